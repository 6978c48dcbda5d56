"""Summaries of a kernel: how large the gradients are, and how similar."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any

from mgs_core._errors import ArgumentError
from mgs_core._matrix import as_numpy, cosine_kernel, on_host, side
from mgs_core._namespace import host as np
from mgs_core._types import Array


@dataclass(frozen=True)
class Summary:
    """Hold the summaries of one kernel, with eigenvalues λ and cosine kernel `C_ab = K_ab / √(K_aa K_bb)`.

    Attributes:
        trace: `tr K`.
        mean_trace: `tr K / n`.
        log_determinant: `log det(K + ridge·(tr K/n)·I)`; equal to magnitude + similarity.
        magnitude: `Σ log D_a`, with `D_a = K_aa + ridge·tr K/n`: the part that the sizes of the gradients make.
        similarity: `log det` of the cosine kernel of the same ridged K, at most 0; LOW means SIMILAR.
        effective_rank: `exp(entropy(λ/Σλ))`, between 1 and n.
        top_share: `λ_max / Σλ`.
        mean_cosine: mean of C off the diagonal.
        same_class_cosine: that mean over pairs with one label; None without labels or such pairs.
        other_class_cosine: that mean over pairs with two labels; None without labels or such pairs.
        alignment: `<K, Y> / (‖K‖ ‖Y‖)`, `Y_ab = 1` where the labels are equal, else 0; None without labels.

    Example:
        >>> import numpy as np
        >>> import mgs_core as mgs
        >>> isinstance(mgs.summarize(np.eye(2)), mgs.Summary)
        True
    """

    trace: float
    mean_trace: float
    log_determinant: float
    magnitude: float
    similarity: float
    effective_rank: float
    top_share: float
    mean_cosine: float
    same_class_cosine: float | None = None
    other_class_cosine: float | None = None
    alignment: float | None = None

    def to_dict(self) -> dict[str, float]:
        """Return the fields that have a value, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        """Return one line for each field."""
        width = max(len(field.name) for field in fields(self))
        return "\n".join(f"{name:<{width}}  {value: .6g}" for name, value in self.to_dict().items())


def summarize(kernel: Array, labels: Any = None, *, ridge: float = 1e-6) -> Summary:
    """Summarise a kernel in float64.

    A trace sees magnitude only; the determinant sees similarity too, and splits exactly into the two. Of a kernel in single
    precision, eigenvalues below about `eps · tr K` are rounding. Where many are, as of gradients that are nearly collinear or
    have a few directions only, log-determinant and similarity are off by a share of a nat for each: by 26 to 93 of −1600 to −3400
    for the gradients of inputs with one or two columns. Measure in double precision where that matters.

    Args:
        kernel: (n, n), symmetric, positive semi-definite, n at least 2, of any framework.
        labels: integers (n,), or (n, 1), or None.
        ridge: added to the diagonal as a share of the mean diagonal, so that the determinant of a rank-deficient kernel is
            defined; above 0.

    Returns:
        The summary.

    Raises:
        ArgumentError: when the kernel is not square, not finite, not symmetric, not of inner products, has a zero trace or n < 2,
            or labels do not fit.

    Cost:
        One eigendecomposition on the host, about 10 n³ operations; not differentiable.

    References:
        Szolnoky et al., NeurIPS 2022, arXiv 2205.12642 (trace, determinant); Roy and Vetterli, EUSIPCO 2007 (effective rank);
        Cristianini et al., NeurIPS 2001 (alignment). The split of the determinant is this library's.

    Example:
        >>> import numpy as np
        >>> import mgs_core as mgs
        >>> summary = mgs.summarize(np.array([[2.0, 0.0], [0.0, 2.0]]))
        >>> summary.trace, round(summary.effective_rank, 6), summary.mean_cosine
        (4.0, 2.0, 0.0)
    """
    n = side(kernel)
    if n < 2:
        raise ArgumentError("`kernel` must have at least 2 samples to be summarised; got 1. Use a larger probe batch.")
    if not isinstance(ridge, Real) or isinstance(ridge, bool) or not 0 < ridge < float("inf"):
        raise ArgumentError(f"`ridge` must be a finite number above 0; got {ridge!r}. The default is 1e-6.")
    matrix = on_host(kernel)
    size = 2.0 ** (math.frexp(float(np.max(np.linalg.diagonal(matrix))))[1] - 1)
    matrix = matrix / size  # so that no square overflows
    diagonal = np.linalg.diagonal(matrix)
    trace = float(np.sum(diagonal))
    eigenvalues = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    shares = np.maximum(eigenvalues, 0.0) / np.sum(np.maximum(eigenvalues, 0.0))
    entropy = -float(np.sum(np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1.0)), 0.0)))
    shift = ridge * trace / n
    log_determinant = float(np.sum(np.log(np.maximum(eigenvalues, 0.0) + shift)))
    magnitude = float(np.sum(np.log(diagonal + shift)))
    cosine = cosine_kernel(matrix)
    off = ~np.eye(n, dtype=np.bool)
    values: dict[str, float | None] = {}
    if labels is not None:
        same = _same(labels, n)
        values = {
            "same_class_cosine": _mean(cosine, same & off),
            "other_class_cosine": _mean(cosine, ~same),
            "alignment": float(np.sum(matrix * same) / (np.linalg.norm(matrix) * np.sqrt(np.sum(same)))),
        }
    return Summary(
        trace=trace * size,
        mean_trace=trace / n * size,
        log_determinant=log_determinant + n * math.log(size),
        magnitude=magnitude + n * math.log(size),
        similarity=log_determinant - magnitude,
        effective_rank=float(np.exp(entropy)),
        top_share=float(np.max(shares)),
        mean_cosine=float(np.mean(cosine[off])),
        **values,
    )


def undefined(kernel: Array | None, *, labelled: bool) -> Summary:
    """Return the summary of a kernel that is not finite or 0, for a record: its trace where there is one, else NaN.

    Args:
        kernel: (n, n); None where it could not be had.
        labelled: whether the class-wise summaries belong to it.
    """
    absent = () if labelled else ("same_class_cosine", "other_class_cosine", "alignment")
    values: dict[str, Any] = {field.name: None if field.name in absent else float("nan") for field in fields(Summary)}
    if kernel is not None:
        values["trace"] = float(np.sum(np.linalg.diagonal(np.asarray(as_numpy(kernel), dtype=np.float64))))
        values["mean_trace"] = values["trace"] / kernel.shape[0]
    return Summary(**values)


def _mean(values: Array, chosen: Array) -> float | None:
    return float(np.mean(values[chosen])) if bool(np.any(chosen)) else None


def _same(labels: Any, n: int) -> Array:
    labels = as_numpy(labels)
    labels = labels[:, 0] if labels.shape == (n, 1) else labels  # a column, as Keras' data sets have them
    if labels.shape != (n,) or labels.dtype.kind in "fc":
        raise ArgumentError(
            f"`labels` must be integers of shape ({n},), one for each sample of the kernel; got dtype {labels.dtype}, shape "
            f"{labels.shape}. Leave them out for targets of a regression."
        )
    return labels[:, None] == labels[None, :]
