"""Keras losses as losses of single samples, for heads and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import prod
from typing import Any, cast

from keras.src.trainers.compile_utils import CompileLoss

from mgs_core import ArgumentError

from ._keras import keras

_TARGETS, _MASKS = "mgs targets", "mgs masks"


def sample_loss(loss: Any) -> Callable[[Any, Any], Any]:
    """Return a loss as `(outputs, targets) → (n,)`, for `mgs_core.kernel(model, x, y, output="loss", loss=…)`.

    Args:
        loss: a name, a function `(y_true, y_pred)` or an object of `keras.losses`; or a compiled model, whose losses are added up
            with their weights.

    Returns:
        The function; the mean over what axes a sample's loss has, without reduction over samples. Where a loss returns a scalar,
        that of each sample is the loss of a batch of it alone.

    Raises:
        ArgumentError: when a model is not compiled with a loss, or is a subclass of several outputs.

    Example:
        >>> import keras
        >>> from mgs_core.adapters.keras import sample_loss
        >>> loss = sample_loss("mean_squared_error")
        >>> keras.ops.convert_to_numpy(loss(keras.ops.ones((2, 3)), keras.ops.zeros((2, 3)))).tolist()
        [1.0, 1.0]
    """
    if isinstance(loss, keras.Model):
        inputs = getattr(loss, "inputs", None)
        spec = loss.compute_output_spec(inputs if len(inputs) > 1 else inputs[0]) if inputs else None
        return compiled_loss(loss, spec)
    function = keras.losses.get(loss)
    call = partial(_values, function) if isinstance(function, keras.losses.Loss) else function
    return lambda outputs, targets: _of_samples(call, targets, outputs)


def compiled_loss(model: Any, spec: Any, *, weighted: bool = False) -> Callable[[Any, Any], Any]:
    """Return the losses that a model was compiled with, added up, for its flattened outputs.

    Args:
        model: the model.
        spec: outputs of the model, whatever their values; None for one output of shape (n, c).
        weighted: refuse losses that return a scalar, for Keras cannot weight their samples.

    Returns:
        `(outputs (n, c), targets) → (n,)`; targets may be those of `masked`.

    Raises:
        ArgumentError: when it has none, they cannot be weighted, or shapes of several outputs are not known.
    """
    compiled = model._compile_loss
    if compiled is None:
        raise ArgumentError(f"`model` must be compiled with a loss; got {model.name!r} without. Compile it, or pass a loss.")

    def loss(outputs: Any, targets: Any) -> Any:
        predicted = outputs if spec is None else like(spec, outputs)
        targets, masks = (targets[_TARGETS], targets[_MASKS]) if _is_masked(targets) else (targets, None)
        if spec is None and len(keras.tree.flatten(targets)) > 1:
            raise ArgumentError(
                f"`model` must be sequential or functional for the losses of several outputs, whose shapes it knows; got "
                f"{model.name!r} of class {type(model).__name__}. Pass a loss of outputs side by side, (n, c), and targets."
            )
        total = 0.0
        for function, weight, y_true, y_pred, mask in _parts(compiled, targets, predicted, masks):
            values = _values(function, y_true, y_pred)
            if len(values.shape) == 0:
                if weighted:
                    raise ArgumentError(
                        f"`loss` must return one value for each sample to be weighted; {function.name} returned a scalar. "
                        "Leave the mean over samples to Keras: keras.ops.mean(…, axis=-1)."
                    )
                value = _of_samples(partial(_values, function), y_true, y_pred)
            else:
                if mask is not None:
                    values = values * keras.ops.reshape(mask, (*mask.shape, *(1,) * (len(values.shape) - len(mask.shape))))
                value = _each(values)
            total = total + (value if weight is None else weight * value)
        return total

    return loss


def scalar_losses(compiled: Any, outputs: Any, targets: Any) -> list[tuple[Any, Any]]:
    """Return those of the losses that a model was compiled with that return a scalar, and what they give for each sample alone.

    For all samples, and without the first one and two: that of a batch may be close to the mean of its samples by chance.

    Args:
        compiled: the losses.
        outputs: in the model's own structure.
        targets: as it is trained with.
    """
    found = []
    for function, _, y_true, y_pred, _ in _parts(compiled, targets, outputs, None):
        value = _values(function, y_true, y_pred)
        if len(value.shape) == 0:
            alone = _of_samples(partial(_values, function), y_true, y_pred)
            found.append((value, alone))
            for first in range(1, min(3, alone.shape[0] - 1)):
                later = keras.tree.map_structure(lambda leaf, first=first: leaf[first:], (y_true, y_pred))
                found.append((_values(function, *later), alone[first:]))
    return found


def _parts(compiled: Any, targets: Any, predicted: Any, masks: Any) -> Iterator[tuple[Any, Any, Any, Any, Any]]:
    """Yield each loss with its weight, targets, outputs and mask."""
    losses = _flat_losses(compiled, targets, predicted)
    masks = None if masks is None else keras.tree.pack_sequence_as(predicted, masks)
    if keras.tree.is_nested(predicted) and len(keras.tree.flatten(targets)) == len(keras.tree.flatten(predicted)):
        targets = keras.tree.pack_sequence_as(predicted, keras.tree.flatten(targets))
    for path, function, weight, _ in losses:
        y_true, y_pred, mask = targets, predicted, masks
        for key in path:
            y_true, y_pred, mask = y_true[key], y_pred[key], None if mask is None else mask[key]
        yield function, weight, y_true, y_pred, mask


class _Unevaluated(CompileLoss):  # type: ignore[misc]  # keras has no types
    """Find which loss is of which output, as Keras does at the first batch, and evaluate none."""

    found: Any = None

    def build(self, y_true: Any, y_pred: Any) -> None:
        super().build(y_true, y_pred)
        self.found = self._flat_losses
        self._flat_losses: list[Any] = []


def _flat_losses(compiled: Any, targets: Any, predicted: Any) -> Any:
    """Return the losses with path and weight; those that Keras has not built yet stay so, for they are the model's."""
    if compiled.built:
        return compiled._flat_losses
    copy = _Unevaluated(compiled._user_loss, compiled._user_loss_weights, output_names=compiled.output_names)
    with _apart():
        if keras.tree.is_nested(targets) or keras.tree.is_nested(predicted):
            copy.call(targets, predicted)  # makes one structure of both
        else:
            copy.build(targets, predicted)
    return copy.found


