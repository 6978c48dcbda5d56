"""Plan: decide for each equation of one sample's program how it is evaluated, so that every parameter's use is seen.

Each variable has an origin: it is constant, a view of one parameter, derived from parameters alone, or data. An equation on
which parameters and data meet is a use. A rule may know it: then a zero tap on its output takes the gradient there, and the other
operand is recorded. Otherwise the equation reads the parameters as `θ + ε` with ε = 0, and the gradient in ε is, per sample, that
of all such uses of θ together. Either way nothing is missed, for a parameter can reach the outputs through a use only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import jax
from jax.extend.core import Jaxpr
from jax.extend.core import Literal as LiteralValue

from .equations import INLINED, inner
from .rules import Rule, rule_for
from .versions import ClosedJaxpr, counts_of_scan, parts
from .views import View, views_after


@dataclass(frozen=True)
class Derived:
    """Mark a variable that depends on the named parameters and on no data."""

    parameters: frozenset[str]


class Data:
    """Mark a variable that depends on the sample."""


DATA = Data()
#: None marks a constant.
Origin: TypeAlias = View | Derived | Data | None


@dataclass(frozen=True, eq=False)
class Site:
    """Hold one place where a tap goes.

    Attributes:
        rule: how to read it.
        tap: shape and dtype of the tap, inside the loops.
        loops: of the scans around it, outermost first, the length and whether it runs over an axis of the weight.
    """

    rule: Rule
    tap: jax.ShapeDtypeStruct
    loops: tuple[tuple[int, bool], ...] = ()


Action: TypeAlias = Literal["evaluate", "parameters", "tap", "inline", "checkpoint", "scan"]


@dataclass(frozen=True, eq=False)
class Operation:
    """Say how to evaluate one equation.

    Attributes:
        equation: the equation.
        action: "evaluate" with parameters as `θ + ε`; "parameters": no data takes part, so evaluate when and as it is needed;
            "tap"; or follow a plan for the equation's own jaxpr: "inline", "checkpoint" or "scan".
        place: of the data among the operands, for a tap.
        bind: evaluates the equation, where a rule says how.
    """

    equation: Any
    action: Action
    place: int = 0
    bind: Callable[..., Any] | None = None


@dataclass(frozen=True, eq=False)
class Nested(Operation):
    """Hold the plan of the equation's own jaxpr too."""

    plan: Plan = field(kw_only=True)


@dataclass(eq=False)
class Plan:
    """Hold the decisions for a jaxpr.

    Attributes:
        jaxpr: the jaxpr.
        constants: values of its constant variables.
        inputs: origins of its inputs.
        operations: one for each equation.
        sites: of the taps, in order of evaluation, those of inner plans included.
        rooted: parameters that are read as `θ + ε`, and the primitives that read them.
        outputs: origins of its outputs, as seen by the caller.
    """

    jaxpr: Jaxpr
    constants: Sequence[Any]
    inputs: list[Origin]
    operations: list[Operation] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    rooted: dict[str, set[str]] = field(default_factory=dict)
    outputs: list[Origin] = field(default_factory=list)

    def reads(self, origin: Origin, *, rooted: bool) -> bool:
        """Return whether the value of an input of this origin may be read, with ε or without.

        Args:
            origin: of the input.
            rooted: with ε.

        Returns:
            True when it may.
        """
        if rooted:
            return any(name in self.rooted for name in names_of(origin))
        return isinstance(origin, View) and any(site.rule.weight.parameter == origin.parameter for site in self.sites)


def names_of(origin: Origin) -> frozenset[str]:
    """Return the parameters on which a variable without data depends."""
    if isinstance(origin, View):
        return frozenset({origin.parameter})
    return origin.parameters if isinstance(origin, Derived) else frozenset()


def make_plan(jaxpr: Jaxpr | ClosedJaxpr, inputs: Sequence[Origin], *, close: bool = True) -> Plan:
    """Return the plan of a jaxpr.

    Args:
        jaxpr: the program of one sample, or a part of it.
        inputs: the origin of each input.
        close: read outputs that depend on parameters alone with ε, so that all outputs are data.

    Returns:
        The plan.
    """
    return _Planner(jaxpr, inputs, close).plan


