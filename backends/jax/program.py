"""Programs: the compiled function from parameters and batch to layer statistics, found again by the jaxpr of one sample."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from mgs_core._known import Recent
from mgs_core._protocol import LayerStatistics, Lookup, Outer, Rows, Scale, Sum
from mgs_core._types import Array

from .execute import Parameterised, execute
from .own_rules import loses_rules
from .plan import DATA, Plan, Site, make_plan, undifferentiated
from .versions import ClosedJaxpr, as_function, opened, parts
from .views import View

_programs: Recent[Program] = Recent()


@dataclass(eq=False)
class Program:
    """Hold the plan of one sample's program and the compiled function for the batch.

    Attributes:
        plan: the plan.
        names: of all parameters, in the order of the jaxpr's inputs.
        run: `(parameters, samples, constants) → ([heads (n, k), outputs …], found)`, where `found` is gradients and inputs of the
            sites, and rows of ε by name.
        shapes: shape and dtype of each parameter.
    """

    plan: Plan
    names: tuple[str, ...]
    run: Callable[..., Any]
    shapes: dict[str, jax.ShapeDtypeStruct]

    def statistics(self, found: tuple[list[Any], dict[str, Array]]) -> list[LayerStatistics]:
        """Name the arrays that `run` found.

        Args:
            found: (gradients and inputs of the sites, rows of ε by name).

        Returns:
            The layer statistics.
        """
        sites, rows = found
        statistics = [self._of_site(site, *arrays) for site, arrays in zip(self.plan.sites, sites, strict=True)]
        return statistics + [_of_rows(name, gradients, self.plan.rooted[name]) for name, gradients in rows.items()]

    def _of_site(self, site: Site, gradients: Array, inputs: Array) -> LayerStatistics:
        rule = site.rule
        view = rule.weight
        common: dict[str, Any] = {"parameter": view.parameter, "gradients": gradients, "view": view.keys}
        common["restore"] = view.restore(self.shapes[view.parameter])
        if rule.kind == "outer":
            return Outer(**common, inputs=inputs)
        return Lookup(**common, indices=inputs, size=rule.size * prod(length for length, block in site.loops if block))


def program_for(
    known_by: Hashable, jaxpr: ClosedJaxpr, names: Sequence[str], chosen: Sequence[str], differentiable: bool
) -> Program:
    """Return the program of a traced sample.

    Args:
        known_by: the jaxpr's fingerprint.
        jaxpr: from the parameters and the leaves of one sample to its heads (k,) and whatever is to come out besides; its
            constants are given when it runs.
        names: of the parameters, the first inputs of the jaxpr.
        chosen: those that belong to the kernel.
        differentiable: whether the statistics will be differentiated.

    Returns:
        The program, a known one when the same computation came before.
    """
    key = (known_by, tuple(names), tuple(chosen), differentiable)
    return _programs.put(key, _programs.take(key) or _make(jaxpr, tuple(names), frozenset(chosen), differentiable))


def _make(closed: ClosedJaxpr, names: tuple[str, ...], chosen: frozenset[str], differentiable: bool) -> Program:
    jaxpr, _ = parts(closed)
    variables = jaxpr.invars[: len(names)]
    shapes = {name: jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for name, v in zip(names, variables, strict=True)}
    whole = opened(closed)  # so that one program serves other values of the constants
    origins = [View(name) if name in chosen else None for name in names]
    plan = make_plan(whole, [*[None] * len(jaxpr.constvars), *origins, *[DATA] * (len(jaxpr.invars) - len(names))])
    plan = plan if differentiable else undifferentiated(plan)
    heads, by_itself = jaxpr.outvars[0].aval, as_function(whole) if loses_rules(whole) else None

    def one(parameters: dict[str, Array], sample: list[Array], constants: list[Array]) -> Any:
        def head(taps: list[Array], epsilon: dict[str, Array]) -> tuple[Array, Any]:
            values = [Parameterised(partial(_rooted, value=parameters[n], epsilon=epsilon.get(n))) for n in names]
            given = [v if n in chosen else parameters[n] for n, v in zip(names, values, strict=True)]
            (outputs, *others), records = execute(plan, [*constants, *given, *sample], taps)
            return outputs, (others, records)

        taps = [jnp.zeros((*(length for length, _ in site.loops), *site.tap.shape), site.tap.dtype) for site in plan.sites]
        epsilon = {name: jnp.zeros_like(parameters[name]) for name in names if name in plan.rooted}
        outputs, pull, (others, records) = jax.vjp(head, taps, epsilon, has_aux=True)
        if by_itself is not None:
            outputs, *others = by_itself(*constants, *(parameters[n] for n in names), *sample)
        if heads.shape[0] == 1:
            gradients, rows = jax.tree.map(lambda leaf: leaf[None], pull(jnp.ones_like(outputs)))
        else:
            gradients, rows = jax.vmap(pull)(jnp.eye(heads.shape[0], dtype=heads.dtype))
        sites = [_arranged(site, d, x) for site, d, x in zip(plan.sites, gradients, records, strict=True)]
        return [outputs, *others], (sites, {name: jnp.reshape(row, (heads.shape[0], -1)) for name, row in rows.items()})

    return Program(plan, names, jax.jit(jax.vmap(one, in_axes=(None, 0, None))), shapes)


def _rooted(rooted: bool, *, value: Array, epsilon: Array | None) -> Array:
    return value + epsilon if rooted and epsilon is not None else value


def _arranged(site: Site, gradients: Array, record: Array) -> tuple[Array, Array]:
    """Return the gradients (k, g, s, o) and the inputs (g, s, i) of one sample's site."""
    rule, loops = site.rule, [length for length, _ in site.loops]
    of_gradient, of_inputs, of_valid = rule.gradient, rule.inputs, rule.valid
    for _ in loops:
        of_gradient, of_inputs = jax.vmap(of_gradient), jax.vmap(of_inputs)
        of_valid = of_valid and jax.vmap(of_valid)
    d = jax.vmap(lambda gradient: _merge_loops(of_gradient(gradient), site.loops))(gradients)
    inputs = of_inputs(record)
    if rule.kind == "outer":
        return d, _merge_loops(inputs, site.loops)
    index = _merge_loops(inputs[..., None, :, None], site.loops)[..., 0]
    if of_valid is not None:
        d = jnp.where(_merge_loops(of_valid(record)[..., None, :, None], site.loops), d, 0)
    if len(index) > 1:  # the loops' slices of the table, one below the other, are one table
        index = (
            index.astype(jnp.promote_types(index.dtype, jnp.int32)) + rule.size * jnp.arange(len(index), dtype=jnp.int32)[:, None]
        )
    return jnp.reshape(d, (len(d), -1, d.shape[-1])), jnp.ravel(index)


def _merge_loops(array: Array, loops: Sequence[tuple[int, bool]]) -> Array:
    """Move the axes of loops in (*loops, g, s, features) into g, where they run over the weight, else into s."""
    over_weight = [axis for axis, (_, block) in enumerate(loops) if block]
    shared = [axis for axis, (_, block) in enumerate(loops) if not block]
    g, s, features = array.shape[len(loops) :]
    g, s = g * prod(loops[axis][0] for axis in over_weight), s * prod(loops[axis][0] for axis in shared)
    array = jnp.transpose(array, (*over_weight, len(loops), *shared, len(loops) + 1, len(loops) + 2))
    return jnp.reshape(array, (g, s, features))


def _of_rows(name: str, rows: Array, readers: set[str]) -> LayerStatistics:
    """Return rows (n, k, p) as what they are: the sums over positions have been taken already."""
    if readers <= {"add", "sub", "add_any", "output"}:
        return Sum(parameter=name, gradients=rows[:, :, None])
    if readers <= {"mul", "div", "add", "sub", "add_any", "output"}:
        return Scale(parameter=name, gradients=rows[:, :, None], inputs=jnp.ones((rows.shape[0], 1, rows.shape[2]), rows.dtype))
    return Rows(parameter=name, gradients=rows)
