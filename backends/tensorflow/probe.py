"""Find by evaluation which axis of each use holds the samples, and refuse models in which samples interact.

It is done eagerly, on the values at hand, and again from time to time; where there are none, because the caller is being traced,
on drawn ones. Where drawn values, or NaN on its way back, show that values decide which samples meet, it is done at each use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from mgs_core._errors import ArgumentError, NotFiniteError, SamplesInteractError, UnsupportedModelError
from mgs_core._known import Known
from mgs_core._layout import Layout, compare_rows, find_layout, interaction, reaches_others, sample_weights
from mgs_core._types import Array

from .draws import Draw
from .gradients import gradients
from .namespace import namespace
from .walk import Record, Scalars, each, record, rows

_known: Known[list[Layout | None]] = Known()
_DRAWS, _LEAST = 4, 3  # values are drawn so often at most; they are tried so often, own ones included, at least
_DRAWN = (
    "That was seen on drawn values, for in a traced step there are none: call mgs.kernel outside of tf.function, or write what "
    "holds for all values, as tf.maximum(x, 1e-6) in a logarithm."
)
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
    draw = Draw(given)
    for attempt in range(_DRAWS + 1):
        if attempt >= _LEAST and not open_uses:
            break
        values, own = draw.values(attempt)
        evaluate = evaluate or _evaluation(scalars, chosen, values, traced)
        try:
            found = evaluate(values, own)
        except tf.errors.InvalidArgumentError:  # of labels that are none: others may do, and the step itself will say so
            draw.choose()
            continue
        states = {state for place, (_, state, _) in enumerate(found) if place in open_uses}
        if not own and ("infinite" in states and draw.raise_()) | ("mixed" in states and draw.shift()):
            decided = True  # what such values show need not hold of the step's own: of others that are drawn it may
            if "mixed" in states:
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
        decided = _refuse_tried(scalars, slow, tried, traced, draw) or decided
        try:
            _refuse_interaction(scalars, slow, drawn or tried, traced)
        except (ArgumentError, SamplesInteractError):
            decided = True
    return layouts, not decided


def _refuse_tried(scalars: Scalars, slow: list[str], tried: Any, traced: Record, draw: Draw) -> bool:
    """Refuse an interaction in front of rows, on other values too where these were drawn; return whether those are needed."""
    try:
        _refuse_interaction(scalars, slow, tried, traced)
    except (NotFiniteError, SamplesInteractError) as error:
        if draw.own(tried):
            raise
        while draw.raise_() if isinstance(error, NotFiniteError) else draw.shift():
            try:
                _refuse_interaction(scalars, slow, draw.values(_DRAWS)[0], traced)
            except (NotFiniteError, SamplesInteractError):
                continue
            return True
        raise type(error)(f"{error} {_DRAWN}") from error
    return False


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
                layouts.append((None, "infinite", False))  # other values may do
            else:
                flat, *weighted, tainted = (gradient.numpy() for gradient in of_use)
                layout, state = find_layout(flat, weighted, weights, traced.eps)
                layouts.append((layout, state, layout is not None and reaches_others(tainted, layout, n, list(range(1, n, 2)))))
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
                raise _misfit(scalars, slow[0], values, traced, error) from error
    for name in slow:
        if single[name].shape[1] != k:  # one sample alone has other outputs, as where they are similarities
            raise interaction(name)
        eps = _eps(whole[name]) if half else traced.eps
        compare_rows(name, single[name].numpy(), whole[name].numpy(), weights, eps)


def _misfit(scalars: Scalars, name: str, values: Any, traced: Record, error: Exception) -> Exception:
    """Return what is wrong where the rows of one sample alone cannot be had: the model, or a gradient within it."""
    n, dtype = traced.scalars.shape[0], traced.scalars.dtype

    def alone(parameters: Any, inputs: Any, targets: Any) -> Any:
        def one(sample: Array) -> Array:
            return scalars(parameters, *each(lambda leaf: tf.expand_dims(leaf[sample], 0), (inputs, targets)))

        return tf.map_fn(one, tf.range(n), fn_output_signature=dtype)

    try:
        _compiled(alone, values)(values)
    except _MISFIT:
        return interaction(name)
    return UnsupportedModelError(
        f"`model` must have gradients that TensorFlow takes of one sample alone; got a {type(error).__name__} for parameter "
        f"{name!r}. Write gradients of your own for any number of samples, or leave it out by `parameters=`."
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
