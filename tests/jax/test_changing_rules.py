"""Derivative rules of the user's own that read what changes; what is compiled again, and what is not."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mgs_core.backends.jax import program

import mgs_core as mgs

SLOPE = 1.0
ARRAY = np.float64(1.0)
X = np.random.default_rng(0).normal(size=(5, 3))


def parameters():
    draw = np.random.default_rng(1)
    return {"w": jnp.asarray(draw.normal(size=(3, 4))), "v": jnp.asarray(draw.normal(size=(4, 2)))}


class Settings:
    slope = 1.0


def step(v):
    return (v > 0).astype(v.dtype)


def by_vjp(slope):
    spike = jax.custom_vjp(step)
    spike.defvjp(lambda v: (spike(v), v), lambda v, g: (g / (1 + slope() * jnp.abs(v)) ** 2,))
    return spike


def by_jvp(slope):
    spike = jax.custom_jvp(step)
    spike.defjvp(lambda primals, tangents: (spike(*primals), tangents[0] / (1 + slope() * jnp.abs(primals[0])) ** 2))
    return spike


def trace(spike, p):
    return jnp.trace(mgs.kernel(mgs.FunctionalModel(lambda p, x: spike(x @ p["w"]) @ p["v"], p), X, differentiable=True))


def by_loop(spike, p):
    jacobian = jax.vmap(lambda x: jax.jacrev(lambda p: spike(x[None] @ p["w"])[0] @ p["v"])(p))(X)
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(jacobian))


SLOPES = [lambda: SLOPE, lambda: ARRAY, lambda: Settings.slope]


@pytest.mark.parametrize("make", [by_vjp, by_jvp])
@pytest.mark.parametrize("slope", SLOPES, ids=["global", "array", "attribute"])
def test_rules_are_those_of_the_call(make, slope, monkeypatch):
    spike, found = make(slope), []
    for value in (1.0, 25.0):
        monkeypatch.setitem(globals(), "SLOPE", value)
        monkeypatch.setitem(globals(), "ARRAY", jnp.asarray(value))
        monkeypatch.setattr(Settings, "slope", value)
        found.append(float(trace(spike, parameters())))
        np.testing.assert_allclose(found[-1], by_loop(spike, parameters()), rtol=1e-12)
        np.testing.assert_allclose(jax.jit(lambda p: trace(spike, p))(parameters()), found[-1], rtol=1e-12)
    assert found[0] > 1.1 * found[1]


RULES = {
    "left": lambda primals, tangents: (primals[0] * primals[1], tangents[0] * primals[1]),
    "right": lambda primals, tangents: (primals[0] * primals[1], primals[0] * tangents[1]),
}


def test_rules_that_differ_in_what_they_differentiate_are_told_apart():
    p = parameters()
    for rule in RULES.values():
        half = jax.custom_jvp(lambda a, b: a * b)
        half.defjvp(rule)

        def function(p, x, half=half):
            return half(x @ p["w"], x @ jnp.tanh(p["w"])) @ p["v"]

        jacobian = jax.vmap(lambda x, function=function: jax.jacrev(lambda p: function(p, x[None])[0])(p))(X)
        expected = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(jacobian))
        np.testing.assert_allclose(jnp.trace(mgs.kernel(mgs.FunctionalModel(function, p), X)), expected, rtol=1e-12)


@dataclass
class Rule:
    """One that cannot be hashed."""

    slope: float

    def __call__(self, primals, tangents):
        return step(*primals), self.slope * tangents[0]


def test_rules_may_be_objects_that_change():
    spike, rule = jax.custom_jvp(step), Rule(1.0)
    spike.defjvp(rule)
    found = []
    for rule.slope in (1.0, 3.0):
        found.append(float(trace(spike, {"w": parameters()["w"], "v": parameters()["v"]})))
        np.testing.assert_allclose(found[-1], by_loop(spike, parameters()), rtol=1e-12)
    assert found[1] > found[0]


def test_rules_within_rules_are_those_of_the_call(monkeypatch):
    inner = by_jvp(lambda: SLOPE)  # whose derivative only a penalty takes
    spike = jax.custom_jvp(step)
    spike.defjvp(lambda primals, tangents: (spike(*primals), tangents[0] * (1 + inner(*primals))))
    for value in (1.0, 25.0):
        monkeypatch.setitem(globals(), "SLOPE", value)
        found, expected = (jax.grad(lambda p, f=f: f(spike, p))(parameters())["w"] for f in (trace, by_loop))
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def made(monkeypatch, *functions):
    """Return how many programs are made for kernels of functions, called one after the other."""
    count, original = [], program._make
    monkeypatch.setattr(program, "_programs", type(program._programs)())
    monkeypatch.setattr(program, "_make", lambda *given: (count.append(1), original(*given))[1])
    for function in functions:
        mgs.kernel(mgs.FunctionalModel(lambda p, x, f=function: f(x @ p["w"]) @ p["v"], parameters()), X)
    return len(count)


def test_rules_that_are_made_anew_and_do_the_same_are_compiled_once(monkeypatch):
    def quantised():
        scale = jnp.asarray([0.5])
        q = jax.custom_vjp(lambda v: jnp.round(v / scale) * scale)
        q.defvjp(lambda v: (q(v), None), lambda _, g: (g * scale,))
        return q

    assert made(monkeypatch, quantised(), quantised()) == 1
    assert made(monkeypatch, by_jvp(SLOPES[0]), by_jvp(SLOPES[0])) == 1


def test_policies_that_close_over_sets_are_compiled_once(monkeypatch):
    def checkpointed(*names):
        return lambda v: jax.checkpoint(lambda v: jnp.sin(v) * v, policy=jax.checkpoint_policies.save_only_these_names(*names))(v)

    assert made(monkeypatch, *(checkpointed(*names) for names in ("ab", "ba", "ac"))) == 2


def test_a_rule_that_cannot_be_traced_is_not_in_the_way_of_what_is_not_differentiated():
    rough = jax.custom_vjp(jnp.sign)
    rough.defvjp(lambda v: 1 / 0, lambda _, g: (g,))
    model = mgs.FunctionalModel(lambda p, x: rough(x) @ p["w"][:, :2], parameters())
    np.testing.assert_allclose(mgs.kernel(model, X), 2.0 * np.sign(X) @ np.sign(X).T)
