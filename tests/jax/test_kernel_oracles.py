"""Kernels on JAX against Jacobian rows of the batched function, and penalties' gradients against central differences."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mgs_core as mgs


@cache
def jacobian_of(function):
    return jax.jit(jax.jacrev(function))


def jacobian_rows(function, parameters, x) -> np.ndarray:
    """Rows (n, c, p) of the batched function, in one go by JAX."""
    leaves = jax.tree.leaves(jacobian_of(function)(parameters, x))
    return np.concatenate([np.reshape(leaf, (*leaf.shape[:2], -1)) for leaf in leaves], axis=-1)


def close(actual, expected, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.max(np.abs(expected)))


def count(x) -> int:
    return len(jax.tree.leaves(x)[0])


def test_kernel_is_that_of_the_jacobian(case):
    function, parameters, x = case
    rows = jacobian_rows(function, parameters, x)

    @jax.jit
    def kernel(p, x):
        return mgs.kernel(mgs.FunctionalModel(function, p), x, output="full")

    full = kernel(parameters, x)
    close(full, np.einsum("acp,bdp->acbd", rows, rows))
    order = np.arange(count(x))[::-1]
    close(kernel(parameters, jax.tree.map(lambda leaf: leaf[order], x)), full[order][:, :, order])


@pytest.mark.parametrize("name", ["mlp", "tied", pytest.param("loops", marks=pytest.mark.slow)])
def test_kernel_without_jit_is_the_sum_over_parameters(build, name):
    function, parameters, x = build(name)
    rows, model = jacobian_rows(function, parameters, x), mgs.FunctionalModel(function, parameters)
    half = set(list(mgs.get_backend("jax").parameters(model))[::2])
    first, second = (mgs.kernel(model, x, parameters=lambda name, s=s: (name in half) == s) for s in (True, False))
    close(first + second, np.einsum("acp,bcp->ab", rows, rows))


@pytest.mark.parametrize("name", ["mlp", "tied", pytest.param("convolutions", marks=pytest.mark.slow)])
def test_chunks_change_nothing(build, name):
    function, parameters, x = build(name)

    @jax.jit
    def kernels(p, x):
        model = mgs.FunctionalModel(function, p)
        return mgs.kernel(model, x, output="full", chunk_size=count(x) - 2), mgs.kernel(model, x, output="full")

    close(*kernels(parameters, x))


def test_heads_are_those_of_the_jacobian(build):
    function, parameters, x = build("mlp")
    rows, labels = jacobian_rows(function, parameters, x), jnp.asarray([0, 2, 1, 1, 0, 2])
    outputs, hot = np.asarray(function(parameters, x)), np.eye(3)[np.asarray(labels)]
    error = np.asarray(jax.nn.softmax(outputs)) - hot  # the gradient of cross-entropy in the outputs
    directions = {
        "sum": np.ones_like(hot),
        "target": hot,
        "loss": error,
        "squares": 2.0 * outputs,
    }
    heads = {"squares": lambda outputs, _: jnp.sum(outputs**2, axis=1)}
    model = mgs.FunctionalModel(function, parameters)
    for name, direction in directions.items():
        g = np.einsum("ac,acp->ap", direction, rows)
        close(mgs.kernel(model, x, labels, output=heads.get(name, name)), g @ g.T)
    probes = mgs.kernel(model, x, output="random", probes=400)
    close(probes, mgs.kernel(model, x), 0.2)


def test_gradient_of_a_penalty_is_that_of_central_differences(light_case):
    function, parameters, x = light_case
    penalty = mgs.Penalty("log_determinant", strength=1.0, scale=2.0)

    def head(outputs, targets):
        return jnp.sum((jax.nn.softmax(outputs) - targets) ** 2, axis=1)

    targets = jnp.linspace(0.1, 0.9, count(x))[:, None]

    @jax.jit
    @jax.value_and_grad
    def objective(p):
        model = mgs.FunctionalModel(function, p)
        return penalty(mgs.kernel(model, x, targets, output=head, differentiable=True))

    gradient = objective(parameters)[1]
    draw = np.random.default_rng(2)
    direction = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape), parameters)
    step = 1e-5  # central differences of fourth order; some of the models bend too much for a longer one
    at = {i: objective(jax.tree.map(lambda v, d, i=i: v + i * step * d, parameters, direction))[0] for i in (-2, -1, 1, 2)}
    expected = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)
    actual = sum(np.sum(g * d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    assert float(actual) == pytest.approx(float(expected), rel=1e-6, abs=1e-8)
