"""Windows and their sums: NumPy's values, each other's transposes under every transformation, one kernel each."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mgs_core.backends.jax import windows as module
from mgs_core.backends.jax.windows import windows

#: Shape of an image, and window, strides and dilations.
KINDS = {
    "one axis": ((11,), (4,), (3,), (2,)),
    "images": ((7, 9), (3, 2), (1, 2), (1, 1)),
    "apart": ((9, 8), (2, 2), (3, 2), (1, 3)),
    "volumes": ((5, 6, 4), (2, 3, 2), (2, 1, 1), (1, 2, 1)),
    "one element": ((5, 6), (1, 1), (1, 2), (1, 1)),
    "large": ((9, 12), (9, 8), (1, 2), (1, 1)),
}


def described(name: str):
    space, window, strides, dilations = KINDS[name]
    spans = [(size - 1) * dilation + 1 for size, dilation in zip(window, dilations, strict=True)]
    out = [(n - span) // stride + 1 for n, span, stride in zip(space, spans, strides, strict=True)]
    return space, {"window": window, "out": out, "strides": strides, "dilations": dilations}, spans


def expected(x: np.ndarray, name: str) -> np.ndarray:
    _, how, spans = described(name)
    axes = tuple(range(x.ndim - len(spans), x.ndim))
    views = np.lib.stride_tricks.sliding_window_view(x, spans, axes)  # (..., *places, *spans)
    lead = (slice(None),) * axes[0]
    views = views[(*lead, *[slice(None, None, s) for s in how["strides"]], *[slice(None, None, d) for d in how["dilations"]])]
    return np.moveaxis(views, range(-len(spans), 0), axes)


def draw(*shape: int):
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape))


@pytest.mark.parametrize("name", KINDS)
def test_windows_and_their_transpose(name):
    space, how, _ = described(name)
    x = draw(2, 3, *space)
    cut = windows(x, **how)
    np.testing.assert_array_equal(cut, expected(np.asarray(x), name))
    d = draw(*cut.shape)
    added, again = jax.jit(lambda d: jax.vjp(lambda d: jax.linear_transpose(lambda x: windows(x, **how), x)(d)[0], d))(d)
    np.testing.assert_allclose(jnp.vdot(added, x), jnp.vdot(d, cut), rtol=1e-12)
    np.testing.assert_array_equal(again(x)[0], cut)  # and of the transpose the windows
    np.testing.assert_allclose(added[:1, 1:2], jax.linear_transpose(lambda x: windows(x, **how), x[:1, 1:2])(d[:1, 1:2])[0])


def test_windows_are_mapped_and_differentiated():
    space, how, _ = described("images")
    x = draw(*space, 4)  # mapped over the last axis

    def energy(x):
        return jnp.sum(jnp.sin(windows(x, **how)) ** 3)

    mapped = jax.vmap(lambda x: windows(x, **how), -1)(x)
    np.testing.assert_array_equal(mapped, expected(np.moveaxis(np.asarray(x), -1, 0), "images"))
    gradient = jax.vmap(jax.grad(energy), -1, -1)(x)
    step, way = 1e-6, draw(*x.shape)
    slope = sum(energy(x[..., at] + step * way[..., at]) - energy(x[..., at] - step * way[..., at]) for at in range(4))
    np.testing.assert_allclose(jnp.vdot(gradient, way), slope / (2 * step), rtol=1e-7)
    turned = jax.jvp(jax.grad(energy), (x[..., 0],), (way[..., 0],))[1]  # forward over reverse, and reverse over forward
    np.testing.assert_allclose(turned, jax.grad(lambda x: jax.jvp(energy, (x,), (way[..., 0],))[1])(x[..., 0]), rtol=1e-12)


def test_each_is_one_kernel_up_to_a_size():
    space, how, _ = described("images")
    x = draw(2, 3, *space)
    cut = windows(x, **how)

    def kernels(function, argument):
        return len(re.findall(r" fusion\(", jax.jit(function).lower(argument).compile().as_text()))

    def add(d):
        return jax.linear_transpose(lambda x: windows(x, **how), x)(d)[0]

    assert (kernels(lambda x: windows(x, **how), x), kernels(add, cut)) == (1, 1)
    space, how, _ = described("large")
    x, pads = draw(*space), 9 + 8  # not 9 · 8: that would be one large kernel that tries each of them for each element
    axes = tuple(zip(space, *how.values(), strict=True))
    text = str(jax.make_jaxpr(lambda d: module._add_windows(d, axes))(windows(x, **how)))
    assert len(re.findall(r"= pad\[", text)) == pads
