"""Fused operations whose gradient cannot be differentiated again, and the context in which PyTorch does without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mgs_core._errors import UnsupportedModelError

from .graph import Graph

_CONTEXT = "Run the model within `mgs_core.adapters.torch.twice_differentiable()`."
# beginning of an operation's name → (what it is, remedy)
_ONCE = {
    "ScaledDotProduct": ("fused attention", _CONTEXT),
    "EfficientAttention": ("fused attention", _CONTEXT),
    "FlashAttention": ("fused attention", _CONTEXT),
    "MkldnnRnnLayer": ("a fused recurrent layer", _CONTEXT),
    "CudnnRnn": ("a fused recurrent layer", _CONTEXT),
    "MiopenRnn": ("a fused recurrent layer", _CONTEXT),
    "CompiledFunction": ("a model compiled by torch.compile", "Use the model as it was before, `model._orig_mod`."),
    "EmbeddingBag": ("an embedding bag that takes the maximum", 'Use `mode="sum"` or "mean".'),
}


def refuse_fused(graph: Graph, rows: set[int]) -> None:
    """Refuse a graph that cannot be differentiated twice.

    Args:
        graph: the graph.
        rows: numbers of the nodes whose backward itself makes rows.

    Raises:
        UnsupportedModelError: when it has such an operation.
    """
    for number in range(len(graph.nodes)):
        name = graph.name(number)
        for beginning, (what, remedy) in _ONCE.items():
            if name.startswith(beginning) and (beginning != "EmbeddingBag" or number in rows):
                raise UnsupportedModelError(
                    f"`model` must be twice differentiable for a penalty; got {what} ({name}), which is not. {remedy}"
                )


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Let PyTorch choose attention and recurrent layers that have a second derivative.

    Within it fused attention, and on CPU all of oneDNN (whose recurrent layers it is about), are off.
    """
    with (
        sdpa_kernel(SDPBackend.MATH),
        torch.backends.mkldnn.flags(enabled=False),
        torch.backends.cudnn.flags(enabled=False),
    ):
        yield
