"""Statistics of a few numbers, and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence

MISSING = "–"
_MOST = 1e150


def finite(value: object) -> float | None:
    """Return the number, or None for whatever is none: NaN, infinity, a text, a truth value, None.

    Numbers at the edges of the floats count as infinite or 0, so that spans and ratios of numbers are finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    if not abs(number) < _MOST:
        return None
    return number if abs(number) > 1 / _MOST else 0.0


def mean(values: Sequence[float]) -> float:
    """Return the mean of at least one number."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean, `s / √n` with n − 1 degrees of freedom; None for fewer than two numbers."""
    n = len(values)
    if n < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (n - 1) / n)


def ranks(values: Sequence[float]) -> list[float]:
    """Return ranks from 1; equal numbers share the mean of their ranks."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for at in range(start, stop):
            found[order[at]] = (start + stop + 1) / 2
        start = stop
    return found


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's ρ; None for fewer than three pairs or where one side is constant."""
    if len(first) < 3:
        return None
    a, b = ranks(first), ranks(second)
    centre = (len(first) + 1) / 2
    spread = math.fsum((x - centre) ** 2 for x in a) * math.fsum((y - centre) ** 2 for y in b)
    if spread == 0:
        return None
    return math.fsum((x - centre) * (y - centre) for x, y in zip(a, b, strict=True)) / math.sqrt(spread)


def written(value: float | None, *, share: bool = False, digits: int = 4) -> str:
    """Write a number short: a share in percent with one decimal, other numbers with about so many digits."""
    if value is None:
        return MISSING
    if share:
        return _signed(f"{100 * value:.1f}")
    size = abs(value)
    if size != 0 and not 1e-3 <= size < 10.0 ** (digits + 1):
        return _power(value, digits - 1)
    return _signed(f"{value:.0f}" if size >= 10.0 ** (digits - 1) else f"{value:.{digits}g}")


def written_with_error(values: Sequence[float], *, share: bool = False) -> str:
    """Write `mean ± standard error` of the numbers; the mean alone where there is one, a dash where there is none."""
    if not values:
        return MISSING
    centre, error = mean(values), standard_error(values)
    if error is None:
        return written(centre, share=share)
    if share:
        return f"{written(centre, share=True)} ± {100 * error:.1f}"
    size = max(abs(centre), error)
    if size != 0 and not 1e-3 <= size < 1e5:
        return f"{_power(centre, 3)} ± {_power(error, 2)}"
    digits = 1 - math.floor(math.log10(error)) if error > 0 else 2
    digits = min(max(digits, 0), 4)
    return f"{_signed(f'{centre:.{digits}f}')} ± {error:.{digits}f}"


def written_correlation(value: float | None) -> str:
    """Write a correlation with its sign and two decimals; a dash where there is none."""
    return MISSING if value is None else f"{value:+.2f}".replace("-", "−")


def _power(value: float, digits: int) -> str:
    number, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{_signed(number)}e{_signed(str(int(exponent)))}"


def _signed(text: str) -> str:
    if text.startswith("-") and not text.strip("-0."):
        text = text[1:]  # no minus nought
    return text.replace("-", "−")
