"""Drawings of single figures: the end of training at a glance, runs against runs, and rank correlations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mgs_core.report.axes import axis, spread
from mgs_core.report.charts import BOTTOM, LEFT, ROW, TOP, WIDTH, Table, chart_height, names_width, shortened
from mgs_core.report.looks import Look
from mgs_core.report.metrics import KERNEL_METRICS, MEMORISATION, OUTCOMES, TEST, Metric
from mgs_core.report.numbers import mean, rank_correlation, written, written_correlation
from mgs_core.report.runs import Comparison

NAMES = 162.0  # width of a column of names left of a drawing, at least


@dataclass(frozen=True)
class Dot:
    """Place one mark; `text` is shown when the pointer rests on it."""

    look: Look
    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Row:
    """Hold one row of a drawing: its name, its two means and the single runs."""

    name: str
    look: Look | None
    y: float
    memorisation: float | None
    test: float | None
    runs: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Rows:
    """Hold a drawing made of rows."""

    identity: str
    title: str
    reading: str
    height: float
    box: tuple[float, float, float, float]
    x_ticks: list[tuple[float, str]]
    zero: float
    rows: list[Row]
    numbers: Table
    summary: str


@dataclass(frozen=True)
class Scatter:
    """Hold a drawing of one dot for each run."""

    identity: str
    title: str
    reading: str
    height: float
    box: tuple[float, float, float, float]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    x_title: str
    y_title: str
    dots: list[Dot]
    labels: list[tuple[Look, str, float]]
    numbers: Table
    summary: str


@dataclass(frozen=True)
class Correlation:
    """Hold Spearman's ρ of a metric with memorisation and with test accuracy, and over how many runs."""

    metric: Metric
    memorisation: float | None
    test: float | None
    runs: tuple[int, int]


def glance(comparison: Comparison, order: Sequence[str], looks: dict[str, Look]) -> Rows | None:
    """Return memorisation and test accuracy at the end, one row for each regulariser, or None where there is neither."""
    finals = {name: [comparison.finals(name, metric.field) for metric in OUTCOMES] for name in order}
    finals = {name: values for name, values in finals.items() if any(values)}
    if not finals:
        return None
    height = TOP + 26 * len(finals) + BOTTOM
    box = (max(NAMES, names_width(finals)), TOP, WIDTH - 14, height - BOTTOM)
    across = axis([0.0, 1.0], box[0], box[2], share=True)
    rows = []
    for number, (name, values) in enumerate(finals.items()):
        places = [across.place(mean(part)) if part else None for part in values]
        runs = tuple((kind, across.place(value)) for kind, part in zip(("wrong", "right"), values, strict=True) for value in part)
        rows.append(
            Row(
                name=shortened(name),
                look=looks[name],
                y=TOP + 26 * (number + 0.5),
                memorisation=places[0],
                test=places[1],
                runs=runs if len(runs) > 2 else (),
            )
        )
    header = ("regulariser", *(f"{metric.title}, %" for metric in OUTCOMES))
    cells = tuple(
        (name, *(written(mean(part) if part else None, share=True) for part in values)) for name, values in finals.items()
    )
    return Rows(
        identity="glance",
        title="At the end of training",
        reading="Filled circle: further right is better. Open diamond: further left is better. Small dots: the single runs.",
        height=height,
        box=box,
        x_ticks=across.ticks(4),
        zero=across.place(0.0),
        rows=rows,
        numbers=Table("Means over the runs at the end of training", header, cells),
        summary="; ".join(f"{name}: memorised {wrong} %, test {right} %" for name, wrong, right in cells),
    )


def correlations(comparison: Comparison) -> list[Correlation]:
    """Return the rank correlation of each metric of the kernel with each outcome, over all finished runs."""
    found = []
    for metric in KERNEL_METRICS:
        pairs = {outcome.field: _pairs(comparison, metric, outcome) for outcome in OUTCOMES}
        values = [rank_correlation([a for a, _ in pairs[o.field]], [b for _, b in pairs[o.field]]) for o in OUTCOMES]
        if any(value is not None for value in values):
            found.append(Correlation(metric, values[0], values[1], (len(pairs[MEMORISATION.field]), len(pairs[TEST.field]))))
    return found


