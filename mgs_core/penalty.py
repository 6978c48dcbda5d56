"""Penalties: scalar, differentiable functions of the kernel, to be added to the loss."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, Literal

from mgs_core._errors import ArgumentError
from mgs_core._matrix import cosine_kernel, in_single, side
from mgs_core._namespace import array_namespace
from mgs_core._types import Array, Namespace, Shaped

PenaltyName = Literal["trace", "log_trace", "log_determinant", "cosine", "log_determinant_cosine"]
#: For trace the one of the study's four strengths, a factor of ten apart, that in its worst cell is least behind the best of the
#: four on noisy validation labels, by 16 points. For log_determinant and cosine that is 0.3 and 1, by 12 and 13 points; but
#: networks that begin with PyTorch's smaller weights can collapse there (digits, MNIST, clean labels too), and do not at 0.1. The
#: other two were tried on these alone.
_STRENGTHS = {"trace": 3e-3, "log_trace": 3e-2, "log_determinant": 0.1, "cosine": 0.1, "log_determinant_cosine": 1.0}


@dataclass(frozen=True, init=False)
class Penalty:
    """Penalise a kernel: `P(K) = strength · R(K)`.

    * trace: `tr K / n`;
    * log_trace: `log(1 + tr K / (n·scale))`;
    * log_determinant: `(1/n) log det(I + K/scale)`, at least 0, linear in K where K ≪ scale, logarithmic where K ≫ scale; of
      huge gradients in single precision, eigenvalues below the rounding of K count less than they should;
    * cosine: `1 − mean_{a≠b} C_ab`, with the cosine kernel `C_ab = K_ab / √(K_aa K_bb)`; 0 for one sample, which has no pairs;
    * log_determinant_cosine: `(1/n) log det(I + C/scale)`.

    The summaries trace and determinant are the paper's; the scaled and bounded forms are this library's choice.

    Attributes:
        name: which R.
        strength: factor, at least 0, finite; None for the one to begin with: trace 0.003,
            log_trace 0.03, log_determinant 0.1, cosine 0.1, log_determinant_cosine 1 (see docs/method.md).
        scale: size of K at which the logarithm bends, above 0, finite; unused by trace and cosine.

    Raises:
        ArgumentError: when an argument is out of range.

    Cost:
        The determinants take one Cholesky factorisation, n³/3 operations; the others n².

    References:
        Szolnoky et al., NeurIPS 2022, arXiv 2205.12642.

    Example:
        >>> import numpy as np
        >>> import mgs_core as mgs
        >>> float(mgs.Penalty("trace", strength=0.5)(2.0 * np.eye(3)))
        1.0
        >>> mgs.Penalty.from_dict(mgs.Penalty("log_trace").to_dict())
        Penalty(name='log_trace', strength=0.03, scale=1.0)
    """

    name: PenaltyName
    strength: float
    scale: float

    def __init__(self, name: PenaltyName, strength: float | None = None, scale: float = 1.0) -> None:
        if name not in tuple(_STRENGTHS):  # also what cannot be hashed
            raise ArgumentError(f"`name` must be one of {', '.join(_STRENGTHS)}; got {name!r}.")
        strength = _STRENGTHS[name] if strength is None else strength
        object.__setattr__(self, "name", name)  # the class is frozen
        for field, value, least in (("strength", strength, "at least 0"), ("scale", scale, "above 0")):
            number = isinstance(value, Real) and not isinstance(value, bool) and _is_finite(value)
            if not number or value < 0 or (field == "scale" and value == 0):
                raise ArgumentError(f"`{field}` must be a finite number {least}; got {value!r}.")
            object.__setattr__(self, field, value if isinstance(value, (int, float)) else float(value))  # which JSON can hold

    def __call__(self, kernel: Shaped[Array, "n n"]) -> Shaped[Array, ""]:
        """Return `strength · R(K)`, a scalar that is differentiable in K.

        Args:
            kernel: (n, n), positive semi-definite.

        Returns:
            A scalar array of the kernel's dtype; of half precision it is computed in single.

        Raises:
            ArgumentError: when the kernel is not square.
        """
        n, xp, dtype = side(kernel), array_namespace(kernel), kernel.dtype
        kernel = in_single(kernel)
        identity = xp.eye(n, dtype=kernel.dtype)
        if self.name == "trace":
            value = _trace(kernel, identity) / n
        elif self.name == "log_trace":
            value = xp.log1p(_trace(kernel, identity) / (n * self.scale))
        elif self.name == "log_determinant":
            value = _log_determinant(kernel / self.scale, identity) / n
        elif self.name == "cosine":
            cosine = cosine_kernel(kernel)
            value = (1.0 if n > 1 else 0.0) - (xp.sum(cosine) - _trace(cosine, identity)) / max(1, n * (n - 1))
        elif self.name == "log_determinant_cosine":
            value = _log_determinant(cosine_kernel(kernel) / self.scale, identity) / n
        else:
            raise ArgumentError(f"`name` must be one of {', '.join(_STRENGTHS)}; got {self.name!r}.")
        return _cast(xp, self.strength * value, dtype)

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments as a dict that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Penalty:
        """Return the penalty that `to_dict` described."""
        return cls(**config)


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # of an integer that is no floating-point number
        return False


def _trace(kernel: Array, identity: Array) -> Array:
    return array_namespace(kernel).sum(kernel * identity)


def _log_determinant(kernel: Array, identity: Array) -> Array:
    """Return log det(I + K) by Cholesky; in double precision, but for JAX and TensorFlow.

    Rounding may cost K its definiteness, by about `√n · eps · tr K / n` where errors are as good as random, and by `eps · ‖K‖` in
    the Frobenius norm where they are not, as of many samples with nearly collinear gradients. The identity makes up for less
    than 1. Beyond, r times the identity does, with the lesser of the two that suffices, a constant; and what it adds to the value
    where eigenvalues are below it, `Σ log(r) · r/(r + λ)`, is taken off, down to 0.
    """
    xp, dtype = array_namespace(kernel), kernel.dtype
    n, eps = identity.shape[0], float(xp.finfo(dtype).eps)
    native = getattr(xp, "mgs_log_determinant", None)
    if native is not None:
        return native(kernel, eps)
    kernel, identity = xp.astype(kernel, xp.float64), xp.astype(identity, xp.float64)
    constant = getattr(xp, "mgs_constant", lambda array: array)
    known = constant(kernel)
    small, large = 4.0 * eps / math.sqrt(n) * xp.sum(known * identity), 4.0 * eps * xp.sqrt(xp.sum(known**2))
    ridge = float(small) if small > 1.0 else 1.0
    if large > 1.0 and not _is_definite(xp, known + ridge * identity):
        ridge = float(large)
    value = 2.0 * xp.sum(xp.log(xp.sum(xp.linalg.cholesky(kernel + ridge * identity) * identity, axis=1)))
    if ridge > 1.0:
        excess = math.log(ridge) * ridge * float(xp.sum(xp.linalg.inv(known + ridge * identity) * identity))
        value = value - min(excess, float(constant(value)))
    return _cast(xp, value, dtype)


def _cast(xp: Namespace, value: Array, dtype: Any) -> Array:
    """Return a scalar in a dtype; by way of an axis, for NumPy 2.0 casts no scalars."""
    return value if value.dtype == dtype else xp.astype(xp.reshape(value, (1,)), dtype)[0]


def _is_definite(xp: Namespace, matrix: Array) -> bool:
    try:
        return bool(xp.all(xp.isfinite(xp.linalg.cholesky(matrix))))
    except ValueError:  # as NumPy's LinAlgError is
        return False
