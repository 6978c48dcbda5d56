"""Layer statistics: the uses of each parameter joined, and as explicit rows.

A weight used as `y = a W` has the per-sample gradient `Σ_s a ⊗ d`; `contraction.py` says what that adds to the kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from math import prod

from mgs_core._namespace import array_namespace
from mgs_core._protocol import Convolution, LayerStatistics, Lookup, Outer, Rows, Scale, Sum
from mgs_core._types import Array, Namespace


def merge(uses: Iterable[LayerStatistics]) -> list[LayerStatistics]:
    """Join the uses of each parameter, because its gradient is the sum over them and cross terms belong to the kernel.

    Uses of one kind seen through one view concatenate along the positions; others meet as rows of the parameter.

    Args:
        uses: statistics, any number for each parameter.

    Returns:
        One statistics object for each parameter, or part of one, in order of first use.
    """
    by_parameter: dict[tuple[str, int | None], list[LayerStatistics]] = {}
    for use in uses:
        by_parameter.setdefault((use.parameter, use.part), []).append(use)
    return [_join(group) if len(group) > 1 else group[0] for group in by_parameter.values()]


def as_rows(use: LayerStatistics, *, restore: bool = False) -> Array:
    """Return explicit per-sample gradients.

    Args:
        use: statistics of any kind.
        restore: map from the coordinates of the use to those of the parameter.

    Returns:
        Rows, (n, k, p).

    Raises:
        TypeError: when the kind is unknown.
    """
    xp = namespace_of(use)
    n, k = use.gradients.shape[:2]
    if isinstance(use, Convolution):
        return as_rows(unfold(use), restore=restore)
    if isinstance(use, Rows):
        rows = use.gradients
    elif isinstance(use, Sum):
        rows = _over_positions(xp, use.gradients)
    elif isinstance(use, Scale):
        rows = _over_positions(xp, use.gradients * xp.expand_dims(use.inputs, axis=1))
    elif isinstance(use, Lookup):
        one_hot = equal(xp, use.indices, xp.arange(use.size), use.gradients)  # (n, s, size)
        rows = xp.matmul(xp.expand_dims(xp.permute_dims(one_hot, (0, 2, 1)), axis=1), use.gradients)
    elif isinstance(use, Outer):
        groups, s, i = use.inputs.shape[1:]
        rows = xp.matmul(arranged(xp, use.inputs, (0, 1, 3, 2), (n, 1, groups, i, s)), use.gradients)
    else:
        raise TypeError(f"`use` must be layer statistics; got {type(use).__name__}.")
    rows = xp.reshape(rows, (n, k, prod(rows.shape[2:])))
    return use.restore(rows) if restore and use.restore is not None else rows


def unfold(use: Convolution) -> Outer:
    """Cut the patches out of the images.

    Args:
        use: statistics of a convolution.

    Returns:
        The same statistics with the patches as inputs.
    """
    xp, images = namespace_of(use), use.images
    n, k, s, groups, o, *out = use.gradients.shape
    positions, lead = prod(out), use.images.ndim - len(use.window)
    for axis, (before, after) in enumerate(use.pads, start=lead):
        shape = images.shape
        edges = [xp.zeros((*shape[:axis], width, *shape[axis + 1 :]), dtype=images.dtype) for width in (before, after)]
        images = xp.concat([edges[0], images, edges[1]], axis=axis) if before or after else images
    patches = []
    for offset in product(*map(range, use.window)):
        starts = (at * dilation for at, dilation in zip(offset, use.dilations, strict=True))
        where = (slice(at, at + (size - 1) * step + 1, step) for at, size, step in zip(starts, out, use.strides, strict=True))
        patches.append(xp.reshape(images[(..., *where)], (n, s, groups, -1, positions)))
    inputs = xp.permute_dims(xp.stack(patches, axis=4), (0, 2, 1, 5, 3, 4))  # (n, g, s, positions, i, window)
    gradients = xp.permute_dims(xp.reshape(use.gradients, (n, k, s, groups, o, positions)), (0, 1, 3, 2, 5, 4))
    return Outer(
        use.parameter,
        xp.reshape(gradients, (n, k, groups, s * positions, o)),
        use.view,
        use.restore,
        inputs=xp.reshape(inputs, (n, groups, s * positions, inputs.shape[4] * inputs.shape[5])),
        part=use.part,
    )


def namespace_of(*uses: LayerStatistics) -> Namespace:
    """Return the namespace of all arrays of the uses: inputs may be traced where gradients, of a linear model, are constants.

    Args:
        *uses: statistics of any kind.
    """
    parts = ("gradients", "inputs", "images")
    return array_namespace(*(getattr(use, part, None) for use in uses for part in parts))


def whole(uses: Sequence[LayerStatistics]) -> Rows:
    """Return rows of the parameter that uses, or parts, of it add up to."""
    rows = [as_rows(use, restore=True) for use in uses]
    return Rows(uses[0].parameter, sum(rows[1:], start=rows[0]))


def _join(group: list[LayerStatistics]) -> LayerStatistics:
    group = [unfold(use) if isinstance(use, Convolution) else use for use in group]
    first = group[0]
    xp = namespace_of(*group)
    same = all(type(use) is type(first) and use.view == first.view for use in group)
    if not same or isinstance(first, Rows):
        return whole(group)
    gradients, first = xp.concat([use.gradients for use in group], axis=-2), replace(first, origin=None)
    if isinstance(first, Outer):
        return replace(first, gradients=gradients, inputs=xp.concat([u.inputs for u in group if isinstance(u, Outer)], axis=2))
    if isinstance(first, Scale):
        return replace(first, gradients=gradients, inputs=xp.concat([u.inputs for u in group if isinstance(u, Scale)], axis=1))
    if isinstance(first, Lookup):
        return replace(first, gradients=gradients, indices=xp.concat([u.indices for u in group if isinstance(u, Lookup)], axis=1))
    return replace(first, gradients=gradients)


def _over_positions(xp: Namespace, gradients: Array) -> Array:
    """Return the sum of (n, k, s, o) over the positions; of one position the thing itself, which is cheaper to differentiate."""
    n, k, s, o = gradients.shape
    return xp.reshape(gradients, (n, k, o)) if s == 1 else xp.sum(gradients, axis=2)


def arranged(xp: Namespace, array: Array, order: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """Permute the axes and reshape, without the permutation where it moves only axes of length 1."""
    long = [axis for axis in order if array.shape[axis] != 1]
    return xp.reshape(array if long == sorted(long) else xp.permute_dims(array, order), shape)


def equal(xp: Namespace, a: Array, b: Array, like: Array) -> Array:
    """Return the outer equality of `a` (…, s) and `b` (t,), as numbers of the dtype of `like`."""
    b = xp.reshape(b, (*[1] * a.ndim, b.shape[0]))
    return xp.astype(xp.expand_dims(xp.astype(a, b.dtype), axis=-1) == b, like.dtype)  # few bits of `a` may have no room for `b`
