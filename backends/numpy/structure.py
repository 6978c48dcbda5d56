"""The structure of a tape: what two tapes of one program have in common, and whether values decide which of its samples meet."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd.numpy.numpy_boxes import ArrayBox

from mgs_core._layout import Layout, halves, reaches_others
from mgs_core._types import Array

from . import primitives
from .tape import Tape, TapeNode, plain
from .uses import Use


def key_of(tape: Tape, n: int) -> Hashable:
    """Return what tapes of equal structure have in common: operations, shapes, wiring, slices, axes; no values of arrays.

    Args:
        tape: the tape.
        n: number of samples.
    """
    number = {node: place for place, node in enumerate(tape.nodes)}
    steps = []
    for node in tape.nodes:
        given = tuple(_setting(value) for value in node.arguments)
        options = tuple((name, _setting(value)) for name, value in sorted(node.options.items()))
        wiring = tuple(number[parent] for parent in node.parents)
        name = getattr(node.function, "__name__", node.name)
        steps.append((name, _setting(node.value), node.positions, wiring, given, options, _keeps_order(node, n)))
    return n, tuple(steps)


def _setting(value: Any) -> Hashable:
    value = plain(value)
    if isinstance(value, (tuple, list)):
        return tuple(_setting(entry) for entry in value)
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    if value is None or value is Ellipsis or isinstance(value, (bool, int, str, np.integer)):
        return repr(value)
    return (type(value).__name__, np.shape(value))


def values_decide(
    tape: Tape,
    placed: Sequence[tuple[Use, Layout]],
    stop: Callable[[TapeNode, TapeNode], bool],
    heads: Array,
) -> bool:
    """Return whether values may let samples meet, or take rows to other samples, in another batch.

    Args:
        tape: the tape.
        placed: uses with the places of the samples.
        stop: whether not to go on from a node to a parent.
        heads: factors of the heads, (n, k).
    """
    n = heads.shape[0]
    if n == 1:
        return False
    active: set[TapeNode] = {use.node for use, _ in placed}
    for node in reversed(tape.nodes):
        if any(parent in active for parent in node.parents):
            active.add(node)
            if _moves_rows(node, n):
                return True
    return any(_ways_between(tape, placed, stop, heads, half) for half in halves(n))


def _ways_between(
    tape: Tape,
    placed: Sequence[tuple[Use, Layout]],
    stop: Callable[[TapeNode, TapeNode], bool],
    heads: Array,
    half: list[int],
) -> bool:
    """Return whether anything goes between these samples and the others, be the way closed by values."""
    n = heads.shape[0]
    nan = np.full((n, 1), np.nan)
    nan[half] = 1.0
    with np.errstate(all="ignore"):
        tainted = tape.pull((heads * nan).astype(heads.dtype), [use.node for use, _ in placed], stop, open_gates=True)
    found: Mapping[TapeNode, Array] = tainted
    return any(
        reaches_others(plain(use.site.arrange(plain(found[use.node]))), layout, n, half)
        for use, layout in placed
        if use.site is not None and use.node in found
    )


def _index(node: TapeNode) -> list[Any]:
    given = plain(node.arguments[1])
    entries = [plain(entry) for entry in (given if isinstance(given, tuple) else (given,))]
    return [entry if isinstance(entry, (int, slice, type(None), type(Ellipsis))) else np.asarray(entry) for entry in entries]


def _keeps_order(node: TapeNode, n: int) -> bool:
    """Return whether one of the arrays of an index is 0, 1, …, n − 1, so that the samples keep their places."""
    if node.function is not ArrayBox.__getitem__:
        return True
    arrays = [entry for entry in _index(node) if isinstance(entry, np.ndarray) and entry.ndim]
    return not arrays or any(a.dtype != bool and np.array_equal(a.ravel(), np.arange(n)) for a in arrays)


def _moves_rows(node: TapeNode, n: int) -> bool:
    """Return whether values say where rows go, along an axis that may hold the samples."""
    shape: tuple[int, ...] = np.shape(plain(node.arguments[0])) if node.arguments else ()
    if node.function is ArrayBox.__getitem__:
        if _keeps_order(node, n):
            return False
        index = [entry for entry in _index(node) if entry is not None]
        by_values = [axis for axis, entry in enumerate(index) if isinstance(entry, np.ndarray)]
        return any(entry is Ellipsis for entry in index) or any(shape[axis] % n == 0 for axis in by_values)
    if node.function in (primitives.pick, primitives.spread):
        return shape[0] % n == 0
    # autograd differentiates both along one axis only
    return node.function in (anp.sort, anp.partition) and shape[0] % n == 0
