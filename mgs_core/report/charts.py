"""The curves over the epochs: what a template needs to draw them, and the same numbers as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mgs_core.report.axes import Axis, axis, spread
from mgs_core.report.looks import Look
from mgs_core.report.metrics import Metric
from mgs_core.report.numbers import MISSING, mean, written
from mgs_core.report.runs import Comparison, Point, Run

WIDTH, TOP, LEFT, BOTTOM, ROW = 440.0, 12.0, 52.0, 36.0, 16.0
MOST_EPOCHS = 100
_SETTLING = 5  # epochs, of which fewer have no first tenth to leave out


@dataclass(frozen=True)
class Label:
    """Place a name at the right edge, and the line that leads to it."""

    look: Look
    text: str
    y: float
    leader: str


@dataclass(frozen=True)
class Line:
    """Draw one regulariser: its mean, band, last point, the point whose weights were kept if earlier, and unfinished runs."""

    look: Look
    path: str
    band: str
    end: tuple[float, float]
    kept: tuple[float, float] | None
    unfinished: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Hold the numbers of a chart as texts."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Chart:
    """Hold all that the template draws."""

    identity: str
    title: str
    reading: str
    height: float
    box: tuple[float, float, float, float]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    x_title: str
    lines: list[Line]
    labels: list[Label]
    numbers: Table
    summary: str
    epochs: tuple[int, int]
    notes: tuple[str, ...]


def chart_height(names: int) -> float:
    """Return a height at which so many labels fit beside the curves."""
    return max(290.0, TOP + BOTTOM + ROW * names + 4)


def names_width(names: Iterable[str]) -> float:
    """Return the room beside a chart for its names."""
    return max(70.0, 18 + 8.6 * max(len(shortened(name)) for name in names))


def extremes(metric: Metric, curves: Mapping[str, list[Point]]) -> list[float]:
    """Return the numbers that the axis of a metric must hold."""
    points = [point for curve in curves.values() for point in curve]
    first, last = min(point.epoch for point in points), max(point.epoch for point in points)
    start = first + 0.1 * (last - first) if metric.settled and last - first >= _SETTLING else first
    return [value for point in points if point.epoch >= start for value in (point.low, point.high)]


def thinned(epochs: list[int], most: int = MOST_EPOCHS) -> list[int]:
    """Return at most so many of the epochs, evenly, the first and the last among them."""
    n = len(epochs)
    if n <= most:
        return epochs
    return [epochs[round(at * (n - 1) / (most - 1))] for at in range(most)]


def curve_chart(comparison: Comparison, metric: Metric, looks: dict[str, Look]) -> Chart | None:
    """Return the chart of a metric over the epochs, or None where no record has it."""
    curves = {name: comparison.curve(name, metric.field) for name in comparison.regularizers}
    curves = {name: [point for point in curve if not metric.logarithmic or point.low > 0] for name, curve in curves.items()}
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return None
    every = sorted({point.epoch for curve in curves.values() for point in curve})
    epochs = thinned(every)
    kept = set(epochs) | {curve[-1].epoch for curve in curves.values()}  # each line is drawn to its end
    curves = {name: [point for point in curve if point.epoch in kept] for name, curve in curves.items()}
    epochs = sorted(kept)
    partial = {name: _unfinished(comparison, name, metric, kept) for name in curves}
    height = chart_height(len(curves))
    box = (LEFT, TOP, WIDTH - names_width(curves), height - BOTTOM)
    across = _epoch_axis(epochs[0], epochs[-1], box)
    held = extremes(metric, curves)
    if not metric.settled:
        held += [point.mean for runs in partial.values() for run in runs for point in run]
    up = axis(held, box[3], box[1], logarithmic=metric.logarithmic, share=metric.share, from_zero=metric.from_zero)
    lines = [
        Line(
            look=looks[name],
            path=path([(across.place(point.epoch), up.place(point.mean)) for point in curve]),
            band=_band(curve, across, up),
            end=(across.place(curve[-1].epoch), up.place(curve[-1].mean)),
            kept=_kept(comparison, name, curve, across, up),
            unfinished=tuple(path([(across.place(point.epoch), up.place(point.mean)) for point in run]) for run in partial[name]),
        )
        for name, curve in curves.items()
    ]
    several = any(len(comparison.runs_of(name)) > 1 for name in curves)
    notes = [f"{len(epochs)} of {len(every)} epochs are drawn and listed."] if len(epochs) < len(every) else []
    if any(point.low < up.low for curve in curves.values() for point in curve):
        notes.append("The axis leaves out the lowest values of the first epochs; the numbers hold them.")
    if any(partial.values()):
        notes.append("Thin broken lines without a name: runs that are not finished, or failed.")
    return Chart(
        identity=metric.field.replace("_", "-"),
        title=metric.title,
        reading=metric.reading,
        height=height,
        box=box,
        x_ticks=[(x, text) for x, text in across.ticks(3) if text.isdecimal()],
        y_ticks=up.ticks(5),
        x_title="epoch",
        lines=sorted(lines, key=lambda line: ("other", "mgs", "plain").index(line.look.group)),  # the strong ones on top
        labels=end_labels(comparison, lines, box),
        numbers=_numbers(metric, curves, epochs, several),
        summary=_summary(metric, curves),
        epochs=(epochs[0], epochs[-1]),
        notes=tuple(notes),
    )


def path(places: list[tuple[float, float]]) -> str:
    """Return an SVG path through the places; one place alone is a dot that a round line cap shows."""
    if len(places) == 1:
        places = [*places, places[0]]
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in places)


def shortened(name: str, most: int = 20) -> str:
    """Return the name, cut where it would not fit beside a chart."""
    return name if len(name) <= most else name[: most - 1] + "…"


def end_labels(comparison: Comparison, lines: list[Line], box: tuple[float, float, float, float]) -> list[Label]:
    """Return the names beside the ends of the lines, moved apart."""
    places = spread([line.end[1] for line in lines], ROW, box[1] + 3, box[3] - 2)
    labels = []
    for line, y in zip(lines, places, strict=True):
        x, height = line.end
        bend = max(x + 4, box[2])
        leader = f"M{x + 5:g},{height:g}L{bend:g},{height:g}L{box[2] + 11:g},{y:g}"
        open_runs = not comparison.counted(line.look.name)[0]
        text = shortened(line.look.name, 18) + " …" if open_runs else shortened(line.look.name)
        labels.append(Label(line.look, text, y, leader))
    return labels


def _epoch_axis(first: int, last: int, box: tuple[float, float, float, float]) -> Axis:
    if first == last:
        return Axis(first - 1.0, last + 1.0, box[0], box[2])
    return Axis(float(first), float(last), box[0], box[2])


def _unfinished(comparison: Comparison, name: str, metric: Metric, kept: set[int]) -> list[list[Point]]:
    """Return the curves of unfinished runs beside finished ones."""
    taken = comparison.runs_of(name)
    left: list[Run] = [run for run in comparison.runs if run.regularizer == name and run not in taken]
    curves = [sorted(run.curves.get(metric.field, {}).items()) for run in left]
    points = [[Point(epoch, value, value, value) for epoch, value in curve if epoch in kept] for curve in curves]
    return [[point for point in run if not metric.logarithmic or point.mean > 0] for run in points if run]


def _kept(comparison: Comparison, name: str, curve: list[Point], across: Axis, up: Axis) -> tuple[float, float] | None:
    """Return the point nearest to the mean epoch whose weights the finished runs kept, or None where that is the last."""
    epochs = comparison.finals(name, "epochs")
    if not epochs or mean(epochs) >= curve[-1].epoch - 0.5:
        return None
    nearest = min(curve, key=lambda point: abs(point.epoch - mean(epochs)))
    return across.place(nearest.epoch), up.place(nearest.mean)


def _band(curve: list[Point], across: Axis, up: Axis) -> str:
    if all(point.low == point.high for point in curve):
        return ""
    upper = [(across.place(point.epoch), up.place(point.high)) for point in curve]
    lower = [(across.place(point.epoch), up.place(point.low)) for point in reversed(curve)]
    return path(upper + lower) + "Z"


def _numbers(metric: Metric, curves: dict[str, list[Point]], epochs: list[int], several: bool) -> Table:
    at = {name: {point.epoch: point for point in curve} for name, curve in curves.items()}
    rows = [(str(epoch), *(_cell(at[name].get(epoch), metric.share) for name in curves)) for epoch in epochs]
    unit = ", in percent" if metric.share else ""
    what = ": mean of the runs, with the lowest and the highest in brackets" if several else ""
    return Table(f"{metric.title.removeprefix('… ').capitalize()}{unit}{what}", ("epoch", *curves), tuple(rows))


def _cell(point: Point | None, share: bool) -> str:
    if point is None:
        return MISSING
    text = written(point.mean, share=share)
    if point.low == point.high:
        return text
    return f"{text} ({written(point.low, share=share)} to {written(point.high, share=share)})"


def _summary(metric: Metric, curves: dict[str, list[Point]]) -> str:
    unit = " %" if metric.share else ""
    ends = sorted(((curve[-1].mean, name) for name, curve in curves.items()), reverse=True)
    return f"{metric.title} at the end: " + ", ".join(
        f"{name} {written(value, share=metric.share)}{unit}" for value, name in ends
    )
