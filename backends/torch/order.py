"""The order in which autograd differentiates statistics, which decides how much memory the derivative takes.

Of the nodes that are ready, autograd runs the one that was made last. The contractions are made after the graph of the first
gradient, so it would run the derivatives of all of them first, and hold the gradients of every layer's inputs and outputs while
it walks that graph. When that graph's nodes count as made after the contractions, it runs the derivative of one contraction and
follows it as far as it leads, which frees what it passes, before it turns to the contraction that was made before. The values are
the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from mgs_core._protocol import LayerStatistics

# what is added to numbers; above every number that autograd counts to
_LATER = 1 << 40
# the number of parameters' nodes
_AT_ONCE = (1 << 64) - 1


def next_number() -> int:
    """Return the number that autograd gives to the next node of this thread, or a smaller one."""
    with torch.enable_grad():
        node: Any = torch.zeros((), requires_grad=True).view(()).grad_fn
    return int(node._sequence_nr())


def follow_each_contraction(statistics: Iterable[LayerStatistics], first: int) -> None:
    """Let autograd follow the derivative of each contraction to the end before it runs the next one's.

    Contractions are differentiated from the last to the first, so the last should be that of the layer next to the data.

    Args:
        statistics: not contracted yet.
        first: what `next_number` returned before their graph was made.
    """
    tensors = (value for use in statistics for value in vars(use).values() if isinstance(value, torch.Tensor))
    stack: list[Any] = [tensor.grad_fn for tensor in tensors]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen and first <= node._sequence_nr() < _AT_ONCE:
            seen.add(node)
            stack.extend(child for child, _ in node.next_functions)
    for node in seen:
        node._set_sequence_nr(node._sequence_nr() + _LATER)
