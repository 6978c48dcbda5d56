"""The backend's face: layer statistics and gradients on TensorFlow tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from hashlib import sha256
from typing import Any, cast

import numpy as np
import tensorflow as tf

from mgs_core import _batch
from mgs_core._errors import ArgumentError
from mgs_core._layout import Layout
from mgs_core._namespace import register_namespace
from mgs_core._protocol import HeadFunction, LayerStatistics, Lookup, Outer, ParameterChoice, Restore, Rows, Scale, Sum
from mgs_core._tree import check_parameters, flatten, select, unflatten
from mgs_core._types import Array, Namespace, Tree
from mgs_core.functional import FunctionalModel

from .apart import apart
from .gradients import gradients
from .inline import call
from .modules import functional, of_keras
from .namespace import namespace
from .probe import find_layouts
from .terms import Term
from .walk import Record, Use, each, record, rows

register_namespace(lambda array: isinstance(array, (tf.Tensor, tf.Variable)), namespace)


class TensorFlowBackend:
    """Implement `Backend` on TensorFlow, eagerly and inside `tf.function`."""

    name = "tensorflow"
    namespace: Namespace = namespace

    def asarray(self, value: Any) -> Array:
        """Return the value as a tensor."""
        return tf.convert_to_tensor(value)

    def to_numpy(self, array: Array) -> Any:
        """Return the tensor as a NumPy array on the host."""
        return np.asarray(array)

    def parameters(self, model: Any) -> dict[str, Array]:
        """Return the parameters by name."""
        leaves: dict[str, Array] = flatten(_functional(model).parameters)
        for name, leaf in leaves.items():
            if of_keras(leaf):
                raise ArgumentError(
                    f"`parameters` must be variables or tensors of TensorFlow; got a variable of Keras for {name!r}. Pass its "
                    "`value`, or the Keras model itself: mgs_core.kernel(model, inputs)."
                )
            if isinstance(leaf, (tf.Tensor, tf.Variable)) and not leaf.shape.is_fully_defined():
                raise ArgumentError(
                    f"`parameters` must have known shapes; got {leaf.shape} for {name!r}. Make the tf.Variable without `shape=`."
                )
        check_parameters(leaves, lambda dtype: isinstance(dtype, (tf.DType, np.dtype)) and tf.as_dtype(dtype).is_floating)
        return leaves

    def statistics(
        self, model: Any, inputs: Any, targets: Any, head: HeadFunction, parameters: ParameterChoice, *, differentiable: bool
    ) -> list[LayerStatistics]:
        """Return the layer statistics, as `Backend.statistics` says."""
        model = _functional(model)
        leaves = self.parameters(model)
        chosen = select(leaves, parameters)
        values = leaves if differentiable else {name: tf.stop_gradient(value) for name, value in leaves.items()}
        inputs, targets = each(_dense, (inputs, targets))
        scalars = partial(_scalars, model, head)
        n = _batch.count(inputs, targets)
        _refuse_infinite(inputs)
        found: list[LayerStatistics] = []
        layouts: dict[bytes, list[Layout | None]] = {}

        def layouts_of(traced: Record) -> list[Layout | None]:
            if traced.key not in layouts:  # a second trace of the same needs none of its own
                layouts[traced.key] = find_layouts(traced, scalars, leaves, chosen, inputs, targets)  # eager where they are
            return layouts[traced.key]

        def traced(given: dict[str, Array], batch: Any) -> list[dict[str, Array]]:
            # targets are captured, so that labels can be looked at
            found[:] = _statistics(scalars, chosen, layouts_of, n, given, batch, targets)
            return [_arrays(use) for use in found]

        arrays = apart(traced, {name: tf.convert_to_tensor(value) for name, value in values.items()}, inputs)
        return [replace(use, **values) for use, values in zip(found, arrays, strict=True)]

    def value_and_gradient(self, function: Callable[..., Array]) -> Callable[..., tuple[Array, Tree]]:
        """Return a function that gives the value and the gradient in the first argument."""

        def both(parameters: Tree, *arguments: Any) -> tuple[Array, Tree]:
            leaves = {name: tf.convert_to_tensor(value) for name, value in flatten(parameters).items()}
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(leaves)
                value = function(unflatten(parameters, leaves), *arguments)
            gradient = tape.gradient(value, leaves, unconnected_gradients=tf.UnconnectedGradients.ZERO)
            return value, unflatten(parameters, {name: tf.convert_to_tensor(part) for name, part in gradient.items()})

        return both

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function as a `tf.function`."""
        compiled: Any = tf.function(function, autograph=False)
        compiled._omit_frequent_tracing_warning = True  # it is meant to be called for several functions and sizes
        return cast(Callable[..., Any], compiled)


