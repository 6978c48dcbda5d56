"""The picture: four panels that can be read at half their size."""

from __future__ import annotations

import io
import warnings
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mgs_core.report.axes import spread
from mgs_core.report.charts import extremes, shortened
from mgs_core.report.looks import BACKGROUND, PLAIN, Look, looks
from mgs_core.report.metrics import KERNEL_METRICS, MEMORISATION, TEST, Metric
from mgs_core.report.runs import Comparison, Point

_TRACE, _SIMILARITY, _RANK = (metric for metric in KERNEL_METRICS if metric.field.endswith(("_trace", "_similarity", "_rank")))
_POINT = 1 / 72  # all lengths below are in inches
_TYPE, _WIDTH, _LEFT, _TOP, _BOTTOM = 16.0, 16.4, 1.05, 0.75, 0.85
_INK, _GREY = PLAIN[0], "#5f6670"


def picture(comparison: Comparison, facts: list[str]) -> bytes:
    """Return a PNG of test accuracy, memorisation, trace and similarity over the epochs; the facts are its first line."""
    curves = {metric: _curves(comparison, metric) for metric in (TEST, MEMORISATION, _TRACE, _SIMILARITY, _RANK)}
    shown = [metric for metric, found in curves.items() if found][:4]
    columns = min(len(shown), 2) or 1
    rows = (len(shown) + 1) // 2 or 1
    names = [shortened(name) for name in comparison.regularizers]
    beside = 0.3 + 0.7 * _TYPE * _POINT * max(len(name) for name in names)
    wide = _WIDTH / columns - _LEFT - beside
    high = max(3.9, 1.22 * _TYPE * _POINT * len(names))
    head = 0.55
    size = (_WIDTH, head + rows * (_TOP + high + _BOTTOM))
    figure = Figure(figsize=size, dpi=100, facecolor=BACKGROUND[0])
    figure.text(
        _LEFT / size[0], 1 - 0.42 / size[1], "  ·  ".join(facts), fontsize=_TYPE, color=_GREY, va="center", parse_math=False
    )
    if not shown:
        figure.text(0.5, 0.4, "No curve is recorded.", ha="center", fontsize=1.4 * _TYPE, color=_INK)
    drawn = looks(comparison.regularizers)
    for number, metric in enumerate(shown):
        row, column = divmod(number, 2)
        corner = (_LEFT + column * _WIDTH / columns, size[1] - head - (row + 1) * (_TOP + high) - row * _BOTTOM)
        panel = figure.add_axes((corner[0] / size[0], corner[1] / size[1], wide / size[0], high / size[1]))
        _draw(panel, metric, curves[metric], drawn)
        _name(panel, curves[metric], drawn, gap=1.2 * _TYPE * _POINT / high, inch=1 / wide)
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font lacks is drawn as boxes
        figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _curves(comparison: Comparison, metric: Metric) -> dict[str, list[Point]]:
    curves = {name: comparison.curve(name, metric.field) for name in comparison.regularizers}
    curves = {name: [point for point in curve if not metric.logarithmic or point.low > 0] for name, curve in curves.items()}
    return {name: curve for name, curve in curves.items() if curve}


def _draw(panel: Axes, metric: Metric, curves: dict[str, list[Point]], drawn: dict[str, Look]) -> None:
    for name, curve in curves.items():
        look = drawn[name]
        epochs = [point.epoch for point in curve]
        dashes: Any = (0, tuple(float(length) for length in look.dash.split())) if look.dash else "-"
        panel.plot(
            epochs, [point.mean for point in curve], color=look.colours[0], linewidth=1.3 * look.width, linestyle=dashes,
            marker=look.mark if len(curve) == 1 else None, markersize=9, zorder={"other": 2, "mgs": 3, "plain": 4}[look.group],
        )  # fmt: skip
        if look.group != "other":
            low, high = [point.low for point in curve], [point.high for point in curve]
            panel.fill_between(epochs, low, high, color=look.colours[0], alpha=0.13, linewidth=0, zorder=1)
    title = "Similarity part of the log-determinant" if metric is _SIMILARITY else metric.title
    panel.set_title(title, loc="left", fontsize=1.25 * _TYPE, fontweight="bold", color=_INK, pad=12)
    if metric.logarithmic:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(numticks=6))
        panel.yaxis.set_minor_locator(NullLocator())
    else:
        panel.yaxis.set_major_locator(MaxNLocator(5))
    if metric.share:
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
    if metric.from_zero:
        panel.set_ylim(bottom=0)
    elif metric.settled:
        bottom, top = min(extremes(metric, curves)), max(extremes(metric, curves))
        room = 0.05 * (top - bottom) or 0.05
        panel.set_ylim(bottom - room, top + room)
    first, last = min(curve[0].epoch for curve in curves.values()), max(curve[-1].epoch for curve in curves.values())
    panel.set_xlim((first, last) if first < last else (first - 1, last + 1))
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panel.tick_params(labelsize=_TYPE, colors=_GREY, length=0, pad=7)
    panel.set_xlabel("epoch", fontsize=_TYPE, color=_GREY)
    panel.grid(axis="y", color="#e3e6ea", linewidth=1)
    panel.set_axisbelow(True)
    for side, spine in panel.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#b9bfc7")


def _name(panel: Axes, curves: dict[str, list[Point]], drawn: dict[str, Look], *, gap: float, inch: float) -> None:
    """Write the names beside the ends of the lines, moved apart, and lead a thin line to each; lengths in panels."""
    to_panel = panel.transData + panel.transAxes.inverted()
    ends = {name: to_panel.transform((curve[-1].epoch, curve[-1].mean)) for name, curve in curves.items()}
    places = spread([float(end[1]) for end in ends.values()], gap, 0.0, 1.0)
    for (name, end), place in zip(ends.items(), places, strict=True):
        look = drawn[name]
        panel.plot(
            [float(end[0]), 1.0, 1.0 + 0.2 * inch], [float(end[1]), float(end[1]), place], transform=panel.transAxes,
            clip_on=False, color=look.colours[0], linewidth=0.9, alpha=0.7, zorder=1,
        )  # fmt: skip
        panel.text(
            1.0 + 0.25 * inch, place, shortened(name), transform=panel.transAxes, va="center", color=look.colours[0],
            fontsize=_TYPE, fontweight="normal" if look.group == "other" else "bold", parse_math=False,
        )  # fmt: skip
