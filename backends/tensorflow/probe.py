"""Find by evaluation which axis of each use holds the samples, and refuse models in which samples interact.

It is done eagerly, on the values at hand, and again from time to time; where there are none, because the caller is being traced,
on drawn ones. Where drawn values, or NaN on its way back, show that values decide which samples meet, it is done at each use.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from mgs_core._errors import ArgumentError, SamplesInteractError, UnsupportedModelError
from mgs_core._known import Known
from mgs_core._layout import Layout, compare_rows, find_layout, interaction, reaches_others, sample_weights
from mgs_core._types import Array

from .gradients import gradients
from .namespace import namespace
from .walk import Record, Scalars, each, record, rows

_known: Known[list[Layout | None]] = Known()
_DRAWS, _LEAST = 4, 3  # values are drawn so often at most; they are tried so often, own ones included, at least
_HALF = (tf.float16, tf.bfloat16)
#: What TensorFlow raises where dtypes or shapes do not fit.
_MISFIT = (TypeError, ValueError, tf.errors.InvalidArgumentError)


def find_layouts(
    traced: Record, scalars: Scalars, parameters: Mapping[str, Array], chosen: list[str], inputs: Any, targets: Any
) -> list[Layout | None]:
    """Return the layout of each use, None where rows must be formed.

    Args:
        traced: the evaluation to find them for.
        scalars: the model and its head.
        parameters: all parameters by name; eager, or of the graph.
        chosen: names of those to follow.
        inputs: the batch; eager, or of the graph.
        targets: its targets, or None.

    Returns:
        A list along `traced.uses`.

    Raises:
        ArgumentError: when the model does not do the same each time.
        SamplesInteractError: when a sample's output depends on another sample.
    """
    given = (dict(parameters), inputs, targets)
    if all(leaf is None or tf.is_symbolic_tensor(leaf) for leaf in tf.nest.flatten(given)):
        kept = _known.kept(traced.key)  # all values would be drawn, which are the same each time
        if kept is not None:
            return kept
    return _known.of(traced.key, lambda: _find(traced, scalars, chosen, given))


def _find(traced: Record, scalars: Scalars, chosen: list[str], given: Any) -> tuple[list[Layout | None], bool]:
    """Return the layouts, and whether they may hold for other values too."""
    layouts: list[Layout | None] = [None] * len(traced.uses)
    open_uses, decided, drawn = set(range(len(layouts))), False, None
    evaluate = tried = None
    for attempt, (values, own) in enumerate(_values(given)):
        if attempt >= _LEAST and not open_uses:
            break
        evaluate = evaluate or _evaluation(scalars, chosen, values, traced)
        try:
            found = evaluate(values, own)
        except tf.errors.InvalidArgumentError:  # of labels that are none: others may do, and the step itself will say so
            continue
        if open_uses:
            tried = values
        if attempt:
            drawn = values
        for place, (layout, state, reaches) in enumerate(found):
            certain = state in ("sure", "mixed")
            if place in open_uses:
                layouts[place] = layout
                open_uses -= {place} if certain else set()
            decided = decided or reaches or (certain and layout != layouts[place])
    for place in open_uses:
        layouts[place] = None
    slow = sorted({use.term.parameter for use, layout in zip(traced.uses, layouts, strict=True) if layout is None})
    if tried is None and open_uses:  # labels that are none each time, as where the loss holds them
        return layouts, False
    if slow:
        _refuse_interaction(scalars, slow, tried, traced)
        try:
            _refuse_interaction(scalars, slow, drawn or tried, traced)
        except (ArgumentError, SamplesInteractError):
            decided = True
    return layouts, not decided


def _values(graph_values: Any) -> Iterator[tuple[Any, bool]]:
    """Yield values for the tensors, and whether all are their own: as far as they have one, the others drawn; then all drawn."""
    leaves = tf.nest.flatten(graph_values)
    first_target = len(leaves) - len(tf.nest.flatten(graph_values[2]))
    with tf.init_scope():
        known = [None if leaf is None or tf.is_symbolic_tensor(leaf) else tf.convert_to_tensor(leaf) for leaf in leaves]
    for attempt in range(_DRAWS + 1):
        random = np.random.default_rng(attempt)
        with tf.init_scope():
            values = [
                _draw(leaf, random, attempt, target=place >= first_target) if value is None or attempt else value
                for place, (leaf, value) in enumerate(zip(leaves, known, strict=True))
            ]
        yield tf.nest.pack_sequence_as(graph_values, values), all(map(operator.is_, values, known))


def _draw(leaf: Array, random: np.random.Generator, attempt: int, *, target: bool) -> Array:
    if leaf is None:
        return None
    shape, floating = tuple(leaf.shape), leaf.dtype.is_floating
    if leaf.dtype == tf.string:
        return tf.zeros(shape, leaf.dtype)  # empty texts
    if target:  # floating ones too may be labels; as probabilities, zeros would leave no loss
        if attempt % 2 == 0:  # some alike and some not, for a loss may compare samples of one label, or of two
            return tf.cast(tf.constant(np.indices(shape).sum(axis=0) % 2), leaf.dtype)
        return tf.zeros(shape, leaf.dtype) if floating else tf.ones(shape, leaf.dtype)
    if not floating:  # tokens that are all alike would leave attention without a gradient
        bits = random.integers(0, 2, shape) if attempt % 2 == 0 else np.full(shape, attempt < _DRAWS)
        return tf.cast(tf.constant(bits), leaf.dtype)
    fan_in = max(1, int(np.prod(shape[:-1])))
    scale = 1.0 if len(shape) < 2 else fan_in**-0.5
    smaller = 4.0 ** -(attempt // 2)  # where losses clip what is large, no gradient would be seen
    return tf.constant(smaller * (0.5 * (len(shape) < 2) + scale * random.normal(size=shape)), dtype=leaf.dtype)


def _evaluation(
    scalars: Scalars, chosen: list[str], like: Any, traced: Record
) -> Callable[[Any, bool], list[tuple[Layout | None, str, bool]]]:
    """Return what gives for each use its layout, how sure it is, and whether there are ways between samples, be they closed."""
    n, k = traced.scalars.shape
    weights = [np.asarray(weight) for weight in sample_weights(n)]
    # distinct factors keep heads from cancelling, as the outputs of a softmax would
    heads = np.broadcast_to(1.0 + np.random.default_rng(0).random(k), (n, k))
    nan = np.where(np.arange(n) % 2, 1.0, np.nan)
    seeds = [heads, *(heads * weight[:, None] for weight in (*weights, nan))]

    def pulled(parameters: Any, inputs: Any, targets: Any) -> list[Any]:
        again = record(scalars, parameters, chosen, inputs, targets)
        if len(again.uses) != len(traced.uses):
            raise ArgumentError(
                "`model` must do the same each time; got other operations at a second call. Make it a pure function."
            )
        tensors = [use.op.outputs[0] for use in again.uses]
        by_seed = [gradients(again.scalars, tf.cast(seed, again.scalars.dtype), tensors) for seed in seeds]
        found: list[Any] = []
        for use, *of_use in zip(again.uses, *by_seed, strict=True):
            usable = use.site is not None and of_use[0] is not None
            found.append([use.site.arrange(gradient) for gradient in of_use] if usable and use.site else [])
        return found

    run = _compiled(pulled, like)

    def evaluate(values: Any, own: bool) -> list[tuple[Layout | None, str, bool]]:
        layouts: list[tuple[Layout | None, str, bool]] = []
        for use, of_use in zip(traced.uses, run(values), strict=True):
            if use.site is None:
                layouts.append((None, "sure", False))
            elif not of_use:
                layouts.append((Layout(-1), "sure", False))  # no gradient reaches it: it adds nothing
            elif not own and not np.all(np.isfinite(of_use[0])):
                layouts.append((None, "open", False))  # other values may do
            else:
                flat, *weighted, tainted = (gradient.numpy() for gradient in of_use)
                layout, state = find_layout(flat, weighted, weights, traced.eps)
                layouts.append((layout, state, layout is not None and reaches_others(tainted, layout, n)))
        return layouts

    return evaluate


def _refuse_interaction(scalars: Scalars, slow: list[str], values: Any, traced: Record) -> None:
    """Check `Σ_a w_a g_a = ∇ Σ_a w_a h_a`, which fails exactly when a sample's head depends on another sample."""
    n, k = traced.scalars.shape
    weights = 0.5 + np.random.default_rng(0).random((n, k))
    half = any(leaf is not None and leaf.dtype in _HALF for leaf in tf.nest.flatten(values))
    attempts = [each(_wide, values), values] if half else [values]  # in half precision sums of rows are too coarse to compare
    for attempt in attempts:
        try:
            single, whole = _compared(scalars, slow, weights, attempt)
            break
        except _MISFIT as error:
            if attempt is values:  # of one sample alone it cannot be had
                raise _misfit(scalars, slow[0], values, error) from error
    for name in slow:
        eps = _eps(whole[name]) if half else traced.eps
        compare_rows(name, single[name].numpy(), whole[name].numpy(), weights, eps)