def _functional(model: Any) -> FunctionalModel:
    if isinstance(model, FunctionalModel):
        return model
    if isinstance(model, tf.Module) and callable(model):
        return functional(model)
    raise ArgumentError(
        f"`model` must be a FunctionalModel or a tf.Module that can be called; got {type(model).__name__}. Wrap a tf.function: "
        "mgs_core.FunctionalModel(lambda _, inputs: function(inputs), {name: variable}), with the variables that it reads."
    )


def _dense(value: Any) -> Array:
    if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
        remedy = (
            "tf.sparse.to_dense(inputs)" if isinstance(value, tf.SparseTensor) else "inputs.to_tensor(), and mask the padding"
        )
        raise ArgumentError(f"`inputs` and `targets` must be dense; got a {type(value).__name__}. Pass {remedy}.")
    return tf.convert_to_tensor(value)


def _scalars(model: FunctionalModel, head: HeadFunction, leaves: Mapping[str, Array], inputs: Any, targets: Any) -> Array:
    n = _batch.count(inputs)

    def function(leaves: dict[str, Array], inputs: Any) -> Array:
        return _tensor(model.function(unflatten(model.parameters, leaves), inputs), "model")

    outputs = call(function, leaves, flatten(model.parameters), inputs)
    if outputs.shape.rank == 2 and outputs.shape[0] is None:  # as of tf.boolean_mask: it is seen as it runs
        outputs = tf.ensure_shape(outputs, (n, None))
    if outputs.shape.rank != 2 or outputs.shape[0] != n or outputs.shape[1] is None:
        raise ArgumentError(
            f"`model` must return outputs of shape (n, c) with n = {n}; got {outputs.shape}. Keep the samples first and flatten "
            "the outputs of each; a size that is not known when traced says tf.reshape(outputs, (tf.shape(inputs)[0], c))."
        )
    return _tensor(head(outputs, targets), "output")


def _tensor(value: Any, name: str) -> Array:
    """Return what a function of the user's returned, refused unless it is one tensor that can have gradients."""
    if not tf.is_tensor(value) or not value.dtype.is_floating:
        got = f"a tensor of {value.dtype.name}" if tf.is_tensor(value) else type(value).__name__
        raise ArgumentError(
            f"`{name}` must return one tensor of real floating-point numbers, computed by TensorFlow; got {got}. "
            "Of several outputs return the one that the kernel is of."
        )
    return value


def _refuse_infinite(inputs: Any) -> None:
    """Look at the values, where there are some."""
    for leaf in tf.nest.flatten(inputs):
        if leaf.dtype.is_floating and not tf.is_symbolic_tensor(leaf) and not bool(tf.reduce_all(tf.math.is_finite(leaf))):
            raise ArgumentError("`inputs` must be finite; got NaN or infinity. Remove or replace these values.")


