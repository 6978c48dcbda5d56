"""The network of a comparison: a built-in one, or the user's own classifier from an ONNX file, made to fit the data.

An own file starts every run from its own weights; seeds then differ in the draw of data and noise, and in the order. It meets the
samples as the data file holds them, not as they are scaled, for that is what it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mgs_core import onnx
from mgs_core._errors import ArgumentError, renamed
from mgs_core._namespace import array_namespace
from mgs_core._protocol import Backend
from mgs_core._registry import get_backend
from mgs_core._types import Array
from mgs_core.experiments.data import Dataset, load_dataset
from mgs_core.experiments.models import build
from mgs_core.experiments.settings import Settings
from mgs_core.experiments.surgery import before_softmax, with_masks
from mgs_core.functional import FunctionalModel

_APART = 0.1  # by which share of themselves the weights of a second network differ, at random
_TINY = 1e-12  # added to probabilities before their logarithm is taken


@dataclass(frozen=True, eq=False)
class Network:
    """Hold what a run trains.

    Attributes:
        plain: takes the samples as the data set has them, or a dict of them as "x", and returns logits (n, c).
        masked: gives the same with further inputs, by which hidden values are multiplied, and their names and sizes.
        peer: gives parameters for a second network, which starts elsewhere.
    """

    plain: FunctionalModel
    masked: Callable[[], tuple[FunctionalModel, dict[str, int]]]
    peer: Callable[[], dict[str, Array]]


def is_file(model: str) -> bool:
    """Say whether a model is named by its file."""
    return model.endswith(".onnx")


def make_network(model: str, data: Dataset, *, backend: str, seed: int) -> Network:
    """Make the network of a run.

    Args:
        model: "mlp", "cnn", or the path of an .onnx file of a classifier.
        data: which it shall fit.
        backend: name of the backend.
        seed: of the weights of a built-in network; a file's are taken as they are.

    Returns:
        The network, in float32.

    Raises:
        ArgumentError: when the model is unknown, or the file's does not fit the data; says what fits.
    """
    if is_file(model):
        return own_network(model, data, backend=backend, seed=seed)
    shape, classes = data.train_inputs.shape[1:], data.classes
    built = build(model, shape, classes, seed=seed)
    return Network(
        onnx.load(built.plain, backend=backend),
        lambda: (onnx.load(built.masked, backend=backend), built.masks),
        lambda: onnx.load(build(model, shape, classes, seed=[seed, 4]).plain, backend=backend).parameters,
    )


def check_fit(settings: Settings, *, dropout: bool) -> Dataset:
    """Refuse data that cannot be read and a model that does not fit them, before anything is trained.

    Args:
        settings: of the comparison.
        dropout: whether a recipe drops hidden units.

    Returns:
        The data of seed 0, their labels clean.

    Raises:
        ArgumentError: when they do not fit, or no hidden unit can be dropped.
    """
    with renamed(source="data"):
        data = load_dataset(settings.data, samples=settings.samples)
    network = make_network(settings.model, data, backend="numpy", seed=0)
    if dropout:
        network.masked()
    return data


def save_own(model: str, parameters: Any, path: Path) -> None:
    """Write a user's file again, with trained parameters.

    Args:
        model: path of the file that was trained.
        parameters: arrays by name.
        path: of the file to write; its folder is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(onnx.load(model), path, parameters=parameters)


def own_network(model: Any, data: Dataset, *, backend: str, seed: int, more: bool = False) -> Network:
    """Make a network of the user's own classifier.

    Args:
        model: its path or proto.
        data: which it shall fit.
        backend: name of the backend.
        seed: of what the second network of a pair is moved by.
        more: whether it may know more classes than the data.

    Returns:
        The network, in float32.

    Raises:
        ArgumentError: when it does not fit the data; says what fits.
    """
    proto, output = before_softmax(onnx.load(model))
    loaded = onnx.load(proto, backend=backend, output=output, dtype="float32")
    name, shape = _input(loaded.function, data)
    function = _Fitted(loaded.function, name, shape, data)
    function.judge(_outputs(function, loaded.parameters, data.train_inputs[:4], get_backend(backend)), more)

    def masked() -> tuple[FunctionalModel, dict[str, int]]:
        edited, masks = with_masks(proto, loaded, shape)
        other = onnx.load(edited, backend=backend, output=output, parameters=list(loaded.parameters), dtype="float32")
        return FunctionalModel(function.of(other.function), other.parameters), masks

    def peer() -> dict[str, Array]:
        get, random = get_backend(backend), np.random.default_rng([seed, 4])
        values = {name: np.asarray(get.to_numpy(value)) for name, value in loaded.parameters.items()}
        moved = {name: value * (1 + _APART * random.normal(size=value.shape)) for name, value in values.items()}
        return {name: get.asarray(value.astype(np.float32)) for name, value in moved.items()}

    return Network(FunctionalModel(function, loaded.parameters), masked, peer)


