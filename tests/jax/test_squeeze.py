"""The program of one sample without the batch's axis: the same values, and no axis of length 1 left where a rule drops it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from mgs_core.backends.jax import interaction
from mgs_core.backends.jax.squeeze import squeezed

import mgs_core as mgs


def of_one(function, parameters, x):
    """Return the program of a batch of one, from parameters and a sample."""
    return jax.make_jaxpr(lambda p, x: function(p, jax.tree.map(lambda leaf: leaf[None], x)))(parameters, x)


def compare(program, *inputs):
    leaves = jax.tree.leaves(inputs)
    expected, found = (jax.jit(jax.extend.core.jaxpr_as_fun(closed))(*leaves) for closed in (program, squeezed(program)))
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)


def test_every_model_has_the_same_values(light_case):
    function, parameters, x = light_case
    sample = jax.tree.map(lambda leaf: leaf[0], x)
    compare(of_one(function, parameters, sample), parameters, sample)


def draw(*shape: int):
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape))


#: Functions of a batch x (1, 3, 4), and the primitives that have outputs of three axes afterwards, which makes one too many.
DROPPED = {
    "elementwise": (lambda x: jnp.where(x > 0, jnp.tanh(x) ** 3, jnp.clip(x, -1.0, 0.5) / 2.0).astype(jnp.float32), set()),
    "elementwise with length 1": (lambda x: x - lax.sub(x[:, :1], jnp.ones(())), set()),
    "reductions": (lambda x: jnp.sum(x, 1) + jnp.max(x, (1, 2))[:, None] * jnp.argmin(x, 2)[:, :1], set()),
    "transposition": (lambda x: jnp.transpose(x, (0, 2, 1)), set()),
    "reshape": (lambda x: lax.slice(jnp.reshape(x, (1, 2, 6)), (0, 0, 1), (1, 2, 5), (1, 2, 1)), set()),
    "layer": (lambda x: jnp.sin(x @ draw(4, 2) + draw(2)) @ draw(2, 3), set()),
    "layer without positions": (lambda x: jnp.sum(x, 1) @ draw(4, 2), set()),
    "attention": (lambda x: jnp.einsum("nij,nkj->nik", x, jnp.sin(x)), set()),
    "calls": (lambda x: jax.jit(lambda x: jax.jit(jnp.sin)(x) + 1.0)(x), set()),
    "weights on the left": (
        lambda x: lax.dot_general(draw(2, 3), x, (((1,), (1,)), ((), ()))),
        {"broadcast_in_dim", "dot_general"},
    ),
    "reductions of the axis": (lambda x: jnp.sum(jnp.sin(x), 0) + jnp.max(x, (0, 2))[:, None], set()),
    "places on the axis": (lambda x: jnp.argmax(jnp.sin(x), 0), {"broadcast_in_dim"}),
    "a product over the axis": (lambda x: jnp.einsum("nij,nkj->ik", x, jnp.sin(x)), {"broadcast_in_dim"}),
    "moved": (lambda x: jnp.swapaxes(jnp.sin(x), 0, 1), {"broadcast_in_dim", "transpose"}),
    "unknown": (lambda x: jnp.sin(jnp.sort(x, 1)), {"broadcast_in_dim", "sort"}),
}


@pytest.mark.parametrize("name", DROPPED)
def test_axes_of_length_1_are_dropped(name):
    function, left = DROPPED[name]
    sample = draw(3, 4)
    program = jax.make_jaxpr(lambda x: jnp.sum(function(x[None])))(sample)
    compare(program, sample)
    assert {e.primitive.name for e in squeezed(program).jaxpr.eqns if e.outvars[0].aval.ndim == 3} == left


def test_options_that_xla_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setattr(interaction, "_QUICKLY", {"xla_backend_optimization_level": 0, "xla_of_another_version": True})
    for name in ("_verdicts", "_comparisons"):
        monkeypatch.setattr(interaction, name, type(getattr(interaction, name))())
    given, compile_ = [], jax.stages.Lowered.compile

    def compile_with(lowered, options=None):
        given.append(options)
        return compile_(lowered, options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_with)
    model = mgs.FunctionalModel(lambda p, x: jnp.sin(x @ p), draw(3, 2))
    assert mgs.kernel(model, draw(4, 3)).shape == (4, 4)
    assert given == [interaction._QUICKLY, {"xla_backend_optimization_level": 0}]
    with pytest.raises(mgs.SamplesInteractError):
        mgs.kernel(mgs.FunctionalModel(lambda p, x: jnp.sin(x @ p - jnp.mean(x)), draw(3, 2)), draw(4, 3))


@pytest.mark.parametrize(
    "mixing",
    [
        lambda h: h + jnp.sum(h, axis=0, keepdims=True),
        lambda h: h + jnp.max(h, axis=0),
        lambda h: h + jnp.reshape(h, (-1,))[: h.shape[1]],
        lambda h: h + h[:1],
        lambda h: h + h[::-1],
    ],
)
def test_a_program_that_is_alike_for_one_sample_has_a_verdict_of_its_own(mixing):
    """Of one sample each of these is `h + h`, whose samples do not interact."""
    parameters, x = {"w": draw(3, 2)}, draw(4, 3)
    mgs.kernel(mgs.FunctionalModel(lambda p, x: (lambda h: h + h)(jnp.tanh(x @ p["w"])), parameters), x)
    with pytest.raises(mgs.SamplesInteractError):
        mgs.kernel(mgs.FunctionalModel(lambda p, x: mixing(jnp.tanh(x @ p["w"])), parameters), x)
