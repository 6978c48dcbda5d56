"""What the records say, in sentences: every word is computed from them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mgs_core.report.dots import Correlation
from mgs_core.report.metrics import MEMORISATION, OUTCOMES
from mgs_core.report.numbers import mean, standard_error, written, written_correlation, written_with_error
from mgs_core.report.runs import PLAIN, Comparison

_WELL = 0.5  # least |ρ| at which a metric is said to tell runs apart
_CHANCE = 2.0  # |ρ| · √(cases − 1) that chance alone exceeds once in twenty times


def verdict(comparison: Comparison) -> str:
    """Return one sentence: which regulariser memorises most and which least, or what can be said instead."""
    if all(run.failure for run in comparison.runs):
        return "Every run failed."
    for metric in OUTCOMES:
        values = {name: comparison.finals(name, metric.field) for name in comparison.regularizers}
        values = {name: found for name, found in values.items() if found}
        if not values:
            continue
        most = max(values, key=lambda name: mean(values[name]))
        if PLAIN in values and not _apart(values[most], values[PLAIN]) and metric is MEMORISATION:
            most = PLAIN  # as good as the most, and what the others are measured by
        least = min(values, key=lambda name: mean(values[name]))
        low, high = _percent(values[least]), _percent(values[most])
        wrong = metric is MEMORISATION
        if len(values) == 1:
            verb = "memorises" if wrong else "reaches"
            rest = "of the wrong labels" if wrong else "test accuracy"
            return f"{_begun(most)}, the network {verb} {high} {rest}."
        if not _apart(values[most], values[least]):
            what = "memorise alike" if wrong else "end alike"
            rest = "of the wrong labels" if wrong else "test accuracy"
            between = high if low == high else f"{low} to {high}"
            return f"The regularisers {what}: {between} {rest}, within one standard error."
        if wrong:
            return f"{_begun(most)}, the network memorises {high} of the wrong labels; {spoken(least)}, {low}."
        if any(name != most and not _apart(values[most], values[name]) for name in values):  # there is no highest
            return f"Test accuracy ends between {low} {spoken(least)} and {high} {spoken(most)}."
        return f"{_begun(most)}, test accuracy ends highest, at {high}; {spoken(least)} lowest, at {low}."
    return "The records hold neither test accuracy nor memorisation."


def findings(comparison: Comparison, found: Sequence[Correlation]) -> list[str]:
    """Return the sentences below the headline."""
    return [
        *_accuracy(comparison),
        *_metrics(comparison, found),
        *_single(comparison),
        *_unfinished(comparison),
        *failures(comparison),
    ]


def spoken(name: str) -> str:
    """Return how a regulariser is spoken of."""
    return "without a regulariser" if name == PLAIN else f"with {name}"


def failures(comparison: Comparison) -> list[str]:
    """Return a sentence for each regulariser of which runs failed: how many, and why the first did."""
    sentences = []
    for name in comparison.regularizers:
        failed = comparison.failed(name)
        if failed:
            seeds = f"seed{'s' if len(failed) > 1 else ''} {_listed([run.seed for run in failed])}"
            runs = "1 run" if len(failed) == 1 else f"{len(failed)} runs"
            reason = failed[0].failure.strip().rstrip(".")
            sentences.append(
                f"{runs} {spoken(name)} failed ({seeds}) and {'is' if len(failed) == 1 else 'are'} left out: {reason}."
            )
    return sentences


def _begun(name: str) -> str:
    """Return how a sentence about a regulariser begins; its name stays as it is."""
    text = spoken(name)
    return text[0].upper() + text[1:]


def _accuracy(comparison: Comparison) -> list[str]:
    last = {name: comparison.finals(name, "last_test_accuracy") for name in comparison.regularizers}
    last = {name: values for name, values in last.items() if values}
    sentences = []
    if len(last) == 1 and PLAIN not in last:
        (only,) = last
        sentences.append(f"Test accuracy ends at {_spread(last[only])}{_several(last[only])}.")
    elif len(last) > 1:
        best = max(last, key=lambda name: mean(last[name]))
        rivals = [name for name in last if name != best and not _apart(last[best], last[name])]
        level = f", not clearly above {_listed(rivals)}" if rivals else ""
        sentences.append(f"Test accuracy ends highest {spoken(best)}, at {_spread(last[best])}{_several(last[best])}{level}.")
    if PLAIN in last:
        top = comparison.finals(PLAIN, "best_test_accuracy")
        fall = mean(top) - mean(last[PLAIN]) if top else 0.0
        lost = f", {100 * fall:.1f} points below its own best epoch" if fall >= 0.0005 else ", its best epoch" if top else ""
        what = "it ends" if sentences else "test accuracy ends"
        several = "" if sentences else _several(last[PLAIN])
        sentences.append(f"Without a regulariser {what} at {_spread(last[PLAIN])}{several}{lost}.")
    return sentences


def _metrics(comparison: Comparison, found: Sequence[Correlation]) -> list[str]:
    sentences = []
    ranked = sorted((each for each in found if each.memorisation is not None), key=lambda each: -abs(each.memorisation or 0.0))
    if ranked:
        first, last = ranked[0], ranked[-1]
        runs, rho = f"Over {first.runs[0]} finished runs", f"rank correlation {written_correlation(first.memorisation)}"
        if abs(first.memorisation or 0.0) < _WELL:
            text = f"{runs}, no metric ranks memorisation well; {_name(first)} comes closest: {rho}"
        elif chance := _chance(comparison, first.memorisation):
            text = f"{runs}, {_name(first)} comes closest to the order of memorisation: {rho}{chance}"
        else:
            text = f"{runs}, {_name(first)} tells best which run memorises: {rho}"
            text += f"; {_name(last)} tells least: {written_correlation(last.memorisation)}" if last is not first else ""
        sentences.append(f"{text}.")
    tests = sorted((each for each in found if each.test is not None), key=lambda each: -abs(each.test or 0.0))
    if tests:
        rho = f"{written_correlation(tests[0].test)}{_chance(comparison, tests[0].test)}"
        sentences.append(f"The order of the last test accuracy is met most closely by {_name(tests[0])}: {rho}.")
    return sentences


def _chance(comparison: Comparison, rho: float | None) -> str:
    """Return the words for a rank correlation that chance alone can bring about, else nothing.

    Runs under one regulariser are alike, so that the regularisers are the independent cases; of one, its runs are.
    """
    finished = [number for name in comparison.regularizers if (number := comparison.counted(name)[0])]
    cases, what = (len(finished), "regularisers") if len(finished) > 1 else (sum(finished), "runs")
    if abs(rho or 0.0) * math.sqrt(cases - 1) >= _CHANCE - 1e-9:
        return ""
    return f", as chance alone can bring about with {cases} {what}"


def _single(comparison: Comparison) -> list[str]:
    single = [name for name in comparison.regularizers if len(comparison.runs_of(name)) == 1]
    if not single or len(comparison.regularizers) == 1:
        return []
    if len(single) == len(comparison.regularizers):
        return ["Each regulariser was run from one seed only: differences may be chance."]
    return [f"Of one run only, without an error: {_listed(single)}."]


def _unfinished(comparison: Comparison) -> list[str]:
    counts = {name: comparison.counted(name) for name in comparison.regularizers}
    missing = {name: total - finished - len(comparison.failed(name)) for name, (finished, total) in counts.items()}
    missing = {name: number for name, number in missing.items() if number}
    if not missing:
        return []
    number = sum(missing.values())
    runs = "1 run is" if number == 1 else f"{number} runs are"
    wholly = [name for name in missing if not counts[name][0]]
    rest = f" {_listed(wholly)}: no run is finished, the figures are those of the last epoch so far." if wholly else ""
    return [f"{runs} not finished ({_listed(list(missing))}).{rest}"]


def _apart(first: Sequence[float], second: Sequence[float]) -> bool:
    """Say whether two means differ by more than the standard error of their difference."""
    error = math.hypot(*(standard_error(values) or 0.0 for values in (first, second)))
    return abs(mean(first) - mean(second)) > error


def _several(values: Sequence[float]) -> str:
    return " (mean ± standard error over seeds)" if len(values) > 1 else ""


def _percent(values: Sequence[float]) -> str:
    return f"{written(mean(values), share=True)}\u00a0%"


def _spread(values: Sequence[float]) -> str:
    return f"{written_with_error(values, share=True)} %".replace(" ", "\u00a0")  # no line ends within a figure


def _name(each: Correlation) -> str:
    name = each.metric.name
    return f"the {name[0].lower()}{name[1:]}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
