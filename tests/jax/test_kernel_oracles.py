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
    rows, model = jacobian_rows(function, parameters, x), mgs.FunctionalModel(function, parameters)
    full = mgs.kernel(model, x, output="full")
    close(full, np.einsum("acp,bdp->acbd", rows, rows))
    order = np.arange(count(x))[::-1]
    close(mgs.kernel(model, jax.tree.map(lambda leaf: leaf[order], x), output="full"), full[order][:, :, order])


def test_kernel_under_jit_is_the_sum_over_parameters(case):
    function, parameters, x = case
    rows = jacobian_rows(function, parameters, x)
    half = set(list(mgs.get_backend("jax").parameters(mgs.FunctionalModel(function, parameters)))[::2])

    @jax.jit
    def parts(p, x):
        model = mgs.FunctionalModel(function, p)
        return [mgs.kernel(model, x, parameters=lambda name, s=s: (name in half) == s) for s in (True, False)]

    first, second = parts(parameters, x)
    close(first + second, np.einsum("acp,bcp->ab", rows, rows))


@pytest.mark.parametrize("name", ["mlp", "convolutions", "tied"])
def test_chunks_change_nothing(build, name):
    function, parameters, x = build(name)
    model = mgs.FunctionalModel(function, parameters)
    for output in ("full", "sum"):
        close(mgs.kernel(model, x, output=output, chunk_size=2), mgs.kernel(model, x, output=output))


def test_gradient_of_a_penalty_is_that_of_central_differences(case):
    function, parameters, x = case
    penalty = mgs.Penalty("log_determinant", strength=1.0, scale=2.0)

    def head(outputs, targets):
        return jnp.sum((jax.nn.softmax(outputs) - targets) ** 2, axis=1)

    targets = jnp.linspace(0.1, 0.9, count(x))[:, None]

    @jax.jit
    def objective(p):
        model = mgs.FunctionalModel(function, p)
        return penalty(mgs.kernel(model, x, targets, output=head, differentiable=True))

    gradient = jax.jit(jax.grad(objective))(parameters)
    draw = np.random.default_rng(2)
    direction = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape), parameters)
    step = 1e-4  # central differences of fourth order
    at = {i: objective(jax.tree.map(lambda v, d, i=i: v + i * step * d, parameters, direction)) for i in (-2, -1, 1, 2)}
    expected = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)
    actual = sum(np.sum(g * d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    assert float(actual) == pytest.approx(float(expected), rel=1e-6, abs=1e-8)