def _input(function: Any, data: Dataset) -> tuple[str, tuple[int, ...]]:
    """Return name and shape of the input that takes the samples."""
    given = data.train_inputs.shape[1:]
    if len(function.inputs) != 1 or (function.inputs[0].dtype is not None and function.inputs[0].dtype.kind != "f"):
        listed = ", ".join(f"{value.name!r} ({value.dtype})" for value in function.inputs)
        raise ArgumentError(f"`model` must have one floating-point input, which takes the samples; got {listed}.")
    (value,) = function.inputs
    declared = given if value.shape is None else value.shape[1:]
    if value.shape is not None and len(value.shape) < 2:
        raise ArgumentError(f"`model` must take a batch of samples, shape (n, …); got {value.shape} for {value.name!r}.")
    fixed = [size for size in declared if isinstance(size, int)]
    if len(fixed) == len(declared) and prod(fixed) == prod(given) and _alike(tuple(fixed), given):
        return value.name, tuple(fixed)
    if len(declared) == len(given) and all(
        not isinstance(size, int) or size == got for size, got in zip(declared, given, strict=True)
    ):
        return value.name, given
    raise ArgumentError(
        f"`model` must take samples of the data's shape {given}, flat or with axes of length 1 more or fewer; "
        f"got {declared} for its input {value.name!r}. Reshape the arrays of the data, or export for this shape."
    )


def _alike(shape: tuple[int, ...], given: tuple[int, ...]) -> bool:
    """Say whether two shapes differ by axes of length 1, or one of them is flat."""
    return 1 in (len(shape), len(given)) or [size for size in shape if size > 1] == [size for size in given if size > 1]


def _outputs(function: _Fitted, parameters: Any, samples: Array, backend: Backend) -> Array:
    try:
        outputs = np.asarray(backend.to_numpy(function.raw(parameters, backend.asarray(samples))))
    except ArgumentError as error:
        raise ArgumentError(f"{error} Samples have the shape {samples.shape[1:]}; their number must be free.") from error
    if len(outputs) != len(samples):
        raise ArgumentError(
            f"`model` must take any number of samples; got {len(outputs)} outputs for {len(samples)}. "
            "Export with a free batch axis."
        )
    return outputs


class _Fitted:
    """The function of a user's network: undoes the scaling, brings samples to its shape, and its outputs to logits (n, c)."""

    def __init__(self, function: Any, name: str, shape: tuple[int, ...], data: Dataset) -> None:
        self._function, self._name, self._shape = function, name, shape
        self._mean, self._deviation, self._classes = data.mean, data.deviation, data.classes
        self._logits: Callable[[Array], Array] = lambda outputs: outputs

    def of(self, function: Any) -> _Fitted:
        """Return the same for another form of the function."""
        other = object.__new__(_Fitted)
        other.__dict__.update(self.__dict__, _function=function)
        return other

    def judge(self, outputs: Array, more: bool) -> None:
        """See from a few outputs (n, c) what they are, and whether they are those of all classes, and of no more or of `more`."""
        outs = outputs.shape[1]
        width = 2 if outs == 1 else outs
        if width < self._classes or (width > self._classes and not more):
            raise ArgumentError(
                f"`model` must return a score for each of the {self._classes} classes of the data; got {outs} outputs. "
                "Number the classes as the model does, or choose data of its classes."
            )
        self._logits = logits_of(outputs)

    def raw(self, parameters: Any, inputs: Any) -> Array:
        """Return the outputs as the file gives them."""
        masks = dict(inputs) if hasattr(inputs, "keys") else {"x": inputs}
        x = masks.pop("x")
        x = array_namespace(x).reshape(x * self._deviation + self._mean, (x.shape[0], *self._shape))
        outputs: Array = self._function(parameters, {self._name: x, **masks})
        return outputs

    def __call__(self, parameters: Any, inputs: Any) -> Array:
        """Return logits."""
        return self._logits(self.raw(parameters, inputs))


def logits_of(outputs: Array) -> Callable[[Array], Array]:
    """Return what makes logits (n, c) of a classifier's outputs, as a few of them tell: probabilities or logits, or one score.

    Args:
        outputs: (n, c), on the host.

    Returns:
        A function of outputs of any framework.
    """
    if outputs.shape[1] == 1:  # the score of the second class; softmax of (0, y) is the sigmoid of y
        return lambda y: array_namespace(y).concat([array_namespace(y).zeros_like(y), y], axis=1)
    if np.all(outputs >= 0) and np.allclose(outputs.sum(axis=1), 1, atol=1e-4):
        return lambda y: array_namespace(y).log(y + _TINY)
    return lambda y: y