def _misfit(scalars: Scalars, name: str, values: Any, error: Exception) -> Exception:
    """Return what is wrong where the rows of one sample alone cannot be had: the model, or a gradient within it."""

    def alone(parameters: Any, inputs: Any, targets: Any) -> Any:
        return scalars(parameters, *each(lambda leaf: leaf[:1], (inputs, targets)))

    try:
        _compiled(alone, values)(values)
    except _MISFIT:
        return interaction(name)
    return UnsupportedModelError(
        f"`model` must have gradients that TensorFlow takes of one sample alone; got a {type(error).__name__} for parameter "
        f"{name!r}, as of loops in a model that reads its variables by itself. Pass the parameters in: "
        "mgs_core.FunctionalModel(function, parameters) with tensors."
    )


def _compared(scalars: Scalars, slow: list[str], weights: Any, values: Any) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the rows of the parameters, one sample at a time, and the weighted gradient of the whole batch."""

    def both(parameters: Any, inputs: Any, targets: Any) -> Any:
        value = scalars(parameters, inputs, targets)
        found = gradients(value, tf.cast(weights, value.dtype), [parameters[name] for name in slow])
        whole = {name: tf.zeros_like(parameters[name]) if g is None else g for name, g in zip(slow, found, strict=True)}
        return rows(scalars, parameters, slow, inputs, targets), whole

    pair: tuple[dict[str, Array], dict[str, Array]] = _compiled(both, values)(values)
    return pair


def _wide(value: Array) -> Array:
    with tf.init_scope():
        return tf.cast(value, tf.float32) if value.dtype in _HALF else value


def _eps(array: Array) -> float:
    return float(namespace.finfo(array.dtype).eps)


def _compiled(function: Callable[..., Any], like: Any) -> Callable[[Any], Any]:
    """Return the function of values such as these, run eagerly; what it holds of a graph that is being traced is made up."""
    concrete = tf.function(function, autograph=False).get_concrete_function(*like)
    with tf.init_scope():
        concrete.set_external_captures([_made_up(held) for held in concrete.captured_inputs])

    def run(values: Any) -> Any:
        with tf.init_scope():
            return concrete(*values)

    return run


def _made_up(held: Array) -> Array:
    if not tf.is_symbolic_tensor(held):
        return held
    if held.dtype.is_floating:
        return tf.constant(np.random.default_rng(0).uniform(0.5, 1.5, tuple(held.shape)), held.dtype)  # perhaps a variance
    return tf.ones(tuple(held.shape), held.dtype)