def undifferentiated(plan: Plan) -> Plan:
    """Return the plan for statistics that are not differentiated again: all is left to JAX, whose first derivatives are fast.

    Args:
        plan: the plan.
    """
    operations = [
        replace(operation, bind=None, plan=undifferentiated(operation.plan))
        if isinstance(operation, Nested)
        else replace(operation, bind=None)
        for operation in plan.operations
    ]
    return replace(plan, operations=operations)


class _Planner:
    """Walk one jaxpr."""

    def __init__(self, jaxpr: Jaxpr | ClosedJaxpr, inputs: Sequence[Origin], close: bool) -> None:
        jaxpr, constants = parts(jaxpr)
        self._origins: dict[Any, Origin] = dict.fromkeys(jaxpr.constvars)
        self._origins.update(zip(jaxpr.invars, inputs, strict=True))
        self.plan = Plan(jaxpr, constants, list(inputs))
        self.plan.operations += [self._decide(equation) for equation in jaxpr.eqns]
        for variable in jaxpr.outvars:
            if close:
                self._root(variable, "output")
            self.plan.outputs.append(DATA if close else self._origin(variable))

    def _origin(self, variable: Any) -> Origin:
        return None if isinstance(variable, LiteralValue) else self._origins[variable]

    def _root(self, variable: Any, reader: str) -> None:
        """Note that the variable is read with ε."""
        for name in names_of(self._origin(variable)):
            self.plan.rooted.setdefault(name, set()).add(reader)

    def _decide(self, equation: Any) -> Operation:
        origins = [self._origin(variable) for variable in equation.invars]
        places = [place for place, origin in enumerate(origins) if names_of(origin)]
        name = equation.primitive.name
        if places and name in INLINED:
            plan = make_plan(inner(equation), origins, close=False)
            return self._follow(equation, "inline", plan, plan.outputs, plan.sites)
        if DATA not in origins:
            self._set(equation, _derive(equation, origins) if places else [None] * len(equation.outvars))
            return Operation(equation, "parameters" if places else "evaluate")
        if places and name == "remat2":
            plan = make_plan(inner(equation), origins)
            return self._follow(equation, "checkpoint", plan, plan.outputs, plan.sites)
        if places and name == "scan":
            return self._scan(equation, origins)
        if len(places) == 1 and isinstance(view := origins[places[0]], View):
            rule = rule_for(equation, places[0], view)
            if rule is not None:
                out = equation.outvars[0].aval
                self.plan.sites.append(Site(rule, jax.ShapeDtypeStruct(out.shape, out.dtype)))
                self._set(equation, [DATA])
                return Operation(equation, "tap", 1 - places[0], rule.bind)
        for variable in equation.invars:
            self._root(variable, name)
        self._set(equation, [DATA] * len(equation.outvars))
        return Operation(equation, "evaluate")

    def _scan(self, equation: Any, origins: list[Origin]) -> Operation:
        constants, carried = counts_of_scan(equation)
        sliced_from, length = constants + carried, equation.params["length"]
        for variable in equation.invars[constants:sliced_from]:
            self._root(variable, "scan")
        loop = id(equation)
        sliced = [origin.within(loop) if isinstance(origin, View) else origin for origin in origins[sliced_from:]]
        plan = make_plan(inner(equation), [*origins[:constants], *[DATA] * carried, *sliced])
        sites = [replace(site, loops=((length, loop in site.rule.weight.loops), *site.loops)) for site in plan.sites]
        return self._follow(equation, "scan", plan, [DATA] * len(equation.outvars), sites)

    def _follow(self, equation: Any, action: Action, plan: Plan, outputs: Sequence[Origin], sites: Sequence[Site]) -> Nested:
        """Take over what an inner plan found."""
        self.plan.sites += sites
        for name, readers in plan.rooted.items():
            self.plan.rooted.setdefault(name, set()).update(readers)
        self._set(equation, outputs)
        return Nested(equation, action, plan=plan)

    def _set(self, equation: Any, origins: Sequence[Origin]) -> None:
        self._origins.update(zip(equation.outvars, origins, strict=True))


def _derive(equation: Any, origins: Sequence[Origin]) -> Sequence[Origin]:
    """Return the origins of the outputs of an equation that reads parameters and constants only."""
    if len(origins) == 1 and isinstance(origins[0], View):
        views = views_after(equation, origins[0])
        if views is not None:
            return views
    return [Derived(frozenset().union(*map(names_of, origins)))] * len(equation.outvars)
