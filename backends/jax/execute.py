"""Follow a plan: evaluate one sample with taps and ε in place, and record the layers' inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from mgs_core._types import Array

from .equations import bind
from .plan import Nested, Operation, Plan, names_of
from .versions import counts_of_scan


class Parameterised:
    """Hold a value that depends on parameters alone: θ itself or `θ + ε`, each computed when it is first read."""

    def __init__(self, compute: Callable[[bool], Array]) -> None:
        """Hold the function from "with ε" to the value."""
        self._compute = compute
        self._known: dict[bool, Array] = {}

    def read(self, rooted: bool) -> Array:
        """Return the value, with ε or without."""
        if rooted not in self._known:
            self._known[rooted] = self._compute(rooted)
        return self._known[rooted]


def execute(plan: Plan, inputs: Sequence[Any], taps: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """Evaluate the plan's jaxpr.

    Args:
        plan: the plan.
        inputs: arrays, or `Parameterised` where the plan's origin is a parameter.
        taps: one for each site, the axes of its loops first.

    Returns:
        (outputs, the other operand of each site).
    """
    records: list[Array] = []
    outputs = _Execution(plan, inputs, iter(taps), records).outputs
    return [value.read(True) if isinstance(value, Parameterised) else value for value in outputs], records


class _Execution:
    def __init__(self, plan: Plan, inputs: Sequence[Any], taps: Iterator[Array], records: list[Array]) -> None:
        self._values: dict[Any, Any] = dict(zip(plan.jaxpr.constvars, plan.constants, strict=True))
        self._values.update(zip(plan.jaxpr.invars, inputs, strict=True))
        self._taps, self._records = taps, records
        for operation in plan.operations:
            results = _ACTIONS[operation.action](self, operation)
            self._values.update(zip(operation.equation.outvars, results, strict=True))
        self.outputs = [self._value(variable) for variable in plan.jaxpr.outvars]

    def _value(self, variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else self._values[variable]

    def _array(self, variable: Any, rooted: bool = True) -> Array:
        value = self._value(variable)
        return value.read(rooted) if isinstance(value, Parameterised) else value

    def _evaluate(self, operation: Operation) -> Sequence[Any]:
        return bind(operation.equation, [self._array(variable) for variable in operation.equation.invars])

    def _of_parameters(self, operation: Operation) -> Sequence[Any]:
        equation = operation.equation
        operands = [self._value(variable) for variable in equation.invars]

        def compute(rooted: bool) -> Any:
            return bind(equation, [v.read(rooted) if isinstance(v, Parameterised) else v for v in operands])

        both = Parameterised(compute)
        return [Parameterised(partial(_entry, both, at)) for at in range(len(equation.outvars))]

    def _tap(self, operation: Operation) -> Sequence[Any]:
        self._records.append(self._array(operation.equation.invars[operation.place]))
        operands = [self._array(variable, rooted=False) for variable in operation.equation.invars]
        out = operation.bind(*operands) if operation.bind else bind(operation.equation, operands)[0]
        return [out + next(self._taps)]

    def _inline(self, operation: Nested) -> Sequence[Any]:
        inputs = [self._value(variable) for variable in operation.equation.invars]
        outputs: Sequence[Any] = _Execution(operation.plan, inputs, self._taps, self._records).outputs
        return outputs

    def _checkpoint(self, operation: Nested) -> Sequence[Any]:
        plan, params = operation.plan, operation.equation.params

        def inner(inputs: list[Any], taps: list[Array]) -> tuple[list[Array], list[Array]]:
            return execute(plan, [_unpack(value) for value in inputs], taps)

        prevent_cse = bool(np.any(params["prevent_cse"]))  # perhaps one flag for each argument
        rematerialised = jax.checkpoint(inner, prevent_cse=prevent_cse, policy=params["policy"])
        outputs, records = rematerialised(self._pack(operation), self._take(plan))
        self._records += records
        return list(outputs)

    def _scan(self, operation: Nested) -> Sequence[Any]:
        plan, params = operation.plan, operation.equation.params
        packed = self._pack(operation)
        constants, carried = counts_of_scan(operation.equation)
        sliced_from = constants + carried

        def body(
            carry: list[Array], slices: tuple[list[Any], list[Array]]
        ) -> tuple[list[Array], tuple[list[Array], list[Array]]]:
            sliced, taps = slices
            inputs = [*map(_unpack, packed[:constants]), *carry, *map(_unpack, sliced)]
            outputs, records = execute(plan, inputs, taps)
            return outputs[: len(carry)], (outputs[len(carry) :], records)

        start = [jnp.asarray(self._array(variable)) for variable in operation.equation.invars[constants:sliced_from]]
        carry, (stacked, records) = lax.scan(
            body, start, (packed[sliced_from:], self._take(plan)),
            length=params["length"], reverse=params["reverse"], unroll=params["unroll"],
        )  # fmt: skip
        self._records += records
        return [*carry, *stacked]

    def _take(self, plan: Plan) -> list[Array]:
        return [next(self._taps) for _ in plan.sites]

    def _pack(self, operation: Nested) -> list[Any]:
        """Return the inner plan's inputs as trees of arrays, of parameters only what it reads."""
        packed: list[Any] = []
        for variable, origin in zip(operation.equation.invars, operation.plan.inputs, strict=True):
            value = self._value(variable)
            if names_of(origin):
                value = {
                    str(rooted): value.read(rooted) for rooted in (False, True) if operation.plan.reads(origin, rooted=rooted)
                }
            elif isinstance(value, Parameterised):
                value = value.read(True)
            packed.append(value)
        return packed


def _entry(values: Parameterised, at: int, rooted: bool) -> Array:
    return values.read(rooted)[at]


def _unpack(value: Any) -> Any:
    return Parameterised(lambda rooted: value[str(rooted)]) if isinstance(value, dict) else value


_ACTIONS: dict[str, Callable[[_Execution, Any], Sequence[Any]]] = {
    "evaluate": _Execution._evaluate,
    "parameters": _Execution._of_parameters,
    "tap": _Execution._tap,
    "inline": _Execution._inline,
    "checkpoint": _Execution._checkpoint,
    "scan": _Execution._scan,
}
