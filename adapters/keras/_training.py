"""What `fit` does for a regularised model: the penalty joins the loss, and its value the logs.

`compute_loss` is what the trainers of all three Keras backends call inside the differentiated region, so the kernel is taken
there, by a second, functional pass over the model's variables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from math import prod
from typing import Any, cast

from keras.src.models.functional import Functional  # the class of `keras.Model(inputs, outputs)` has no public name

import mgs_core as mgs
from mgs_core.contraction import contract
from mgs_core.heads import make_head
from mgs_core.statistics import merge

from ._keras import keras
from ._losses import compiled_loss, like, masked, scalar_losses, settings
from ._regularizer import MGSRegularizer
from ._tracker import NAME, Tracker

#: Samples of the first batch that the kernel is checked on.
_CHECKED = 8
#: Parameters of the largest model that is traced on PyTorch. Measured: for 8 it takes 0.6 s, and then 5 of 14 ms less a step;
#: for 142, 28 s, and then 0.1 of 0.7 s less.
_TRACED = 50


def _minds_training(layer: Any) -> bool:
    """Say whether a layer may do otherwise in training; containers only pass the argument on, and dense layers ignore it."""
    indifferent = keras.Sequential.call, Functional.call, keras.layers.Dense.call, keras.layers.EinsumDense.call
    quantized = getattr(layer, "quantization_mode", None) is not None  # a dense layer in float8 counts its steps
    return bool(layer._call_has_training_arg) and (quantized or type(layer).call not in indifferent)


class Training:
    """Regularise one model's `fit`.

    Attributes:
        regularizer: how, with the strength of now.
        tracker: the metric that the logs show.
    """

    def __init__(self, model: Any, regularizer: MGSRegularizer) -> None:
        self._model = model
        self.regularizer = regularizer
        self.tracker = Tracker(regularizer.strength, regularizer.seed if regularizer.output == "random" else None)
        self._in_training = True
        self._checked = self._losses_checked = self._asked = False
        self._function: Any = None
        self._replay: Any = None
        self._indifferent: bool | None = None

    def set_strength(self, strength: float) -> None:
        """Change the strength, also between the batches of a running `fit`.

        Args:
            strength: at least 0.

        Raises:
            ArgumentError: when it is negative or not finite.
        """
        self.regularizer = MGSRegularizer(**{**self.regularizer.get_config(), "strength": strength})
        self.tracker.strength.assign(strength)

    def loss(self, original: Callable[..., Any], x: Any, y: Any, y_pred: Any, sample_weight: Any, training: bool) -> Any:
        """Return the model's own loss, in training with weights and penalty.

        Args:
            original: the model's own `compute_loss`.
            x: inputs.
            y: targets.
            y_pred: outputs.
            sample_weight: the user's weights, or None.
            training: whether this is a training step.

        Raises:
            ArgumentError: when a `train_step` of the user's does not give the inputs.
        """
        self._in_training = training
        if not training:
            return original(x, y, y_pred, sample_weight)
        if x is None:
            raise mgs.ArgumentError(
                "`x` must be given to `compute_loss`, for the kernel needs the inputs; got None. "
                "Call compute_loss(x, y, y_pred, sample_weight) in `train_step`."
            )
        self._asked = True
        if not self.tracker.at_hand:
            raise mgs.ArgumentError(
                "`train_step` must give `compute_loss` the metrics' variables too, for the penalty has its strength and its mean "
                "there; it gave none. Differentiate Keras' own `self.compute_loss_and_updates(trainable_variables, "
                "non_trainable_variables, metrics_variables, x, y, sample_weight, training=True)`."
            )
        given, x = x, keras.tree.map_structure(_dense, x)
        if keras.backend.backend() == "torch":
            self._check(x, y)
        if self.regularizer.weighting is not None:
            if self._model._compile_loss is not None and not self._model._compile_loss.built:
                original(given, y, y_pred, sample_weight)  # builds them; the value is not needed
            kernel = self._kernel(self._functional(), x, masked(y, y_pred), y_pred, "loss", differentiable=False)
            weights = keras.ops.stop_gradient(mgs.agreement_weights(kernel))
            sample_weight = _weighted(sample_weight, weights, y_pred)
        matrix = None
        if keras.backend.backend() == "jax" and self.regularizer.every == 1 and self._one_pass_serves(y_pred):
            matrix, y_pred = self._kernel_and_outputs(x, y, y_pred)
        loss = original(given, y, y_pred, sample_weight)
        if self.regularizer.penalty is None:
            return loss
        # TensorFlow takes a loss that is not reduced too, and differentiates its sum
        return loss + keras.ops.cast(self._penalty(x, y, y_pred, matrix), loss.dtype) / (self._replicas() * prod(loss.shape))

    def results(self, original: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the metrics' results, those of validation without the penalty.

        Args:
            original: the model's own `get_metrics_result`.
        """
        results = original()
        if not self._in_training or self.regularizer.penalty is None:
            results.pop(NAME, None)
        return results

    def make_train_function(self, original: Callable[[bool], Any], force: bool) -> None:
        """Make the model's training step: with known batch sizes on TensorFlow, and a check on the first batch.

        Args:
            original: the model's own `make_train_function`.
            force: make it again.

        Raises:
            UnsupportedModelError: when the model is to be compiled by PyTorch.
        """
        model, backend = self._model, keras.backend.backend()
        if model.train_function is not None and not force:
            return
        self._checked = self._losses_checked = False
        self._function, self._replay, self._indifferent = None, None, None
        if backend == "torch" and model.jit_compile:
            raise mgs.UnsupportedModelError(
                "`jit_compile` must be off on PyTorch, whose compiler has no second derivative for the penalty; got True. "
                "Compile the model with jit_compile=False."
            )
        if backend == "tensorflow":
            from ._tensorflow import make_train_function

            model.train_function = self._insisting(make_train_function(model, self._check_batch))
            return
        original(force)
        step = self._insisting(model.train_function)
        model.train_function = step
        if backend == "jax":

            def checked(state: Any, iterator: Iterator[Any]) -> Any:
                if not self._checked:
                    data = next(iterator)
                    self._check_batch(data, state[0], state[1])
                    iterator = chain([data], iterator)
                return step(state, iterator)

            model.train_function = checked

    def _insisting(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return the step, which refuses a `train_step` of the user's that takes its loss from elsewhere."""

        def train(*arguments: Any) -> Any:
            result = step(*arguments)
            if not self._asked:
                raise mgs.UnsupportedModelError(
                    "`train_step` must take its loss from `self.compute_loss(x, y, y_pred, …)`, and a `compute_loss` of your own "
                    "from `super().compute_loss(x, y, y_pred, sample_weight, training)`, where penalty and weights enter; those "
                    f"of {type(self._model).__name__} do not. Call it there, or end this: regularize(model, None)."
                )
            return result

        return train

    def _penalty(self, x: Any, y: Any, y_pred: Any, matrix: Any = None) -> Any:
        regularizer, ops = self.regularizer, keras.ops
        strength = self.tracker.strength.value
        probes = self._probes(y_pred) if matrix is None else None  # here, for what is drawn within a condition is not counted

        def value() -> Any:
            return self._value(x, y, y_pred, probes) if matrix is None else self._of_kernel(matrix)

        if regularizer.every == 1:
            penalty = strength * value()
            self.tracker.track(penalty)
            return penalty
        due = ops.equal(self.tracker.step.value % regularizer.every, 0)
        penalty = strength * ops.cond(due, value, lambda: ops.zeros((), keras.config.floatx()))
        self.tracker.step.assign_add(1)
        self.tracker.track(penalty, due)
        return regularizer.every * penalty

    def _probes(self, y_pred: Any) -> Any:
        """Return random probes (c, probes) of length 1, new ones in each step; None for other heads."""
        number = self.regularizer.probes
        if self.regularizer.output != "random":
            return None
        c = sum(prod(leaf.shape[1:]) for leaf in keras.tree.flatten(y_pred))
        ones = keras.ops.cast(keras.random.randint((c, number), 0, 2, seed=self.tracker.seeds), keras.config.floatx())
        return (2.0 * ones - 1.0) / number**0.5

    def _head(self, output: str, probes: Any) -> dict[str, Any]:
        """Return the options of the kernel that say what it is of."""
        if output == "loss":  # also that of weights, whatever the penalty's head
            return {"output": output, "transform": "identity"}
        transform: Any = self.regularizer.transform
        if output != "random":
            return {"output": output, "transform": transform}
        change = make_head("trace", transform, None, 1, 0, None).function
        return {"output": "trace", "transform": lambda outputs: change(outputs, None) @ keras.ops.cast(probes, outputs.dtype)}

    def _value(self, x: Any, y: Any, y_pred: Any, probes: Any) -> Any:
        """Return the penalty without its strength, by a pass of its own."""
        first = slice(0, self.regularizer.max_samples)
        y = masked(y, y_pred) if self.regularizer.output == "loss" else y
        x, y = keras.tree.map_structure(lambda leaf: leaf if leaf is None else keras.ops.convert_to_tensor(leaf[first]), (x, y))
        model = self._functional()
        if keras.backend.backend() == "torch" and self._replays(model):
            return self._replayed(model, x, y, y_pred, probes)
        return self._of_kernel(self._kernel(model, x, y, y_pred, self.regularizer.output, probes))

    def _of_kernel(self, matrix: Any) -> Any:
        penalty = mgs.Penalty(cast(Any, self.regularizer.penalty), 1.0, self.regularizer.scale)
        return keras.ops.cast(penalty(matrix), keras.config.floatx())

    def _kernel(
        self,
        model: mgs.FunctionalModel,
        x: Any,
        y: Any,
        y_pred: Any,
        output: Any,
        probes: Any = None,
        differentiable: bool = True,
    ) -> Any:
        loss = self._losses(y_pred, weighted=not differentiable) if output == "loss" else None
        return mgs.kernel(model, x, y, **self._head(output, probes), loss=loss, differentiable=differentiable)

    def _losses(self, y_pred: Any, weighted: bool = False) -> Callable[[Any, Any], Any]:
        """Return the losses that the model is compiled with and trained by, which Keras has built when it took them."""
        losses = self._model._compile_loss
        if losses is None:
            raise mgs.ArgumentError(
                '`loss` must be given to `compile` for output="loss" and for weighting, which are of that loss; got None. '
                "Compile the model with one, which a `compute_loss` of your own takes from `super().compute_loss`; or choose "
                'another `output`, such as "trace", and no weighting.'
            )
        if not losses.built:
            raise mgs.UnsupportedModelError(
                "`compute_loss` must take its loss from `super().compute_loss(x, y, y_pred, sample_weight, training)` for "
                'output="loss" and for weighting, which are of the losses that the model is compiled with; that of '
                f'{type(self._model).__name__} does not. Call it there; or choose another `output`, such as "trace", and no '
                "weighting."
            )
        return compiled_loss(self._model, y_pred, weighted=weighted)

    def _replays(self, model: mgs.FunctionalModel) -> bool:
        """Say whether to trace: not where it does not pay, nor where the loss is scaled, which must reach every derivative."""
        scaled = isinstance(getattr(self._model, "optimizer", None), keras.optimizers.LossScaleOptimizer)
        return len(model.parameters) <= _TRACED and not scaled

    def _replayed(self, model: mgs.FunctionalModel, x: Any, y: Any, y_pred: Any, probes: Any) -> Any:
        """Return the penalty on PyTorch, from a graph that is traced once for each shape."""
        function, backend = cast(Any, model.function), cast(Any, mgs.get_backend(self._model))
        data, fixed = keras.tree.flatten((x, y)), [variable.value for variable in function.others]

        def penalty(parameters: Any, others: Any) -> Any:
            function.fixed = others[len(data) : -1]
            try:
                inputs, targets = keras.tree.pack_sequence_as((x, y), others[: len(data)])
                given = mgs.FunctionalModel(function, function.named(parameters))
                return self._of_kernel(self._kernel(given, inputs, targets, y_pred, self.regularizer.output, others[-1]))
            finally:
                function.fixed = None

        self._replay = self._replay or backend.replay()
        return self._replay(penalty, list(model.parameters.values()), [*data, *fixed, probes], settings(self._model))

    def _functional(self) -> mgs.FunctionalModel:
        """Return the model as a function, the same one in each step, for what the backend finds out about it is kept with it."""
        backend: Any = mgs.get_backend(self._model)
        moved = [id(variable) for variable in self._model.trainable_variables]  # a layer may be frozen between two steps
        if self._function is None or moved != [id(variable) for variable in self._function.variables.values()]:
            self._function, self._replay = backend.functional(self._model).function, None
        functional: mgs.FunctionalModel = backend.current(self._function)
        return functional

    def _one_pass_serves(self, y_pred: Any) -> bool:
        """Say whether the pass that trains is also that of the kernel: of all samples, and with no layer that minds training."""
        limit, leaves = self.regularizer.max_samples, keras.tree.flatten(y_pred)
        if self.regularizer.penalty is None or (limit is not None and limit < len(leaves[0])):
            return False
        if self._indifferent is None:
            self._indifferent = not any(map(_minds_training, self._model._flatten_layers()))
        return self._indifferent and all(keras.src.backend.get_keras_mask(leaf) is None for leaf in leaves)

    def _kernel_and_outputs(self, x: Any, y: Any, y_pred: Any) -> tuple[Any, Any]:
        """Return the kernel and the outputs of one pass; of the outputs that are there already, JAX has no graph."""
        backend: Any = mgs.get_backend(self._model)
        regularizer = self.regularizer
        loss = self._losses(y_pred) if regularizer.output == "loss" else None
        options = self._head(regularizer.output, self._probes(y_pred))
        head = make_head(options["output"], options["transform"], loss, 1, 0, y)
        _, outputs, found = backend.framework.one_pass(
            self._functional(), x, y, head.function, None, differentiable=True, outputs=True
        )
        found = merge(found)
        return contract(found, found), like(y_pred, outputs)

    def _replicas(self) -> int:
        """Return over how many copies of the model Keras will add up the losses."""
        strategy = getattr(self._model, "distribute_strategy", None)
        return 1 if strategy is None else int(strategy.num_replicas_in_sync)

    def _check_batch(self, data: Any, trainable: Any = None, fixed: Any = None) -> None:
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        self._check(x, y, trainable, fixed)

    def _check(self, x: Any, y: Any, trainable: Any = None, fixed: Any = None) -> None:
        """Compare `1ᵀK1` of the first batch with `‖∇Σh‖²`, which one ordinary backward pass gives; then look at the losses."""
        self._check_losses(x, y, trainable, fixed)
        if self._checked:
            return
        backend: Any = mgs.get_backend(self._model)
        model = backend.functional(self._model, trainable, fixed)
        x = keras.tree.map_structure(_first, x)

        def head(outputs: Any, _: Any = None) -> Any:
            c = outputs.shape[-1]  # unequal weights, for the outputs of a softmax have a constant sum
            return keras.ops.sum(outputs * keras.ops.cast(keras.ops.arange(1, c + 1) / c, outputs.dtype), axis=-1)

        def both(parameters: dict[str, Any]) -> tuple[Any, Any]:
            kernel = mgs.kernel(mgs.FunctionalModel(model.function, parameters), x, output=head)
            _, gradient = backend.value_and_gradient(lambda given: keras.ops.sum(head(model.function(given, x))))(parameters)
            return kernel, [keras.ops.sum(keras.ops.square(part)) for part in gradient.values()]

        kernel, squares = backend.compile(both)(model.parameters)
        kernel, expected = backend.to_numpy(kernel), sum(float(part) for part in squares)
        if not abs(float(kernel.sum()) - expected) <= 0.02 * max(expected, len(kernel) * float(kernel.trace())) + 1e-8:
            raise mgs.UnsupportedModelError(
                f"`model` must be a function of its variables; its kernel sums to {float(kernel.sum()):.6g}, its gradient says "
                f"{expected:.6g}. A layer's gradient is not that of its value; report it with the model."
            )
        self._checked = True

    def _check_losses(self, x: Any, y: Any, trainable: Any, fixed: Any) -> None:
        """Compare losses that are scalars with the mean, or the sum, over samples alone; before Keras builds them, if need be."""
        losses = self._model._compile_loss
        if self._losses_checked or self.regularizer.output != "loss" or losses is None:
            return
        self._losses_checked = True
        backend: Any = mgs.get_backend(self._model)
        model = backend.functional(self._model, trainable, fixed)
        x, y = keras.tree.map_structure(_first, (x, y))
        compare = backend.compile(lambda given: scalar_losses(losses, model.function.outputs(given, x), y))
        for whole, alone in compare(model.parameters):
            total, terms = float(backend.to_numpy(whole)), backend.to_numpy(alone)
            if min(abs(total - terms.mean()), abs(total - terms.sum())) > 1e-3 * float(abs(terms).max()):
                raise mgs.ArgumentError(
                    f"`loss` must be the mean or the sum of losses of single samples; got {total:.6g} for a batch whose "
                    f"samples have a mean of {terms.mean():.6g}. Return one value for each sample: keras.ops.mean(…, axis=-1)."
                )


def _first(leaf: Any) -> Any:
    """Return the samples that are checked."""
    return leaf if leaf is None else _dense(leaf)[:_CHECKED]


def _dense(leaf: Any) -> Any:
    return leaf if leaf is None else keras.ops.convert_to_tensor(leaf, sparse=False)


def _weighted(sample_weight: Any, weights: Any, y_pred: Any) -> Any:
    if sample_weight is None:
        leaves = keras.tree.flatten(y_pred)
        mask = keras.src.backend.get_keras_mask(leaves[0]) if len(leaves) == 1 else None
        if mask is not None:  # with one, Keras wants weights of its shape
            weights = keras.ops.reshape(weights, (-1,) + (1,) * (len(mask.shape) - 1)) * keras.ops.ones(mask.shape, weights.dtype)
        return weights

    def times(given: Any) -> Any:
        return given * keras.ops.reshape(keras.ops.cast(weights, given.dtype), (-1,) + (1,) * (len(given.shape) - 1))

    return keras.tree.map_structure(times, sample_weight)
