"""What the tests of several frameworks compare with; tests/conftest.py puts this folder on the path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Compare on the scale of the largest entry."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.max(np.abs(expected)))


def check_kernels(kernel: Callable[..., Any], rows: np.ndarray) -> None:
    """Compare `kernel(**options)` with what the gradients of each output of each sample, (n, c, p), give."""
    close(kernel(output="full"), np.einsum("acp,bdp->acbd", rows, rows))
    close(kernel(chunk_size=4), np.einsum("acp,bcp->ab", rows, rows))


def check_symmetries(kernel: Callable[..., Any], parameters: Mapping[str, Any], x: np.ndarray) -> None:
    """Check for `kernel(x, **options)` that order does not matter, layers add up, and K is symmetric and semi-definite."""
    whole, order = np.asarray(kernel(x)), np.random.default_rng(1).permutation(len(x))
    close(kernel(x[order]), whole[np.ix_(order, order)])
    close(sum(np.asarray(kernel(x, parameters=[name])) for name in parameters), whole)
    close(whole, whole.T)
    assert np.linalg.eigvalsh(whole).min() >= -1e-10 * np.trace(whole)


def directions(parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Draw a direction for each parameter."""
    return {name: np.random.default_rng(2).normal(size=value.shape) for name, value in parameters.items()}


def slope(objective: Callable[[float], Any], step: float = 1e-4) -> float:
    """Return the derivative of `objective(t)` at 0 by central differences of fourth order."""
    at = {i: float(objective(i * step)) for i in (-2, -1, 1, 2)}
    return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)
