"""Penalties: scalar, differentiable functions of the kernel, to be added to the loss."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, Literal

from mgs_core._errors import ArgumentError
from mgs_core._namespace import array_namespace
from mgs_core._types import Array, Shaped

PenaltyName = Literal["trace", "log_trace", "log_determinant", "cosine", "log_determinant_cosine"]
#: For trace, log_determinant and cosine, of the study's four strengths, a factor of ten apart, that which in its worst cell is
#: least behind the best of the four on noisy validation labels: by 16, 12 and 13 points. The other two act alike where their
#: argument is small, and were not studied.
_STRENGTHS = {"trace": 3e-3, "log_trace": 3e-2, "log_determinant": 0.3, "cosine": 1.0, "log_determinant_cosine": 1.0}


@dataclass(frozen=True, init=False)
class Penalty:
    """Penalise a kernel: `P(K) = strength · R(K)`.

    * trace: `tr K / n`;
    * log_trace: `log(1 + tr K / (n·scale))`;
    * log_determinant: `(1/n) log det(I + K/scale)`, at least 0, linear in K where K ≪ scale, logarithmic where K ≫ scale;
    * cosine: `1 − mean_{a≠b} C_ab`, with the cosine kernel `C_ab = K_ab / √(K_aa K_bb)`; 0 for one sample, which has no pairs;
    * log_determinant_cosine: `(1/n) log det(I + C/scale)`.

    The summaries trace and determinant are the paper's; the scaled and bounded forms are this library's choice.

    Attributes:
        name: which R.
        strength: factor, at least 0, finite; None for one that suits the name where nothing is known (see docs/study.md).
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
        if name not in _STRENGTHS:
            raise ArgumentError(f"`name` must be one of {', '.join(_STRENGTHS)}; got {name!r}.")
        strength = _STRENGTHS[name] if strength is None else strength
        object.__setattr__(self, "name", name)  # the class is frozen
        for field, value, least in (("strength", strength, "at least 0"), ("scale", scale, "above 0")):
            number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
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
        n = _square(kernel)
        xp, dtype = array_namespace(kernel), kernel.dtype
        half = float(xp.finfo(dtype).eps) > float(xp.finfo(xp.float32).eps)
        kernel = xp.astype(kernel, xp.float32) if half else kernel  # NumPy has no Cholesky factorisation of it
        identity = xp.eye(n, dtype=kernel.dtype)
        if self.name == "trace":
            value = _trace(kernel, identity) / n
        elif self.name == "log_trace":
            value = xp.log(1.0 + _trace(kernel, identity) / (n * self.scale))
        elif self.name == "log_determinant":
            value = _log_determinant(kernel / self.scale, identity) / n
        elif self.name == "cosine":
            cosine = cosine_kernel(kernel)
            value = (1.0 if n > 1 else 0.0) - (xp.sum(cosine) - _trace(cosine, identity)) / max(1, n * (n - 1))
        elif self.name == "log_determinant_cosine":
            value = _log_determinant(cosine_kernel(kernel) / self.scale, identity) / n
        else:
            raise ArgumentError(f"`name` must be one of {', '.join(_STRENGTHS)}; got {self.name!r}.")
        return xp.astype(self.strength * value, dtype) if half else self.strength * value

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments as a dict that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Penalty:
        """Return the penalty that `to_dict` described."""
        return cls(**config)


def cosine_kernel(kernel: Array) -> Array:
    """Return `C_ab = K_ab / √(K_aa K_bb)`; a sample without gradient is similar to none, itself included."""
    n = _square(kernel)
    xp = array_namespace(kernel)
    diagonal = xp.sum(kernel * xp.eye(n, dtype=kernel.dtype), axis=1)
    positive = diagonal > 0
    # the inner `where` keeps 1/√0 out of the derivative
    inverse = xp.where(positive, 1.0 / xp.sqrt(xp.where(positive, diagonal, xp.ones_like(diagonal))), xp.zeros_like(diagonal))
    return kernel * xp.expand_dims(inverse, axis=0) * xp.expand_dims(inverse, axis=1)


def _trace(kernel: Array, identity: Array) -> Array:
    return array_namespace(kernel).sum(kernel * identity)


def _log_determinant(kernel: Array, identity: Array) -> Array:
    """Return log det(I + K) by Cholesky.

    Rounding may cost K its definiteness, by about `√n · eps · tr K / n`, for errors of its entries are as good as random. The
    identity makes up for less than 1; beyond, a multiple of it does, and the value is that of the kernel as far as it is known.
    """
    xp = array_namespace(kernel)
    n = identity.shape[0]
    rounding = 4.0 * math.sqrt(n) * float(xp.finfo(kernel.dtype).eps)
    native = getattr(xp, "mgs_log_determinant", None)
    if native is not None:
        return native(kernel, rounding)
    noise = rounding * _trace(kernel, identity) / n
    ridge = xp.where(noise > 1.0, noise, xp.ones_like(noise))
    diagonal = xp.sum(xp.linalg.cholesky(kernel + ridge * identity) * identity, axis=1)
    return 2.0 * xp.sum(xp.log(diagonal))


def _square(kernel: Array) -> int:
    if not hasattr(kernel, "shape"):
        raise ArgumentError(f"`kernel` must be an array; got {type(kernel).__name__}. Convert it, for instance by numpy.asarray.")
    shape = tuple(kernel.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ArgumentError(f'`kernel` must be square, (n, n) with n ≥ 1; got shape {shape}. Use any head but output="full".')
    return int(shape[0])
