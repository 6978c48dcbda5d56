"""The backend's face: layer statistics and gradients of modules and functional models on PyTorch tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from mgs_core import _batch
from mgs_core._errors import ArgumentError, UnsupportedModelError
from mgs_core._known import Known, KnownByOwner
from mgs_core._namespace import register_namespace
from mgs_core._protocol import Convolution, HeadFunction, LayerStatistics, ParameterChoice, Rows
from mgs_core._tree import check_parameters, flatten, select, unflatten
from mgs_core._types import Array, Namespace, Tree
from mgs_core.contraction import contract
from mgs_core.functional import FunctionalModel
from mgs_core.gradient import weighted_gradient
from mgs_core.statistics import merge

from .collect import collect, groups_of_heads, weighted_pulls
from .convolutions import kept_rows
from .evaluated import Evaluated, Models
from .evaluated import covers as _covers
from .evaluated import evaluated as _evaluated
from .fused import refuse_fused
from .fused import twice_differentiable as _twice_differentiable
from .graph import Graph, read_graph
from .namespace import namespace
from .observed import note_observed
from .plan import Plan, make_plan
from .products import differentiated_once, is_capturing, on_host
from .rules import Place, site_of
from .rules.normalisation import frozen_batch_norm
from .run import Configured, as_tensor, gradients_kept, is_distributed, is_freed, is_sharded, recordable, refuse_sharded, unwrap

register_namespace(lambda array: isinstance(array, torch.Tensor), namespace)
note_observed()

_plans: KnownByOwner[Plan] = KnownByOwner()
#: Whether the call is within one of `value_and_gradient`.
_nested: ContextVar[bool] = ContextVar("nested", default=False)


class TorchBackend:
    """Implement `Backend` on PyTorch's autograd graph."""

    name = "torch"
    namespace: Namespace = namespace
    evaluated = staticmethod(_evaluated)
    tensor = staticmethod(as_tensor)
    Configured = Configured
    Models = Models
    Plans = Known  # by the structure of the graph
    twice_differentiable = staticmethod(_twice_differentiable)
    differentiated_once = staticmethod(differentiated_once)

    def asarray(self, value: Any) -> Array:
        """Return the value as a tensor; a tensor keeps its graph."""
        return namespace.asarray(value)

    def to_numpy(self, array: Array) -> Any:
        """Return a NumPy array on the host; low precision comes as float32."""
        array = array.detach()
        return (array.float() if array.dtype == torch.bfloat16 else array).cpu().numpy()

    def parameters(self, model: Any) -> dict[str, Array]:
        """Return the trainable parameters by name."""
        if isinstance(model, Evaluated):
            leaves = dict(model.parameters)
        elif isinstance(model, FunctionalModel):
            leaves = flatten(model.parameters)
        elif isinstance(model, torch.nn.Module | Configured):
            model = unwrap(model.model if isinstance(model, Configured) else model)
            if any(map(is_sharded, model.modules())):
                refuse_sharded()
            leaves = {name: value for name, value in model.named_parameters() if value.requires_grad}
        else:
            raise ArgumentError(
                f"`model` must be a torch.nn.Module or a FunctionalModel; got {type(model).__name__}. Pass the model itself."
            )
        check_parameters(leaves, lambda dtype: isinstance(dtype, torch.dtype) and dtype.is_floating_point)
        for name, value in leaves.items():
            if is_distributed(value):
                raise UnsupportedModelError(
                    f"`model` must hold its parameters whole; got {name!r}, a DTensor, of which each process has a part. Use "
                    "DistributedDataParallel, or choose other parameters and freeze this one."
                )
            if value.is_meta:
                raise ArgumentError(
                    f"`model` must have values; got the parameter {name!r} on the device meta. "
                    "Use model.to_empty(device=…) and load_state_dict."
                )
            if isinstance(model, torch.nn.Module) and not torch.nn.parameter.is_lazy(value) and value.is_inference():
                raise ArgumentError(
                    f"`model` must be made outside of torch.inference_mode(), else no gradient is recorded; got {name!r}, "
                    "made within. Use torch.no_grad() there."
                )
        return leaves

    def statistics(
        self, model: Any, inputs: Any, targets: Any, head: HeadFunction, parameters: ParameterChoice, *, differentiable: bool
    ) -> list[LayerStatistics]:
        """Return the layer statistics, as `Backend.statistics` says."""
        with self._reading(model, inputs, targets, head, parameters, differentiable) as reading:
            found = reading.statistics(range(reading.graph.heads.shape[1]))
        if differentiable and isinstance(model, Evaluated) and any(map(is_freed, model.parameters.values())):
            refuse_sharded()  # the penalty's own backward pass would miss them
        return found

    def summed_kernel(self, model: Any, inputs: Any, targets: Any, head: HeadFunction, parameters: ParameterChoice) -> Array:
        """Return the kernel, summed over the heads, as `Backend` says: of as many at a time as the cache has room for."""
        with self._reading(model, inputs, targets, head, parameters, differentiable=False) as reading, torch.no_grad():
            kernel: Array = None
            for heads in reading.groups():
                found = merge(reading.statistics(heads))
                part = contract(found, found)
                kernel = part if kernel is None else kernel + part
            return kernel

    @contextmanager
    def _reading(
        self, model: Any, inputs: Any, targets: Any, head: HeadFunction, parameters: ParameterChoice, differentiable: bool
    ) -> Iterator[_Reading]:
        """Give the heads' graph, within the modes that reading it needs."""
        leaves = self.parameters(model)
        chosen = select(leaves, parameters)
        with torch.inference_mode(False), torch.enable_grad():
            if isinstance(model, Evaluated):
                evaluated = model
                if model.outputs.shape[0] != _batch.count(inputs):
                    raise ArgumentError("`chunk_size` must be None for outputs that are there already. Leave it out.")
            elif isinstance(model, FunctionalModel):
                sources = _sources(leaves, differentiable)
                leaves = {name: sources[name] if name in chosen else recordable(value) for name, value in leaves.items()}
                inputs = unflatten(inputs, {name: recordable(leaf) for name, leaf in flatten(inputs).items()})
                outputs = model.function(unflatten(model.parameters, leaves), inputs)
                evaluated = Evaluated(outputs, leaves, plans=_plans.of(model.function))
            else:
                settings = model if isinstance(model, Configured) else Configured(model)
                evaluated = Evaluated(settings(inputs), leaves, batch_norm=settings.batch_norm, plans=_plans.of(settings.model))
            outputs = evaluated.outputs
            scalar = isinstance(outputs, torch.Tensor) and outputs.ndim == 0  # which no head takes
            heads = outputs if scalar else head(outputs, _tensors(targets, outputs))
            heads = _heads(heads, outputs, _batch.count(inputs))
            wanted = {name: leaves[name] for name in chosen}
            graph = read_graph(heads, wanted)
            frozen = frozen_batch_norm(graph.nodes) if evaluated.batch_norm == "frozen" else nullcontext()
            with frozen, gradients_kept(graph, model):
                data = {} if isinstance(model, Evaluated) else flatten(inputs)
                plan = _plan(graph, evaluated, data.values()) if graph.nodes else None
                if plan and differentiable:
                    refuse_fused(graph, {use.site for use in plan.uses if site_of(Place(graph, use.site, use.slot)) is None})
                yield _Reading(graph, plan, wanted, evaluated.samples, differentiable)

    def kernel_and_gradient(
        self, model: Evaluated, losses: Array, parameters: ParameterChoice
    ) -> tuple[Array, Callable[[Array], dict[str, Array]]] | None:
        """Return the kernel of the losses (n,), and what gives `Σ_a w_a ∇loss_a` for weights w (n,) from the same statistics.

        None where a backward pass would give more, or the losses do not depend on the chosen parameters.
        """
        if not _covers(model, losses):
            return None
        chosen = select(model.parameters, parameters)
        found = self.statistics(model, model.outputs, None, lambda *_: losses[:, None], None, differentiable=False)
        with torch.no_grad():
            found = [kept_rows(use) or use if isinstance(use, Convolution) else use for use in found]
        seen = merge(use for use in found if use.parameter in chosen)
        if not seen:
            return None

        def gradient(weights: Array) -> dict[str, Array]:
            with torch.no_grad():
                return weighted_gradient(found, weights[:, None])

        return contract(seen, seen), gradient

    def value_and_gradient(self, function: Callable[..., Array]) -> Callable[..., tuple[Array, Tree]]:
        """Return a function that gives the value and the gradient in the first argument."""

        def both(parameters: Tree, *arguments: Any) -> tuple[Array, Tree]:
            nested = _nested.get()
            given = flatten(parameters)
            leaves = _sources(given, nested)
            token = _nested.set(True)
            try:
                with torch.inference_mode(False), torch.enable_grad():
                    value = function(unflatten(parameters, leaves), *arguments)
                    if value.requires_grad:
                        gradients = torch.autograd.grad(
                            value, list(leaves.values()), create_graph=nested, allow_unused=True, materialize_grads=True
                        )
                    else:  # a constant, as a penalty on the outputs of a linear model is
                        gradients = tuple(torch.zeros_like(leaf) for leaf in leaves.values())
            finally:
                _nested.reset(token)
            return value if nested else value.detach(), unflatten(parameters, dict(zip(leaves, gradients, strict=True)))

        return both

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function itself: what a compiled graph holds cannot be seen."""
        return function


@dataclass(frozen=True)
class _Reading:
    """Hold what the statistics of some heads are read from.

    Attributes:
        graph: that of all heads.
        plan: how each parameter is used; None where no parameter moves the heads.
        parameters: the chosen ones by name.
        samples: how many of the samples are wanted; None for all.
        differentiable: keep the graph of the gradients.
    """

    graph: Graph
    plan: Plan | None
    parameters: dict[str, torch.Tensor]
    samples: int | None
    differentiable: bool

    def groups(self) -> list[range]:
        """Return heads that are best read together."""
        return [range(self.graph.heads.shape[1])] if self.plan is None else groups_of_heads(self.graph, self.plan)

    def statistics(self, heads: range) -> list[LayerStatistics]:
        """Return the statistics of these heads."""
        n = self.graph.heads.shape[0]
        samples = n if self.samples is None else min(self.samples, n)
        found = collect(self.graph, self.plan, samples, heads, differentiable=self.differentiable) if self.plan else []
        if found:
            return found
        name, some = next(iter(self.parameters.items()))
        return [Rows(name, torch.zeros((samples, len(heads), 1), dtype=some.dtype, device=some.device))]


def _plan(graph: Graph, evaluated: Evaluated, data: Iterable[Any]) -> Plan:
    plans, key = evaluated.plans, (evaluated.batch_norm, graph.key)  # frozen statistics hide that samples interact
    capturing = not on_host(graph.heads) and is_capturing()
    if (capturing or get_proxy_mode() is not None) and (known := plans.kept(key)) is not None:
        return known
    if capturing:
        raise ArgumentError(
            "`model` must have been used, with the same shapes and criterion, before a graph of the device is captured, for "
            "there are no values then by which to find its samples; got a use that is not known. Take ten steps first; where "
            "values decide which way samples go, a step cannot be captured."
        )

    def find() -> tuple[Plan, bool]:
        tensors = (leaf for leaf in data if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided)
        places = {(leaf.data_ptr(), leaf.numel()) for leaf in tensors if leaf.numel() > 1}
        plan = make_plan(graph, graph.heads.shape[0], lambda edges, weights: weighted_pulls(graph, edges, weights), places)
        return plan, plan.sure

    return plans.of(key, find)


def _sources(values: dict[str, torch.Tensor], connected: bool) -> dict[str, torch.Tensor]:
    """Return tensors to differentiate in: the values where they must stay connected, else leaves of their own.

    Of a value under several names each is a view, so that it has an edge of its own.
    """
    names = Counter(map(id, values.values()))

    def source(value: torch.Tensor) -> torch.Tensor:
        if connected and value.requires_grad:
            return value if names[id(value)] == 1 else value.view_as(value)
        leaf: torch.Tensor = recordable(value).detach().requires_grad_()
        return leaf

    return {name: source(value) for name, value in values.items()}


def _tensors(targets: Any, outputs: torch.Tensor) -> Any:
    """Return targets with tensors for arrays of NumPy, as inputs may be too."""
    if targets is None:
        return None
    found = {name: recordable(torch.as_tensor(leaf, device=outputs.device)) for name, leaf in flatten(targets).items()}
    return unflatten(targets, found)


def _heads(heads: Any, outputs: torch.Tensor, n: int) -> torch.Tensor:
    if not isinstance(heads, torch.Tensor) or heads.ndim != 2 or heads.shape[0] != n:
        got = f"outputs of shape {tuple(outputs.shape)}" if isinstance(heads, torch.Tensor) else type(heads).__name__
        raise ArgumentError(
            f"`model` must return outputs of shape (n, c) with n = {n}, or `output` reduce them so; got {got}. "
            "Keep the samples first and flatten the outputs of each, as `transform=lambda f: f.reshape(len(f), -1)`."
        )
    if heads.is_complex():
        raise ArgumentError(
            f"`model` must return real outputs, or `output` reduce them so; got {heads.dtype}. Take torch.view_as_real of them."
        )
    return heads


backend = TorchBackend()
