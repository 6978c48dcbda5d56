"""The study at a glance, from `results/study.jsonl` alone: tables in Markdown, and a picture of what each regulariser gains.

Run with `python -P benchmarks/study_show.py [--figure FILE.png]`. A figure is percent of clean test samples classified right
after the last epoch, mean ± standard error over the seeds; the best of a cell is bold. A rank is that of a regulariser's mean
among those of its cell, 1 the best, averaged over the cells of a kind.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy.stats import rankdata

matplotlib.use("agg")
import matplotlib.pyplot as plt

from mgs_core.experiments import RECIPES

RESULTS = Path(__file__).parent / "results" / "study.jsonl"
BEST = "none, best epoch"
Figures = dict[str, dict[str, list[float]]]
Records = list[dict[str, Any]]


def accuracies(records: Records) -> Figures:
    """Return percent of last test accuracy of each run, by cell and regulariser, of those with at least three seeds."""
    found: Figures = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["event"] != "run" or record["regularizer"] not in RECIPES:
            continue
        cell = found[record["cell"]]
        cell[record["regularizer"]].append(100 * record["last_test_accuracy"])
        if record["regularizer"] == "none":
            cell[BEST].append(100 * record["best_test_accuracy"])
    whole = {name: {recipe: runs for recipe, runs in cell.items() if len(runs) >= 3} for name, cell in found.items()}
    return {name: cell for name, cell in whole.items() if "none" in cell}


def cost(records: Records) -> str:
    """Return in a sentence what all runs and trials took; the clock ran while the machine did other work too."""
    hours = {event: sum(r["seconds"] for r in records if r["event"] == event) / 3600 for event in ("run", "tuning")}
    counts = {event: sum(r["event"] == event for r in records) for event in hours}
    return f"{counts['run']} runs took {hours['run']:.1f} hours, {counts['tuning']} trials of strengths {hours['tuning']:.1f}."


def kind(cell: str) -> str:
    """Return where a cell belongs: MNIST with wrong labels, MNIST with clean ones, or held-out data."""
    if not cell.startswith("mnist"):
        return "held out"
    return "MNIST, clean labels" if "clean" in cell or cell.endswith("-0") else "MNIST, wrong labels"


def written(cell: str) -> str:
    """Return the words for a cell."""
    name, _, rest = cell.partition("-")
    clean = {"symmetric-0": "clean-1000", "cnn-symmetric-0": "cnn-clean-500"}
    rest = clean.get(rest, rest).replace("-", " ")
    return f"{name if name != 'mnist' else 'MNIST'} {rest}".replace("cnn", "CNN") + ("" if "clean" in rest else " %")


def table(figures: Figures, cells: list[str]) -> str:
    """Return the table of some cells."""
    lines = ["| regulariser | " + " | ".join(map(written, cells)) + " |", "|---" * (len(cells) + 1) + "|"]
    best = {cell: max(np.mean(values) for recipe, values in figures[cell].items() if recipe != BEST) for cell in cells}
    for recipe in (*RECIPES, BEST):
        row = []
        for cell in cells:
            values = figures[cell].get(recipe)
            if values is None:
                row.append("")
                continue
            text = f"{np.mean(values):.1f} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.1f}"
            row.append(f"**{text}**" if recipe != BEST and np.mean(values) == best[cell] else text)
        if any(row):
            lines.append(f"| {recipe if recipe == BEST else f'`{recipe}`'} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def ranks(figures: Figures) -> str:
    """Return the table of mean ranks, the best regulariser first; those that some cell lacks are left out."""
    recipes = [name for name in RECIPES if all(name in cell for cell in figures.values())]
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    for cell, runs in figures.items():
        found[kind(cell)].append(rankdata([-np.mean(runs[name]) for name in recipes]))
    kinds = sorted(found, reverse=True)
    means = {name: np.mean(found[name], axis=0) for name in kinds}
    total = np.mean(np.concatenate([found[name] for name in kinds]), axis=0)
    heads = [f"{name} ({len(found[name])} cells)" for name in kinds]
    lines = [f"| regulariser | all {len(figures)} cells | " + " | ".join(heads) + " |", "|---" * (len(kinds) + 2) + "|"]
    for at in np.argsort(total):
        figures_of = [f"{values[at]:.1f}" for values in (total, *(means[name] for name in kinds))]
        lines.append(f"| `{recipes[at]}` | " + " | ".join(figures_of) + " |")
    return "\n".join(lines)


def picture(figures: Figures, cells: list[str], path: Path) -> None:
    """Draw what each regulariser gains over training without one, in points, cell by cell."""
    recipes = [name for name in RECIPES if name != "none" and all(name in figures[cell] for cell in cells)]
    gains = np.array([[np.mean(figures[cell][name]) - np.mean(figures[cell]["none"]) for cell in cells] for name in recipes])
    order = np.argsort(-np.mean([rankdata(gains[:, at]) for at in range(len(cells))], axis=0))
    gains, recipes = gains[order], [recipes[at] for at in order]
    figure, axes = plt.subplots(figsize=(1.5 + 0.62 * len(cells), 0.6 + 0.32 * len(recipes)), layout="constrained")
    axes.imshow(np.sign(gains) * np.sqrt(np.abs(gains)), cmap="RdBu", vmin=-6, vmax=6, aspect="auto")
    for row, column in np.ndindex(gains.shape):
        value = gains[row, column]
        best = value == gains[:, column].max()
        shade = "white" if abs(value) > 16 else "#111418"
        axes.text(
            column, row, f"{value:+.1f}".replace("-", "−"), ha="center", va="center", fontsize=8, color=shade,
            fontweight="bold" if best else "normal",
        )  # fmt: skip
    axes.set_yticks(range(len(recipes)), recipes)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith("mgs") else "normal")
    axes.set_xticks(range(len(cells)), [written(cell) for cell in cells], rotation=40, ha="left", rotation_mode="anchor")
    axes.xaxis.tick_top()
    for at in range(1, len(cells)):
        if kind(cells[at]) != kind(cells[at - 1]):
            axes.axvline(at - 0.5, color="white", linewidth=4)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.supxlabel("last test accuracy, in points above training without a regulariser", fontsize=10)
    figure.savefig(path, dpi=160)


def main() -> None:
    """Print the tables, and draw the picture where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    records = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
    figures = accuracies(records)
    kinds = ("MNIST, wrong labels", "MNIST, clean labels", "held out")
    cells = {name: [cell for cell in figures if kind(cell) == name] for name in kinds}
    for name in filter(cells.get, kinds):
        print(f"\n## {name}\n\n{table(figures, cells[name])}")
    most = max(map(len, figures.values()))
    full = {name: cell for name, cell in figures.items() if len(cell) > most / 2}  # ranks among few recipes say little
    print(f"\n## Mean rank\n\n{ranks(full)}")
    print(f"\n## Cost\n\n{cost(records)}")
    if options.figure:
        picture(full, [cell for name in kinds for cell in cells[name] if cell in full], options.figure)


if __name__ == "__main__":
    main()
