"""Time and memory of kernels and regularised steps on the NumPy backend, as ratios to the plain training step.

Run with `python -P benchmarks/numpy.py` (without -P this file would be imported as numpy). Methods are interleaved, and each
ratio is one of medians from the same run; memory is the peak that Python's tracemalloc saw, NumPy's arrays included.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import gc
import time
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import autograd
import autograd.numpy as anp
import numpy as np
from rich.console import Console
from rich.table import Table

import mgs_core as mgs

BACKEND = mgs.get_backend("numpy")


def network(p: Any, x: Any) -> Any:
    """Return the outputs of a multilayer perceptron with two hidden layers."""
    hidden = anp.maximum(x @ p["w1"] + p["b1"], 0.0)
    return anp.maximum(hidden @ p["w2"] + p["b2"], 0.0) @ p["w3"] + p["b3"]


def draw(widths: list[int]) -> dict[str, Any]:
    """Draw its parameters."""
    random, parameters = np.random.default_rng(0), {}
    for layer, (before, after) in enumerate(pairwise(widths), start=1):
        parameters[f"w{layer}"] = (random.normal(size=(before, after)) / np.sqrt(before)).astype(np.float32)
        parameters[f"b{layer}"] = np.zeros(after, np.float32)
    return parameters


def methods(parameters: dict[str, Any], x: Any, y: Any) -> dict[str, Callable[[], Any]]:
    """Return what is measured, by name; the first is the plain step."""

    def losses(p: Any) -> Any:
        return mgs.cross_entropy(network(p, x), y)

    def kernel(p: Any, **options: Any) -> Any:
        return mgs.kernel(mgs.FunctionalModel(network, p), x, y, **{"output": "loss", **options})

    def penalised(name: Any) -> Callable[[], Any]:
        penalty = mgs.Penalty(name, strength=0.1)
        step = BACKEND.value_and_gradient(lambda p: anp.mean(losses(p)) + penalty(kernel(p, differentiable=True)))
        return lambda: step(parameters)

    def weighted() -> Any:
        weights = mgs.agreement_weights(kernel(parameters))
        return BACKEND.value_and_gradient(lambda p: anp.mean(weights * losses(p)))(parameters)

    def loop() -> Any:
        gradient = autograd.grad(lambda p, a: mgs.cross_entropy(network(p, x[a : a + 1]), y[a : a + 1])[0])
        rows = np.stack([np.concatenate([np.ravel(g) for g in gradient(parameters, a).values()]) for a in range(len(x))])
        return rows @ rows.T

    plain = BACKEND.value_and_gradient(lambda p: anp.mean(losses(p)))
    return {
        "plain step": lambda: plain(parameters),
        "kernel, loss head": lambda: kernel(parameters),
        "kernel, trace of 10 outputs": lambda: kernel(parameters, output="trace"),
        "step with trace penalty": penalised("trace"),
        "step with log-determinant penalty": penalised("log_determinant"),
        "step with agreement weights": weighted,
        "peer: loop of autograd.grad, kernel": loop,
    }


def main() -> None:
    """Measure and print the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--samples", type=int, nargs="+", default=[32, 128, 512])
    arguments.add_argument("--repeats", type=int, default=15)
    options = arguments.parse_args()
    parameters = draw([784, 256, 256, 10])
    table = Table("method", *(f"n = {n}" for n in options.samples), title="MLP 784-256-256-10: time | peak memory, × plain step")
    cells: dict[str, list[str]] = {}
    for n in options.samples:
        random = np.random.default_rng(1)
        found = methods(parameters, random.normal(size=(n, 784)).astype(np.float32), random.integers(0, 10, n))
        seconds: dict[str, list[float]] = {name: [] for name in found}
        memory = {}
        for name, run in found.items():
            run()
            gc.collect()
            tracemalloc.start()
            run()
            memory[name] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        for repeat in range(options.repeats):
            for name, run in found.items():
                if name.startswith("peer") and repeat >= 3:
                    continue
                begun = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - begun)
        step = "plain step"
        for name in found:
            ratio = median(seconds[name]) / median(seconds[step])
            text = f"{1e3 * median(seconds[name]):.1f} ms | {memory[name] / 2**20:.1f} MiB" if name == step else f"{ratio:.2f} | "
            cells.setdefault(name, []).append(text if name == step else f"{text}{memory[name] / memory[step]:.2f}")
    for name, row in cells.items():
        table.add_row(name, *row)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
