"""Heads: turn outputs (n, c) into the k scalars per sample whose gradients make the kernel."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from array_api_compat import is_numpy_array

from mgs_core._arguments import integer
from mgs_core._errors import ArgumentError
from mgs_core._namespace import array_namespace, host
from mgs_core._protocol import HeadFunction
from mgs_core._types import Array, LossFunction

OutputName = Literal["trace", "full", "sum", "target", "random", "loss"]
TransformName = Literal["identity", "softmax", "log_softmax", "sigmoid"]
Output: TypeAlias = OutputName | LossFunction
Transform: TypeAlias = TransformName | Callable[[Array], Array]


@dataclass(frozen=True)
class Head:
    """Hold a head.

    Attributes:
        function: `(outputs (n, c), targets) → (n, k)`.
        full: keep the heads apart in the kernel; otherwise they are summed.
        factor: factor on the kernel (1/probes for random probes).
    """

    function: HeadFunction
    full: bool = False
    factor: float = 1.0


def log_softmax(outputs: Array) -> Array:
    """Return the logarithm of the softmax along the last axis, without overflow."""
    xp = array_namespace(outputs)
    shifted = outputs - xp.max(outputs, axis=-1, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))


def cross_entropy(outputs: Array, targets: Array) -> Array:
    """Return the cross-entropy of each sample, `-Σ_c t_c log softmax(f)_c`, unreduced.

    Args:
        outputs: logits, (n, c).
        targets: labels (n,) of integers in 0..c-1, or probabilities (n, c).

    Returns:
        Losses, (n,).

    Raises:
        ArgumentError: when there is one output, whose softmax is always 1, or the targets do not fit.

    Example:
        >>> import numpy as np
        >>> import mgs_core as mgs
        >>> mgs.cross_entropy(np.zeros((2, 4)), np.array([0, 3])).round(4)
        array([1.3863, 1.3863])
    """
    if outputs.shape[-1] == 1:
        raise ArgumentError(
            f"`outputs` must have 2 classes or more, for the cross-entropy of one is always 0; got shape {tuple(outputs.shape)}. "
            "Pass the `loss` that the model is trained with, (outputs, targets) → (n,)."
        )
    return -_pick(log_softmax(outputs), targets)


def _cross_entropy_of_logits(outputs: Array, targets: Array) -> Array:
    values = _on_host(outputs)
    if values is not None and _are_probabilities(values, float(array_namespace(outputs).finfo(outputs.dtype).eps)):
        raise ArgumentError(
            '`model` must return logits for the cross-entropy of output="loss"; got probabilities, of which each row sums to 1. '
            "Leave its softmax out, or pass the `loss` that it is trained with, (outputs, targets) → (n,)."
        )
    return cross_entropy(outputs, targets)


def make_head(output: Output, transform: Transform, loss: LossFunction | None, probes: int, seed: int, targets: Any) -> Head:
    """Build the head that the arguments of `kernel` describe.

    Args:
        output: name or `(outputs, targets) → (n,)`.
        transform: applied to the outputs first; name or callable.
        loss: per-sample loss for `output="loss"`; None is `cross_entropy`.
        probes: number of Rademacher vectors for `output="random"`.
        seed: seed of these vectors.
        targets: the targets, or None.

    Returns:
        The head.

    Raises:
        ArgumentError: when a name is unknown, targets are missing, a loss has no use, or probes is below 1.
    """
    change = _transform(transform)
    if loss is not None and output != "loss":
        raise ArgumentError(
            f'`loss` must be None unless output="loss"; got one with output={output!r}. Leave it out, or name the head.'
        )
    if not (loss is None or callable(loss)):
        raise ArgumentError(f"`loss` must be a function (outputs, targets) → (n,); got {loss!r}. Pass the function itself.")
    probes, seed = integer("probes", probes, 1, "One probe is usual."), integer("seed", seed, 0)
    if output in ("target", "loss") and targets is None:
        raise ArgumentError(f'`targets` must be given for output="{output}"; got None. Pass labels, or use output="trace".')
    if output == "trace" or output == "full":
        return Head(lambda outputs, _: change(outputs), full=output == "full")
    if output == "sum":
        return Head(lambda outputs, _: _column(_sum(change(outputs))))
    if output == "target":
        _refuse_regression(targets)  # before a framework traces them
        return Head(lambda outputs, labels: _column(_pick(change(outputs), _shares(labels))))
    if output == "random":
        return Head(lambda outputs, _: _probe(change(outputs), probes, seed), factor=1.0 / probes)
    if output == "loss" or callable(output):
        usual = _cross_entropy_of_logits if transform == "identity" else cross_entropy
        function = output if callable(output) else loss or usual

        def losses(outputs: Array, labels: Array) -> Array:
            changed = change(outputs)
            return _column(_unreduced(function(changed, labels), changed, "output" if callable(output) else "loss"))

        return Head(losses)
    raise ArgumentError(
        f"`output` must be one of {', '.join(get_args(OutputName))} or a callable (outputs, targets) → (n,); got {output!r}."
    )


def _transform(transform: Transform) -> Callable[[Array], Array]:
    if callable(transform):
        return transform
    if transform == "identity":
        return lambda outputs: outputs
    if transform == "softmax":
        return lambda outputs: array_namespace(outputs).exp(log_softmax(outputs))
    if transform == "log_softmax":
        return log_softmax
    if transform == "sigmoid":
        return lambda outputs: 0.5 * (array_namespace(outputs).tanh(0.5 * outputs) + 1.0)
    raise ArgumentError(f"`transform` must be one of {', '.join(get_args(TransformName))} or a callable; got {transform!r}.")


def _sum(outputs: Array) -> Array:
    return array_namespace(outputs).sum(outputs, axis=-1)


def _column(scalars: Array) -> Array:
    return array_namespace(scalars).expand_dims(scalars, axis=-1)


def _unreduced(losses: Array, outputs: Array, name: str) -> Array:
    shape = getattr(losses, "shape", None)
    if shape is None or len(shape) != 1 or shape[0] != outputs.shape[0]:
        got = type(losses).__name__ if shape is None else f"shape {tuple(shape)}"
        raise ArgumentError(
            f"`{name}` must return one value for each of {outputs.shape[0]} samples, shape ({outputs.shape[0]},); "
            f"got {got}. Leave out its reduction over samples, and take its mean over the other axes."
        )
    return losses


def _pick(outputs: Array, targets: Array) -> Array:
    """Return `Σ_c t_c f_c` for probabilities t, or the labelled output."""
    xp = array_namespace(outputs)
    if not hasattr(targets, "ndim"):
        raise ArgumentError(
            f"`targets` must be one array, of labels or probabilities; got {type(targets).__name__}. Of several outputs pass the "
            'one that the labels are for, or use another head, as output="trace" or "random".'
        )
    if outputs.shape[-1] == 1:
        raise ArgumentError(
            f"`targets` must name one of 2 outputs or more; the model has one, of shape {tuple(outputs.shape)}. "
            'Use output="trace", which is the kernel of that output.'
        )
    if targets.ndim == 2 and targets.shape[1] == 1 and outputs.ndim == 2:  # labels in a column, as Keras' data sets have them
        targets = targets[:, 0]
    if targets.ndim == 1 and outputs.shape[:-1] == targets.shape:
        _check_labels(targets, outputs.shape[-1])
        native = getattr(xp, "mgs_picked", None)  # which may mark labels that name no output and cannot be refused
        if native is not None:
            return native(outputs, targets)
        places = xp.arange(outputs.shape[-1])
        if xp.isdtype(targets.dtype, "integral"):  # perhaps of 8 bits, where the places would begin anew at 256
            targets = xp.astype(targets, places.dtype)
        hit = xp.expand_dims(targets, axis=-1) == xp.astype(places, targets.dtype)
        return xp.sum(xp.where(hit, outputs, xp.zeros_like(outputs)), axis=-1)
    if targets.shape != outputs.shape:
        *lead, c = outputs.shape
        raise ArgumentError(
            f"`targets` must have shape {(*lead[:1],)} for labels or {(*lead, c)} for probabilities; got {tuple(targets.shape)}. "
            'For labels of each position use output="loss" with a `loss` of (outputs, targets) → (n,), or choose one.'
        )
    if targets.dtype != outputs.dtype:  # which not every framework multiplies
        targets = xp.astype(targets, outputs.dtype)
    # an output of -inf, as masks make them, has no part in the sum where its target is 0
    return xp.sum(xp.where(targets == 0, xp.zeros_like(outputs), outputs) * targets, axis=-1)


def _on_host(array: Array) -> Any:
    """Return the values as an array of NumPy; None where there are none yet, or they would have to be waited for."""
    if is_numpy_array(array):
        return array
    native = getattr(array_namespace(array), "mgs_values", None)
    return None if native is None else native(array)


def _are_probabilities(values: Any, eps: float) -> bool:
    """Return whether rows, enough of them to be no chance, are at least 0 and sum to 1 but for rounding."""
    if values.ndim != 2 or len(values) < 4 or values.shape[1] < 2 or values.flat[0] < 0:  # which is soon seen
        return False
    close = 4 * values.shape[1] * eps
    sums = host.sum(values, axis=-1, dtype=host.float64)
    return bool(host.min(values) >= 0 and host.max(host.abs(sums - 1.0)) < close and host.any(values != values[:1]))


def _shares(targets: Array) -> Array:
    """Return the targets, those of regression refused, by a namespace's `mgs_shares(targets)` where there are no values yet."""
    if _refuse_regression(targets):
        return targets
    native = getattr(array_namespace(targets), "mgs_shares", None)
    return targets if native is None else native(targets)


