"""A penalty and its gradient on PyTorch, traced once for each shape of batch and then replayed.

In networks of ordinary size a penalised step is little more than calls of Python, through Keras' layers once more and through
the graph of their gradients. TensorFlow and JAX trace all that away; here `make_fx` does, down to single operations, none of
which needs a derivative any more.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeAlias, cast

import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from mgs_core._registry import get_backend

Tensors: TypeAlias = list[torch.Tensor]
Others: TypeAlias = list[torch.Tensor | None]
#: `(parameters, others) → scalar`
Function: TypeAlias = Callable[[Tensors, Others], torch.Tensor]

_differentiated_once: Callable[[Callable[..., Any]], Callable[..., Any]] = cast(Any, get_backend("torch")).differentiated_once

#: Shapes of batches that are traced: the whole one, the last of an epoch, and some more, but not all lengths of sequences.
_SHAPES = 4


class Replay:
    """Evaluate a function with its gradient in the parameters.

    A graph is used from the third batch of its shapes on, once it has agreed with the function on the second. Where it does
    not, or there is none, because the function's Python reads values, the function goes on being called.
    """

    def __init__(self) -> None:
        self._graphs: dict[Any, Callable[..., Any] | None] = {}
        self._proven: set[Any] = set()

    def __call__(self, function: Function, parameters: Tensors, others: Others, settings: Hashable = ()) -> torch.Tensor:
        """Return the scalar; `backward` takes the gradient from it.

        Args:
            function: the same in each call, or one that does the same.
            parameters: tensors to differentiate in.
            others: all other tensors that the value depends on.
            settings: what else it depends on and a graph would hold fixed.
        """
        value, gradients = self._evaluated(function, [tensor.detach() for tensor in parameters], others, settings)
        found: torch.Tensor = _Known.apply(value, gradients, *parameters)  # type: ignore[no-untyped-call]  # of torch
        return found

    def _evaluated(
        self, function: Function, parameters: Tensors, others: Others, settings: Hashable
    ) -> tuple[torch.Tensor, Tensors]:
        shapes = tuple(tensor if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in others)
        key = shapes, settings
        graph = self._graphs.get(key)
        if graph is not None and key in self._proven:
            return _run(graph, parameters, others)

        def both(parameters: Tensors, others: Others) -> tuple[torch.Tensor, Tensors]:
            with torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in parameters]
                value = function(leaves, others)
                if not value.requires_grad:  # the kernel of a linear model's outputs does not depend on its parameters
                    return value, [torch.zeros_like(leaf) for leaf in leaves]
                gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
            return value.detach(), list(gradients)

        value, gradients = both(parameters, others)
        if key not in self._graphs and len(self._graphs) < _SHAPES:
            self._graphs[key] = _trace(both, parameters, others)
        elif graph is not None:
            if _gives(graph, parameters, others, [value, *gradients]):
                self._proven.add(key)
            else:
                self._graphs[key] = None
        return value, gradients


def _trace(both: Callable[..., Any], parameters: Tensors, others: Others) -> Callable[..., Any] | None:
    try:
        traced = make_fx(both, tracing_mode="fake")(parameters, others)  # which no Python can read
    except (AssertionError, RuntimeError):
        return None
    _lay_alike(traced)
    graph: Callable[..., Any] = traced
    return graph


def _lay_alike(traced: GraphModule) -> None:
    """Copy gradients into the layout of the values whose signs mask them: masks over two layouts take four times as long."""
    aten, graph = torch.ops.aten, traced.graph
    for mask in graph.find_nodes(op="call_function", target=aten.threshold_backward.default):
        gradient, values = mask.args[:2]
        if gradient.meta["val"].stride() != values.meta["val"].stride():
            with graph.inserting_before(mask):
                empty = graph.call_function(aten.empty_like.default, (values,))
                mask.update_arg(0, graph.call_function(aten.copy_.default, (empty, gradient)))
    traced.recompile()


def _run(graph: Callable[..., Any], parameters: Tensors, others: Others) -> tuple[torch.Tensor, Tensors]:
    with torch.no_grad():
        value, gradients = graph(parameters, others)
    return value, gradients


def _gives(graph: Callable[..., Any], parameters: Tensors, others: Others, expected: Tensors) -> bool:
    try:
        value, gradients = _run(graph, parameters, others)
    except RuntimeError:  # strides that tracing foresaw otherwise
        return False
    pairs = zip([value, *gradients], expected, strict=True)
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()), equal_nan=True) for a, b in pairs)


class _Known(torch.autograd.Function):
    """A value whose gradients are known; their derivatives are not."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, gradients: Tensors, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        ctx.save_for_backward(*parameters)
        return value.clone()

    @staticmethod
    @_differentiated_once
    def backward(ctx: Any, factor: torch.Tensor) -> Any:
        return None, None, *(factor * gradient for gradient in ctx.gradients)
