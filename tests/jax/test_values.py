"""Models in which values decide whether samples interact: a later batch that mixes them is refused, as the first would be."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mgs_core as mgs

_N = 6
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(_N, 3))
PARAMETERS = {"w": RANDOM.normal(size=(3, 5)), "v": RANDOM.normal(size=(5, 2))}
GROUPS = np.array([0, 0, 0, 1, 1, 1])


def attention(h, g):
    scores = jnp.where(g[:, None] == g, h @ h.T, -jnp.inf)
    return h + jax.nn.softmax(scores) @ h


# how h (n, d) goes on, by what the batch brings along: at first each sample for itself, then not
MIXING = {
    "factor": (lambda h, s: h + s * jnp.mean(h, 0), np.zeros((_N, 1)), np.ones((_N, 1))),
    "gate": (lambda h, s: h + jax.nn.relu(jnp.mean(jnp.tanh(h), 0) + s), np.full((_N, 1), -2.0), np.full((_N, 1), 2.0)),
    "attention within groups": (attention, np.arange(_N), GROUPS),
    "mask of pairs": (
        lambda h, g: jnp.sum(jnp.where((g[:, None] == g)[..., None], jnp.tanh(h)[None], 0.0), 1),
        np.arange(_N),
        GROUPS,
    ),
    "sort": (lambda h, s: jnp.sort(jnp.tanh(h) + 10 * s, 0), np.arange(6.0)[:, None], -np.arange(6.0)[:, None]),
}


def function_of(mix):
    return lambda p, inputs: jnp.tanh(mix(inputs["x"] @ p["w"], inputs["given"])) @ p["v"]


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("name", MIXING)
def test_a_later_batch_that_mixes_samples_is_refused(name, before):
    mix, *given = MIXING[name]
    alone, together = map(jnp.asarray, given)
    parameters = jax.tree.map(jnp.asarray, PARAMETERS)
    model = mgs.FunctionalModel(function_of(mix), parameters)

    def expected(given):  # of the whole batch: each sample's gradient with all that it depends on
        jacobian = jax.jacrev(lambda p: jnp.sum(model.function(p, {"x": X, "given": given}), 1))(parameters)
        rows = np.concatenate([np.reshape(part, (_N, -1)) for part in jax.tree.leaves(jacobian)], 1)
        return rows @ rows.T

    for _ in range(before):
        np.testing.assert_allclose(mgs.kernel(model, {"x": X, "given": alone}, output="sum"), expected(alone), atol=1e-10)
    for _ in range(2):
        with pytest.raises(mgs.SamplesInteractError, match="treat each sample by itself"):
            mgs.kernel(model, {"x": X, "given": together}, output="sum")
    np.testing.assert_allclose(mgs.kernel(model, {"x": X, "given": alone}, output="sum"), expected(alone), atol=1e-10)


@pytest.mark.parametrize("order", [(0.0, 1.0, 1.0, 0.0), (1.0, 0.0, 1.0, 0.0)])
@pytest.mark.parametrize("jit", [False, True])
def test_a_constant_that_is_closed_over_belongs_to_the_verdict(order, jit):
    parameters = jax.tree.map(jnp.asarray, PARAMETERS)
    for scale in order:
        constant = jnp.full(5, scale)

        def function(p, x, constant=constant):
            h = x @ p["w"]
            return jnp.tanh(h + constant * jnp.mean(h, 0)) @ p["v"]

        def kernel(p, function=function):
            return mgs.kernel(mgs.FunctionalModel(function, p), X)

        if scale:
            with pytest.raises(mgs.SamplesInteractError, match="treat each sample by itself"):
                (jax.jit(kernel) if jit else kernel)(parameters)
        else:
            (jax.jit(kernel) if jit else kernel)(parameters)
