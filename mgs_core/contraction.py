"""Contribution of each kind of layer statistics to the kernel, and the cost model that chooses how to contract them.

A weight used as `y = a W` has the per-sample gradient `Σ_s a ⊗ d`, so its share of the kernel can be had in two ways:

* pairwise: `K_ab = Σ_{s,t} (a_as·a_bt)(d_as·d_bt)`, cost `n m s² (i + k o)`; never forms a gradient;
* rows: form the (n, k, i·o) gradients and multiply, cost `n k s i o + n m k i o`.

Either is exact. The cheaper one is taken per layer, by floating-point operations and elements moved. The products of weights are
tiled to keep within the memory budget; tiles change nothing but time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from mgs_core._errors import ArgumentError
from mgs_core._namespace import array_namespace
from mgs_core._protocol import Convolution, LayerStatistics, Lookup, Outer, Rows, Sum
from mgs_core._types import Array, Namespace
from mgs_core.statistics import arranged, as_rows, equal, namespace_of, unfold, whole

#: Elements that one intermediate may have (128 MiB in float32).
MEMORY_BUDGET = 1 << 25
#: Operations that moving one element through memory is worth (measured on CPU: 26 of 28 choices right).
ELEMENT_COST = 30


def contract(left: Sequence[LayerStatistics], right: Sequence[LayerStatistics], *, full: bool = False) -> Array:
    """Sum the contributions of all layers to the kernel between two batches.

    Args:
        left: merged statistics (see `merge`) of the n samples of the rows.
        right: those of the m samples of the columns, which may use the parameters in other ways, or others.
        full: keep the heads apart.

    Returns:
        `Σ_k` over heads, (n, m); or with `full` (n, k, m, k).

    Raises:
        ArgumentError: when there are no statistics.
    """
    if not left or not right:
        raise ArgumentError("`left` and `right` must hold the statistics of a parameter; got none. Choose one that is used.")
    total: Array = None
    for a, b in _with_biases(_pairs(left, right), full):
        part = contribution(a, b, full=full)
        total = part if total is None else total + part
    return total


def _pairs(left: Sequence[LayerStatistics], right: Sequence[LayerStatistics]) -> list[tuple[LayerStatistics, LayerStatistics]]:
    """Pair the statistics of each parameter; of one that two batches use in different ways, or parts, as rows.

    A parameter that one batch does not use, as where the data choose a branch, has no share in the block; where there is no
    other, rows of zeros stand for it.
    """
    if right is left:
        return [(use, use) for use in left]

    def alike(a: LayerStatistics, b: LayerStatistics) -> bool:
        return type(a) is type(b) and (a.view, a.part) == (b.view, b.part)

    pairs: list[tuple[LayerStatistics, LayerStatistics]] = []
    for name in dict.fromkeys(use.parameter for use in left):
        own, other = ([use for use in side if use.parameter == name] for side in (left, right))
        if len(own) == len(other) and all(map(alike, own, other)):
            pairs += zip(own, other, strict=True)
        elif other:
            pairs.append(_of_one_precision(whole(own), whole(other)))
    if not pairs:
        a, b = (Rows(side[0].parameter, as_rows(side[0])[:, :, :1] * 0) for side in (left, right))
        return [(a, b)]
    return pairs


def _of_one_precision(left: Rows, right: Rows) -> tuple[Rows, Rows]:
    xp = array_namespace(left.gradients, right.gradients)
    finer = min((left.gradients.dtype, right.gradients.dtype), key=lambda dtype: float(xp.finfo(dtype).eps))
    return replace(left, gradients=xp.astype(left.gradients, finer)), replace(right, gradients=xp.astype(right.gradients, finer))


def _with_biases(
    pairs: list[tuple[LayerStatistics, LayerStatistics]], full: bool
) -> list[tuple[LayerStatistics, LayerStatistics]]:
    """Count biases in with their weights, where the products of gradients that they need are made for the weights anyway.

    So in contractions of pairs, and in those of a namespace that says so by `mgs_counts_biases`.
    """
    weights = {
        (a.origin, b.origin): (place, a, b)
        for place, (a, b) in enumerate(pairs)
        if isinstance(a, Outer)
        and isinstance(b, Outer)
        and None not in (a.origin, b.origin)
        and (prefers_pairwise(a, b) or (b is a and not full and hasattr(array_namespace(a.gradients), "mgs_counts_biases")))
    }
    counted = {
        (a.origin, b.origin): place
        for place, (a, b) in enumerate(pairs)
        if isinstance(a, Sum) and isinstance(b, Sum) and (a.origin, b.origin) in weights
    }
    for origins in counted:
        place, left, right = weights[origins]
        whole = replace(left, one=True)
        pairs[place] = (whole, whole if right is left else replace(right, one=True))
    return [pair for place, pair in enumerate(pairs) if place not in counted.values()]


def contribution(left: LayerStatistics, right: LayerStatistics, *, full: bool = False) -> Array:
    """Return one layer's contribution to the kernel, by the cheaper contraction.

    A namespace's `mgs_contribution(left, right, full)` goes first; it returns None for what it does not do better.

    Args:
        left: statistics of the rows' samples.
        right: statistics of the columns' samples, of the same kind.
        full: keep the heads apart.

    Returns:
        (n, m), or with `full` (n, k, m, k).

    Raises:
        TypeError: when the kinds differ or are unknown.
    """
    if type(left) is not type(right):
        raise TypeError(f"`right` must be of the kind of `left`, {type(left).__name__}; got {type(right).__name__}.")
    native = getattr(array_namespace(left.gradients, right.gradients), "mgs_contribution", None)
    part = None if native is None else native(left, right, full)
    if part is not None:
        return part
    if isinstance(left, Convolution) and isinstance(right, Convolution):
        unfolded = unfold(left)
        return contribution(unfolded, unfolded if right is left else unfold(right), full=full)
    if isinstance(left, (Outer, Lookup)) and isinstance(right, (Outer, Lookup)) and prefers_pairwise(left, right):
        return _pairwise_tiled(left, right, full)
    if isinstance(left, Outer) and isinstance(right, Outer):
        return _outer_rows_tiled(left, right, full)
    rows = as_rows(left)
    return _gram(rows, rows if right is left else as_rows(right), full)


def prefers_pairwise(left: Outer | Lookup, right: Outer | Lookup) -> bool:
    """Say whether the pairwise contraction costs less than rows, counting operations and elements moved.

    Args:
        left: statistics of the rows' samples.
        right: statistics of the columns' samples.

    Returns:
        True for pairwise.
    """
    pairwise, rows = _operations(left, right)
    return pairwise <= rows


def operations(use: LayerStatistics) -> int:
    """Estimate the operations of a layer's contribution to the kernel of a batch with itself.

    Args:
        use: statistics of any kind.

    Returns:
        Multiplications, moved elements counted as several.
    """
    n, k = use.gradients.shape[:2]
    if isinstance(use, Convolution):
        _, _, s, groups, o, *out = use.gradients.shape
        i, positions = use.images.shape[3] * prod(use.window), s * prod(out)
        rows = groups * i * o * k * n * (positions + n)
        return int(min(rows, groups * (n * positions) ** 2 * (i + k * o)))
    if isinstance(use, (Outer, Lookup)):
        return min(_operations(use, use))
    return int(n * prod(use.gradients.shape[1:]) + n * n * k * use.gradients.shape[-1])


def _operations(left: Outer | Lookup, right: Outer | Lookup) -> tuple[int, int]:
    """Return the costs of the pairwise contraction and of that by rows."""
    n, m = left.gradients.shape[0], right.gradients.shape[0]
    k, s, t, o = left.gradients.shape[1], left.gradients.shape[-2], right.gradients.shape[-2], left.gradients.shape[-1]
    groups, i = (left.inputs.shape[1], left.inputs.shape[3]) if isinstance(left, Outer) else (1, left.size)
    inputs = i if isinstance(left, Outer) else 0
    pairwise = groups * n * m * s * t * (inputs + k * o + 2 * ELEMENT_COST)
    size = groups * i * o * k
    rows = size * (n * s + m * t + n * m) + ELEMENT_COST * (n + m) * size
    return int(pairwise), int(rows)


def _gram(left: Array, right: Array, full: bool) -> Array:
    """Multiply rows (n, k, p) and (m, k, p) to (n, m), or (n, k, m, k)."""
    xp = array_namespace(left, right)
    (n, k, p), m = left.shape, right.shape[0]
    rows, columns = ((n * k, p), (m * k, p)) if full else ((n, k * p), (m, k * p))
    flat = xp.reshape(left, rows)
    gram = _product(xp, flat, flat if right is left else xp.reshape(right, columns))
    return xp.reshape(gram, (n, k, m, k)) if full else gram


def _product(xp: Namespace, left: Array, right: Array) -> Array:
    """Return `left rightᵀ` over the last axis; a namespace's `mgs_product` may use that both are one array, and round less."""
    native = getattr(xp, "mgs_product", None)
    if native is not None:
        return native(left, right)
    return xp.matmul(left, xp.permute_dims(right, (*range(right.ndim - 2), right.ndim - 1, right.ndim - 2)))