def _apart() -> AbstractContextManager[Any]:
    """Take a graph apart: Keras makes means of several losses, and TensorFlow no variables in a function's second trace."""
    if keras.backend.backend() != "tensorflow":
        return nullcontext()
    from tensorflow import Graph

    return cast(AbstractContextManager[Any], Graph().as_default())


def masked(targets: Any, outputs: Any) -> Any:
    """Return targets with the masks of the outputs, scaled as Keras scales them in its losses; without masks themselves.

    Args:
        targets: as the model is trained with.
        outputs: of the model, with their masks.
    """
    leaves = keras.tree.flatten(outputs)
    masks = [keras.src.backend.get_keras_mask(leaf) for leaf in leaves]
    if all(mask is None for mask in masks):
        return targets

    def scaled(mask: Any, leaf: Any) -> Any:
        if mask is None:
            return keras.ops.ones((leaf.shape[0],), leaf.dtype)
        mask = keras.ops.cast(mask, leaf.dtype)
        return mask / keras.ops.maximum(keras.ops.mean(mask), keras.config.epsilon())

    return {_TARGETS: targets, _MASKS: [scaled(mask, leaf) for mask, leaf in zip(masks, leaves, strict=True)]}


def settings(model: Any) -> tuple[Any, ...]:
    """Return the numbers and names that the compiled losses hold, which callbacks may change, and their weights."""
    if model._compile_loss is None or not model._compile_loss.built:
        return ()
    found: list[Any] = []
    for _, function, weight, _ in model._compile_loss._flat_losses:
        held = {**vars(function), **getattr(function, "_fn_kwargs", {})}
        found += [weight, *((name, value) for name, value in held.items() if isinstance(value, (int, float, str)))]
    return tuple(found)


def _values(loss: Any, y_true: Any, y_pred: Any) -> Any:
    """Return a Keras loss before its reduction; like Keras, of values in the dtype of the loss."""

    def convert(leaf: Any) -> Any:
        return keras.ops.convert_to_tensor(leaf, dtype=loss.dtype)

    return loss.call(*(keras.tree.map_structure(convert, values) for values in (y_true, y_pred)))


def _of_samples(call: Callable[[Any, Any], Any], y_true: Any, y_pred: Any) -> Any:
    """Return the loss of each sample; where the loss is a scalar, that of a batch of one sample."""
    values = call(y_true, y_pred)
    if len(values.shape) > 0:
        return _each(values)
    if keras.tree.flatten(y_pred)[0].shape[0] == 1:
        return keras.ops.reshape(values, (1,))

    def alone(sample: Any) -> Any:
        return call(*keras.tree.map_structure(lambda leaf: keras.ops.expand_dims(leaf, 0), sample))

    return keras.ops.vectorized_map(alone, (y_true, y_pred))


def _is_masked(targets: Any) -> bool:
    return isinstance(targets, dict) and targets.keys() == {_TARGETS, _MASKS}


def _each(values: Any) -> Any:
    """Return the mean over all axes but the first."""
    return keras.ops.mean(values, axis=tuple(range(1, len(values.shape)))) if len(values.shape) > 1 else values


def like(spec: Any, outputs: Any) -> Any:
    """Undo the flattening of a model's outputs to (n, c).

    Args:
        spec: outputs of the model, whatever their values.
        outputs: (n, c).

    Returns:
        The outputs in the structure, shapes and dtypes of `spec`.
    """
    parts, start = [], 0
    for leaf in keras.tree.flatten(spec):
        width = prod(leaf.shape[1:])
        part = keras.ops.reshape(outputs[:, start : start + width], (outputs.shape[0], *leaf.shape[1:]))
        parts.append(keras.ops.cast(part, leaf.dtype))
        start += width
    return keras.tree.pack_sequence_as(spec, parts)
