"""The backend's face: layer statistics and gradients of functional models on NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd.numpy.numpy_boxes import ArrayBox

from mgs_core import _batch
from mgs_core._errors import ArgumentError
from mgs_core._known import KnownByOwner
from mgs_core._layout import Layout, compare_rows, find_layout, interaction, sample_weights
from mgs_core._namespace import register_namespace
from mgs_core._protocol import HeadFunction, LayerStatistics, Lookup, Outer, ParameterChoice, Restore, Rows, Scale, Sum
from mgs_core._tree import check_parameters, flatten, select, unflatten
from mgs_core._types import Array, Namespace, Tree
from mgs_core.functional import FunctionalModel

from . import tape as tapes
from .namespace import TracedNamespace
from .structure import key_of, values_decide
from .tape import Tape, TapeNode, plain
from .uses import Use, find_uses

_traced = TracedNamespace()
register_namespace(lambda array: isinstance(array, ArrayBox), _traced)
#: What errors of other libraries say where they are given an array that autograd traces.
_FOREIGN = ("ArrayBox", "dtype('O')", "numpy_boxes", "Can't differentiate w.r.t. type")
_AUTOGRAD = (
    "must be written with autograd.numpy where its parameters are NumPy arrays, and change none in place; got one that NumPy "
    "itself or another library computes. Write `import autograd.numpy as np`, or convert the parameters: for instance "
    "jax.tree.map(jax.numpy.asarray, parameters), or torch.from_numpy of each."
)
_layouts: KnownByOwner[list[Layout | None]] = KnownByOwner()


class NumpyBackend:
    """Implement `Backend` on NumPy, with autograd."""

    name = "numpy"
    namespace: Namespace = _traced

    def asarray(self, value: Any) -> Array:
        """Return the value as a NumPy array; a traced array stays traced."""
        return value if isinstance(value, ArrayBox) else np.asarray(value)

    def to_numpy(self, array: Array) -> Any:
        """Return the NumPy array below every trace."""
        return np.asarray(plain(array))

    def parameters(self, model: Any) -> dict[str, Array]:
        """Return the parameters by name."""
        leaves = flatten(_functional(model).parameters)
        check_parameters({name: plain(value) for name, value in leaves.items()}, lambda dtype: np.issubdtype(dtype, np.floating))
        return leaves

    def statistics(
        self, model: Any, inputs: Any, targets: Any, head: HeadFunction, parameters: ParameterChoice, *, differentiable: bool
    ) -> list[LayerStatistics]:
        """Return the layer statistics, as `Backend.statistics` says."""
        leaves = self.parameters(model)
        chosen = select(leaves, parameters)
        if not differentiable:
            leaves = {name: plain(value) for name, value in leaves.items()}
        scalars = _Scalars(model, leaves, head, inputs, targets)
        tape = Tape(scalars, {name: leaves[name] for name in chosen})
        n, k = anp.shape(tape.value)
        uses, stop = find_uses(tape.nodes)
        key = (tuple(chosen), key_of(tape, n))
        layouts = _layouts.of(model.function).of(key, lambda: _find_layouts(tape, uses, stop))
        slow = {use.parameter for use, layout in zip(uses, layouts, strict=True) if layout is None}
        fast = [
            (use, layout) for use, layout in zip(uses, layouts, strict=True) if layout is not None and use.parameter not in slow
        ]
        found = _gradients(tape, [use.node for use, _ in fast], stop)
        statistics: list[LayerStatistics] = []
        for use, layout in fast:
            if use.node in found[0]:
                statistics.append(_layer(use, layout, [gradients[use.node] for gradients in found], n))
        if slow:
            statistics += _rows(scalars, {name: leaves[name] for name in chosen if name in slow}, n, k)
        return statistics or [Rows(chosen[0], _wide(np.zeros((n, k, 1), dtype=plain(leaves[chosen[0]]).dtype)))]

    def value_and_gradient(self, function: Callable[..., Array]) -> Callable[..., tuple[Array, Tree]]:
        """Return a function that gives the value and the gradient in the first argument."""

        def both(parameters: Tree, *arguments: Any) -> tuple[Array, Tree]:
            leaves = flatten(parameters)
            value, gradient = tapes.value_and_gradient(lambda boxes: function(unflatten(parameters, boxes), *arguments), leaves)
            return value, unflatten(parameters, gradient)

        return both

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function itself: NumPy has no compiler."""
        return function


