"""Models with loops that wait for convergence: the comparison of samples ends, and still sees what they share."""

from __future__ import annotations

import numpy as np
import pytest

import mgs_core as mgs

jax = pytest.importorskip("jax")
jnp = jax.numpy

import jax.experimental  # noqa: E402  # after the skip
import jax.export  # noqa: E402  # after the skip
from mgs_core.adapters.flax import regularized  # noqa: E402  # after the skip

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(5, 3))
WEIGHTS = {
    "inside": 0.3 * RANDOM.normal(size=(16, 16)) / 4,
    "before": RANDOM.normal(size=(3, 16)),
    "after": RANDOM.normal(size=(16, 2)),
}


def network(shared=False, wrapped=False, scanned=False):
    """Return a model of an equilibrium `z = tanh(3 z W + u)`, with a one-step gradient; with random weights it has none."""

    def step(z, w, u):
        z = jnp.tanh(3 * z @ w + u)
        return z - jnp.mean(z, 0) if shared else z

    def solved(w, u):
        def goes_on(state):
            return jnp.max(jnp.abs(state[0] - state[1])) > 1e-9

        return jax.lax.while_loop(goes_on, lambda state: (step(state[0], w, u), state[0]), (jnp.tanh(u), 0 * u))[0]

    solve = jax.jit(solved) if wrapped else solved
    if scanned:
        solve = lambda w, u: jax.lax.scan(lambda z, _: (z + solved(w, u), None), 0 * u, None, length=1)[0]  # noqa: E731  # in turn

    def model(p, x):
        u = x @ p["before"]
        found = jax.lax.stop_gradient(solve(jax.lax.stop_gradient(p["inside"]), jax.lax.stop_gradient(u)))
        return jnp.tanh(3 * found @ p["inside"] + u) @ p["after"]

    return model


@pytest.mark.parametrize("form", [{}, {"wrapped": True}, {"scanned": True}], ids=["plain", "jit", "scan"])
def test_loops_without_an_end_on_other_weights(form):
    with jax.enable_x64(True):
        parameters, model = {name: jnp.asarray(value) for name, value in WEIGHTS.items()}, network(**form)
        rows = jax.vmap(jax.jacrev(lambda p, x: model(p, x[None])[0]), (None, 0))(parameters, jnp.asarray(X))
        flat = jnp.concatenate([row.reshape(5, 2, -1) for row in jax.tree.leaves(rows)], 2)
        truth = jnp.einsum("akp,bkp->ab", flat, flat)
        np.testing.assert_allclose(mgs.kernel(mgs.FunctionalModel(model, parameters), jnp.asarray(X)), truth, rtol=1e-10)
        value, _ = jax.jit(
            regularized(lambda p, x: jnp.mean(model(p, x) ** 2), mgs.Penalty("trace", 0.1), output="trace", outputs=model)
        )(parameters, jnp.asarray(X))
        plain = jnp.mean(model(parameters, jnp.asarray(X)) ** 2)
        assert value - plain == pytest.approx(float(0.1 * jnp.trace(truth) / 5), rel=1e-9)


def test_what_such_a_loop_shares_is_seen():
    model = network(shared=True)
    with pytest.raises(mgs.SamplesInteractError, match="must treat each sample by itself"):
        jax.jit(lambda p, x: mgs.kernel(mgs.FunctionalModel(model, p), x))(WEIGHTS, X)


def test_a_batch_of_unknown_size_is_refused():
    (n,) = jax.export.symbolic_shape("n")
    with pytest.raises(mgs.ArgumentError, match="known number of samples; got n"):
        jax.export.export(jax.jit(lambda x: mgs.kernel(mgs.FunctionalModel(lambda p, x: x @ p, jnp.ones((3, 2))), x)))(
            jax.ShapeDtypeStruct((n, 3), jnp.float32)
        )


def test_a_callback_in_order_is_refused():
    def model(p, x):
        jax.experimental.io_callback(lambda value: None, None, x[0, 0], ordered=True)
        return x @ p

    with pytest.raises(mgs.UnsupportedModelError, match=r"operations that jax\.vmap maps over samples; got one that it does not"):
        mgs.kernel(mgs.FunctionalModel(model, jnp.ones((3, 2))), jnp.ones((4, 3)))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["rounds", "slow", "count"])
def test_long_loops_hide_nothing(kind, shared, jit):
    def loop(x):
        if kind == "slow":  # some 2000 rounds until it converges
            state = (x, x + 1)
            return jax.lax.while_loop(
                lambda s: jnp.max(jnp.abs(s[0] - s[1])) > 1e-5, lambda s: (0.995 * s[0] + 0.005 * x, s[0]), state
            )[0]
        most = jnp.int32(3000) + jnp.int32(0 * x[0, 0])
        if kind == "rounds":
            return jax.lax.fori_loop(0, most, lambda i, a: 0.999 * a + 0.01, x)
        return x * (jax.lax.while_loop(lambda i: i < most, lambda i: i + 1, jnp.int32(0)) > 0)

    def function(p, x):
        outputs = jnp.tanh(jax.lax.stop_gradient(loop(x)) @ p["before"]) @ p["after"]
        return outputs - jnp.mean(outputs, 0) if shared else outputs

    def kernel(p, x):
        return mgs.kernel(mgs.FunctionalModel(function, p), x)

    call, weights = jax.jit(kernel) if jit else kernel, jax.tree.map(jnp.asarray, WEIGHTS)
    if shared:
        with pytest.raises(mgs.SamplesInteractError):
            call(weights, jnp.asarray(X))
    else:
        assert call(weights, jnp.asarray(X)).shape == (5, 5)