def _statistics(
    scalars: Any,
    chosen: list[str],
    layouts_of: Callable[[Record], list[Layout | None]],
    n: int,
    leaves: dict[str, Array],
    inputs: Any,
    targets: Any,
) -> list[LayerStatistics]:
    """Build the statistics in the current graph."""
    traced = record(scalars, leaves, chosen, inputs, targets)
    k = traced.scalars.shape[1]
    pairs = list(zip(traced.uses, layouts_of(traced), strict=True))
    slow = {use.term.parameter for use, layout in pairs if layout is None or not _absorbs(use)}
    fast = [(use, layout) for use, layout in pairs if layout is not None and use.term.parameter not in slow]
    seeds = [tf.one_hot([head] * n, k, dtype=traced.scalars.dtype) for head in range(k)]
    found = [gradients(traced.scalars, seed, [use.op.outputs[0] for use, _ in fast]) for seed in seeds]
    statistics: list[LayerStatistics] = []
    for place, (use, layout) in enumerate(fast):
        at_use = [gradient[place] for gradient in found]
        if any(gradient is not None for gradient in at_use):
            dense = [tf.zeros_like(use.op.outputs[0]) if gradient is None else gradient for gradient in at_use]
            statistics.append(_layer(use, layout, dense, n, _wide(leaves[use.term.parameter].dtype)))
    if slow:
        by_name = rows(scalars, leaves, sorted(slow), inputs, targets)
        statistics += [Rows(name, tf.cast(row, _wide(row.dtype))) for name, row in by_name.items()]
    return statistics or [Rows(chosen[0], tf.zeros((n, k, 1), _wide(leaves[chosen[0]].dtype)))]


def _wide(dtype: Any) -> Any:
    """Return the type in which kernels are summed: single precision at least."""
    return tf.float32 if dtype in (tf.bfloat16, tf.float16) else dtype


def _absorbs(use: Use) -> bool:
    """Say whether the statistics can hold the factor between the parameter and its use."""
    factor = use.term.factor
    elementwise = use.site is not None and use.site.kind in ("sum", "scale")
    return factor is None or elementwise or not isinstance(factor, tf.Tensor) or factor.shape.num_elements() == 1


def _layer(use: Use, layout: Layout, at_output: list[Array], n: int, dtype: Any) -> LayerStatistics:
    site = use.site
    if site is None:
        raise TypeError("`use` must have a site; got none. Uses without one belong to the rows.")
    split = [layout.split(site.arrange(gradient), n) for gradient in at_output]
    d = tf.cast(tf.stack(split, axis=1), dtype)  # (n, k, g, s, o)
    if use.term.factor is not None:
        factor = tf.cast(use.term.factor, dtype)
        size = d.shape[-1] if site.kind in ("sum", "scale") else 1
        d *= tf.reshape(tf.broadcast_to(factor, use.weight) if size > 1 else factor, (size,))
    inputs: Any = None if site.inputs is None or site.kind == "lookup" else tf.cast(layout.split(site.inputs, n), dtype)
    places = _places(use)
    view = () if places is None else (sha256(places.tobytes()).digest(),)
    common: dict[str, Any] = {"parameter": use.term.parameter, "restore": _restore(places, use.term)}
    if site.kind == "outer":
        return Outer(gradients=d, inputs=inputs, view=(*view, d.shape[2], inputs.shape[-1], d.shape[-1]), **common)
    common |= {"gradients": d[:, :, 0], "view": view}
    if site.kind == "sum":
        return Sum(**common)
    if site.kind == "scale":
        return Scale(inputs=inputs[:, 0], **common)
    if site.kind == "lookup":
        return Lookup(indices=layout.split(site.inputs[..., None], n)[:, 0, :, 0], size=site.size, **common)
    raise TypeError(f"`use` must be outer, sum, scale or lookup; got {site.kind!r}.")


def _places(use: Use) -> Any:
    """Return the place in the flat parameter of each coordinate of the use; None when they are the same."""
    order = use.site.order if use.site is not None else None
    if use.term.flat and order is None:
        return None
    places = use.term.places()
    return np.ravel(places if order is None else order(places))


def _restore(places: Any, term: Term) -> Restore:
    """Return the map from rows of the use to rows of the parameter."""
    if places is None:
        return None
    size = int(np.prod(term.shape))
    source = np.full(size, len(places))
    source[places] = np.arange(len(places))

    def restore(rows_of_use: Array) -> Array:
        return tf.gather(tf.pad(rows_of_use, [(0, 0), (0, 0), (0, 1)]), source, axis=2)

    return restore


def _arrays(use: LayerStatistics) -> dict[str, Array]:
    return {field.name: value for field in fields(use) if isinstance(value := getattr(use, field.name), tf.Tensor)}


backend = TensorFlowBackend()
