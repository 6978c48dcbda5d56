"""Kernels that users pass: what is refused, how they come to the host, and their cosines."""

from __future__ import annotations

from typing import Any

from mgs_core._errors import ArgumentError, NotFiniteError
from mgs_core._namespace import array_namespace
from mgs_core._namespace import host as np
from mgs_core._registry import get_backend
from mgs_core._types import Array

#: Cosine of two gradients that rounding is allowed to make; above that, the matrix is no kernel.
_COSINE = 1.1
#: Multiple of the smallest normal number that a squared length must exceed: the derivative of its root overflows below.
_LEAST = 1024.0


def side(kernel: Array) -> int:
    """Return n, and refuse what is not (n, n)."""
    if not hasattr(kernel, "shape"):
        raise ArgumentError(f"`kernel` must be an array; got {type(kernel).__name__}. Convert it, for instance by numpy.asarray.")
    shape = tuple(kernel.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ArgumentError(f'`kernel` must be square, (n, n) with n ≥ 1; got shape {shape}. Use any head but output="full".')
    return int(shape[0])


def in_single(kernel: Array) -> Array:
    """Return the kernel in single precision at least, for sums of half precision overflow; refuse what is not real."""
    xp = array_namespace(kernel)
    if not xp.isdtype(kernel.dtype, "real floating"):
        raise ArgumentError(f"`kernel` must hold real floating-point numbers; got dtype {kernel.dtype}. Convert it.")
    half = float(xp.finfo(kernel.dtype).eps) > float(xp.finfo(xp.float32).eps)
    return xp.astype(kernel, xp.float32) if half else kernel


def cosine_kernel(kernel: Array) -> Array:
    """Return `C_ab = K_ab / √(K_aa K_bb)`; a sample without gradient, or a denormal one, is similar to none."""
    n = side(kernel)
    xp = array_namespace(kernel)
    diagonal = xp.sum(kernel * xp.eye(n, dtype=kernel.dtype), axis=1)
    positive = diagonal > _LEAST * float(xp.finfo(kernel.dtype).smallest_normal)
    # the inner `where` keeps 1/√0 out of the derivative
    inverse = xp.where(positive, 1.0 / xp.sqrt(xp.where(positive, diagonal, xp.ones_like(diagonal))), xp.zeros_like(diagonal))
    return kernel * xp.expand_dims(inverse, axis=0) * xp.expand_dims(inverse, axis=1)


def on_host(kernel: Array) -> Array:
    """Return a kernel as a float64 matrix on the host, and refuse what is none."""
    matrix = _to_numpy(kernel)
    if matrix.dtype.kind == "c":
        raise ArgumentError(f"`kernel` must be real; got dtype {matrix.dtype}. Take that of the real outputs.")
    least = float(np.finfo(matrix.dtype if matrix.dtype.kind == "f" else np.float32).smallest_normal)
    matrix = np.asarray(matrix, dtype=np.float64)
    if not bool(np.all(np.isfinite(matrix))):
        raise NotFiniteError("`kernel` must be finite; got NaN or infinity. Look for NaN in the inputs or the parameters.")
    if float(np.max(np.abs(matrix - matrix.T))) > 1e-3 * float(np.max(np.abs(matrix))):
        raise ArgumentError("`kernel` must be symmetric; got one that is not. Pass the kernel of one batch with itself.")
    diagonal = np.linalg.diagonal(matrix)
    if float(np.min(diagonal)) < 0:
        raise ArgumentError(
            f"`kernel` must have squared norms on its diagonal; got {float(np.min(diagonal))}. Pass one of `mgs_core.kernel`."
        )
    if float(np.max(diagonal)) == 0:
        raise NotFiniteError("`kernel` must have a positive trace; got 0.0. No chosen parameter moves the head on this batch.")
    root = np.sqrt(np.maximum(diagonal, least))  # below, squares have lost their digits
    beyond = np.abs(matrix) - _COSINE * root[:, None] * root[None, :]
    if float(np.max(beyond)) > 1e-6 * float(np.max(diagonal)):
        a, b = divmod(int(np.argmax(beyond)), len(root))
        raise ArgumentError(
            f"`kernel` must have |K_ab| of at most √(K_aa K_bb), as inner products have; got {matrix[a, b]:.3g} for {a} and {b} "
            f"with {diagonal[a]:.3g} and {diagonal[b]:.3g} on the diagonal. Pass one of `mgs_core.kernel`."
        )
    return matrix


def as_numpy(values: Any) -> Array:
    """Return an array of any framework, off its device and without its graph, as NumPy's; and what NumPy makes an array of.

    Args:
        values: an array, or numbers in lists.
    """
    return np.asarray(_to_numpy(values) if hasattr(values, "__dlpack__") else values)


def _to_numpy(array: Array) -> Array:
    try:
        return get_backend(array).to_numpy(array)
    except ArgumentError:  # an array-API array of a library that has no backend
        return np.from_dlpack(array)