def _outer_rows_tiled(left: Outer, right: Outer, full: bool) -> Array:
    """Form rows for a slice of the layer's inputs at a time, and add the slices' Gram matrices."""
    if not full:
        same, left = right is left, heads_as_outputs(left)
        right = left if same else heads_as_outputs(right)
    n, k, groups, _, o = left.gradients.shape
    i = left.inputs.shape[3]
    step = max(1, MEMORY_BUDGET // max(1, max(n, right.gradients.shape[0]) * k * groups * o))
    total: Array = None
    for start in range(0, i, step):
        chosen = (..., slice(start, min(start + step, i)))
        rows = as_rows(replace(left, inputs=left.inputs[chosen]))
        part = _gram(rows, rows if right is left else as_rows(replace(right, inputs=right.inputs[chosen])), full)
        total = part if total is None else total + part
    return total


def heads_as_outputs(use: Outer) -> Outer:
    """Return a use whose heads are outputs of one: its rows' Gram matrix is the sum over the heads, by fewer, larger products."""
    n, k, groups, s, o = use.gradients.shape
    if k == 1:
        return use
    gradients = arranged(array_namespace(use.gradients), use.gradients, (0, 2, 3, 1, 4), (n, 1, groups, s, k * o))
    return replace(use, gradients=gradients, restore=None)


def _pairwise_tiled(left: Outer | Lookup, right: Outer | Lookup, full: bool) -> Array:
    """Contract pairs for a slice of the rows' samples at a time."""
    xp = namespace_of(left, right)
    n, k = left.gradients.shape[:2]
    per_sample = right.gradients.shape[0] * prod(left.gradients.shape[2:-1]) * right.gradients.shape[-2] * (k * k if full else 1)
    step = max(1, MEMORY_BUDGET // max(1, per_sample))
    if step >= n:
        return _pairwise(left, right, full)
    return xp.concat([_pairwise(_samples(left, start, step), right, full) for start in range(0, n, step)], axis=0)


def _samples(use: Outer | Lookup, start: int, step: int) -> Outer | Lookup:
    chosen = slice(start, min(start + step, use.gradients.shape[0]))
    if isinstance(use, Outer):
        return replace(use, gradients=use.gradients[chosen, ...], inputs=use.inputs[chosen, ...])
    return replace(use, gradients=use.gradients[chosen, ...], indices=use.indices[chosen, ...])


def _pairwise(left: Outer | Lookup, right: Outer | Lookup, full: bool) -> Array:
    """Return `Σ_{g,s,t} A_(as)(bt) D_(as)(bt)`, A the inputs' products (or equality of indices), D the gradients' products."""
    xp = namespace_of(left, right)
    n, k, s = left.gradients.shape[0], left.gradients.shape[1], left.gradients.shape[-2]
    m, t = right.gradients.shape[0], right.gradients.shape[-2]
    same = right is left
    gradients = _gradients_by_group(left, full)
    d = _product(xp, gradients, gradients if same else _gradients_by_group(right, full))
    if isinstance(left, Outer) and isinstance(right, Outer):
        groups, inputs = left.inputs.shape[1], _inputs_by_group(left)
        a = _product(xp, inputs, inputs if same else _inputs_by_group(right))
        a = a + 1.0 if left.one else a
    elif isinstance(left, Lookup) and isinstance(right, Lookup):
        groups = 1
        a = equal(xp, xp.reshape(left.indices, (n * s,)), xp.reshape(right.indices, (m * t,)), d)
    else:
        raise TypeError(f"`left` must be Outer or Lookup on both sides; got {type(left).__name__}, {type(right).__name__}.")
    if full:
        d = xp.reshape(d, (groups, n, k, s, m, k, t))
        return xp.sum(xp.reshape(a, (groups, n, 1, s, m, 1, t)) * d, axis=(0, 3, 6))
    pairs = a * d
    if groups == s == t == 1:
        return xp.reshape(pairs, (n, m))
    return xp.sum(xp.reshape(pairs, (groups, n, s, m, t)), axis=(0, 2, 4))


def _inputs_by_group(use: Outer) -> Array:
    """Return the inputs as (g, n·s, i); as (n·s, i) of one group."""
    n, groups, s, i = use.inputs.shape
    shape = (n * s, i) if groups == 1 else (groups, n * s, i)
    return arranged(array_namespace(use.inputs), use.inputs, (1, 0, 2, 3), shape)


def _gradients_by_group(use: Outer | Lookup, full: bool) -> Array:
    """Return the gradients as (g, n·s, k·o), or with `full` (g, n·k·s, o); without the axis g of one group."""
    n, k, *groups, s, o = use.gradients.shape
    xp = array_namespace(use.gradients)
    gradients = use.gradients if groups else xp.expand_dims(use.gradients, axis=2)
    order, shape = ((2, 0, 1, 3, 4), (n * k * s, o)) if full else ((2, 0, 3, 1, 4), (n * s, k * o))
    return arranged(xp, gradients, order, shape if prod(groups) == 1 else (*groups, *shape))
