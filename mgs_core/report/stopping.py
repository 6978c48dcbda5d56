"""Early stopping without validation data: where each metric would have stopped, beside the best epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from mgs_core.report.charts import Table
from mgs_core.report.metrics import DISPARITY, KERNEL_METRICS, TEST
from mgs_core.report.numbers import MISSING, mean, rank_correlation, written_correlation, written_with_error
from mgs_core.report.runs import Comparison, Run

_PATIENCE = 5  # rises of gradient disparity before the training is stopped, as its authors have it
_LEAST = 3  # epochs of a run from which on there is anything to choose


@dataclass(frozen=True)
class Stopping:
    """Say how early stopping by one rule does over all runs.

    Attributes:
        rule: what it goes by, in words.
        accuracies: the test accuracy, one for each run, at the epoch that it chooses.
        losses: what each run loses of accuracy against its best epoch.
        rank: Spearman's ρ of the chosen epochs with the best ones.
    """

    rule: str
    accuracies: tuple[float, ...]
    losses: tuple[float, ...]
    rank: float | None

    @property
    def lost(self) -> float:
        """The mean of the losses."""
        return mean(self.losses)


def stopping(comparison: Comparison) -> list[Stopping]:
    """Return, the least loss first, how stopping by each metric does over all finished runs; the best epoch is the oracle.

    A kernel's metric stops where it is least, or greatest where high means similar; gradient disparity before its fifth rise
    (Forouzesh and Thiran, ECML PKDD 2021). Runs that kept an earlier epoch themselves are left out, for their curves stand still.
    """
    runs = [run for run in comparison.runs if run.finished and len(run.curves.get(TEST.field, {})) >= _LEAST and not _kept(run)]
    rules: list[tuple[str, str, Callable[[Mapping[int, float]], int]]] = [
        (f"{metric.name}, {metric.stop}", metric.field, _least if metric.stop == "least" else _greatest)
        for metric in KERNEL_METRICS
        if metric.stop
    ]
    rules.append((f"{DISPARITY.title}, before its fifth rise", DISPARITY.field, _before_rises))
    rules.append(("Last epoch", TEST.field, max))
    found = [_judge(rule, field, choose, runs) for rule, field, choose in rules]
    return sorted((each for each in found if each is not None), key=lambda each: each.lost)


def stopping_table(found: list[Stopping], comparison: Comparison) -> Table | None:
    """Return the table for the page, with early stopping on noisy validation data last, or None where no metric has a rule."""
    if len(found) < 2:  # the last epoch alone
        return None
    rows = [
        (
            each.rule,
            written_with_error(each.accuracies, share=True),
            written_with_error(each.losses, share=True),
            written_correlation(each.rank),
        )
        for each in found
    ]
    held = [run.final["last_test_accuracy"] for run in comparison.runs if _kept(run) and "last_test_accuracy" in run.final]
    if held:
        rows.append(("Other runs, stopped by noisy validation data", written_with_error(held, share=True), MISSING, MISSING))
    return Table(
        "Early stopping by each metric, over all finished runs that kept their last epoch: mean ± standard error of the runs",
        ("stop where", "test accuracy there, %", "below the best epoch, points", "ρ with the best epoch"),
        tuple(rows),
    )


def _judge(rule: str, field: str, choose: Callable[[Mapping[int, float]], int], runs: list[Run]) -> Stopping | None:
    accuracies, losses, chosen, ideal = [], [], [], []
    for run in runs:
        tests = run.curves[TEST.field]
        curve = {epoch: value for epoch, value in run.curves.get(field, {}).items() if epoch in tests}
        if len(curve) >= _LEAST:
            chosen.append(choose(curve))
            ideal.append(_greatest(tests))
            accuracies.append(tests[chosen[-1]])
            losses.append(tests[ideal[-1]] - accuracies[-1])
    if not accuracies:
        return None
    return Stopping(rule, tuple(accuracies), tuple(losses), rank_correlation(chosen, ideal))


def _least(curve: Mapping[int, float]) -> int:
    return min(curve, key=lambda epoch: (curve[epoch], epoch))


def _greatest(curve: Mapping[int, float]) -> int:
    return min(curve, key=lambda epoch: (-curve[epoch], epoch))


def _before_rises(curve: Mapping[int, float]) -> int:
    epochs, rises = sorted(curve), 0
    for before, epoch in pairwise(epochs):
        rises += curve[epoch] > curve[before]
        if rises == _PATIENCE:
            return before
    return epochs[-1]


def _kept(run: Run) -> bool:
    return "validation_accuracy" in run.curves
