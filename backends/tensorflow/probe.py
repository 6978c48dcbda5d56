"""Find by evaluation which axis of each use holds the samples, and refuse models in which samples interact.

It is done once for each structure, eagerly, on the values at hand; where there are none, because the caller is being traced, on
drawn ones. Which sample a row belongs to does not depend on values.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from mgs_core._errors import ArgumentError, SamplesInteractError
from mgs_core._layout import Layout, find_layout, noise_floor, refuse_infinite
from mgs_core._types import Array

from .walk import Record, Scalars, gradients, record, rows

_known: dict[bytes, list[Layout | None]] = {}
_DRAWS = 3


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
    if traced.key in _known:
        return _known[traced.key]
    n, k = traced.scalars.shape
    layouts: list[Layout | None] = [None] * len(traced.uses)
    open_uses = set(range(len(layouts)))
    for values, own in _values((dict(parameters), inputs, targets)):
        try:
            found = _evaluate(scalars, chosen, values, n, k, traced, own=own)
        except tf.errors.InvalidArgumentError:  # of labels that are none: others may do, and the step itself will say so
            continue
        for place, (layout, certain) in enumerate(found):
            if place in open_uses:
                layouts[place] = layout
                if certain:
                    open_uses.remove(place)
        if not open_uses:
            break
    for place in open_uses:
        layouts[place] = None
    slow = sorted({use.term.parameter for use, layout in zip(traced.uses, layouts, strict=True) if layout is None})
    if slow:
        _refuse_interaction(scalars, slow, values, traced)
    _known[traced.key] = layouts
    return layouts


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
    if target or not floating:  # floating targets too may be labels; as probabilities, zeros would leave no loss
        return tf.ones(shape, leaf.dtype) if (attempt + floating) % 2 else tf.zeros(shape, leaf.dtype)
    fan_in = max(1, int(np.prod(shape[:-1])))
    scale = 1.0 if len(shape) < 2 else fan_in**-0.5
    return tf.constant(0.5 * (len(shape) < 2) + scale * random.normal(size=shape), dtype=leaf.dtype)


def _weights(n: int, k: int) -> tuple[Any, Any]:
    """Return distinct weights of the samples, and factors that keep heads from cancelling as the outputs of a softmax would."""
    random = np.random.default_rng(0)
    return random.permutation(0.5 + (np.arange(n) + 1.0) / n), 1.0 + random.random(k)


def _evaluate(
    scalars: Scalars, chosen: list[str], values: Any, n: int, k: int, traced: Record, *, own: bool
) -> list[tuple[Layout | None, bool]]:
    weights, heads = _weights(n, k)

    def both(parameters: Any, inputs: Any, targets: Any) -> list[Any]:
        again = record(scalars, parameters, chosen, inputs, targets)
        if len(again.uses) != len(traced.uses):
            raise ArgumentError(
                "`model` must do the same each time; got other operations at a second call. Make it a pure function."
            )
        tensors = [use.op.outputs[0] for use in again.uses]
        pair = [gradients(again.scalars, tf.cast(seed, again.scalars.dtype), tensors) for seed in (flat, weighted)]
        found: list[Any] = []
        for use, *both_gradients in zip(again.uses, *pair, strict=True):
            usable = use.site is not None and both_gradients[0] is not None
            found.append([use.site.arrange(gradient) for gradient in both_gradients] if usable and use.site else [])
        return found

    flat = np.broadcast_to(heads, (n, k))
    weighted = flat * weights[:, None]
    layouts: list[tuple[Layout | None, bool]] = []
    for use, pair in zip(traced.uses, _run(both, values), strict=True):
        if use.site is None:
            layouts.append((None, True))
        elif not pair:
            layouts.append((Layout(-1), True))  # no gradient reaches it: it adds nothing
        elif not own and not np.all(np.isfinite(pair[0])):
            layouts.append((None, False))  # other values may do
        else:
            layouts.append(find_layout(pair[0].numpy(), pair[1].numpy(), weights, traced.eps))
    return layouts


def _refuse_interaction(scalars: Scalars, slow: list[str], values: Any, traced: Record) -> None:
    """Check `Σ_a w_a g_a = ∇ Σ_a w_a h_a`, which fails exactly when a sample's head depends on another sample."""
    n, k = traced.scalars.shape
    weights = 0.5 + np.random.default_rng(0).random((n, k))

    def both(parameters: Any, inputs: Any, targets: Any) -> Any:
        value = scalars(parameters, inputs, targets)
        found = gradients(value, tf.cast(weights, value.dtype), [parameters[name] for name in slow])
        whole = {name: tf.zeros_like(parameters[name]) if g is None else g for name, g in zip(slow, found, strict=True)}
        return rows(scalars, parameters, slow, inputs, targets), whole

    single, whole = _run(both, values)
    for name in slow:
        each = single[name].numpy().astype(np.float64)
        summed, size = np.einsum("nk,nkp->p", weights, each), float(np.max(np.abs(each), initial=0.0))
        refuse_infinite(bool(np.all(np.isfinite(whole[name]))))
        tolerance = n * (min(1e3 * traced.eps, 0.05) * size + noise_floor(traced.eps))
        # written so that NaN, which a batch of one can give, is refused too
        if not np.max(np.abs(summed - whole[name].numpy().astype(np.float64).ravel()), initial=0.0) <= tolerance:
            raise SamplesInteractError(
                f"`model` must treat each sample by itself; got samples that interact in front of parameter {name!r} "
                "(batch statistics, or attention across the batch). Use fixed statistics (inference mode), or leave these "
                "parameters out by `parameters=`."
            )


def _run(function: Callable[..., Any], arguments: Any) -> Any:
    """Call a function eagerly; for what it holds of a graph that is being traced, values are made up."""
    concrete = tf.function(function, autograph=False).get_concrete_function(*arguments)
    with tf.init_scope():
        concrete.set_external_captures([_made_up(held) for held in concrete.captured_inputs])
        return concrete(*arguments)


def _made_up(held: Array) -> Array:
    if not tf.is_symbolic_tensor(held):
        return held
    if held.dtype.is_floating:
        return tf.constant(np.random.default_rng(0).uniform(0.5, 1.5, tuple(held.shape)), held.dtype)  # perhaps a variance
    return tf.ones(tuple(held.shape), held.dtype)
