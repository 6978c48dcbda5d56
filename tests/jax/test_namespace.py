"""The namespace's native versions of the ONNX extensions against the portable defaults, and the symmetric product."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mgs_core as mgs
from mgs_core.onnx import extensions

XP = mgs.get_backend("jax").namespace


def draw(*shape: int):
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape))


CALLS = {
    "convolution": lambda: (
        (draw(2, 4, 6, 5), draw(6, 2, 3, 2)),
        {"strides": (2, 1), "pads": ((1, 2), (0, 1)), "dilations": (1, 2), "groups": 2},
    ),
    "pad": lambda: ((draw(2, 3), ((1, 0), (2, 1))), {"value": -3.0}),
    "lookup": lambda: ((draw(5, 3), jnp.asarray([[0, 4], [2, 2]])), {}),
    "einsum": lambda: (("abc,cd->bd", draw(2, 3, 4), draw(4, 5)), {}),
    "relu": lambda: ((draw(3, 4),), {}),
    "erf": lambda: ((3.0 * draw(3, 4),), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_native_extensions_are_the_portable_ones(name):
    arguments, options = CALLS[name]()
    native = getattr(XP, f"mgs_{name}")(*arguments, **options)
    portable = extensions._DEFAULTS[name](jnp, *arguments, **options)
    np.testing.assert_allclose(native, portable, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_scatter(reduction):
    data, at, updates = draw(5), jnp.asarray([1, 3, 1]), draw(3)
    native = XP.mgs_scatter(data, at, updates, reduction=reduction)
    np.testing.assert_allclose(native, extensions._DEFAULTS["scatter"](jnp, data, at, updates, reduction=reduction), rtol=1e-12)
    none = jnp.zeros(0, int)
    np.testing.assert_array_equal(XP.mgs_scatter(data, none, draw(0), reduction=reduction), data)


def test_scatter_refuses_other_reductions():
    with pytest.raises(mgs.ArgumentError, match="`reduction` must be none, add, mul, max, min; got 'mean'"):
        XP.mgs_scatter(draw(2), jnp.zeros(1, int), draw(1), reduction="mean")


def test_symmetric_product_has_the_derivatives_of_the_product():
    rows, weights = draw(3, 2), draw(3, 3)

    def symmetric(r):
        return jnp.sum(weights * XP.mgs_product(r, r) ** 2)

    def plain(r):
        return jnp.sum(weights * (r @ jnp.swapaxes(r, -1, -2)) ** 2)

    np.testing.assert_allclose(jax.jit(jax.grad(symmetric))(rows), jax.jit(jax.grad(plain))(rows), rtol=1e-12)
    np.testing.assert_allclose(jax.jit(jax.hessian(symmetric))(rows), jax.jit(jax.hessian(plain))(rows), rtol=1e-11, atol=1e-12)
    other = draw(5, 2)
    np.testing.assert_allclose(XP.mgs_product(rows, other), rows @ jnp.swapaxes(other, -1, -2), rtol=1e-12)


def test_log_determinant_has_the_derivatives_of_the_determinant():
    rows = draw(5, 4)

    def of(log_determinant):
        return lambda rows: log_determinant(rows @ rows.T)

    ours = of(lambda kernel: XP.mgs_log_determinant(kernel, 1e-15))
    plain = of(lambda kernel: jnp.linalg.slogdet(jnp.eye(5) + kernel)[1])
    np.testing.assert_allclose(ours(rows), plain(rows), rtol=1e-12)
    np.testing.assert_allclose(jax.grad(ours)(rows), jax.grad(plain)(rows), rtol=1e-10)
    np.testing.assert_allclose(jax.hessian(ours)(rows), jax.hessian(plain)(rows), rtol=1e-8, atol=1e-10)
    assert jnp.isnan(XP.mgs_log_determinant(-2.0 * jnp.eye(3), 1e-15))
    for eps, ridge in ((0.01, 1.0), (0.5, 4.0 * 3.0**0.5)):
        for of in (
            XP.mgs_log_determinant,
            jax.jit(lambda kernel, eps: jax.value_and_grad(XP.mgs_log_determinant)(kernel, eps)[0], static_argnums=1),
        ):
            expected = 3.0 * (np.log(2.0 + ridge) - np.log(ridge) * ridge / (ridge + 2.0))
            np.testing.assert_allclose(of(2.0 * jnp.eye(3), eps), expected, rtol=1e-12)
    rows = 100.0 * jnp.asarray(np.random.default_rng(0).normal(size=(256, 1)), dtype=jnp.float32)
    expected = np.log1p(float(np.sum(np.asarray(rows, dtype=np.float64) ** 2))) / 256
    # how much rounding leaves depends on the threads of the library that factors
    np.testing.assert_allclose(mgs.Penalty("log_determinant", 1.0)(rows @ rows.T), expected, rtol=2e-2)
