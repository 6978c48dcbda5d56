"""The backend's face: a Keras model becomes a functional model over the arrays of Keras' own backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import prod
from typing import Any, cast

import keras
from keras.src.backend.common.global_state import get_global_attribute
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR

from mgs_core._errors import ArgumentError, UnsupportedModelError
from mgs_core._protocol import Backend, HeadFunction, LayerStatistics, ParameterChoice
from mgs_core._registry import get_backend
from mgs_core._tree import add_named, select
from mgs_core._types import Array, Namespace, Tree
from mgs_core.functional import FunctionalModel


class Function:
    """Be a model, as it is at inference, as a pure function of its trainable variables.

    Attributes:
        variables: the trainable variables by path.
        others: the other variables.
        fixed: values for the others; None for those they have at the call.
    """

    def __init__(self, model: Any, fixed: Sequence[Array] | None = None) -> None:
        self.variables = _names(model)
        self._model, self.others, self.fixed = model, model.non_trainable_variables, fixed

    def named(self, values: Iterable[Array]) -> dict[str, Array]:
        """Return values of the trainable variables by path."""
        return dict(zip(self.variables, values, strict=True))

    def __call__(self, parameters: dict[str, Array], inputs: Any) -> Array:
        """Return the outputs (n, c)."""
        return flat_outputs(self.outputs(parameters, inputs), keras.tree.flatten(inputs)[0].shape[0])

    def outputs(self, parameters: dict[str, Array], inputs: Any) -> Any:
        """Return the outputs in the model's own structure.

        Raises:
            UnsupportedModelError: when a layer draws random numbers, as none should at inference.
        """
        # read only here, in the graph that needs them; constants, though on JAX a step has gradients in the statistics it moves
        held = [keras.ops.stop_gradient(variable.value) for variable in self.others] if self.fixed is None else self.fixed
        state = [(variable, parameters[name]) for name, variable in self.variables.items()]
        scope = keras.StatelessScope(state_mapping=[*state, *zip(self.others, held, strict=True)])
        with _kept_losses(self._model), scope, _differentiable_twice(), _no_random_numbers(self._model, scope):
            return call(self._model, inputs, training=False)


class KerasBackend:
    """Implement `Backend` for Keras models by the backend of their framework."""

    name = "keras"

    @property
    def framework(self) -> Backend:
        """Return the backend of TensorFlow, JAX or PyTorch, as Keras is configured."""
        return get_backend(keras.backend.backend())

    @property
    def namespace(self) -> Namespace:
        """Return the framework's namespace."""
        return self.framework.namespace

    def asarray(self, value: Any) -> Array:
        """Return the value as an array of the framework, on its default device; what is sparse becomes dense."""
        return keras.ops.convert_to_tensor(value.toarray() if hasattr(value, "toarray") else value, sparse=False)

    def to_numpy(self, array: Array) -> Any:
        """Return the array as a NumPy array on the host."""
        return self.framework.to_numpy(array)

    def functional(
        self, model: Any, trainable: Sequence[Array] | None = None, fixed: Sequence[Array] | None = None
    ) -> FunctionalModel:
        """Return the model as a pure function of its trainable variables, as it is at inference.

        Dropout is off, and batch normalisation uses its running statistics: per-sample gradients exist. Outputs are flattened to
        (n, c), several side by side.

        Args:
            model: a built layer or model.
            trainable: values of `model.trainable_variables`; None for those they have now.
            fixed: values of `model.non_trainable_variables`; None for those they have now.

        Returns:
            The functional model; its parameters go by the variables' paths.

        Raises:
            ArgumentError: when the model is not built.
        """
        function = Function(model, fixed)
        return self.current(function) if trainable is None else FunctionalModel(function, function.named(trainable))

    def current(self, function: Function) -> FunctionalModel:
        """Return a model's function with the values that its variables have now.

        Args:
            function: of an earlier functional model; what a framework's backend finds out about it is kept as long as it lives.
        """
        return FunctionalModel(function, function.named(self.values(function.variables.values())))

    def values(self, variables: Iterable[Any]) -> list[Array]:
        """Return the values that Keras variables have now, differentiable in them.

        Args:
            variables: of any layers.
        """
        return [self.framework.asarray(variable.value) for variable in variables]

    def parameters(self, model: Any) -> dict[str, Array]:
        """Return the values of the trainable variables by path."""
        return self.framework.parameters(model if isinstance(model, FunctionalModel) else self.functional(model))

    def statistics(
        self, model: Any, inputs: Any, targets: Any, head: HeadFunction, parameters: ParameterChoice, *, differentiable: bool
    ) -> list[LayerStatistics]:
        """Return the layer statistics, as `Backend.statistics` says."""
        arguments = self._arguments(model, inputs, targets, head, parameters)
        return self.framework.statistics(*arguments, differentiable=differentiable)

    @property
    def summed_kernel(self) -> Callable[..., Array] | None:
        """Return what gives the kernel summed over the heads, as `Backend` says; None where the framework's backend has none."""
        summed = getattr(self.framework, "summed_kernel", None)
        return None if summed is None else lambda *arguments: summed(*self._arguments(*arguments))

    def _arguments(
        self, model: Any, inputs: Any, targets: Any, head: HeadFunction, parameters: ParameterChoice
    ) -> tuple[FunctionalModel, Any, Any, HeadFunction, list[str]]:
        """Return the arguments as the framework's backend takes them."""
        functional = model if isinstance(model, FunctionalModel) else self.functional(model)
        chosen = select(functional.parameters, parameters)
        inputs = keras.tree.map_structure(self.asarray, inputs)
        targets = None if targets is None else keras.tree.map_structure(self.asarray, targets)
        return functional, inputs, targets, head, chosen

    def refuse_probabilities(self, model: Any) -> None:
        """Refuse a model that ends in a softmax or sigmoid, whose outputs are no logits.

        Raises:
            ArgumentError: when it does.
        """
        last = model
        while getattr(last, "outputs", None):  # of a graph of layers; what others do at their end cannot be seen
            last = last.outputs[0]._keras_history.operation
        plain = keras.layers.Dense | keras.layers.EinsumDense | keras.layers.Activation
        ending = getattr(last.activation, "__name__", "") if isinstance(last, plain) else ""
        name = "softmax" if isinstance(last, keras.layers.Softmax) else ending
        if name in ("softmax", "sigmoid"):
            raise ArgumentError(
                f'`model` must return logits for the cross-entropy of output="loss"; got layer {last.name!r} with {name}. '
                "Pass the loss that it is trained with: loss=mgs_core.adapters.keras.sample_loss(model)."
            )

    def replay(self) -> Any:
        """Return what evaluates a function with its gradient on PyTorch, traced once for each shape."""
        from .replay import Replay

        return Replay()

    def value_and_gradient(self, function: Callable[..., Array]) -> Callable[..., tuple[Array, Tree]]:
        """Return a function that gives the value and the gradient in the first argument."""
        return self.framework.value_and_gradient(function)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function compiled by the framework."""
        return self.framework.compile(function)


def call(model: Any, inputs: Any, *, training: bool) -> Any:
    """Call a model or layer, with `training` where it takes it.

    Args:
        model: the model.
        inputs: the batch.
        training: as Keras uses it.
    """
    return model(inputs, training=training) if model._call_has_training_arg else model(inputs)


def flat_outputs(outputs: Any, n: int) -> Array:
    """Return outputs of any structure as (n, c), side by side in the order of `keras.tree`.

    Args:
        outputs: tensors with the samples first.
        n: their number, which outputs of a traced model may not know.
    """
    flat = []
    for leaf in keras.tree.flatten(outputs):
        samples, *rest = leaf.shape
        flat.append(keras.ops.reshape(leaf, (n if samples is None else samples, -1 if None in rest else prod(rest))))
    return flat[0] if len(flat) == 1 else keras.ops.concatenate([keras.ops.cast(leaf, flat[0].dtype) for leaf in flat], axis=-1)


def _names(model: Any) -> dict[str, Any]:
    """Return the trainable variables by path; a path that comes twice gets a number."""
    if not model.built:
        raise ArgumentError(f"`model` must be built; got {model.name!r}, which has not seen a batch. Call it on one first.")
    stateful = [layer.name for layer in model._flatten_layers() if getattr(layer, "stateful", False)]
    if stateful:
        raise UnsupportedModelError(
            f"`model` must treat each sample by itself; got stateful layer {', '.join(stateful)}, which goes on from what had a "
            "sample's place in the batch before. Make it with stateful=False, or let the model take `initial_state` as an input."
        )
    names: dict[str, Any] = {}
    for variable in model.trainable_variables:
        if getattr(variable, "overwrite_with_gradient", False):
            raise UnsupportedModelError(
                f"`model` must have gradients in its variables; got {variable.path!r}, whose gradient is its next value, as in "
                "layers quantized to float8. Pass the model before `quantize`."
            )
        add_named(names, variable.path, variable)
    if not names:
        raise ArgumentError(f"`model` must have trainable variables; got none in {model.name!r}. Unfreeze a layer.")
    return names


@contextmanager
def _kept_losses(model: Any) -> Iterator[None]:
    """Keep what layers have added to the loss in the training pass; a call of the model drops it."""
    before = [(layer, list(layer._losses), set(layer._loss_ids)) for layer in model._flatten_layers()]
    try:
        yield
    finally:
        for layer, losses, ids in before:
            layer._losses[:] = losses
            layer._loss_ids.update(ids)


@contextmanager
def _no_random_numbers(model: Any, scope: Any) -> Iterator[None]:
    """Refuse layers that draw some, though it is not training, by the states of their generators in the scope."""
    sources = [(layer.name, source.state) for layer in model._flatten_layers() for source in layer._seed_generators]
    before = [scope.get_current_value(state) for _, state in sources]
    yield
    drawing = [n for (n, state), value in zip(sources, before, strict=True) if scope.get_current_value(state) is not value]
    common = get_global_attribute(GLOBAL_SEED_GENERATOR)
    if common is not None and scope.get_current_value(common.state) is not None:
        drawing.append("without a SeedGenerator of its own")
    if drawing:
        raise UnsupportedModelError(
            "`model` must do the same at each call, as it is at inference; got random numbers, drawn with training=False by "
            f"layer {', '.join(drawing)}. Let it draw only where its argument `training` is true."
        )


def _differentiable_twice() -> AbstractContextManager[Any]:
    """Keep PyTorch from fused attention, which has no second derivative."""
    if keras.backend.backend() != "torch":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return cast(AbstractContextManager[Any], sdpa_kernel(SDPBackend.MATH))


backend = KerasBackend()
