"""Suspicious labels from a kernel: what the gradients of all other samples say of each sample's label."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from mgs_core._arguments import integer
from mgs_core._errors import ArgumentError
from mgs_core._matrix import as_numpy, cosine_kernel, on_host, side
from mgs_core._namespace import host as np
from mgs_core._types import Array, Shaped

_RIDGES = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
_STEEPNESS = 3.0
_LEAST_WEIGHT = 1e-3
#: Share of what is usual for a class that is taken off its predictions before a label is trusted.
_USUAL = 0.75
#: Share of the labels that networks not trained on them contradict and those trained on them do not, from which a warning is due.
_MEMORY = 0.4
#: Difference of predictions that is rounding.
_TIE = 1e-9
#: Change of the largest weight below which no further round is made.
_SETTLED = 1e-2


@dataclass(frozen=True, eq=False)
class Suspicion:
    """Hold what the other samples say of each label.

    Attributes:
        scores: (n,), by how much another class is predicted ahead of the given one; above 0 another fits better.
        suggested: (n,), the class that is predicted.
        contradicted: (n,) of bool: another class is predicted as surely as it is on average for samples that bear its label.
        neighbours: (n,), share of the ten most similar samples that bear another label.
        weights: (n,), at least 0, mean 1: train on `mean(w · loss)`, and labels that the others contradict count for little.
        predictable: share of the labels that all others predict as given, before any label is distrusted. Where it is low,
            classes overlap or labels are wrong, and no kernel tells which.
        ridge: λ, which was chosen.

    Example:
        >>> import numpy as np
        >>> import mgs_core as mgs
        >>> mgs.suspicion(np.kron(np.eye(2), np.ones((4, 4))), np.repeat([0, 1], 4)).predictable
        1.0
    """

    scores: Array
    suggested: Array
    contradicted: Array
    neighbours: Array
    weights: Array
    predictable: float
    ridge: float

    @property
    def order(self) -> Array:
        """Return the samples, the most suspicious first."""
        return np.argsort(-self.scores, stable=True)

    def __str__(self) -> str:
        """Return the figures, and the most suspicious samples."""
        return described(self, {"ridge": self.ridge})


def suspicion(kernel: Shaped[Array, "n n"], labels: Any, *, classes: int | None = None, rounds: int = 6) -> Suspicion:
    """Rank labels by leave-one-out kernel regression, which trusts a label the less the more the others contradict it.

    With the cosine kernel C, one-hot labels less their mean Y and weights w, the prediction for a sample from all others is

        `q_a = y_a − α_a / M_aa`,  `M = (C + λ W⁻¹)⁻¹`,  `α = M Y`,

    where λ is, of a grid, the one with the least leave-one-out error. The mean is that of all labels, so a label has a share of
    1/n in what is predicted for it. The score is `max_{k ≠ y_a} q_ak − q_{a y_a}`.

    A wrong label should not testify against others, so weights follow from predictions, and predictions from weights, until both
    settle: `w_a ∝ σ(−3 · t_a / std(t))`, where t is the score of `q_ak − ¾ u_k`. What is usual for a class, `u_k = mean of q_bk
    over the b with y_b = k`, is taken off, so that of two classes that are confused neither wins the other's samples.

    A label is contradicted when some class k has `q_ak > q_{a y_a}` and `q_ak ≥ u_k`. Where classes can be told apart, hardly any
    clean label is; where they overlap, labels that are right but unlikely are contradicted as wrong ones are.

    Args:
        kernel: (n, n), of samples whose outputs tell the classes apart; `output="trace"` of a network after a few epochs is good.
        labels: integers (n,), from 0.
        classes: their number c; None for the largest label + 1.
        rounds: how often at most the weights are found anew, until they settle; 0 is plain kernel regression.

    Returns:
        Scores, suggested labels, neighbours and weights, NumPy arrays. With a warning where the samples predict each other's
        labels no better than naming the most frequent one does: then nothing follows from them.

    Raises:
        ArgumentError: when the kernel is not square, finite, symmetric and of positive trace, labels do not fit, or there are
            fewer than 2 samples or classes.

    Cost:
        One eigendecomposition and at most `rounds` inversions on the host in float64, about (10 + 2·rounds) n³ operations; not
        differentiable.

    References:
        Wahba, Spline Models for Observational Data, 1990 (the closed form of leave-one-out); Northcutt, Jiang and Chuang,
        Confident Learning, 2021 (the threshold of each class); the use of the model's own kernel and of the weights is this
        library's.

    Example:
        >>> import numpy as np
        >>> import mgs_core as mgs
        >>> x = np.repeat(np.eye(2), 6, axis=0) + 0.1 * np.random.default_rng(0).normal(size=(12, 2))
        >>> labels = np.repeat([0, 1], 6)
        >>> labels[3] = 1
        >>> found = mgs.suspicion(x @ x.T, labels)
        >>> int(found.scores.argmax()), found.suggested.tolist()
        (3, [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    """
    n = side(kernel)
    if n < 2:
        raise ArgumentError("`kernel` must have at least 2 samples, for labels are judged by others; got 1. Use more samples.")
    rounds = integer("rounds", rounds, 0, "The default is 6.")
    matrix = on_host(kernel)
    given, c = _labels(labels, n, classes)
    cosine = cosine_kernel(matrix / np.max(np.linalg.diagonal(matrix)))  # whatever the unit
    found = judge([cosine], [np.ones(n, dtype=bool)], given, c, rounds)
    warn_of_chance(found.predictable, given, "the gradients in `kernel`")
    return found


def judge(kernels: list[Array], members: list[Array], given: Array, classes: int, rounds: int = 6) -> Suspicion:
    """Do what `suspicion` does where samples are judged by different kernels, which are known to fit.

    Args:
        kernels: cosine kernels (n, n) of the same samples, in float64.
        members: which samples (n,) of bool each judges; each sample is judged by one.
        given: integers (n,).
        classes: their number.
        rounds: as in `suspicion`.
    """
    one_hot = np.astype(given[:, None] == np.arange(classes)[None, :], np.float64)
    centred = one_hot - np.mean(one_hot, axis=0)
    ridge, residual = _best_ridge(kernels, members, centred)
    predicted = one_hot - residual
    right = _right(predicted, one_hot)
    weights = _trust(predicted, one_hot)
    for _ in range(rounds):
        predicted = one_hot - _residual(kernels, members, centred, ridge / np.maximum(weights, _LEAST_WEIGHT))
        before, weights = weights, _trust(predicted, one_hot)
        if float(np.max(np.abs(weights - before))) < _SETTLED:
            break
    scores, suggested = _scores(predicted, one_hot), np.argmax(predicted, axis=1)
    neighbours = np.sum([_neighbours(own, given) * judged for own, judged in zip(kernels, members, strict=True)], axis=0)
    return Suspicion(scores, suggested, _contradicted(predicted, one_hot), neighbours, weights, right, ridge)


def predictable(kernels: list[Array], members: list[Array], given: Array, classes: int, ridge: float) -> float:
    """Return the share of the labels that leave-one-out regression predicts as given; arguments as those of `judge`."""
    one_hot = np.astype(given[:, None] == np.arange(classes)[None, :], np.float64)
    residual = _residual(kernels, members, one_hot - np.mean(one_hot, axis=0), np.full(len(given), ridge))
    return _right(one_hot - residual, one_hot)


def warn_of_chance(predictable: float, given: Array, what: str) -> None:
    """Warn where samples predict each other's labels no better than naming the most frequent one does, by two standard errors."""
    if by_chance(predictable, given):
        warnings.warn(
            f"The samples predict {predictable:.0%} of each other's labels, which naming the most frequent one could: {what} do "
            "not tell the classes apart, or about as many `labels` are wrong as right. Do not drop samples by `contradicted`.",
            UserWarning,
            stacklevel=3,
        )


def by_chance(share: float, given: Array) -> bool:
    """Say whether naming the most frequent label would predict as large a share of the labels, within two standard errors."""
    most = float(np.max(np.unique_counts(given).counts)) / len(given)
    return share < 1 and bool(share <= most + 2 * (most * (1 - most) / len(given)) ** 0.5)


def much_by_heart(share: float) -> bool:
    """Say whether networks agree with so many labels only because they were trained on them that this cannot be relied on."""
    return share > _MEMORY


def described(found: Any, figures: dict[str, float], given: Array | None = None) -> str:
    """Return a line for each figure, and the ten most suspicious samples.

    Args:
        found: a `Suspicion` or an audit.
        figures: what is shown beside the counts, by name.
        given: the labels, or None.
    """
    counts = {
        "samples": len(found.scores),
        "another fits better": int(np.sum(found.scores > 0)),
        "contradicted": int(np.sum(found.contradicted)),
        "predictable": found.predictable,
        **figures,
    }
    lines = [f"{name:<19}  {value if isinstance(value, int) else format(value, '.6g')}" for name, value in counts.items()]
    lines += ["", "sample" + ("" if given is None else "  given") + "  suggested   score"]
    for a in found.order[:10]:
        label = "" if given is None else f"  {int(given[a]):>5}"
        lines.append(f"{int(a):>6}{label}  {int(found.suggested[a]):>9}  {float(found.scores[a]):+.3f}")
    return "\n".join(lines)


def _labels(labels: Any, n: int, classes: int | None) -> tuple[Array, int]:
    given = as_numpy(labels)
    given = given[:, 0] if given.shape == (n, 1) else given
    if given.shape != (n,) or not np.isdtype(given.dtype, "integral"):
        raise ArgumentError(f"`labels` must be integers of shape ({n},); got dtype {given.dtype}, shape {given.shape}.")
    c = int(np.max(given)) + 1 if classes is None else integer("classes", classes, 0)
    if classes is None and c > max(1000, 10 * n):  # memory grows with their number
        raise ArgumentError(
            f"`labels` must number the classes from 0 without large gaps; got labels up to {c - 1} for {n} samples. "
            "Renumber them: numpy.unique(labels, return_inverse=True)[1]."
        )
    if int(np.min(given)) < 0 or int(np.max(given)) >= c or c < 2:
        raise ArgumentError(
            f"`labels` must be in 0..c−1 with c ≥ 2; got {int(np.min(given))}..{int(np.max(given))} and c = {c}. "
            "Number the classes from 0, or pass `classes`."
        )
    return given, c


def _best_ridge(kernels: list[Array], members: list[Array], centred: Array) -> tuple[float, Array]:
    """Return the ridge with the least leave-one-out error, and the leave-one-out residuals that it leaves."""
    parts = []
    for cosine in kernels:
        eigenvalues, vectors = np.linalg.eigh((cosine + cosine.T) / 2)
        parts.append((np.maximum(eigenvalues, 0.0), vectors, vectors.T @ centred))
    best: tuple[float, float, Array] | None = None
    for ridge in _RIDGES:
        residual = np.zeros_like(centred)
        for (eigenvalues, vectors, turned), judged in zip(parts, members, strict=True):
            shrunk = 1.0 / (eigenvalues + ridge)
            own = (vectors @ (shrunk[:, None] * turned)) / ((vectors * vectors) @ shrunk)[:, None]
            residual = np.where(judged[:, None], own, residual)
        error = float(np.mean(residual * residual))
        if best is None or error < best[0]:
            best = error, ridge, residual
    if best is None:
        raise TypeError("`_RIDGES` must hold at least one ridge; it is empty.")
    return best[1], best[2]


def _residual(kernels: list[Array], members: list[Array], centred: Array, ridges: Array) -> Array:
    """Return the leave-one-out residuals with a ridge for each sample."""
    residual = np.zeros_like(centred)
    for cosine, judged in zip(kernels, members, strict=True):
        inverse = np.linalg.inv(cosine + np.eye(cosine.shape[0]) * ridges)
        residual = np.where(judged[:, None], (inverse @ centred) / np.linalg.diagonal(inverse)[:, None], residual)
    return residual


def _usual(predicted: Array, one_hot: Array) -> Array:
    """Return the mean prediction of each class for the samples that bear it, (c,); infinite for a class that none bears."""
    members = np.sum(one_hot, axis=0)
    return np.where(members > 0, np.sum(predicted * one_hot, axis=0) / np.maximum(members, 1.0), np.inf)


def _scores(predicted: Array, one_hot: Array) -> Array:
    others = np.max(np.where(one_hot > 0, -np.inf, predicted), axis=1)
    return others - np.sum(np.where(one_hot > 0, predicted, 0.0), axis=1)


def _right(predicted: Array, one_hot: Array) -> float:
    """Return the share of labels that are predicted ahead of all others, by more than rounding."""
    return float(np.mean(np.astype(_scores(predicted, one_hot) < -_TIE, np.float64)))


def _contradicted(predicted: Array, one_hot: Array) -> Array:
    sure = (predicted >= _usual(predicted, one_hot)) & (predicted > np.sum(predicted * one_hot, axis=1, keepdims=True))
    return np.any(sure, axis=1)


def _trust(predicted: Array, one_hot: Array) -> Array:
    usual = _usual(predicted, one_hot)
    usual = np.where(np.isfinite(usual), usual, np.max(usual[np.isfinite(usual)]))  # a class without samples must not seem likely
    measured = _scores(predicted - _USUAL * usual, one_hot)
    spread = float(np.std(measured))
    if spread <= 1e-9 * float(np.max(np.abs(measured))):  # all alike but for rounding, as those of equal samples
        return np.ones_like(measured)
    logarithm = -np.logaddexp(0.0, _STEEPNESS * measured / spread)  # where all are contradicted, σ itself would be 0 for each
    weights = np.exp(logarithm - np.max(logarithm))
    return weights / np.mean(weights)


def _neighbours(cosine: Array, given: Array) -> Array:
    n = given.shape[0]
    count = min(10, n - 1)
    closest = np.argsort(np.where(np.eye(n) > 0, np.inf, -cosine), axis=1)[:, :count]
    return np.mean(np.astype(given[closest] != given[:, None], np.float64), axis=1)
