"""Examples of Equinox and Haiku: models of both are pure functions of a pytree."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mgs_core as mgs


def rows(function, parameters, x) -> np.ndarray:
    jacobian = jax.jit(jax.jacrev(function))(parameters, x)
    return np.concatenate([np.reshape(leaf, (*leaf.shape[:2], -1)) for leaf in jax.tree.leaves(jacobian)], axis=-1)


def inputs(*shape: int):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape))


def test_equinox():
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 3)
    network = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(2, 4, 3, key=keys[0]),
            eqx.nn.GroupNorm(2, 4),
            eqx.nn.Lambda(jax.nn.gelu),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.MLP(36, 2, 5, 1, key=keys[1]),
        ]
    )
    parameters, static = eqx.partition(network, eqx.is_inexact_array)

    def function(parameters, x):  # an Equinox model takes one sample
        return jax.vmap(eqx.combine(parameters, static))(x)

    model, x = mgs.FunctionalModel(function, parameters), inputs(4, 2, 5, 5)
    expected = np.einsum("acp,bcp->ab", *[rows(function, parameters, x)] * 2)
    np.testing.assert_allclose(mgs.kernel(model, x), expected, rtol=1e-10)
    assert "layers.0.weight" in mgs.get_backend("jax").parameters(model)
    assert mgs.check(model, x).ok

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient_of_penalty(network):
        parameters = eqx.filter(network, eqx.is_inexact_array)
        return mgs.Penalty("trace")(mgs.kernel(mgs.FunctionalModel(function, parameters), x, differentiable=True))

    gradient = gradient_of_penalty(network)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_haiku():
    hk = pytest.importorskip("haiku")

    def forward(x):
        h = hk.LayerNorm(-1, create_scale=True, create_offset=True)(hk.Linear(4)(x))
        return hk.Linear(2)(jnp.mean(jax.nn.relu(h), axis=1))

    network, x = hk.without_apply_rng(hk.transform(forward)), inputs(5, 3, 4)
    parameters = network.init(jax.random.key(0), x)
    model = mgs.FunctionalModel(network.apply, parameters)
    expected = np.einsum("acp,bcp->ab", *[rows(network.apply, parameters, x)] * 2)
    np.testing.assert_allclose(mgs.kernel(model, x), expected, rtol=1e-10)
    assert {layer.kind for layer in mgs.check(model, x).layers} == {"outer", "sum", "scale"}


@pytest.mark.parametrize("network", ["mlp", pytest.param("cnn", marks=pytest.mark.slow)])
def test_comparison_has_the_curves_of_numpy(network):
    pytest.importorskip("onnx")
    pytest.importorskip("sklearn")
    from mgs_core.experiments.recipes import RECIPES
    from mgs_core.experiments.settings import Settings
    from mgs_core.experiments.training import train

    curves = []
    for backend in ("numpy", "jax"):
        settings = Settings(data="digits", samples=128, epochs=2, seeds=1, backend=backend, model=network, probe_samples=16)
        curves.append([record for record in train(RECIPES["mgs-log-determinant"], 0, settings) if record["event"] == "epoch"])
    for ours, theirs in zip(*curves, strict=True):
        for name in ("train_loss", "mgs_trace", "mgs_effective_rank"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
        # near chance, where rounding in single precision decides a test sample or two
        assert ours["test_accuracy"] == pytest.approx(theirs["test_accuracy"], abs=0.005)
