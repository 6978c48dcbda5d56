"""The networks of the JAX benchmarks, for any version of JAX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass
class Case:
    """Hold a network, its parameters and a batch."""

    function: Callable[[Any, Any], Any]
    parameters: Any
    x: Any
    y: Any


def mlp(n: int) -> Case:
    """Return a perceptron 784-512-512-10."""
    draw = np.random.default_rng(0)
    sizes = [(784, 512), (512, 512), (512, 10)]
    p = [{"w": jnp.asarray(draw.normal(size=s) * (2 / s[0]) ** 0.5, jnp.float32), "b": jnp.zeros(s[1])} for s in sizes]

    def function(p: Any, x: Any) -> Any:
        for layer in p[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return x @ p[-1]["w"] + p[-1]["b"]

    return Case(function, p, jnp.asarray(draw.normal(size=(n, 784)), jnp.float32), jnp.asarray(draw.integers(0, 10, n)))


def cnn(n: int) -> Case:
    """Return a convolutional network on 32×32×3: 32, 64/2, 64, 128/2 channels, mean, dense."""
    draw = np.random.default_rng(0)
    sizes, strides = [(3, 32), (32, 64), (64, 64), (64, 128)], [1, 2, 1, 2]
    p = [
        {"w": jnp.asarray(draw.normal(size=(3, 3, *s)) * (2 / 9 / s[0]) ** 0.5, jnp.float32), "b": jnp.zeros(s[1])} for s in sizes
    ]
    p.append({"w": jnp.asarray(draw.normal(size=(128, 10)) / 128**0.5, jnp.float32), "b": jnp.zeros(10)})

    def function(p: Any, x: Any) -> Any:
        for layer, stride in zip(p[:-1], strides, strict=True):
            x = jax.lax.conv_general_dilated(x, layer["w"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jax.nn.relu(x + layer["b"])
        return jnp.mean(x, (1, 2)) @ p[-1]["w"] + p[-1]["b"]

    return Case(function, p, jnp.asarray(draw.normal(size=(n, 32, 32, 3)), jnp.float32), jnp.asarray(draw.integers(0, 10, n)))


def transformer(n: int, d: int = 128, length: int = 64, layers: int = 4, words: int = 1000) -> Case:
    """Return an encoder with pre-normalisation, four heads and learnt positions."""
    draw = np.random.default_rng(0)

    def matrix(*shape: int) -> Any:
        return jnp.asarray(draw.normal(size=shape) / shape[0] ** 0.5, jnp.float32)

    def norm() -> Any:
        return {"g": jnp.ones(d), "b": jnp.zeros(d)}

    def layer() -> Any:
        attention = {name: matrix(d, d) for name in "qkvo"}
        return {"n1": norm(), "n2": norm(), **attention, "w1": matrix(d, 4 * d), "b1": jnp.zeros(4 * d), "w2": matrix(4 * d, d)}

    p = {"table": matrix(words, d) * words**0.5, "position": matrix(length, d), "layers": [layer() for _ in range(layers)]}
    p |= {"norm": norm(), "out": matrix(d, 10)}

    def normalise(p: Any, x: Any) -> Any:
        x = x - jnp.mean(x, -1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * p["g"] + p["b"]

    def heads(x: Any) -> Any:
        return jnp.reshape(x, (*x.shape[:-1], 4, d // 4))

    def function(p: Any, x: Any) -> Any:
        h = p["table"][x] + p["position"]
        for layer in p["layers"]:
            z = normalise(layer["n1"], h)
            q, k, v = (heads(z @ layer[name]) for name in "qkv")
            scores = jax.nn.softmax(jnp.einsum("nshd,nthd->nhst", q, k) / (d // 4) ** 0.5)
            h = h + jnp.reshape(jnp.einsum("nhst,nthd->nshd", scores, v), h.shape) @ layer["o"]
            z = normalise(layer["n2"], h)
            h = h + jax.nn.gelu(z @ layer["w1"] + layer["b1"]) @ layer["w2"]
        return jnp.mean(normalise(p["norm"], h), 1) @ p["out"]

    return Case(function, p, jnp.asarray(draw.integers(0, words, (n, length))), jnp.asarray(draw.integers(0, 10, n)))


CASES = {"mlp": (mlp, 128), "cnn": (cnn, 64), "transformer": (transformer, 32)}
