"""Time and compiled temporary memory of kernels and regularised steps on JAX, as ratios to the jitted plain training step.

Run with `python -P benchmarks/jax.py` (without -P this file would be imported as jax). Methods are interleaved, and each ratio is
one of medians from the same run. Memory is XLA's own account of the temporary buffers of the compiled program.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # jax's Cholesky factorisation, which threads slow down

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from mgs_core.adapters.flax import regularized
from rich.console import Console
from rich.table import Table

import mgs_core as mgs

PENALTY = mgs.Penalty("log_determinant", strength=0.1)


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


def methods(case: Case) -> dict[str, Callable[..., Any]]:
    """Return what is measured, functions of parameters, inputs and targets; the first is the plain step."""

    def losses(p: Any, x: Any, y: Any) -> Any:
        return mgs.cross_entropy(case.function(p, x), y)

    def model(p: Any) -> Any:
        return mgs.FunctionalModel(case.function, p)

    def loss(p: Any, batch: Any) -> Any:
        return jnp.mean(losses(p, *batch))

    def step(**options: Any) -> Callable[..., Any]:
        function = jax.value_and_grad(regularized(loss, **options), has_aux=True)
        return lambda p, x, y: function(p, (x, y))

    def by_vmap(p: Any, x: Any, y: Any) -> Any:
        rows = jax.vmap(jax.grad(lambda p, x, y: losses(p, x[None], y[None])[0]), (None, 0, 0))(p, x, y)
        flat = [jnp.reshape(leaf, (len(x), -1)) for leaf in jax.tree.leaves(rows)]
        return sum(leaf @ leaf.T for leaf in flat)

    return {
        "plain step": jax.value_and_grad(lambda p, x, y: jnp.mean(losses(p, x, y))),
        "kernel": lambda p, x, y: mgs.kernel(model(p), x, y, output="loss"),
        "loss, gradient and kernel: agreement weights": step(weighting="agreement"),
        "penalised step": step(penalty=PENALTY),
        "vmap: kernel": by_vmap,
        "vmap: penalised step": jax.value_and_grad(lambda p, x, y: jnp.mean(losses(p, x, y)) + PENALTY(by_vmap(p, x, y))),
        "kernel of 10 outputs": lambda p, x, y: mgs.kernel(model(p), x, output="full"),
    }


CASES = {"mlp": (mlp, 128), "cnn": (cnn, 64), "transformer": (transformer, 32)}


def main() -> None:
    """Measure and print the tables."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments.add_argument("--methods", nargs="+", help="parts of names", default=[""])
    arguments.add_argument("--repeats", type=int, default=15)
    options = arguments.parse_args()
    for name in options.cases:
        build, n = CASES[name]
        case = build(n)
        table = Table("method", "time", "temporary", "compile", title=f"{name}, n = {n}: × plain step")
        steps, figures = {}, {}
        for title, function in methods(case).items():
            if title != "plain step" and not any(part in title for part in options.methods):
                continue
            begun = time.perf_counter()
            compiled = jax.jit(function).lower(case.parameters, case.x, case.y).compile()
            seconds = time.perf_counter() - begun
            begun = time.perf_counter()
            jax.block_until_ready(compiled(case.parameters, case.x, case.y))
            first = time.perf_counter() - begun
            steps[title] = compiled
            figures[title] = [compiled.memory_analysis().temp_size_in_bytes / 2**20, seconds, first]
        times: dict[str, list[float]] = {title: [] for title in steps}
        for repeat in range(options.repeats):
            for title, compiled in steps.items():
                if figures[title][2] > 2 and repeat >= 3:
                    continue
                begun = time.perf_counter()
                jax.block_until_ready(compiled(case.parameters, case.x, case.y))
                times[title].append(time.perf_counter() - begun)
        plain = median(times["plain step"])
        for title, (memory, seconds, _) in figures.items():
            took, base = median(times[title]), figures["plain step"]
            row = (f"{took / plain:.2f}", f"{memory:.1f} MiB", f"{seconds / base[1]:.2f}")
            table.add_row(title, *(row if title != "plain step" else (f"{1e3 * took:.1f} ms", row[1], f"{seconds:.2f} s")))
        Console(width=110).print(table)


if __name__ == "__main__":
    main()
