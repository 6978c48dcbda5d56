"""The picture: four panels that can be read at half their size."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mgs_core.report.axes import spread
from mgs_core.report.charts import shortened
from mgs_core.report.looks import BACKGROUND, PLAIN, Look, looks
from mgs_core.report.metrics import KERNEL_METRICS, MEMORISATION, TEST, Metric
from mgs_core.report.runs import Comparison, Point

_TRACE, _SIMILARITY, _RANK = (KERNEL_METRICS[at] for at in (0, 3, 4))
_SIZE = 15.0  # points, at 110 dots an inch
_INK, _GREY = PLAIN[0], "#6a7079"


def picture(comparison: Comparison, settings: Mapping[str, Any]) -> bytes:
    """Return a PNG of test accuracy, memorisation, trace and similarity over the epochs."""
    wanted = (TEST, MEMORISATION, _TRACE, _SIMILARITY, _RANK)
    curves = {metric: _curves(comparison, metric) for metric in wanted}
    shown = [metric for metric in wanted if curves[metric]][:4]
    rows = max((len(shown) + 1) // 2, 1)
    height = max(5.2, 1.5 + 0.27 * len(comparison.regularizers))
    figure = Figure(figsize=(15.6, height * rows), dpi=110, facecolor=BACKGROUND[0])
    drawn = looks(comparison.regularizers)
    if not shown:
        figure.text(0.5, 0.5, "No curve is recorded.", ha="center", va="center", fontsize=_SIZE * 1.4, color=_INK)
    grid = figure.add_gridspec(
        rows, min(len(shown), 2) or 1, left=0.06, right=0.855, top=1 - 0.55 / (height * rows), bottom=0.75 / (height * rows),
        wspace=0.62, hspace=0.32,
    )  # fmt: skip
    for number, metric in enumerate(shown):
        panel = figure.add_subplot(grid[number // 2, number % 2])
        _draw(panel, metric, curves[metric], drawn, last_row=number >= len(shown) - 2)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _curves(comparison: Comparison, metric: Metric) -> dict[str, list[Point]]:
    curves = {name: comparison.curve(name, metric.field) for name in comparison.regularizers}
    curves = {name: [point for point in curve if not metric.logarithmic or point.low > 0] for name, curve in curves.items()}
    return {name: curve for name, curve in curves.items() if curve}


def _draw(panel: Axes, metric: Metric, curves: dict[str, list[Point]], drawn: dict[str, Look], *, last_row: bool) -> None:
    for name, curve in curves.items():
        look = drawn[name]
        epochs = [point.epoch for point in curve]
        colour, front = look.colours[0], {"other": 2, "mgs": 3, "plain": 4}[look.group]
        dashes = (0, tuple(float(length) for length in look.dash.split())) if look.dash else "-"
        panel.plot(
            epochs, [point.mean for point in curve], color=colour, linewidth=1.25 * look.width, linestyle=dashes, zorder=front,
            marker=look.mark if len(curve) == 1 else None,
        )  # fmt: skip
        if look.group != "other":
            panel.fill_between(
                epochs, [p.low for p in curve], [p.high for p in curve], color=colour, alpha=0.13, linewidth=0, zorder=1
            )
    title = "Similarity part of the log-determinant" if metric is _SIMILARITY else metric.title
    panel.set_title(title, loc="left", fontsize=1.2 * _SIZE, fontweight="bold", color=_INK, pad=12)
    if metric.logarithmic:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(numticks=6))
        panel.yaxis.set_minor_formatter(NullFormatter())
    else:
        panel.yaxis.set_major_locator(MaxNLocator(5))
    if metric.share:
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
    if metric.from_zero:
        panel.set_ylim(bottom=0)
    first, last = min(c[0].epoch for c in curves.values()), max(c[-1].epoch for c in curves.values())
    panel.set_xlim((first, last) if first < last else (first - 1, last + 1))
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panel.tick_params(labelsize=_SIZE, colors=_GREY, length=0)
    if last_row:
        panel.set_xlabel("epoch", fontsize=_SIZE, color=_GREY)
    panel.grid(axis="y", color="#e3e6ea", linewidth=1)
    panel.set_axisbelow(True)
    for side, spine in panel.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#b9bfc7")
    _name(panel, curves, drawn)


def _name(panel: Axes, curves: dict[str, list[Point]], drawn: dict[str, Look]) -> None:
    """Write the names beside the ends of the lines, moved apart, and lead a thin line to each."""
    to_panel = panel.transData + panel.transAxes.inverted()
    ends = {name: to_panel.transform((curve[-1].epoch, curve[-1].mean)) for name, curve in curves.items()}
    figure = panel.get_figure()
    inches = panel.get_position().height * (figure.get_size_inches()[1] if figure is not None else 1.0)
    places = spread([float(end[1]) for end in ends.values()], 1.2 * _SIZE / 72 / inches, 0.0, 1.0)
    for (name, end), place in zip(ends.items(), places, strict=True):
        look = drawn[name]
        panel.plot(
            [float(end[0]), 1.0, 1.035], [float(end[1]), float(end[1]), place], transform=panel.transAxes, clip_on=False,
            color=look.colours[0], linewidth=0.9, alpha=0.7, zorder=1,
        )  # fmt: skip
        panel.text(
            1.045, place, shortened(name), transform=panel.transAxes, va="center", ha="left", color=look.colours[0],
            fontsize=_SIZE, fontweight="normal" if look.group == "other" else "bold",
        )  # fmt: skip
