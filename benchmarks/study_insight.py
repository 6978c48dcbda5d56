"""What the runs of the study say of the metrics: rank correlations with test accuracy and memorisation, and early stopping.

Run with `python -P benchmarks/study_insight.py FOLDER`, after `study.py --out FOLDER`; prints Markdown. Each cell is taken by
itself, since cells differ in their accuracies by themselves, and the means over cells are shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from mgs_core.experiments.compare import load_records
from mgs_core.report.dots import correlations
from mgs_core.report.numbers import mean, written_correlation
from mgs_core.report.runs import PLAIN, Comparison, read
from mgs_core.report.stopping import stopping


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    records = {path.parent.name: load_records(path) for path in sorted(folder.glob("*/records.jsonl"))}
    cells = {name: read(found) for name, found in records.items() if any(record["event"] == "run" for record in found)}
    noisy = {name: cell for name, cell in cells.items() if any("memorisation" in run.final for run in cell.runs)}
    print(f"{len(noisy)} cells with wrong labels: {', '.join(noisy)}; {sum(len(cell.runs) for cell in noisy.values())} runs.\n")
    print("| metric at the end of training | ρ with memorisation | ρ with test accuracy |\n|---|---|---|")
    memorised: dict[str, list[float]] = {}
    tested: dict[str, list[float]] = {}
    for cell in noisy.values():
        for each in correlations(cell):
            if each.memorisation is not None and each.test is not None:
                memorised.setdefault(each.metric.name, []).append(each.memorisation)
                tested.setdefault(each.metric.name, []).append(each.test)
    for name in sorted(memorised, key=lambda name: -abs(mean(memorised[name]))):
        print(f"| {name} | {_ranged(memorised[name])} | {_ranged(tested[name])} |")
    print("\n| stop where | points lost, runs without a regulariser | points lost, all runs |\n|---|---|---|")
    lost = [_lost({name: _plain(cell) for name, cell in noisy.items()}), _lost(noisy)]
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