class _Scalars:
    """Be the function from parameters to heads (n, k), for the whole batch or a slice of it."""

    def __init__(self, model: FunctionalModel, leaves: dict[str, Array], head: HeadFunction, inputs: Any, targets: Any) -> None:
        self._model, self._leaves, self._head = model, leaves, head
        self._inputs, self._targets = inputs, targets
        for name, leaf in flatten(inputs, "inputs").items():
            values = plain(leaf)
            if not isinstance(values.dtype, np.dtype):
                raise ArgumentError(
                    f"`{name}` must be NumPy arrays where the parameters are; got {type(values).__name__}. Convert the "
                    "parameters to arrays of the same library, for instance by tf.Variable."
                )
            if np.issubdtype(values.dtype, np.inexact) and not np.all(np.isfinite(values)):
                raise ArgumentError(f"`{name}` must be finite; got NaN or infinity. Remove or replace these values.")
            if not (np.issubdtype(values.dtype, np.floating) or np.issubdtype(values.dtype, np.integer) or values.dtype == bool):
                raise ArgumentError(f"`{name}` must hold real numbers; got dtype {values.dtype}. Convert it.")

    def wide(self) -> _Scalars:
        """Return the function in single precision, where it is in half."""
        leaves = {name: _wide(value) for name, value in self._leaves.items()}
        inputs = unflatten(self._inputs, {name: _wide(leaf) for name, leaf in flatten(self._inputs, "inputs").items()}, "inputs")
        return _Scalars(self._model, leaves, self._head, inputs, self._targets)

    def __call__(self, parameters: dict[str, Array], samples: slice = slice(None)) -> Array:
        inputs, targets = _batch.take(self._inputs, samples), _batch.take(self._targets, samples)
        n = _batch.count(inputs)
        try:
            outputs = self._model.function(unflatten(self._model.parameters, {**self._leaves, **parameters}), inputs)
        except Exception as error:
            if foreign := _foreign("`model`", error):
                raise foreign from error
            raise
        _refuse_objects("`model`", outputs)
        if not hasattr(outputs, "shape"):
            raise ArgumentError(f"`model` must return an array (n, c); got {type(outputs).__name__}. Return the outputs alone.")
        if anp.ndim(outputs) != 2 or outputs.shape[0] != n:
            raise ArgumentError(
                f"`model` must return outputs of shape (n, c) with n = {n}; got {anp.shape(outputs)}. "
                "Keep the samples first and flatten the outputs of each."
            )
        if np.issubdtype(plain(outputs).dtype, np.complexfloating):
            raise ArgumentError(f"`model` must return real outputs; got {plain(outputs).dtype}. Return real and imaginary parts.")
        try:
            heads = self._head(outputs, targets)
        except ArgumentError:
            raise
        except Exception as error:
            if foreign := _foreign("`loss`, `output` or `transform`", error):
                raise foreign from error
            raise
        _refuse_objects("`loss`, `output` or `transform`", heads)
        return heads


def _foreign(what: str, error: Exception) -> ArgumentError | None:
    """Return the refusal of a function that is not written with autograd's NumPy, if the error is one of that."""
    return ArgumentError(f"{what} {_AUTOGRAD}") if any(word in str(error) for word in _FOREIGN) else None


def _refuse_objects(what: str, values: Any) -> None:
    if getattr(plain(values), "dtype", None) == np.dtype(object):  # NumPy's own, of traced numbers: nothing follows them
        raise ArgumentError(f"{what} {_AUTOGRAD}")


def _functional(model: Any) -> FunctionalModel:
    if not isinstance(model, FunctionalModel):
        raise ArgumentError(f"`model` must be a FunctionalModel for the NumPy backend; got {type(model).__name__}.")
    return model


def _gradients(tape: Tape, nodes: list[TapeNode], stop: Callable[[TapeNode, TapeNode], bool]) -> list[dict[TapeNode, Array]]:
    """Return, for each head, the gradients of its sum over the samples at the nodes."""
    n, k = anp.shape(tape.value)
    found = []
    for head in range(k):
        seed = np.zeros((n, k), dtype=plain(tape.value).dtype)
        seed[:, head] = 1.0
        found.append(tape.pull(seed, nodes, stop))
    return found


def _find_layouts(
    tape: Tape, uses: Sequence[Use], stop: Callable[[TapeNode, TapeNode], bool]
) -> tuple[list[Layout | None], bool]:
    """Return the layout of each use, None where rows must be formed, and whether they may hold for other values too."""
    n, k = anp.shape(tape.value)
    dtype = plain(tape.value).dtype
    # distinct factors keep heads from cancelling, as the outputs of a softmax would
    heads = np.broadcast_to(1.0 + np.random.default_rng(0).random(k), (n, k)).astype(dtype)
    nodes = [use.node for use in uses]
    weights = [np.asarray(weight, dtype) for weight in sample_weights(n)]
    flat, *weighted = (tape.pull(seed, nodes, stop) for seed in (heads, *(heads * weight[:, None] for weight in weights)))
    layouts: list[Layout | None] = []
    states = []
    for use in uses:
        layout, state = None, "sure"
        if use.site is not None and use.node in flat:
            first, *others = (plain(use.site.arrange(plain(gradients[use.node]))) for gradients in (flat, *weighted))
            layout, state = find_layout(first, others, weights, float(np.finfo(first.dtype).eps))
        elif use.site is not None:
            layout = Layout(-1)  # no gradient reaches it: it adds nothing
        layouts.append(layout)
        states.append(state)
    holds = "open" not in states and "silent" not in states
    placed = [(use, layout) for use, layout in zip(uses, layouts, strict=True) if layout is not None and use.node in flat]
    return layouts, holds and not values_decide(tape, placed, stop, heads)


