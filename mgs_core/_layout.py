"""Find the sample axis of a use by weighted backward passes.

A row of the gradient that belongs to sample a is scaled by exactly `w_a` when the heads of sample a are weighted by `w_a`. That
gives the axis; where no axis is scaled so, the place does not belong to single samples. The weights are powers of two, so that
scaling commutes with rounding in any precision; sample numbers are spelled in digits, one pass each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from mgs_core._errors import NotFiniteError, SamplesInteractError
from mgs_core._namespace import array_namespace
from mgs_core._namespace import host as np
from mgs_core._types import Array

#: Weights are 2, 4, …, 256: far from overflow even in float16, and never 1, so that what no weight scales is no sample's.
BASE = 8
_FEW = 4
# spacing of single precision: scaling is exact in lower ones too, and in higher ones losses may be in single precision
_EPS = 2.0**-23


@dataclass(frozen=True)
class Layout:
    """Say where the samples are among the lead axes.

    Attributes:
        axis: the axis that holds them; -1 when there is one sample and so no axis.
        before: positions merged into the axis that are slower than the sample (1: the sample is the slowest index).
    """

    axis: int
    before: int = 1

    def split(self, array: Array, n: int) -> Array:
        """Rearrange (groups, *lead, features) to (n, groups, s, features)."""
        xp = array_namespace(array)
        groups, *lead, features = array.shape
        if self.axis < 0 or (groups == 1 and self.before == 1 and prod(lead[: self.axis]) == 1):  # they stand first already
            return xp.reshape(array, (n, groups, prod(lead) // n, features))
        front, length, rest = prod(lead[: self.axis]), lead[self.axis], prod(lead[self.axis + 1 :])
        after = length // (n * self.before)
        array = xp.reshape(array, (groups, front * self.before, n, after * rest, features))
        return xp.reshape(xp.permute_dims(array, (2, 0, 1, 3, 4)), (n, groups, prod(lead) // n, features))

    def spread(self, values: Array, shape: Sequence[int]) -> Array:
        """Return values (n,) along the axis of the samples, to be broadcast over an array (*lead) of this shape."""
        xp = array_namespace(values)
        if self.axis < 0:
            return xp.reshape(values, (1,) * len(shape))
        n, length = values.shape[0], shape[self.axis]
        along = xp.broadcast_to(xp.reshape(values, (1, n, 1)), (self.before, n, length // (n * self.before)))
        return xp.reshape(along, (length, *(1,) * (len(shape) - self.axis - 1)))


def sample_weights(n: int) -> list[list[float]]:
    """Return weights of n samples, one list for each pass, that together tell the samples apart.

    Args:
        n: number of samples.
    """
    passes: list[list[float]] = []
    digit = 1
    while not passes or digit < n:
        passes.append([2.0 ** (1 + sample // digit % BASE) for sample in range(n)])
        digit *= BASE
    return passes


def find_layout(
    gradient: Array, weighted: Sequence[Array], weights: Sequence[Array], eps: float
) -> tuple[Layout | None, Literal["sure", "open", "silent", "mixed"]]:
    """Find the layout of one use.

    Args:
        gradient: of the sum of the heads, (groups, *lead, features).
        weighted: those of the weighted sums.
        weights: those of `sample_weights`, (n,) each, as arrays beside the gradient.
        eps: relative spacing of numbers of the gradient's dtype.

    Returns:
        (layout or None; "sure", "open" where zero gradients leave more than one layout, "silent" where all is zero, or "mixed"
        where no layout fits, for the rows belong to no single sample).

    Raises:
        ArgumentError: when the gradient is not finite.
    """
    n = weights[0].shape[0]
    if n == 1:
        return Layout(-1), "sure"
    candidates = list(_candidates(gradient.shape[1:-1], n))
    size = max(_size(gradient), *(_size(array) / _size(weight) for array, weight in zip(weighted, weights, strict=True)))
    refuse_infinite(math.isfinite(size))
    tolerance = rounding(eps) * size
    fits = candidates
    if len(fits) > 1:
        few = [array[..., :_FEW] for array in (gradient, *weighted)]  # enough to rule most of them out
        fits = [layout for layout in fits if _fits(layout, few[0], few[1:], weights, tolerance)]
    fits = [layout for layout in fits if _fits(layout, gradient, weighted, weights, tolerance)]
    if candidates and (size == 0 or (not fits and size <= noise_floor(eps))):
        return candidates[0], "silent"
    if not fits:
        return None, "mixed"
    return fits[0], "sure" if len(fits) == 1 else "open"


def refuse_infinite(finite: bool) -> None:
    """Raise unless gradients are finite; which sample they belong to could not be told."""
    if not finite:
        raise NotFiniteError(
            "`model` must have finite gradients; got NaN or infinity. Look for them in inputs, targets and parameters."
        )


def rounding(eps: float) -> float:
    """Return how far, relative to the largest gradient, a row that is scaled may be from its multiple.

    Args:
        eps: relative spacing of numbers of the dtype.
    """
    return 1e3 * min(eps, _EPS)


def noise_floor(eps: float) -> float:
    """Return the size below which the gradient of a head of size 1 may be nothing but rounding.

    Args:
        eps: relative spacing of numbers of the dtype.
    """
    return 10.0 * eps


def compare_rows(parameter: str, rows: Array, whole: Array, weights: Array, eps: float) -> None:
    """Check `Σ_a w_a g_a = ∇ Σ_a w_a h_a`, which fails exactly when a sample's head depends on another sample.

    Args:
        parameter: the parameter's name.
        rows: its explicit rows, (n, k, p), on the host.
        whole: gradient of the weighted sum of the heads of the whole batch, on the host.
        weights: (n, k).
        eps: relative spacing of the coarsest numbers that take part.

    Raises:
        ArgumentError: when the gradient is not finite.
        SamplesInteractError: when they differ.
    """
    refuse_infinite(bool(np.all(np.isfinite(whole))))
    rows, whole = np.astype(rows, np.float64), np.astype(whole, np.float64)
    size = float(np.max(np.abs(rows))) if prod(rows.shape) else 0.0
    difference = np.abs(np.tensordot(weights, rows, axes=2) - np.reshape(whole, (-1,)))
    tolerance = rows.shape[0] * (min(1e3 * eps, 0.05) * size + noise_floor(eps))
    # written so that NaN, which a batch of one can give, is refused too
    if not bool(np.all(difference <= tolerance)):
        raise interaction(parameter)


def interaction(parameter: str, error: Exception | None = None) -> SamplesInteractError:
    """Return the refusal of a model whose samples interact in front of a parameter, or that fails for one sample."""
    if error is not None:
        return SamplesInteractError(
            f"`model` must treat each sample by itself, and take one alone; got the error {error} for one sample. Use fixed "
            f"statistics (inference mode), keep the batch's axis, or leave {parameter!r} and the like out by `parameters=`."
        )
    return SamplesInteractError(
        f"`model` must treat each sample by itself; got samples that interact in front of parameter {parameter!r} "
        "(batch statistics, or attention across the batch). Use fixed statistics (inference mode), or leave these "
        "parameters out by `parameters=`."
    )


def halves(n: int) -> tuple[list[int], list[int]]:
    """Divide the samples such that shifts of any length go from one half to the other, in both directions."""
    odd = [sample.bit_count() % 2 == 1 for sample in range(n)]  # the sequence of Thue and Morse, which has no period
    return [sample for sample in range(n) if odd[sample]], [sample for sample in range(n) if not odd[sample]]


def reaches_others(tainted: Array, layout: Layout, n: int, others: list[int]) -> bool:
    """Return whether anything goes between samples and others, by a gradient that began with NaN in all but these others.

    `0 · NaN = NaN`, so this shows ways between samples that only values close, as in `h + 0·h.mean(0)`.

    Args:
        tainted: the gradient, (groups, *lead, features), of heads whose samples are weighted by NaN.
        layout: where the samples are.
        n: number of samples.
        others: those whose heads were not.
    """
    xp = array_namespace(tainted)
    return n > 1 and bool(xp.any(xp.isnan(layout.split(tainted, n)[others])))


def _size(array: Array) -> float:
    xp = array_namespace(array)
    return float(xp.max(xp.abs(array))) if prod(array.shape) else 0.0


def _fits(layout: Layout, gradient: Array, weighted: Sequence[Array], weights: Sequence[Array], tolerance: float) -> bool:
    n, xp = weights[0].shape[0], array_namespace(gradient)
    flat = layout.split(gradient, n)
    for array, weight in zip(weighted, weights, strict=True):
        scale = xp.reshape(weight, (n, 1, 1, 1))
        if not bool(xp.all(xp.abs(layout.split(array, n) - flat * scale) <= tolerance * scale)):
            return False
    return True


def _candidates(lead: Sequence[int], n: int) -> Iterator[Layout]:
    """Yield the layouts that fit the shape, those with an axis of its own for the samples first."""
    yield from (Layout(axis) for axis, length in enumerate(lead) if length == n)
    for axis, length in enumerate(lead):
        if length > n and length % n == 0:
            positions = length // n
            befores = [before for before in range(1, positions + 1) if positions % before == 0]
            yield from (Layout(axis, before) for before in sorted(befores, key=lambda before: before not in (1, positions)))
