"""The records of a comparison, put in order: runs, their curves and their last figures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mgs_core._errors import ArgumentError
from mgs_core.report.numbers import finite, mean

PLAIN = "none"
UNNAMED = "unnamed"


@dataclass
class Run:
    """Hold one training run.

    Attributes:
        regularizer: its name.
        seed: its seed, as text.
        finished: a record of the whole run was found.
        failure: why it failed; empty where it did not.
        curves: for each field its number at each epoch; what is missing or not finite is left out.
        final: the last figures: those of the record of the run, else those of the last epoch.
    """

    regularizer: str
    seed: str
    finished: bool = False
    failure: str = ""
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)

    @property
    def epochs(self) -> list[int]:
        """The epochs of which there is any number."""
        return sorted({epoch for curve in self.curves.values() for epoch in curve})


@dataclass(frozen=True)
class Point:
    """Hold the mean, lowest and highest number of the runs at one epoch."""

    epoch: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Hold all runs, and the names of the regularisers: the plain run first, then those of this library, then the others."""

    runs: tuple[Run, ...]
    regularizers: tuple[str, ...]

    def runs_of(self, regularizer: str) -> list[Run]:
        """Return the runs that give a regulariser's figures: the finished ones, or where there is none those that go on."""
        own = [run for run in self.runs if run.regularizer == regularizer and not run.failure]
        return [run for run in own if run.finished] or own

    def counted(self, regularizer: str) -> tuple[int, int]:
        """Return how many runs are finished, and how many there are."""
        own = [run for run in self.runs if run.regularizer == regularizer]
        return sum(run.finished for run in own), len(own)

    def failed(self, regularizer: str) -> list[Run]:
        """Return the runs that failed."""
        return [run for run in self.runs if run.regularizer == regularizer and run.failure]

    def finals(self, regularizer: str, name: str) -> list[float]:
        """Return the last figures of that name, one for each run that has it."""
        return [run.final[name] for run in self.runs_of(regularizer) if name in run.final]

    def curve(self, regularizer: str, name: str) -> list[Point]:
        """Return the figure of that name over the epochs, over the runs that have it there."""
        curves = [run.curves.get(name, {}) for run in self.runs_of(regularizer)]
        points = []
        for epoch in sorted(set().union(*curves)):
            values = [curve[epoch] for curve in curves if epoch in curve]
            points.append(Point(epoch, mean(values), min(values), max(values)))
        return points


def group(regularizer: str) -> str:
    """Return "plain" for the run without regulariser, "mgs" for those of this library, "other" for the rest."""
    if regularizer == PLAIN:
        return "plain"
    return "mgs" if re.search(r"(?<![a-z])mgs(?![a-z])", regularizer.lower()) else "other"


def read(records: Sequence[Mapping[str, Any]]) -> Comparison:
    """Put records in order.

    Args:
        records: the dicts of `records.jsonl`; any field may be missing or None, other events are passed over.

    Returns:
        The comparison.

    Raises:
        ArgumentError: when there is no record of an epoch or a run.
    """
    if isinstance(records, (str, bytes, Mapping)) or not isinstance(records, Sequence):
        raise ArgumentError(f"`records` must be a list of dicts; got {type(records).__name__}. Read them with load_records.")
    runs: dict[tuple[str, str], Run] = {}
    closing: dict[tuple[str, str], dict[str, float]] = {}
    for record in records:
        if not isinstance(record, Mapping):
            raise ArgumentError(f"`records` must be a list of dicts; got one of type {type(record).__name__}. Drop it.")
        event = record.get("event")
        if event not in ("epoch", "run") and not (event == "failed" and record.get("of") == "run"):
            continue
        key = (_name(record.get("regularizer"), UNNAMED), _name(record.get("seed"), "0"))
        run = runs.setdefault(key, Run(*key))
        numbers = {name: number for name, value in record.items() if (number := finite(value)) is not None}
        if event == "failed":
            run.failure = "" if run.finished else _name(record.get("error"), "unknown error")
        elif event == "run":
            run.finished, run.failure = True, ""  # a run that failed and was tried again
            closing[key] = numbers
        else:
            epoch = int(numbers.get("epoch", max(run.epochs, default=0) + 1))
            for name in numbers.keys() - {"epoch", "seed", "seconds"}:
                run.curves.setdefault(name, {})[epoch] = numbers[name]
    if not runs:
        raise ArgumentError("`records` must hold at least one record of an epoch or a run; got none. Run mgs compare first.")
    for key, run in runs.items():
        run.final = _final(run, closing.get(key, {}))
    names = sorted(
        {run.regularizer for run in runs.values()}, key=lambda name: (("plain", "mgs", "other").index(group(name)), name)
    )
    ordered = sorted(runs.values(), key=lambda run: (names.index(run.regularizer), finite(_number(run.seed)) or 0.0, run.seed))
    return Comparison(tuple(ordered), tuple(names))


def _final(run: Run, closing: Mapping[str, float]) -> dict[str, float]:
    """Return the record of the run, filled up from the epoch whose weights it kept (the last where it does not say)."""
    epochs = run.epochs
    kept = int(closing["epochs"]) if "epochs" in closing else max(epochs, default=0)
    final = {name: curve[kept] for name, curve in run.curves.items() if kept in curve}
    tests = run.curves.get("test_accuracy", {})
    if "test_accuracy" in final:
        final["last_test_accuracy"] = final["test_accuracy"]
    if tests:
        final["best_test_accuracy"] = max(tests.values())
    final |= {name: value for name, value in closing.items() if name != "seed"}
    if "last_test_accuracy" in final:
        final["test_accuracy"] = final["last_test_accuracy"]
    return final


def _name(value: object, default: str) -> str:
    return default if value is None or str(value).strip() == "" else str(value)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
