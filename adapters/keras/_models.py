"""Attach a regulariser to a model: as a class that its file names, or as a change to one instance."""

from __future__ import annotations

import inspect
from typing import Any

from keras.src.models.functional import Functional  # the class of `keras.Model(inputs, outputs)` has no public name

from mgs_core import ArgumentError

from ._keras import keras
from ._regularizer import MGSRegularizer
from ._training import Training

_CONFIG = "mgs_regularizer"


class MGSMixin:
    """Give a model a regulariser that is saved with it; put it before `keras.Model` among the bases.

    Example:
        >>> import keras
        >>> from mgs_core.adapters.keras import MGSMixin, MGSRegularizer, regularize
        >>> class Net(MGSMixin, keras.Model):
        ...     pass
        >>> regularize(Net(), MGSRegularizer("trace")).mgs_regularizer.penalty
        'trace'
    """

    _mgs: Training | None = None

    @property
    def mgs_regularizer(self) -> MGSRegularizer | None:
        """Return the regulariser, or None."""
        return None if self._mgs is None else self._mgs.regularizer

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """Return the loss, in training with weights and penalty."""
        original: Any = super().compute_loss  # type: ignore[misc]  # of keras.Model
        if self._mgs is None:
            return original(x, y, y_pred, sample_weight, training)
        own = _taking_training(original, training)
        return self._mgs.loss(own, x, y, y_pred, sample_weight, training)

    def get_metrics_result(self) -> dict[str, Any]:
        """Return the metrics, those of validation without the penalty."""
        original: Any = super().get_metrics_result  # type: ignore[misc]
        results: dict[str, Any] = original() if self._mgs is None else self._mgs.results(original)
        return results

    def make_train_function(self, force: bool = False) -> None:
        """Make the training step."""
        original: Any = super().make_train_function  # type: ignore[misc]
        if self._mgs is None:
            original(force)
        else:
            self._mgs.make_train_function(original, force)

    def get_config(self) -> dict[str, Any]:
        """Return the model's configuration and its regulariser's."""
        config: dict[str, Any] = super().get_config()  # type: ignore[misc]
        if self.mgs_regularizer is not None:
            config[_CONFIG] = keras.saving.serialize_keras_object(self.mgs_regularizer)
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Return the model with its regulariser."""
        config = dict(config)
        regularizer = keras.saving.deserialize_keras_object(config.pop(_CONFIG, None))
        arguments = () if custom_objects is None else (custom_objects,)
        model = super().from_config(config, *arguments)  # type: ignore[misc]
        return model if regularizer is None else regularize(model, regularizer)


@keras.saving.register_keras_serializable(package="mgs_core")
class MGSFunctional(MGSMixin, Functional):  # type: ignore[misc]
    """Be a functional model with a regulariser; its `.keras` file brings both back where this module is imported."""


@keras.saving.register_keras_serializable(package="mgs_core")
class MGSSequential(MGSMixin, keras.Sequential):  # type: ignore[misc]
    """Be a sequential model with a regulariser; its `.keras` file brings both back where this module is imported."""


_REGISTERED = {Functional: MGSFunctional, keras.Sequential: MGSSequential}
_PLAIN = {registered: plain for plain, registered in _REGISTERED.items()}


def regularize(model: Any, regularizer: MGSRegularizer | None) -> Any:
    """Regularise a model's `fit`, so that its file brings the regulariser back.

    A sequential or functional model becomes `MGSSequential` or `MGSFunctional`, the same object with the same layers, compiled as
    it is, and with None what it was again; a subclass with `MGSMixin` keeps its class. Any other class cannot hold the
    regulariser in its file and is treated by `attach`.

    Args:
        model: a Keras model, compiled or not.
        regularizer: how; None to remove it.

    Returns:
        The model.

    Raises:
        ArgumentError: when an argument is of another type.

    Example:
        >>> import keras
        >>> from mgs_core.adapters.keras import MGSRegularizer, regularize
        >>> model = regularize(keras.Sequential([keras.layers.Dense(2)]), MGSRegularizer("trace", strength=0.01))
        >>> type(model).__name__
        'MGSSequential'
    """
    _refuse(model, regularizer)
    if type(model) in _REGISTERED and regularizer is not None:
        if getattr(model, "_mgs", None) is not None:
            attach(model, None)  # or what it changed on the instance would stand before the class
        model.__class__ = _REGISTERED[type(model)]
    return attach(model, regularizer)


def attach(model: Any, regularizer: MGSRegularizer | None) -> Any:
    """Regularise one instance's `fit`; its class and its file stay plain Keras, so attach again after loading.

    Args:
        model: a Keras model of any class, compiled or not.
        regularizer: how; None to remove it.

    Returns:
        The model.

    Raises:
        ArgumentError: when an argument is of another type.

    Example:
        >>> import keras
        >>> from mgs_core.adapters.keras import MGSRegularizer, attach
        >>> model = attach(keras.Sequential([keras.layers.Dense(2)]), MGSRegularizer("trace", strength=0.01))
        >>> type(model).__name__
        'Sequential'
    """
    _refuse(model, regularizer)
    if isinstance(model, MGSMixin):
        _install(model, regularizer)
        if regularizer is None:
            model.__class__ = _PLAIN.get(type(model), type(model))
        return model
    for name in ("compute_loss", "get_metrics_result", "make_train_function"):
        model.__dict__.pop(name, None)
    _install(model, regularizer)
    training = model._mgs
    object.__setattr__(model, "_compute_loss_has_training_arg", training is not None or _has_training(model.compute_loss))
    if training is None:
        return model
    original = model.compute_loss, model.get_metrics_result, model.make_train_function

    def compute_loss(x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True) -> Any:
        own = _taking_training(original[0], training)
        return model._mgs.loss(own, x, y, y_pred, sample_weight, training)

    # past Keras' __setattr__, which would track the functions or refuse them
    object.__setattr__(model, "compute_loss", compute_loss)
    object.__setattr__(model, "get_metrics_result", lambda: training.results(original[1]))
    object.__setattr__(model, "make_train_function", lambda force=False: training.make_train_function(original[2], force))
    return model


def _refuse(model: Any, regularizer: Any) -> None:
    if not isinstance(model, keras.Model):
        raise ArgumentError(f"`model` must be a keras.Model; got {type(model).__name__}. Wrap a layer in keras.Sequential.")
    if regularizer is not None and not isinstance(regularizer, MGSRegularizer):
        raise ArgumentError(
            f"`regularizer` must be an MGSRegularizer or None; got {type(regularizer).__name__}. "
            'Make one: MGSRegularizer("trace").'
        )


def _install(model: Any, regularizer: MGSRegularizer | None) -> None:
    """Put a `Training` on the model, its tracker among the model's metrics, and drop a step that was traced without it."""
    before = model._mgs if getattr(model, "_mgs", None) is not None else None
    if before is not None:
        model._metrics.remove(before.tracker)
    training = None if regularizer is None else Training(model, regularizer)
    object.__setattr__(model, "_mgs", training)
    if training is not None:
        model._metrics.append(training.tracker)
    model.train_function = model.test_function = None


def _taking_training(original: Any, training: bool) -> Any:
    """Return `compute_loss` without the argument `training`, which the user's own may not have."""
    if not _has_training(original):
        return original
    return lambda x, y, y_pred, sample_weight: original(x, y, y_pred, sample_weight, training)


def _has_training(compute_loss: Any) -> bool:
    return "training" in inspect.signature(compute_loss).parameters
