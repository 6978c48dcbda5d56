"""What the operators need beyond the array API: a small protocol that a namespace may implement, and portable defaults.

An operator asks for `extension(xp, "convolution")`. It gets `xp.mgs_convolution` where the namespace has one, and else the
function of that name below, which uses array-API functions only. A native version must take the same arguments and return the
same values; it exists to be faster, or so that a backend recognises where a parameter meets data. All arrays keep their dtype.
The names:

* `mgs_convolution(x, weight, *, strides, pads, dilations, groups)`
* `mgs_convolution_transpose(x, weight, *, strides, pads, dilations, groups, output_padding)`
* `mgs_max_pool(x, *, window, strides, pads, dilations)`
* `mgs_average_pool(x, *, window, strides, pads, dilations)`
* `mgs_patches(x, window, strides, dilations)`
* `mgs_pad(x, widths, *, value=0.0)`
* `mgs_lookup(table, indices)`
* `mgs_scatter(data, indices, updates, *, reduction)`
* `mgs_einsum(equation, *operands)`
* `mgs_relu(x)`, `mgs_sigmoid(x)`, `mgs_erf(x)`
* `mgs_softmax(x, axis)`, `mgs_log_softmax(x, axis)`

Letters: n samples, i input channels, o output channels. Spatial arguments are tuples with one entry for each spatial axis; `pads`
and `widths` hold a pair (before, after) of integers of at least 0 for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from math import prod
from typing import Any, TypeAlias

from mgs_core._types import Array, Namespace

Pairs: TypeAlias = Sequence[tuple[int, int]]


def extension(xp: Namespace, name: str) -> Callable[..., Array]:
    """Return the namespace's own `mgs_<name>`, or the portable default.

    Args:
        xp: array-API namespace.
        name: one of the names in the module's docstring, without the prefix.

    Returns:
        The function.
    """
    native = getattr(xp, f"mgs_{name}", None)
    return native if native is not None else portable(xp, name)


def portable(xp: Namespace, name: str) -> Callable[..., Array]:
    """Return the portable default, for a native version that does not take every argument.

    Args:
        xp: array-API namespace.
        name: as for `extension`.

    Returns:
        The function.
    """
    return partial(_DEFAULTS[name], xp)


def _convolution(
    xp: Namespace, x: Array, weight: Array, *, strides: Sequence[int], pads: Pairs, dilations: Sequence[int], groups: int
) -> Array:
    """Return the cross-correlation of x (n, i, *space) with weight (o, i/groups, *window): (n, o, *positions)."""
    n, channels = x.shape[:2]
    o, window = weight.shape[0], tuple(weight.shape[2:])
    padded = extension(xp, "pad")(x, ((0, 0), (0, 0), *pads)) if any(map(any, pads)) else x
    patches = extension(xp, "patches")(padded, window, tuple(strides), tuple(dilations))
    out = tuple(patches.shape[2 + len(window) :])
    size = channels // groups * prod(window)
    if groups == 1:
        mixed = xp.matmul(xp.reshape(weight, (o, size)), xp.reshape(patches, (n, size, prod(out))))
        return xp.reshape(mixed, (n, o, *out))
    by_group = xp.permute_dims(xp.reshape(patches, (n, groups, size, prod(out))), (0, 1, 3, 2))
    kernels = xp.permute_dims(xp.reshape(weight, (groups, o // groups, size)), (0, 2, 1))
    mixed = xp.matmul(by_group, kernels)  # (n, g, positions, o/g)
    return xp.reshape(xp.permute_dims(mixed, (0, 1, 3, 2)), (n, o, *out))


def _convolution_transpose(
    xp: Namespace,
    x: Array,
    weight: Array,
    *,
    strides: Sequence[int],
    pads: Pairs,
    dilations: Sequence[int],
    groups: int,
    output_padding: Sequence[int],
) -> Array:
    """Return the adjoint of a convolution: x (n, i, *space), weight (i, o/groups, *window).

    Output (n, o, *size), size = stride·(space − 1) + dilation·(window − 1) + 1 − pads + output_padding on each axis; pads may be
    negative here.
    """
    window = tuple(weight.shape[2:])
    spread = x
    for axis, stride in enumerate(strides, start=2):
        spread = _insert_zeros(xp, spread, axis, stride)
    edges, cuts = [], []
    for (before, after), dilation, size, extra in zip(pads, dilations, window, output_padding, strict=True):
        reach = dilation * (size - 1)
        low, high = reach - before, reach - after + extra
        edges.append((max(low, 0), max(high, 0)))
        cuts.append((max(-low, 0), max(-high, 0)))
    where = tuple(slice(low, size - high) for size, (low, high) in zip(spread.shape[2:], cuts, strict=True))
    spread = spread[(slice(None), slice(None), *where)]
    i, per_group = weight.shape[:2]
    flipped = xp.flip(weight, axis=tuple(range(2, weight.ndim)))
    grouped = xp.reshape(flipped, (groups, i // groups, per_group, *window))
    order = (0, 2, 1, *range(3, 3 + len(window)))
    kernels = xp.reshape(xp.permute_dims(grouped, order), (groups * per_group, i // groups, *window))
    ones = (1,) * len(window)
    return extension(xp, "convolution")(
        spread, kernels, strides=ones, pads=tuple(edges), dilations=tuple(dilations), groups=groups
    )


def _insert_zeros(xp: Namespace, x: Array, axis: int, stride: int) -> Array:
    """Put stride − 1 zeros between neighbours along an axis."""
    length = x.shape[axis]
    if stride == 1 or length == 0:
        return x
    wide = xp.expand_dims(x, axis=axis + 1)
    widths = [(0, 0)] * wide.ndim
    widths[axis + 1] = (0, stride - 1)
    wide = extension(xp, "pad")(wide, tuple(widths))
    flat = xp.reshape(wide, (*x.shape[:axis], length * stride, *x.shape[axis + 1 :]))
    return flat[(*(slice(None),) * axis, slice(0, (length - 1) * stride + 1), ...)]


def _max_pool(
    xp: Namespace, x: Array, *, window: Sequence[int], strides: Sequence[int], pads: Pairs, dilations: Sequence[int]
) -> Array:
    """Return the greatest of each window of x (n, i, *space); padding counts as −∞."""
    if any(map(any, pads)):
        x = extension(xp, "pad")(x, ((0, 0), (0, 0), *pads), value=lowest(xp, x.dtype))
    patches = extension(xp, "patches")(x, tuple(window), tuple(strides), tuple(dilations))
    return xp.max(patches, axis=tuple(range(2, 2 + len(window))))


def _average_pool(
    xp: Namespace, x: Array, *, window: Sequence[int], strides: Sequence[int], pads: Pairs, dilations: Sequence[int]
) -> Array:
    """Return the mean of each window of x (n, i, *space); padding counts as zeros."""
    if any(map(any, pads)):
        x = extension(xp, "pad")(x, ((0, 0), (0, 0), *pads))
    patches = extension(xp, "patches")(x, tuple(window), tuple(strides), tuple(dilations))
    return xp.mean(patches, axis=tuple(range(2, 2 + len(window))))


def _patches(xp: Namespace, x: Array, window: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Array:
    """Return the windows of x (n, i, *space), already padded: (n, i, *window, *positions)."""
    out = tuple((size - d * (w - 1) - 1) // s + 1 for size, w, s, d in zip(x.shape[2:], window, strides, dilations, strict=True))
    pieces = []
    for offset in product(*map(range, window)):
        where = tuple(
            slice(at * d, at * d + (count - 1) * s + 1, s)
            for at, d, s, count in zip(offset, dilations, strides, out, strict=True)
        )
        pieces.append(x[(slice(None), slice(None), *where)])
    return xp.reshape(xp.stack(pieces, axis=2), (*x.shape[:2], *window, *out))


def _pad(xp: Namespace, x: Array, widths: Pairs, *, value: float = 0.0) -> Array:
    """Return x with `value` added around it, one pair of `widths` for each axis of x."""
    for axis, (before, after) in enumerate(widths):
        parts = [x]
        for width, place in ((before, 0), (after, len(parts) + 1)):
            if width:
                shape = (*x.shape[:axis], width, *x.shape[axis + 1 :])
                parts.insert(place, xp.full(shape, value, dtype=x.dtype))
        if len(parts) > 1:
            x = xp.concat(parts, axis=axis)
    return x


def _lookup(xp: Namespace, table: Array, indices: Array) -> Array:
    """Return `table[indices]`: table (size, *width), indices any shape, integers of at least 0."""
    flat = xp.take(table, xp.reshape(indices, (-1,)), axis=0)
    return xp.reshape(flat, (*indices.shape, *table.shape[1:]))


def _scatter(xp: Namespace, data: Array, indices: Array, updates: Array, *, reduction: str) -> Array:
    """Return data (size,) with updates (m,) written at indices (m,), integers in [0, size).

    `reduction`: "none" (the last of equal indices counts), "add", "mul", "max" or "min" with the value that is there. The default
    costs m·size; native versions cost m.
    """
    if indices.shape[0] == 0:
        return data
    size, m = data.shape[0], indices.shape[0]
    hit = xp.expand_dims(indices, axis=1) == xp.arange(size)  # (m, size)
    if reduction == "none":
        order = xp.expand_dims(xp.arange(1, m + 1), axis=1)
        ranked = xp.where(hit, order, xp.zeros_like(order))
        last = xp.max(ranked, axis=0)
        return xp.where(last > 0, xp.take(updates, xp.where(last > 0, last - 1, 0 * last), axis=0), data)
    values = xp.broadcast_to(xp.expand_dims(updates, axis=1), (m, size))
    if reduction == "add":
        return data + xp.sum(xp.where(hit, values, xp.zeros_like(values)), axis=0)
    if reduction == "mul":
        return data * xp.prod(xp.where(hit, values, xp.ones_like(values)), axis=0)
    own = xp.broadcast_to(xp.expand_dims(data, axis=0), (m, size))
    if reduction == "max":
        return xp.maximum(data, xp.max(xp.where(hit, values, own), axis=0))
    if reduction == "min":
        return xp.minimum(data, xp.min(xp.where(hit, values, own), axis=0))
    raise ValueError(f"`reduction` must be none, add, mul, max or min; got {reduction!r}.")


def _einsum(xp: Namespace, equation: str, *operands: Array) -> Array:
    """Return the Einstein sum; the equation has an arrow, no ellipsis, and distinct letters within each operand."""
    sides, out = equation.split("->")
    labels = sides.split(",")
    left, label = operands[0], labels[0]
    for number, (right, other) in enumerate(zip(operands[1:], labels[1:], strict=True), start=2):
        later = set(out).union(*labels[number:])
        left, label = _contract(xp, left, label, right, other, later)
    summed = tuple(axis for axis, letter in enumerate(label) if letter not in out)
    if summed:
        left, label = xp.sum(left, axis=summed), "".join(letter for letter in label if letter in out)
    return xp.permute_dims(left, tuple(label.index(letter) for letter in out)) if len(out) > 1 else left


def _contract(xp: Namespace, a: Array, left: str, b: Array, right: str, later: set[str]) -> tuple[Array, str]:
    """Contract two operands by one matrix product; letters that are in neither `later` nor both are summed first."""
    for letter in set(left) ^ set(right):
        if letter not in later:
            if letter in left:
                a, left = xp.sum(a, axis=left.index(letter)), left.replace(letter, "")
            else:
                b, right = xp.sum(b, axis=right.index(letter)), right.replace(letter, "")
    shared = [letter for letter in left if letter in right]
    batch, inner = [x for x in shared if x in later], [x for x in shared if x not in later]
    rows, columns = [x for x in left if x not in right], [x for x in right if x not in left]
    sizes = {**dict(zip(left, a.shape, strict=True)), **dict(zip(right, b.shape, strict=True))}

    def arrange(array: Array, label: str, *groups: list[str]) -> Array:
        order = [letter for group in groups for letter in group]
        array = xp.permute_dims(array, tuple(label.index(letter) for letter in order)) if len(order) > 1 else array
        return xp.reshape(array, (*(sizes[x] for x in groups[0]), *(prod(sizes[x] for x in group) for group in groups[1:])))

    result = xp.matmul(arrange(a, left, batch, rows, inner), arrange(b, right, batch, inner, columns))
    label = [*batch, *rows, *columns]
    return xp.reshape(result, tuple(sizes[x] for x in label)), "".join(label)


def _relu(xp: Namespace, x: Array) -> Array:
    """Return max(x, 0), with derivative 0 at 0; NaN stays NaN."""
    return xp.where(x <= 0, xp.zeros_like(x), x)


def _sigmoid(xp: Namespace, x: Array) -> Array:
    """Return 1/(1 + exp(−x)) without overflow, to rounding on both sides."""
    small = xp.exp(xp.where(x < 0, x, -x))
    return xp.where(x < 0, small, xp.ones_like(x)) / (1.0 + small)


def _softmax(xp: Namespace, x: Array, axis: int) -> Array:
    """Return exp(x) / Σ exp(x) along an axis."""
    raised = xp.exp(x - xp.max(x, axis=axis, keepdims=True))
    return raised / xp.sum(raised, axis=axis, keepdims=True)


def _log_softmax(xp: Namespace, x: Array, axis: int) -> Array:
    """Return x − log Σ exp(x) along an axis."""
    shifted = x - xp.max(x, axis=axis, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=axis, keepdims=True))


def lowest(xp: Namespace, dtype: Any) -> float:
    """Return the least number of a dtype."""
    return -float("inf") if xp.isdtype(dtype, "real floating") else int(xp.iinfo(dtype).min)


# Sun's fdlibm: rational functions on four intervals, relative error below 1e-16
_ERF_NEAR = (
    (-2.37630166566501626084e-05, -5.77027029648944159157e-03, -2.84817495755985104766e-02, -3.25042107247001499370e-01,
     1.28379167095512558561e-01),
    (-3.96022827877536812320e-06, 1.32494738004321644526e-04, 5.08130628187576562776e-03, 6.50222499887672944485e-02,
     3.97917223959155352819e-01, 1.0),
)  # fmt: skip
_ERF_ONE = (
    (-2.16637559486879084300e-03, 3.54783043256182359371e-02, -1.10894694282396677476e-01, 3.18346619901161753674e-01,
     -3.72207876035701323847e-01, 4.14856118683748331666e-01, -2.36211856075265944077e-03),
    (1.19844998467991074170e-02, 1.36370839120290507362e-02, 1.26171219808761642112e-01, 7.18286544141962662868e-02,
     5.40397917702171048937e-01, 1.06420880400844228286e-01, 1.0),
)  # fmt: skip
_ERF_FAR = (
    (-9.81432934416914548592e00, -8.12874355063065934246e01, -1.84605092906711035994e02, -1.62396669462573470355e02,
     -6.23753324503260060396e01, -1.05586262253232909814e01, -6.93858572707181764372e-01, -9.86494403484714822705e-03),
    (-6.04244152148580987438e-02, 6.57024977031928170135e00, 1.08635005541779435134e02, 4.29008140027567833386e02,
     6.45387271733267880336e02, 4.34565877475229228821e02, 1.37657754143519042600e02, 1.96512716674392571292e01, 1.0),
)  # fmt: skip


def _ratio(x: Array, coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> Array:
    values = []
    for polynomial in coefficients:
        value = x * polynomial[0] + polynomial[1]
        for coefficient in polynomial[2:]:
            value = value * x + coefficient
        values.append(value)
    return values[0] / values[1]


def _erf(xp: Namespace, x: Array) -> Array:
    """Return the error function to rounding."""
    size = xp.abs(x)
    small = xp.where(size < 0.84375, x, xp.zeros_like(x))
    near = small + small * _ratio(small * small, _ERF_NEAR)
    middle = 0.845062911510467529297 + _ratio(xp.where(size < 1.25, size, xp.ones_like(x)) - 1.0, _ERF_ONE)
    # beyond 2.86 erf differs from 1 by less than 6e-5, so this interval's formula, stretched to 6, keeps full precision
    far = xp.where(size < 1.25, xp.full_like(x, 1.25), xp.where(size > 6.0, xp.full_like(x, 6.0), size))
    tail = 1.0 - xp.exp(-far * far - 0.5625 + _ratio(1.0 / (far * far), _ERF_FAR)) / far
    outer = xp.where(size < 1.25, middle, tail)
    signed = xp.where(x < 0, -outer, outer)
    return xp.where(size < 0.84375, near, xp.where(size == size, signed, x))


_DEFAULTS: dict[str, Callable[..., Array]] = {
    "convolution": _convolution,
    "convolution_transpose": _convolution_transpose,
    "max_pool": _max_pool,
    "average_pool": _average_pool,
    "patches": _patches,
    "pad": _pad,
    "lookup": _lookup,
    "scatter": _scatter,
    "einsum": _einsum,
    "relu": _relu,
    "sigmoid": _sigmoid,
    "erf": _erf,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
}
