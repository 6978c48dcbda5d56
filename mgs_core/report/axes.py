"""From numbers to places on the page: axes with round ticks, and labels that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mgs_core.report.numbers import written


@dataclass(frozen=True)
class Axis:
    """Map numbers from `low` to `high` onto places from `start` to `stop`.

    Attributes:
        low: number at `start`.
        high: number at `stop`.
        start: place, in units of the drawing.
        stop: place; may lie before `start`.
        logarithmic: equal ratios are equally far apart; `low` is above 0.
        share: ticks are written in percent.
    """

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False
    share: bool = False

    def place(self, value: int | float) -> float:
        """Return where a number lies; beyond the ends of the axis too, but for numbers of at most 0 on a logarithmic one."""
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(value) if value > 0 else math.log(low)
        part = (at - low) / (high - low)
        return round(self.start + part * (self.stop - self.start), 1)

    def ticks(self, about: int = 5) -> list[tuple[float, str]]:
        """Return places and texts of round numbers."""
        values = _decades(self.low, self.high, about) if self.logarithmic else _round_numbers(self.low, self.high, about)
        if self.logarithmic and len(values) < 2:
            values = _round_numbers(self.low, self.high, about)
        return [(self.place(value), self._text(value)) for value in values]

    def _text(self, value: float) -> str:
        if self.share:
            return f"{written(round(100 * value, 6))} %"
        text = f"{value:.4g}"
        if value != 0 and not 1e-3 <= abs(value) < 1e5:
            number, _, exponent = f"{value:.3e}".partition("e")
            text = f"{number.rstrip('0').rstrip('.')}e{int(exponent)}"
        return written(float(f"{value:.4g}")) if "e" not in text else text.replace("-", "−")


def axis(
    values: Iterable[float],
    start: float,
    stop: float,
    *,
    logarithmic: bool = False,
    share: bool = False,
    from_zero: bool = False,
    padding: float = 0.04,
) -> Axis:
    """Return an axis that holds all the numbers, with some room; on a logarithmic one those above 0."""
    found = [value for value in values if not logarithmic or value > 0]
    if not found:
        return Axis(1.0, 10.0, start, stop, logarithmic, share) if logarithmic else Axis(0.0, 1.0, start, stop, share=share)
    low, high = min(found), max(found)
    if logarithmic:
        room = max((high / low) ** padding, 1.02)
        return Axis(low / room, high * room, start, stop, logarithmic=True, share=share)
    room = padding * (high - low) or 0.05 * abs(high) or 0.05
    low, high = low - room, high + room
    if share:
        low, high = max(low, 0.0) if min(found) >= 0 else low, min(high, 1.0) if max(found) <= 1 else high
    if from_zero:
        low = min(0.0, low)
    return Axis(low, high, start, stop, share=share)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart as little as possible (in squares), so that neighbours are `gap` apart and all lie within the bounds.

    Args:
        wanted: where each label would like to be.
        gap: least distance; taken smaller where not all labels fit.
        low: least place.
        high: greatest place.

    Returns:
        The places, in the order of `wanted`.
    """
    n = len(wanted)
    if n == 0:
        return []
    gap = min(gap, (high - low) / max(n - 1, 1))
    order = sorted(range(n), key=wanted.__getitem__)
    blocks: list[tuple[float, int]] = []  # of labels that touch: mean of (wanted − own offset), and their number
    for rank, index in enumerate(order):
        centre, size = wanted[index] - rank * gap, 1
        while blocks and blocks[-1][0] > centre:
            before, count = blocks.pop()
            centre, size = (before * count + centre * size) / (count + size), count + size
        blocks.append((centre, size))
    top = high - (n - 1) * gap
    places = [0.0] * n
    rank = 0
    for centre, size in blocks:
        for _ in range(size):
            places[order[rank]] = round(min(max(centre, low), top) + rank * gap, 2)
            rank += 1
    return places


def _round_numbers(low: float, high: float, about: int) -> list[float]:
    power = 10.0 ** math.floor(math.log10(high - low))
    steps = [factor * power for factor in (5.0, 2.5, 2.0, 1.0, 0.5, 0.25, 0.2, 0.1)]
    step = next((step for step in steps if math.floor(high / step) - math.ceil(low / step) + 1 >= about), steps[-1])
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _decades(low: float, high: float, about: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / (about + 1)))
    steps = (1,) if math.log10(high / low) > 1.7 else (1, 2, 5)
    values = [step * 10.0**power for power in range(first, last + 1) for step in steps if power % every == 0]
    return [value for value in values if low <= value <= high]
