"""Record one evaluation of a model in the current graph and find where its parameters meet data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from mgs_core._errors import UnsupportedModelError
from mgs_core._types import Array

from .gradients import gradients
from .namespace import namespace
from .operations import functions_of
from .sites import Site, find_site
from .terms import Term, follow

#: `(parameters by name, inputs, targets) → (n, k)` scalars.
Scalars: TypeAlias = Callable[[Mapping[str, Array], Any, Any], Array]


@dataclass(frozen=True, eq=False)
class Use:
    """Hold one use of a parameter.

    Attributes:
        term: the parameter as the operation sees it.
        op: the operation.
        site: the place, or None when no rule knows it.
        weight: shape of the operation's input.
    """

    term: Term
    op: Any
    site: Site | None
    weight: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Record:
    """Hold one evaluation.

    Attributes:
        scalars: (n, k).
        uses: in the order of evaluation.
        key: equal for evaluations by the same operations, wired alike, on the same shapes and constants.
        eps: relative spacing of the coarsest numbers that take part.
    """

    scalars: Array
    uses: list[Use]
    key: bytes
    eps: float


def record(scalars: Scalars, parameters: Mapping[str, Array], chosen: list[str], inputs: Any, targets: Any) -> Record:
    """Evaluate in the current graph and find the uses of the chosen parameters.

    Args:
        scalars: the model and its head.
        parameters: all parameters by name.
        chosen: names of those to follow.
        inputs: the batch.
        targets: its targets, or None.
    """
    graph = tf.compat.v1.get_default_graph()
    marked = {name: tf.identity(value) for name, value in parameters.items()}
    inputs, targets = each(tf.identity, (inputs, targets))
    start = len(graph.get_operations())
    value = scalars(marked, inputs, targets)
    ops = _needed(value, graph.get_operations()[start:])
    known = [marked[name] for name in marked] + tf.nest.flatten((inputs, targets))
    key = _key(ops, [tensor.name for tensor in known if tensor is not None], chosen)
    terms = {marked[name].name: [Term(name, tuple(marked[name].shape))] for name in chosen}
    _refuse_python(ops, set(terms))
    dtypes = {tensor.dtype for op in ops for tensor in op.outputs if tensor.dtype.is_floating} | {value.dtype}
    return Record(value, _uses(ops, terms, value.op.name), key, max(float(namespace.finfo(dtype).eps) for dtype in dtypes))


def _needed(value: Array, ops: list[Any]) -> list[Any]:
    """Return those of the operations that the value depends on, in order."""
    names, pending = set(), [value.op]
    while pending:
        op = pending.pop()
        if op.name not in names:
            names.add(op.name)
            pending += [tensor.op for tensor in op.inputs]
    return [op for op in ops if op.name in names]


def _refuse_python(ops: list[Any], reached: set[str]) -> None:
    """Refuse `tf.py_function` behind a parameter: its gradient can be taken once only."""
    for op in ops:
        if any(tensor.name in reached for tensor in op.inputs):
            if op.type == "EagerPyFunc":
                raise UnsupportedModelError(
                    f"`model` must have no tf.py_function behind a parameter, for its gradient can be taken once only; got "
                    f"{op.name!r}. Write it with TensorFlow's operations, or apply it to the data beforehand."
                )
            reached.update(tensor.name for tensor in op.outputs)


def _uses(ops: list[Any], terms: dict[str, list[Term]], last: str) -> list[Use]:
    uses = []
    for op in ops:
        positions = [place for place, tensor in enumerate(op.inputs) if terms.get(tensor.name)]
        if not positions:
            continue
        # of one sample, data may have joined a parameter of its shape: what nothing comes after is a use in any case
        followed = None if op.name == last else follow(op, terms)
        if followed is not None:
            terms.update((tensor.name, found) for tensor, found in zip(op.outputs, followed, strict=True))
            continue
        for place in positions:
            site = find_site(op, place)
            uses += [Use(term, op, site, _shape(op.inputs[place])) for term in terms[op.inputs[place].name]]
    return uses


def _shape(tensor: Array) -> tuple[int, ...]:
    return tuple(tensor.shape) if tensor.shape.is_fully_defined() else ()


def _key(ops: list[Any], known: list[str], chosen: list[str]) -> bytes:
    """Digest the operations: type, attributes, wiring and shapes, whatever their names and those of functions."""
    number = {name: place for place, name in enumerate(known)}
    digest = sha256(repr(chosen).encode())
    for op in ops:
        wiring = [number.setdefault(tensor.name, len(number)) for tensor in op.inputs]
        shapes = [(tensor.shape, number.setdefault(tensor.name, len(number))) for tensor in op.outputs]
        functions = {name: _content(op, name) for name in functions_of(op)}
        attributes = [(name, _attribute(op.node_def.attr[name], functions)) for name in sorted(op.node_def.attr)]
        digest.update(repr((op.type, wiring, shapes, attributes)).encode())
    return digest.digest()


def _attribute(value: Any, functions: Mapping[str, bytes]) -> Any:
    """Return what an attribute says; of functions, whose names are new in each trace, what they do."""
    named = [function.name for function in (value.func, *value.list.func) if function.name]
    if named:
        return [functions[name] for name in named]
    if value.s.startswith((b"PartitionedCall-", b"StatefulPartitionedCall-")):  # a name of the gradient of the function called
        return None
    return value.SerializeToString(deterministic=True)


def _content(op: Any, name: str) -> bytes:
    """Digest a function that an operation calls; its name where there is no more to know."""
    graph = getattr(op.graph._get_function(name), "graph", None)
    if graph is None:
        return name.encode()
    ops, inputs = graph.get_operations(), [tensor.name for tensor in graph.inputs]
    place = {made: at for at, made in enumerate([*inputs, *(tensor.name for op in ops for tensor in op.outputs)])}
    return _key(ops, inputs, [str(place[tensor.name]) for tensor in graph.outputs])


def each(function: Callable[[Array], Array], tree: Any) -> Any:
    """Apply a function to every tensor of a tree; None stays."""
    return tf.nest.map_structure(lambda leaf: None if leaf is None else function(leaf), tree)


def rows(scalars: Scalars, parameters: Mapping[str, Array], chosen: list[str], inputs: Any, targets: Any) -> dict[str, Array]:
    """Return explicit gradients by parameter, (n, k, p), one sample at a time.

    A loop, not `tf.vectorized_map`: that lacks rules for some operations and brings down the process on others.
    """
    batch = each(tf.convert_to_tensor, (inputs, targets))
    n = tf.nest.flatten(inputs)[0].shape[0]

    def one(sample: Array) -> dict[str, Array]:
        single = each(lambda leaf: tf.expand_dims(leaf[sample], 0), batch)
        marked = {name: tf.identity(value) for name, value in parameters.items()}
        value = scalars(marked, *single)
        k = value.shape[1]
        found = [
            gradients(value, tf.one_hot([head], k, dtype=value.dtype), [marked[name] for name in chosen]) for head in range(k)
        ]
        flat: dict[str, Array] = {}
        for place, name in enumerate(chosen):
            zero = tf.zeros_like(marked[name])
            dense = [zero if gradient[place] is None else gradient[place] for gradient in found]
            flat[name] = tf.stack([tf.reshape(gradient, [-1]) for gradient in dense])
        return flat

    signature = {name: parameters[name].dtype for name in chosen}
    k_rows: dict[str, Array] = tf.map_fn(one, tf.range(n), fn_output_signature=signature)
    return {name: tf.reshape(row, (n, -1, int(np.prod(parameters[name].shape)))) for name, row in k_rows.items()}
