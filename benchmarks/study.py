"""The study: every regulariser, its strength tuned on noisy validation data alone, over noise, few samples and data sets.

Run with `python -P benchmarks/study.py --mnist PATH.npz --out FOLDER`; stop it at any time, the same command goes on. Each cell
is a comparison in a folder of its own, which `mgs report` shows. `--collect FILE` copies the line of every run and trial. The
regularisers were developed on MNIST and digits; `--held FOLDER` has the data sets to judge them by, which `study_data.py` writes.

Protocol, the same for every regulariser: 4 strengths are tried, each by one training on four fifths of the noisy training samples
and scored on the rest of them after the last epoch; the best trains from 3 other seeds, each of which draws wrong labels, weights
and order anew, and the samples where not all are taken. Test samples are clean, and looked at only to report. Regularisers
without a strength are not tuned.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mgs_core.experiments import RECIPES, Settings, compare
from mgs_core.experiments.compare import load_records


def _cells() -> dict[str, dict[str, Any]]:
    """Return the settings of each cell by its name, which begins with that of its data."""
    mnist, cells = {"samples": 1000, "epochs": 25}, {}
    for rate in (60, 40, 80, 20, 0):
        cells[f"mnist-symmetric-{rate}"] = {**mnist, "noise": rate / 100}
    cells["mnist-pair-45"] = {**mnist, "noise": 0.45, "noise_kind": "pair"}
    for samples, epochs, batch in ((300, 40, 32), (100, 60, 16), (500, 30, 32), (3000, 15, 64), (5000, 15, 64)):
        cells[f"mnist-clean-{samples}"] = {"noise": 0.0, "samples": samples, "epochs": epochs, "batch_size": batch}
    cnn = {"model": "cnn", "backend": "torch", "samples": 500, "epochs": 20}
    for rate in (60, 40, 80, 20, 0):
        cells[f"mnist-cnn-symmetric-{rate}"] = {**cnn, "noise": rate / 100}
    cells["mnist-cnn-pair-45"] = {**cnn, "noise": 0.45, "noise_kind": "pair"}
    cells["segment-symmetric-60"] = {"samples": 600, "epochs": 30, "noise": 0.6}
    cells["leaf-symmetric-40"] = {"epochs": 30, "noise": 0.4}
    cells["segment-pair-40"] = {"samples": 600, "epochs": 30, "noise": 0.4, "noise_kind": "pair"}
    cells["tissue-symmetric-40"] = {"epochs": 40, "batch_size": 32, "noise": 0.4}
    cells["cells-symmetric-40"] = {"samples": 600, "epochs": 30, "noise": 0.4}
    cells["segment-clean-100"] = {"samples": 100, "epochs": 60, "batch_size": 16, "noise": 0.0}
    cells["leaf-clean-320"] = {"samples": 320, "epochs": 40, "batch_size": 32, "noise": 0.0}
    return cells


CELLS = _cells()


def settings_of(cell: str, mnist: str, held: Path) -> Settings:
    """Return the settings of a cell."""
    name = cell.partition("-")[0]
    data = mnist if name == "mnist" else str(held / f"{name}.npz")
    return Settings(**{"data": data, "seeds": 3, "tuning": 4, "probe_samples": 64, **CELLS[cell]})


def summary(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Return, for each regulariser of a cell, its runs' figures."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in load_records(folder / "records.jsonl"):
        if record["event"] == "run":
            own = found.setdefault(record["regularizer"], {"last": [], "best": [], "seconds": []})
            own["last"].append(100 * record["last_test_accuracy"])
            own["best"].append(100 * record["best_test_accuracy"])
            own["seconds"].append(record["seconds"])
    return found


def show(out: Path, cells: list[str]) -> None:
    """Print the table: last-epoch test accuracy, mean ± standard error, of each regulariser in each cell."""
    tables = {name: summary(out / name) for name in cells if (out / name / "records.jsonl").exists()}
    shown = Table("regulariser", *tables, title="last test accuracy, %, mean ± s.e.")

    def written(values: list[float]) -> str:
        error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
        return f"{np.mean(values):.1f}±{error:.1f}"

    for recipe in RECIPES:
        cells_of = [tables[name].get(recipe) for name in tables]
        shown.add_row(recipe, *(written(found["last"]) if found else "" for found in cells_of))
    shown.add_row("none, best epoch", *(written(table["none"]["best"]) if "none" in table else "" for table in tables.values()))
    Console(width=30 + 16 * max(1, len(tables))).print(shown)


def main() -> None:
    """Run the cells that are asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", required=True, help="MNIST as an .npz file with x_train, y_train, x_test, y_test; or mnist")
    parser.add_argument("--held", type=Path, default=Path("mgs-study-data"), help="folder that study_data.py wrote")
    parser.add_argument("--out", type=Path, default=Path("mgs-study"))
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print the table only")
    parser.add_argument("--collect", type=Path, help="write the line of every run and trial of all cells to this file")
    options = parser.parse_args()
    cells = options.cells.split(",")
    recipes = [RECIPES[name] for name in options.recipes.split(",")]
    for name in [] if options.show else cells:
        begun = time.perf_counter()
        compare(settings_of(name, options.mnist, options.held), recipes, options.out / name, jobs=options.jobs)
        print(f"{name}: {time.perf_counter() - begun:.0f} s", flush=True)
    show(options.out, cells)
    if options.collect:
        found = [{"cell": name, **record} for name in cells for record in load_records(options.out / name / "records.jsonl")]
        lines = [json.dumps(record) for record in found if record["event"] != "epoch"]
        options.collect.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