def _refuse_regression(targets: Any) -> bool:
    """Refuse targets below 0 of several outputs; return whether that could be seen."""
    if getattr(targets, "ndim", 0) < 2:
        return True
    values = _on_host(targets)
    if values is not None and values.size and float(host.min(values)) < 0:
        raise ArgumentError(
            '`targets` must be labels, or shares of the outputs of at least 0, for output="target"; got '
            f"{float(values.min()):.3g}. "
            'For regression use output="trace", or "loss" with the `loss` that the model is trained with.'
        )
    return values is not None


def _check_labels(labels: Array, c: int) -> None:
    """Refuse labels that name no output; on the host only, for elsewhere a look at the values would wait for the device.

    A namespace's `mgs_labels(labels, c)` gives those of another framework as integers of NumPy, or None where it cannot know them
    yet; it may have them looked at later.
    """
    if array_namespace(labels).isdtype(labels.dtype, "bool"):
        raise ArgumentError(f"`targets` must be integers to be labels; got dtype {labels.dtype}. Convert them, or pass a loss.")
    if not is_numpy_array(labels):
        native = getattr(array_namespace(labels), "mgs_labels", None)
        labels = None if native is None else native(labels, c)
    if labels is None or labels.size == 0:
        return
    if not array_namespace(labels).isdtype(labels.dtype, "integral"):
        raise ArgumentError(f"`targets` must be integers to be labels; got dtype {labels.dtype}. Convert them, or pass a loss.")
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= c:
        raise ArgumentError(f"`targets` must be labels in 0..{c - 1}; got {least}..{most}. Number the classes from 0.")


def _probe(outputs: Array, probes: int, seed: int) -> Array:
    """Multiply the outputs by seeded Rademacher vectors that the whole batch shares; the same in every framework."""
    xp, c = array_namespace(outputs), outputs.shape[-1]
    size = -(-c * probes // 8)  # drawn as bits at once, for a vocabulary has tens of thousands
    bits = host.frombuffer(random.Random(seed).randbytes(size), host.uint8)
    signs = 2.0 * host.unpackbits(bits, count=c * probes).reshape(c, probes) - 1.0
    return xp.matmul(outputs, xp.asarray(signs, dtype=outputs.dtype))
