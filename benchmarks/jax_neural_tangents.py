"""Kernels by neural-tangents 0.6.5 as ratios to the jitted plain step, in an environment of their own.

    python3.11 -m venv nt && nt/bin/pip install --no-deps -r benchmarks/jax_neural_tangents.txt
    nt/bin/python -P benchmarks/jax_neural_tangents.py

neural-tangents no longer imports on current JAX. Even here two names that JAX 0.4.26 has moved must be put back, and its
TensorFlow part, which this does not use, is left out. Times are of the processor, so that other work on the machine counts
little. Ratios, not times, compare with those of benchmarks/jax.py.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import sys
import time
import types
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax._src.config
import jax._src.source_info_util
import jax.interpreters.ad
import jax.numpy as jnp

jax.interpreters.ad.source_info_util = jax._src.source_info_util
jax.interpreters.ad.config = jax._src.config.config
sys.modules["neural_tangents.experimental"] = types.ModuleType("experimental")
sys.path.append(str(Path(__file__).parent))
import neural_tangents as nt  # noqa: E402  # after the patches
from jax_networks import CASES, Case  # noqa: E402


def methods(case: Case) -> dict[str, Any]:
    """Return what is measured; the first is the plain step."""

    def losses(p: Any, x: Any, y: Any) -> Any:
        return -jnp.take_along_axis(jax.nn.log_softmax(case.function(p, x)), y[:, None], 1)[:, 0]

    def penalty(kernel: Any) -> Any:
        return 0.1 * jnp.linalg.slogdet(jnp.eye(len(kernel)) + kernel)[1] / len(kernel)

    found = {"plain step": jax.value_and_grad(lambda p, x, y: jnp.mean(losses(p, x, y)))}
    for number, name in enumerate(("automatic", "Jacobian contraction", "vector products", "structured derivatives")):
        which = nt.NtkImplementation(number) if number else nt.NtkImplementation.AUTO

        def kernel(p: Any, x: Any, y: Any, which: Any = which) -> Any:
            of_losses = nt.empirical_ntk_fn(
                lambda p, batch: losses(p, *batch)[:, None], trace_axes=(-1,), vmap_axes=((0, 0), 0, {}), implementation=which
            )
            return of_losses((x, y), None, p)

        def step(p: Any, x: Any, y: Any, kernel: Any = kernel) -> Any:
            return jnp.mean(losses(p, x, y)) + penalty(kernel(p, x, y))

        found[f"{name}: kernel"] = kernel
        found[f"{name}: penalised step"] = jax.value_and_grad(step)
        outputs = nt.empirical_ntk_fn(case.function, trace_axes=(), vmap_axes=0, implementation=which)
        found[f"{name}: kernel of 10 outputs"] = lambda p, x, y, outputs=outputs: outputs(x, None, p)
    return found


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments.add_argument("--methods", nargs="+", help="parts of names", default=[": kernel", "penalised"])
    arguments.add_argument("--samples", type=int, help="instead of those of the case")
    arguments.add_argument("--repeats", type=int, default=7)
    options = arguments.parse_args()
    for name in options.cases:
        build, n = CASES[name]
        case = build(options.samples or n)
        plain = None
        for title, function in methods(case).items():
            if title != "plain step" and not any(part in title for part in options.methods):
                continue
            try:
                compiled = jax.jit(function)
                jax.block_until_ready(compiled(case.parameters, case.x, case.y))
                seconds = []
                while len(seconds) < options.repeats and sum(seconds) < 20:
                    begun = time.process_time()
                    jax.block_until_ready(compiled(case.parameters, case.x, case.y))
                    seconds.append(time.process_time() - begun)
            except Exception as error:  # it fails in many ways, and the others are still to be measured
                print(f"{name:12} {title:45} {type(error).__name__}: {str(error)[:80]!r}", flush=True)
                continue
            plain = plain or median(seconds)
            print(f"{name:12} {title:45} x {median(seconds) / plain:8.2f}", flush=True)


if __name__ == "__main__":
    main()