def correlation_rows(found: Sequence[Correlation]) -> Rows | None:
    """Return the drawing of the correlations, or None where there is none."""
    if not found:
        return None
    height = TOP + 26 * len(found) + BOTTOM
    box = (NAMES + 16, TOP, WIDTH - 14, height - BOTTOM)
    across = axis([-1.0, 1.0], box[0], box[2])
    rows = [
        Row(
            name=each.metric.name,
            look=None,
            y=TOP + 26 * (number + 0.5),
            memorisation=None if each.memorisation is None else across.place(each.memorisation),
            test=None if each.test is None else across.place(each.test),
            runs=(),
        )
        for number, each in enumerate(found)
    ]
    cells = tuple(
        (
            each.metric.name,
            written_correlation(each.memorisation),
            str(each.runs[0]),
            written_correlation(each.test),
            str(each.runs[1]),
        )
        for each in found
    )
    header = ("metric", "ρ, memorised", "runs", "ρ, test accuracy", "runs")
    return Rows(
        identity="correlations",
        title="How well each metric ranks the runs",
        reading="Spearman's rank correlation ρ over the finished runs: ±1 is the same order or its reverse, 0 none. "
        "Runs under one regulariser are alike: there are fewer independent cases than runs.",
        height=height,
        box=box,
        x_ticks=across.ticks(4),
        zero=across.place(0.0),
        rows=rows,
        numbers=Table("Rank correlation ρ over the finished runs", header, cells),
        summary="; ".join(f"{name}: with memorisation {wrong}, with test accuracy {right}" for name, wrong, _, right, _ in cells),
    )


def scatter(comparison: Comparison, metric: Metric, outcome: Metric, looks: dict[str, Look]) -> Scatter | None:
    """Return the drawing of an outcome against a metric, one dot for each finished run, or None for fewer than two dots."""
    runs = [run for run in comparison.runs if run.finished and metric.field in run.final and outcome.field in run.final]
    runs = [run for run in runs if not metric.logarithmic or run.final[metric.field] > 0]
    if len(runs) < 2:
        return None
    names = [name for name in comparison.regularizers if any(run.regularizer == name for run in runs)]
    height = chart_height(len(names)) + 8
    box = (LEFT, TOP, WIDTH - names_width(names) - 10, height - BOTTOM - 8)
    across = axis((run.final[metric.field] for run in runs), box[0], box[2], logarithmic=metric.logarithmic, share=metric.share)
    up = axis((run.final[outcome.field] for run in runs), box[3], box[1], share=True, from_zero=outcome.from_zero)
    dots = []
    for run in sorted(runs, key=lambda run: ("other", "mgs", "plain").index(looks[run.regularizer].group)):
        x, y = run.final[metric.field], run.final[outcome.field]
        text = f"{run.regularizer}, seed {run.seed}: {metric.name} {written(x, share=metric.share)}, {written(y, share=True)} %"
        dots.append(Dot(looks[run.regularizer], across.place(x), up.place(y), text))
    heights = {name: mean([dot.y for dot in dots if dot.look.name == name]) for name in names}
    places = spread(list(heights.values()), ROW, box[1] + 3, box[3] - 2)
    labels = [(looks[name], shortened(name), place) for name, place in zip(heights, places, strict=True)]
    rho = rank_correlation([run.final[metric.field] for run in runs], [run.final[outcome.field] for run in runs])
    cells = tuple(
        (
            run.regularizer,
            run.seed,
            written(run.final[metric.field], share=metric.share),
            written(run.final[outcome.field], share=True),
        )
        for run in runs
    )
    percent = ", %" if metric.share else ""
    header = ("regulariser", "seed", f"{metric.name}{percent}", f"{outcome.title.lower()}, %")
    correlated = "" if rho is None else f"; rank correlation ρ = {written_correlation(rho)}"
    return Scatter(
        identity=f"{metric.field}-{outcome.field}".replace("_", "-"),
        title=f"{outcome.title} against {metric.name.lower()}",
        reading=f"One mark for each of {len(runs)} finished runs{correlated}.",
        height=height,
        box=box,
        x_ticks=across.ticks(4),
        y_ticks=up.ticks(5),
        x_title=metric.name.lower(),
        y_title=outcome.title.lower(),
        dots=dots,
        labels=labels,
        numbers=Table(f"The runs: {metric.name.lower()} and {outcome.title.lower()}", header, cells),
        summary=f"Rank correlation {written_correlation(rho)} over {len(runs)} runs",
    )


def _pairs(comparison: Comparison, metric: Metric, outcome: Metric) -> list[tuple[float, float]]:
    finals = [run.final for run in comparison.runs if run.finished]
    return [(final[metric.field], final[outcome.field]) for final in finals if metric.field in final and outcome.field in final]