def _layer(use: Use, layout: Layout, gradients: list[Array], n: int) -> LayerStatistics:
    site = use.site
    if site is None:
        raise TypeError("`use` must have a site; got none. Uses without one belong to the rows.")
    parts = [layout.split(site.arrange(gradient), n) for gradient in gradients]
    # (n, k, g, s, o); one head without stacking, which is slow to differentiate
    d = _wide(anp.stack(parts, axis=1) if len(parts) > 1 else anp.expand_dims(parts[0], axis=1))
    common: dict[str, Any] = {"parameter": use.parameter, "view": use.view_key, "restore": _restore(use)}
    if site.kind == "outer":
        return Outer(gradients=d, inputs=_floating(layout.split(site.inputs, n), d), **common)
    _, k, _, s, o = anp.shape(d)
    common["gradients"] = anp.reshape(d, (n, k, s, o))  # one group; by reshape, for indexing is slow to differentiate
    if site.kind == "sum":
        return Sum(**common)
    if site.kind == "scale":
        return Scale(inputs=_floating(anp.reshape(layout.split(site.inputs, n), (n, s, o)), d), **common)
    if site.kind == "lookup":
        return Lookup(indices=anp.reshape(layout.split(site.inputs[..., None], n), (n, s)), size=site.size, **common)
    raise TypeError(f"`use` must be outer, sum, scale or lookup; got {site.kind!r}.")


def _wide(array: Array) -> Array:
    """Return half precision in float32, in which kernels are summed."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _floating(inputs: Array, gradients: Array) -> Array:
    """Return the inputs as floating-point numbers: products of integers, as pixels, would begin anew at 256."""
    return _wide(inputs) if np.issubdtype(inputs.dtype, np.inexact) else inputs.astype(gradients.dtype)


def _restore(use: Use) -> Restore:
    """Return the map from rows of the use to rows of the parameter: the pull-back of the views between them."""
    if not use.views and not (use.site is not None and use.site.transposed):
        return None
    transposed = use.site is not None and use.site.transposed
    shape = anp.shape(use.node.arguments[0]) if transposed else anp.shape(use.views[-1].value)

    def restore(rows: Array) -> Array:
        n, k, size = rows.shape
        pulled = []
        for row in anp.reshape(rows, (n * k, size)):
            at_view = anp.transpose(anp.reshape(row, shape[::-1])) if transposed else anp.reshape(row, shape)
            for view in reversed(use.views):
                (at_view,) = view.pull(at_view, (0,))
            pulled.append(anp.ravel(at_view))
        return anp.reshape(anp.stack(pulled), (n, k, -1))

    return restore


def _rows(scalars: _Scalars, leaves: dict[str, Array], n: int, k: int) -> list[LayerStatistics]:
    """Return explicit gradients of the parameters, sample by sample, after a check that samples do not interact.

    In single precision at least: sums of rows in half precision are too coarse to be compared.
    """
    scalars, leaves = scalars.wide(), {name: _wide(value) for name, value in leaves.items()}
    rows: dict[str, list[Array]] = {name: [] for name in leaves}
    for sample in range(n):
        try:
            with np.errstate(invalid="ignore", divide="ignore"):  # statistics of a batch of one: refused below
                tape = Tape(partial(scalars, samples=slice(sample, sample + 1)), leaves)
                roots = {node.name: node for node in tape.nodes if node.name}
                found = _gradients(tape, list(roots.values()), lambda node, parent: False)
        except (IndexError, ValueError) as error:  # it does run on the whole batch
            raise interaction(next(iter(leaves)), error) from error
        for name, value in leaves.items():
            zero = np.zeros(value.shape, dtype=plain(value).dtype)
            of_heads = [gradients.get(roots[name], zero) if name in roots else zero for gradients in found]
            rows[name].append(anp.stack([anp.ravel(gradient) for gradient in of_heads]))
    statistics: list[LayerStatistics] = [Rows(name, _wide(anp.stack(row))) for name, row in rows.items()]
    values = (plain(node.value) for node in tape.nodes)  # of which a model may make lower ones again
    dtypes = [value.dtype for value in values if isinstance(value, (np.ndarray, np.generic))]
    _refuse_interaction(scalars, leaves, statistics, (n, k), max((float(np.finfo(dtype).eps) for dtype in dtypes), default=0.0))
    return statistics


def _refuse_interaction(
    scalars: _Scalars, leaves: dict[str, Array], rows: list[LayerStatistics], shape: tuple[int, int], eps: float
) -> None:
    """Check `Σ_a w_a g_a = ∇ Σ_a w_a h_a`, which fails exactly when a sample's head depends on another sample."""
    weights = 0.5 + np.random.default_rng(0).random(shape)
    values = {name: plain(value) for name, value in leaves.items()}
    _, whole = tapes.value_and_gradient(lambda boxes: anp.sum(scalars(boxes) * weights.astype(_dtype(values))), values)
    for use in rows:
        compare_rows(use.parameter, plain(use.gradients), plain(whole[use.parameter]), weights, eps)


def _dtype(values: dict[str, Array]) -> Any:
    return np.result_type(*(value.dtype for value in values.values()))


backend = NumpyBackend()
