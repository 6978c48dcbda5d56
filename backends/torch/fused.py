"""Fused operations whose gradient cannot be differentiated again, and the context in which PyTorch does without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mgs_core._errors import UnsupportedModelError

from .attention import FUSED_ATTENTION
from .graph import Graph, written_in

_HEAD = 'Penalise another head than the losses, or use `weighting="agreement"`.'
_CONTEXT = "Run the model within `mgs_core.adapters.torch.twice_differentiable()`."
# beginning of an operation's name → (what it is, remedy)
_ONCE = {
    "ScaledDotProduct": ("fused attention", _CONTEXT),
    "EfficientAttention": ("fused attention", _CONTEXT),
    "FlashAttention": ("fused attention", _CONTEXT),
    "MkldnnRnnLayer": ("a fused recurrent layer", _CONTEXT),
    "CudnnRnn": ("a fused recurrent layer", _CONTEXT),
    "MiopenRnn": ("a fused recurrent layer", _CONTEXT),
    "Python CompiledFunction": (
        "a model compiled by torch.compile",
        "Use the model as it was before, `model._orig_mod`, or run it within `torch.compiler.set_stance('force_eager')`, and "
        "compile no step around it.",
    ),
    "EmbeddingBag": ("an embedding bag that takes the maximum", 'Use `mode="sum"` or "mean".'),
    "FakeQuantizeLearnable": ("a learnable quantisation", "Turn it off on penalised steps."),
    "Cdist": ("torch.cdist", 'Pass `compute_mode="use_mm_for_euclid_dist"`, or take norms of differences.'),
    "Pdist": ("torch.pdist", "Take norms of differences."),
    "SegmentReduce": ("torch.segment_reduce", "Use `scatter_reduce`."),
    "CtcLoss": ("the CTC loss", _HEAD),
    "CudnnCtcLoss": ("the CTC loss", _HEAD),
    "MultiMarginLoss": ("the multi-margin loss", _HEAD),
    "MultilabelMarginLoss": ("the multi-label margin loss", _HEAD),
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
            if name.startswith(beginning) and name != FUSED_ATTENTION and (beginning != "EmbeddingBag" or number in rows):
                raise UnsupportedModelError(
                    f"`model` must be twice differentiable for a penalty; got {what} ({name}), which is not. {remedy}"
                )
        if name.startswith("Python ") and written_in(graph.nodes[number]).startswith("torch.distributed.tensor"):
            raise UnsupportedModelError(
                f"`model` must be twice differentiable for a penalty; got a layer split over processes (DTensor, {name}), which "
                'is not. Penalise a whole copy, or use `weighting="agreement"`.'
            )
        if name == "EmbeddingBag" and any(edge is not None for edge in graph.inputs[number][1:]):
            raise UnsupportedModelError(
                "`model` must be twice differentiable for a penalty; got an embedding bag with learnt weights of its entries "
                "(EmbeddingBag), which is not. Use torch.nn.functional.embedding, multiply and sum."
            )
        if _is_once_differentiable(graph.nodes[number]):
            raise UnsupportedModelError(
                f"`model` must be twice differentiable for a penalty; got a function marked with once_differentiable ({name}). "
                'Write its backward with differentiable operations and leave the mark out, or use `weighting="agreement"`.'
            )


def _is_once_differentiable(node: Any) -> bool:
    """Return whether this is a function written in Python whose backward is wrapped by PyTorch's `once_differentiable`."""
    backward: Any = getattr(getattr(node, "_forward_cls", None), "backward", None)
    return hasattr(backward, "__wrapped__") and backward.__globals__ is vars(torch.autograd.function)


@contextmanager
def twice_differentiable(*, recurrent: bool = True) -> Iterator[None]:
    """Let PyTorch choose attention and recurrent layers that have a second derivative.

    Args:
        recurrent: whether recurrent layers matter. Then oneDNN and cuDNN are off, and convolutions are slower without.

    Yields:
        Nothing.

    Example:
        >>> import torch
        >>> from mgs_core.adapters.torch import twice_differentiable
        >>> with twice_differentiable():
        ...     outputs = torch.nn.functional.scaled_dot_product_attention(*[torch.ones(1, 2, 3)] * 3)
    """
    libraries: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn] if recurrent else []
    before = [library.enabled for library in libraries]
    try:
        for library in libraries:
            library.enabled = False
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for library, enabled in zip(libraries, before, strict=True):
            library.enabled = enabled
