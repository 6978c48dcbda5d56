"""Time and compiled temporary memory of kernels and regularised steps on JAX, as ratios to the jitted plain training step.

Run with `python -P benchmarks/jax.py` (without -P this file would be imported as jax). Methods are interleaved, and each ratio is
one of medians from the same run. Memory is XLA's own account of the temporary buffers of the compiled program.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # jax's Cholesky factorisation, which threads slow down

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from mgs_core.adapters.flax import regularized
from rich.console import Console
from rich.table import Table

import mgs_core as mgs

sys.path.append(str(Path(__file__).parent))  # at the end, for jax.py would shadow jax
from jax_networks import CASES, Case  # found on the path that was just extended

PENALTY = mgs.Penalty("log_determinant", strength=0.1)


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

    def gradient_norm(p: Any, x: Any, y: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(p, (x, y))
        return value + sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(gradient))

    return {
        "plain step": jax.value_and_grad(lambda p, x, y: jnp.mean(losses(p, x, y))),
        "kernel": lambda p, x, y: mgs.kernel(model(p), x, y, output="loss"),
        "loss, gradient and kernel: agreement weights": step(weighting="agreement"),
        "penalised step": step(penalty=PENALTY),
        "for comparison: penalty on the norm of the batch's gradient": jax.value_and_grad(gradient_norm),
        "vmap: kernel": by_vmap,
        "vmap: penalised step": jax.value_and_grad(lambda p, x, y: jnp.mean(losses(p, x, y)) + PENALTY(by_vmap(p, x, y))),
        "kernel of 10 outputs": lambda p, x, y: mgs.kernel(model(p), x, output="full"),
    }


def main() -> None:
    """Measure and print the tables."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments.add_argument("--methods", nargs="+", help="parts of names", default=[""])
    arguments.add_argument("--repeats", type=int, default=15)
    options = arguments.parse_args()
    jax.jit(jnp.linalg.cholesky)(jnp.eye(2))  # the first one of a process loads SciPy, which is no part of compiling
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
        # what takes long moves much memory, and would slow its neighbours down: it has rounds of its own
        heavy = {title for title in steps if figures[title][2] > 10 * figures["plain step"][2]}
        for repeat in range(2 * options.repeats):
            late = repeat >= options.repeats
            for title, compiled in steps.items():
                if late != (title in heavy) or (late and figures[title][2] > 2 and repeat >= options.repeats + 3):
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
