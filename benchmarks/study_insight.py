"""What the runs of the study say of the metrics: rank correlations with test accuracy and memorisation, and early stopping.

Run with `python -P benchmarks/study_insight.py`; prints Markdown, from what `results/study-insight.jsonl` keeps of some cells,
and for the metrics that the line of a run has, from `results/study.jsonl`, of all cells with wrong labels, and of those with the
convolutional network. With `--folder FOLDER` it reads what `study.py --out FOLDER` wrote in place of the former, and
`--collect FILE` then keeps of the cells with wrong labels what these tables need. Each cell is taken by itself, since cells
differ in their accuracies by themselves, and the means over cells are shown.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mgs_core.experiments.compare import load_records
from mgs_core.report.dots import correlations
from mgs_core.report.metrics import DISPARITY, KERNEL_METRICS, MEMORISATION, TEST
from mgs_core.report.numbers import mean, written_correlation
from mgs_core.report.runs import PLAIN, Comparison, read
from mgs_core.report.stopping import stopping

RESULTS = Path(__file__).parent / "results"
KEPT, RUNS = RESULTS / "study-insight.jsonl", RESULTS / "study.jsonl"
WHOLE = (TEST.field, DISPARITY.field)  # of the others the ends and extremes are kept, with one more: three are the least
THINNED = (MEMORISATION.field, "validation_accuracy", *(metric.field for metric in KERNEL_METRICS if metric is not DISPARITY))
Records = list[dict[str, Any]]


def from_folder(folder: Path) -> dict[str, Records]:
    """Return the records of each cell that has finished runs."""
    records = {path.parent.name: load_records(path) for path in sorted(folder.glob("*/records.jsonl"))}
    return {name: found for name, found in records.items() if any(record["event"] == "run" for record in found)}


def from_file(path: Path) -> dict[str, Records]:
    """Return the records of each cell as `collect` kept them, one line for each run."""
    cells: dict[str, Records] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        named = {"regularizer": run["regularizer"], "seed": run["seed"]}
        epochs: dict[int, dict[str, float]] = defaultdict(dict)
        for name, curve in run["curves"].items():
            for epoch, value in enumerate(curve, start=1) if isinstance(curve, list) else curve.items():
                epochs[int(epoch)][name] = value
        found = cells.setdefault(run["cell"], [])
        found += [{"event": "epoch", **named, "epoch": epoch, **values} for epoch, values in epochs.items()]
        found.append({"event": "run", **named, "epochs": max(epochs)})
    return cells


def from_runs(path: Path) -> dict[str, Records]:
    """Return the records of each cell as the lines of its runs have them: an epoch, the last, and the run."""
    cells: dict[str, Records] = {}
    for run in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if run["event"] == "run":
            last = {"event": "epoch", "epoch": run["epochs"], "test_accuracy": run["last_test_accuracy"]}
            cells.setdefault(run["cell"], []).extend(({**run, **last}, run))
    return cells


def noisy(records: Mapping[str, Records]) -> dict[str, Comparison]:
    """Return the cells with wrong labels."""
    cells = {name: read(found) for name, found in records.items()}
    return {name: cell for name, cell in cells.items() if any("memorisation" in run.final for run in cell.runs)}


def correlated(cells: Mapping[str, Comparison]) -> None:
    """Print the rank correlations of the metrics that the runs have."""
    print(f"{len(cells)} cells with wrong labels: {', '.join(cells)}; {sum(len(cell.runs) for cell in cells.values())} runs.\n")
    print("| metric at the end of training | ρ with memorisation | ρ with test accuracy |\n|---|---|---|")
    memorised: dict[str, list[float]] = {}
    tested: dict[str, list[float]] = {}
    for cell in cells.values():
        for each in correlations(cell):
            if each.memorisation is not None and each.test is not None:
                memorised.setdefault(each.metric.name, []).append(each.memorisation)
                tested.setdefault(each.metric.name, []).append(each.test)
    for name in sorted(memorised, key=lambda name: -abs(mean(memorised[name]))):
        print(f"| {name} | {_ranged(memorised[name])} | {_ranged(tested[name])} |")
    print()


def collect(cells: Iterable[tuple[str, Comparison]], path: Path) -> None:
    """Write a line for each finished run: whole curves as lists over all epochs, the others as objects by epoch."""
    lines = []
    for cell, comparison in cells:
        for run in (run for run in comparison.runs if run.finished):
            curves: dict[str, Any] = {name: [_rounded(run.curves[name][epoch]) for epoch in run.epochs] for name in WHOLE}
            for name in (name for name in THINNED if name in run.curves):
                curve = run.curves[name]
                asked = {*sorted(curve)[:2], max(curve), min(curve, key=curve.__getitem__), max(curve, key=curve.__getitem__)}
                curves[name] = {epoch: _rounded(curve[epoch]) for epoch in sorted(asked)}
            line = {"cell": cell, "regularizer": run.regularizer, "seed": int(run.seed), "curves": curves}
            lines.append(json.dumps(line, separators=(",", ":")))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _rounded(value: float) -> float:
    return float(f"{value:.9g}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of study.py; results/study-insight.jsonl by default")
    parser.add_argument("--collect", type=Path, help="keep what the tables need in this file")
    options = parser.parse_args()
    whole = noisy(from_folder(options.folder) if options.folder else from_file(KEPT))
    if options.collect:
        collect(whole.items(), options.collect)
    ends = noisy(from_runs(RUNS))
    for cells in (whole, ends, {name: cell for name, cell in ends.items() if "cnn" in name}):
        correlated(cells)
    print("| stop where | points lost, runs without a regulariser | points lost, all runs |\n|---|---|---|")
    lost = [_lost({name: _plain(cell) for name, cell in whole.items()}), _lost(whole)]
    for rule in sorted(lost[0], key=lambda rule: mean(lost[0][rule])):
        print(f"| {rule} | {100 * mean(lost[0][rule]):.1f} | {100 * mean(lost[1][rule]):.1f} |")


def _plain(cell: Comparison) -> Comparison:
    return Comparison(tuple(run for run in cell.runs if run.regularizer == PLAIN), (PLAIN,))


def _lost(cells: Mapping[str, Comparison]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for cell in cells.values():
        for each in stopping(cell):
            found.setdefault(each.rule, []).append(each.lost)
    return found


def _ranged(values: Sequence[float]) -> str:
    low, high = (written_correlation(value) for value in (min(values), max(values)))
    return f"{written_correlation(mean(values))} ({low} to {high})"


if __name__ == "__main__":
    main()
