"""A model that has been evaluated already: its outputs, with their graph, are all there is and all that is needed."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

from mgs_core._errors import ArgumentError, UnsupportedModelError
from mgs_core._known import Known
from mgs_core._tree import add_named, flatten

from .graph import operation, written_in
from .observed import observed
from .plan import Plan
from .rules.normalisation import BATCH_NORMS
from .run import BatchNorm, is_sharded, refuse_sharded, unwrap


@dataclass(frozen=True, eq=False)
class Evaluated:
    """Hold outputs in place of the model that made them; takes the model's place in `mgs_core.kernel`.

    Attributes:
        outputs: what the model returned, (n, …), with its graph.
        parameters: the parameters in that graph by name.
        batch_norm: "frozen" takes statistics of the batch for constants; "refuse" refuses them.
        samples: use only the first so many samples.
        plans: plans of earlier batches, by the structure of the graph.
    """

    outputs: torch.Tensor
    parameters: dict[str, torch.Tensor]
    batch_norm: BatchNorm = "refuse"
    samples: int | None = None
    plans: Known[Plan] = field(default_factory=Known)


class Models:
    """Refer to a model, and to the copies of it that were made when this was copied, as long as they live.

    Which of them made the outputs, the parameters tell.
    """

    def __init__(self, *models: torch.nn.Module) -> None:
        """Refer to the models."""
        self._references = [weakref.ref(model) for model in models]

    def __iter__(self) -> Iterator[torch.nn.Module]:
        """Give those that live."""
        return (model for model in (reference() for reference in self._references) if model is not None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Models:
        """Refer to their copies too."""
        # a copy that nobody else holds does not outlive the memo
        return Models(*self, *(copy.deepcopy(model, memo) for model in self))

    def __reduce__(self) -> tuple[Any, ...]:
        """Be pickled with the models, which live on where they are pickled besides."""
        return Models, tuple(self)


def evaluated(
    outputs: torch.Tensor, models: Iterable[torch.nn.Module] | None = None, others: Any = (), **options: Any
) -> Evaluated:
    """Return outputs in place of the model that made them.

    Args:
        outputs: with their graph.
        models: give names to the parameters, and leave out those that are not their own; without them they are numbered.
        others: a tree of what else the losses are made of; tensors in it may be outputs of the model too.
        **options: `batch_norm`, `samples` and `plans` of `Evaluated`.

    Returns:
        The evaluated model.

    Raises:
        ArgumentError: when the outputs have no graph or no parameter is in it.
        UnsupportedModelError: when the first backward pass through them is to be the only one.
    """
    if not isinstance(outputs, torch.Tensor) or outputs.grad_fn is None:
        raise ArgumentError(
            "`outputs` must be a tensor that the model made with gradients enabled; got one without a graph. "
            "Pass the outputs themselves, not detached, of a model that is not wholly frozen."
        )
    found = [outputs, *(leaf for leaf in flatten(others).values() if isinstance(leaf, torch.Tensor) and leaf.requires_grad)]
    nodes = _nodes(*found)
    leaves = [node.variable for node in reversed(nodes) if hasattr(node, "variable")]
    owners = [getattr(hook, "__self__", None) for tensor in found for hook in (tensor._backward_hooks or {}).values()]
    owners.extend(module for model in models or () for module in model.modules())
    if any(map(is_sharded, owners)) or any(hasattr(leaf, "_is_flat_param") for leaf in leaves):
        refuse_sharded()
    parallel = (node.ddp_weakref() for node in nodes if hasattr(node, "ddp_weakref"))
    if any(module is not None and module.static_graph for module in parallel):
        raise UnsupportedModelError(  # it would average the gradients in that pass, and never those of the loss
            "`static_graph` must be False in DistributedDataParallel, which takes the kernel's backward pass for that of the "
            "loss; got True. Leave it out."
        )
    parameters: dict[str, torch.Tensor]
    if models is None:
        own = (leaf for leaf in leaves if isinstance(leaf, torch.nn.Parameter))  # others are data
        parameters = {f"parameter {number}": value for number, value in enumerate(own)}
    else:
        names = {id(value): name for model in models for name, value in unwrap(model).named_parameters()}
        parameters = {}
        for value in leaves:
            if id(value) in names:
                add_named(parameters, names[id(value)], value)  # copies of a model have equal names
    if not parameters and leaves and models is None:
        raise ArgumentError(
            "`outputs` must depend on torch.nn.Parameters; got plain tensors that need gradients, which are taken for data. Make "
            "parameters of them: torch.nn.Parameter(tensor)."
        )
    if not parameters:
        raise ArgumentError(
            "`outputs` must depend on trainable parameters; got none in their graph. Check freezing, and that `model` is the one "
            "that made them."
        )
    return Evaluated(outputs, parameters, **options)


def covers(model: Evaluated, losses: torch.Tensor) -> bool:
    """Return whether statistics of the model's parameters give the gradient of the losses that a backward pass would give.

    Not so where other leaves need gradients, where tensors retain theirs or have hooks, or modules, where functions written in
    Python see gradients, where a table wants a sparse gradient, where batch normalisation is frozen for the kernel but not for
    training, and in low precision, in which a scaled loss keeps small gradients that the statistics lose.
    """
    own, nodes = {id(value) for value in model.parameters.values()}, _nodes(losses)
    if observed(nodes):
        return False
    for node in nodes:
        name = operation(node)
        if (
            (hasattr(node, "variable") and id(node.variable) not in own)
            or (name.startswith("Python ") and not written_in(node).startswith("torch.nn.parallel"))  # DistributedDataParallel's
            or getattr(node, "_saved_sparse", False)
            or (name in BATCH_NORMS and node._saved_training)
            or any(metadata.dtype in (torch.float16, torch.bfloat16) for metadata in node._input_metadata)
        ):
            return False
    return True


def _nodes(*outputs: torch.Tensor) -> list[Any]:
    nodes: list[Any] = list(dict.fromkeys(get_gradient_edge(tensor).node for tensor in outputs))
    seen = set(nodes)
    for node in nodes:
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                nodes.append(child)
    return nodes
