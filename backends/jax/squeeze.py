"""Drop the batch's axis of length 1 from the program of one sample.

A model takes batches, so a sample is traced as a batch of one. Under `vmap` that axis would stay between the samples' and the
others: XLA makes more kernels of such arrays, and copies some. Without it the program is what the batch's own would be.
A leading axis of length 1 says nothing, so that taking it away and putting it back is exact, whatever the primitive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax import lax
from jax.extend.core import Jaxpr, Literal

from mgs_core._types import Array

from .equations import INLINED, bind, inner
from .versions import ClosedJaxpr, parts


class _Short:
    """Hold an array without its leading axis, which has length 1."""

    def __init__(self, array: Array) -> None:
        self.array = array


Value: TypeAlias = Any  # an array, or a _Short one
_Rule: TypeAlias = Callable[[Any, list[Value]], "Value | None"]


def squeezed(closed: ClosedJaxpr) -> ClosedJaxpr:
    """Return a program of the same inputs and outputs that works without leading axes of length 1 where it can.

    Args:
        closed: the program.

    Returns:
        The program, nested calls inlined.
    """

    def run(*inputs: Array) -> list[Array]:
        return [_whole(value) for value in _evaluate(*parts(closed), inputs)]

    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type) for v in parts(closed)[0].invars]
    found: ClosedJaxpr = jax.make_jaxpr(run)(*shapes)
    return found


def _evaluate(jaxpr: Jaxpr, constants: Sequence[Array], inputs: Sequence[Value]) -> list[Value]:
    values: dict[Any, Value] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *inputs), strict=True))

    def value(variable: Any) -> Value:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        operands, name = [value(variable) for variable in equation.invars], equation.primitive.name
        if name in INLINED:
            found = _evaluate(*parts(inner(equation)), operands)
        else:
            rule = _RULES.get(name)
            short = None if rule is None else rule(equation, operands)
            found = bind(equation, [_whole(operand) for operand in operands]) if short is None else [short]
        values.update(zip(equation.outvars, found, strict=True))
    return [value(variable) for variable in jaxpr.outvars]


def _whole(value: Value) -> Array:
    return lax.expand_dims(value.array, (0,)) if isinstance(value, _Short) else value


def _short(value: Value) -> Array:
    return value.array if isinstance(value, _Short) else lax.squeeze(value, (0,))


def _leads(variable: Any) -> bool:
    """Say whether the variable has a leading axis of length 1."""
    return bool(variable.aval.shape[:1] == (1,))


def _lower(axes: Iterable[Any]) -> tuple[int, ...]:
    return tuple(int(axis) - 1 for axis in axes)  # JAX has NumPy's integers among them


def _elementwise(equation: Any, operands: list[Value]) -> Value | None:
    (out,) = equation.outvars
    if not _leads(out):
        return None
    given = [
        _short(value) if variable.aval.ndim == out.aval.ndim else value
        for variable, value in zip(equation.invars, operands, strict=True)
    ]
    return _Short(equation.primitive.bind(*given, **equation.params))


def _reduction(equation: Any, operands: list[Value]) -> Value | None:
    """Drop the axis whether or not it is reduced: of one element nothing is left but itself, or its place."""
    (value,), axes = operands, equation.params["axes"]
    if not isinstance(value, _Short) or (0 in axes and equation.primitive.name in ("argmax", "argmin")):
        return None
    rest = _lower(axis for axis in axes if axis)
    found = equation.primitive.bind(value.array, **equation.params | {"axes": rest}) if rest else value.array
    return found if 0 in axes else _Short(found)


def _broadcast(equation: Any, operands: list[Value]) -> Value | None:
    value, *sizes = operands
    axes, shape = equation.params["broadcast_dimensions"], equation.params["shape"]
    if sizes or shape[:1] != (1,):
        return None
    if axes[:1] == (0,):
        value, axes = _short(value), axes[1:]
    elif isinstance(value, _Short):
        return None
    return _Short(lax.broadcast_in_dim(value, shape[1:], _lower(axes)))


def _reshape(equation: Any, operands: list[Value]) -> Value | None:
    value, *sizes = operands
    if sizes or equation.params["dimensions"] is not None:
        return None
    array, shape = value.array if isinstance(value, _Short) else value, equation.params["new_sizes"]
    return _Short(lax.reshape(array, shape[1:])) if shape[:1] == (1,) else lax.reshape(array, shape)


def _squeeze(equation: Any, operands: list[Value]) -> Value | None:
    (value,), axes = operands, equation.params["dimensions"]
    if not isinstance(value, _Short):
        return None
    array = lax.squeeze(value.array, _lower([axis for axis in axes if axis]))
    return array if 0 in axes else _Short(array)


def _transpose(equation: Any, operands: list[Value]) -> Value | None:
    (value,), order = operands, equation.params["permutation"]
    return _Short(lax.transpose(value.array, _lower(order[1:]))) if isinstance(value, _Short) and order[0] == 0 else None


def _slice(equation: Any, operands: list[Value]) -> Value | None:
    (value,), params = operands, equation.params
    if not isinstance(value, _Short) or not _leads(equation.outvars[0]):
        return None
    strides = params["strides"]
    return _Short(lax.slice(value.array, params["start_indices"][1:], params["limit_indices"][1:], strides and strides[1:]))


def _product(equation: Any, operands: list[Value]) -> Value | None:
    """Drop the axis where it is the first of the left operand and not summed over, or the first batch axis of both."""
    left, right = operands
    (left_axes, right_axes), (left_batch, right_batch) = equation.params["dimension_numbers"]
    if left_batch[:1] == right_batch[:1] == (0,) and all(map(_leads, equation.invars)):
        axes, batch = (_lower(left_axes), _lower(right_axes)), (_lower(left_batch[1:]), _lower(right_batch[1:]))
        given = (_short(left), _short(right))
    elif _leads(equation.invars[0]) and not left_batch and 0 not in left_axes:
        axes, batch, given = (_lower(left_axes), right_axes), ((), ()), (_short(left), _whole(right))
    else:
        return None
    return _Short(equation.primitive.bind(*given, **equation.params | {"dimension_numbers": (axes, batch)}))


_ELEMENTWISE = (
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy cos cosh digamma div "
    "eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log log1p log2 logistic lt max min mul ne "
    "neg nextafter not one_minus_square or pow rem round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan tanh xor"
)
_REDUCTIONS = "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum"
_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_REDUCTIONS.split(), _reduction),
    "broadcast_in_dim": _broadcast,
    "dot_general": _product,
    "reshape": _reshape,
    "slice": _slice,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
