"""Run a module and leave it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from threading import RLock
from typing import Any, Literal, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch.autograd.function import BackwardCFunction

from mgs_core._errors import ArgumentError, UnsupportedModelError
from mgs_core._tree import flatten, unflatten

from .graph import Graph
from .namespace import namespace
from .products import is_capturing, on_host

BatchNorm = Literal["refuse", "frozen"]
_RECURRENT = (torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU)
_lock = RLock()
#: One for each module, for threads that evaluate others may wait for one another.
_locks: WeakKeyDictionary[torch.nn.Module, Any] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Configured:
    """Hold a module with options that `mgs_core.kernel` has no argument for; takes the module's place there.

    Attributes:
        model: the module.
        select: takes the outputs' tensor out of what the module returns; by default the tensor itself, or its `logits`.
        batch_norm: "refuse" raises where batch normalisation mixes the samples; "frozen" takes the statistics of the batch for
            constants of the per-sample gradients.

    Raises:
        ArgumentError: when one of them is something else.

    Example:
        >>> import torch
        >>> import mgs_core as mgs
        >>> from mgs_core.adapters.torch import Configured
        >>> lstm = torch.nn.LSTM(3, 4, batch_first=True)
        >>> last = Configured(lstm, select=lambda outputs: outputs[0][:, -1])
        >>> mgs.kernel(last, torch.ones(2, 5, 3)).shape
        torch.Size([2, 2])
    """

    model: torch.nn.Module
    select: Callable[[Any], torch.Tensor] | None = None
    batch_norm: BatchNorm = "refuse"

    def __post_init__(self) -> None:
        """Refuse what is none of these."""
        if not isinstance(self.model, torch.nn.Module):
            raise ArgumentError(f"`model` must be a torch.nn.Module; got {type(self.model).__name__}. Pass the module itself.")
        if not (self.select is None or callable(self.select)):
            raise ArgumentError(f"`select` must be a function of what the model returns; got {self.select!r}.")
        if self.batch_norm not in ("refuse", "frozen"):
            raise ArgumentError(f'`batch_norm` must be "refuse" or "frozen"; got {self.batch_norm!r}.')

    def __call__(self, inputs: Any) -> torch.Tensor:
        """Run the module and return its outputs; the module is left as it was."""
        outputs = run_module(self.model, inputs)
        return as_tensor(outputs if self.select is None else self.select(outputs))


def run_module(module: torch.nn.Module, inputs: Any) -> Any:
    """Return what the module returns; its buffers and the random state stay as they were.

    Args:
        module: called with a tensor, `**dict` or `*sequence`.
        inputs: a tensor, or a dict, list or tuple of arrays.

    Returns:
        The outputs, with their graph.

    Raises:
        ArgumentError: when the module has parameters without a shape yet, or the inputs are not finite.
    """
    module = unwrap(module)
    parameters = list(module.parameters())
    if any(torch.nn.parameter.is_lazy(value) for value in parameters):
        raise ArgumentError("`model` must have parameters with shapes; got a lazy module. Run it once on a batch first.")
    leaves = {name: namespace.asarray(leaf) for name, leaf in flatten(inputs, "inputs").items()}
    leaves = {name: recordable(leaf) for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        # on the host only, for elsewhere a look at the values would wait for the device
        if on_host(leaf) and leaf.is_floating_point() and not _finite(leaf):
            raise ArgumentError(f"`{name}` must be finite; got NaN or infinity. Remove or replace these values.")
    inputs = unflatten(inputs, leaves, "inputs")
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    keywords = inputs if isinstance(inputs, dict) else {}
    arguments = tuple(inputs) if isinstance(inputs, list | tuple) else () if keywords else (inputs,)
    devices = {value.device for value in parameters if value.device.type == "cuda"}
    with _kept_random_state(devices), _uncompiled(module), _recurrent_gradients(module) if devices else nullcontext():
        if not buffers:  # only they need the detour, which takes 0.1 ms
            return module(*arguments, **keywords)
        # it puts others in their place meanwhile, which another thread would take for the module's own
        with _locks.setdefault(module, RLock()):
            return torch.func.functional_call(module, buffers, arguments, keywords)


@contextmanager
def _uncompiled(module: torch.nn.Module) -> Iterator[None]:
    """Let modules that are compiled, within this one, run as they were written: a compiled graph hides what it does."""
    compiled = any(part._compiled_call_impl is not None or "_orig_mod" in part._modules for part in module.modules())
    if not compiled or torch.compiler.is_compiling():
        yield
        return
    with _lock, torch.compiler.set_stance("force_eager"):  # the stance is the process', and two that overlap would leave it so
        yield


@contextmanager
def gradients_kept(graph: Graph, model: Any) -> Iterator[None]:
    """Refuse a module whose backward pass gives its parameters gradients, which no graph shows; those that they have are kept.

    Args:
        graph: of its outputs.
        model: the module, or a `Configured` one; others are passed over.

    Yields:
        Nothing.

    Raises:
        UnsupportedModelError: when a parameter has got a gradient.
    """
    module = model.model if isinstance(model, Configured) else model
    own = any(isinstance(node, BackwardCFunction) for node in graph.nodes)  # which may do as it likes
    held = [(value, value.grad) for value in module.parameters()] if own and isinstance(module, torch.nn.Module) else []
    for value, _ in held:
        value.grad = None
    try:
        yield
    finally:
        touched = any(value.grad is not None for value, _ in held)
        for value, gradient in held:
            value.grad = gradient
    if touched:
        raise UnsupportedModelError(
            "`model` must show its parameters in the autograd graph; got a torch.autograd.Function that calls `backward` itself, "
            "as those of reversible networks do. Use the form of the model that keeps what its layers return."
        )


@contextmanager
def _kept_random_state(devices: set[torch.device]) -> Iterator[None]:
    """Leave the random state as it was; while a graph of the device is captured, there is none."""
    if devices and is_capturing():
        yield
        return
    with torch.random.fork_rng(devices):
        yield


@contextmanager
def _recurrent_gradients(module: torch.nn.Module) -> Iterator[None]:
    """Let recurrent layers be evaluated such that there is a gradient: cuDNN has one in training mode alone.

    Without dropout, their training mode is their evaluation mode. Classes derived from them, and hooks, may read the mode for
    purposes of their own: there PyTorch's refusal stays.
    """
    with _lock:  # else one thread takes for a layer's own what another has set
        layers: list[Any] = [
            layer
            for layer in module.modules()
            if type(layer) in _RECURRENT and not layer.training and not (layer._forward_hooks or layer._forward_pre_hooks)
        ]
        dropouts = [layer.dropout for layer in layers]
        try:
            for layer in layers:
                layer.training, layer.dropout = True, 0.0
            yield
        finally:
            for layer, dropout in zip(layers, dropouts, strict=True):
                layer.training, layer.dropout = False, dropout


def recordable(value: Any) -> Any:
    """Return the value; a copy of what was made in inference mode, which no graph may keep."""
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value


def _finite(values: torch.Tensor) -> bool:
    """Return whether all values are finite: their sum is, unless it overflows."""
    values = values.detach()
    if values.layout != torch.strided:
        values = values.coalesce().values() if values.is_sparse else values.values()
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module below torch.compile and data parallelism."""
    while True:
        if isinstance(module, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
            below = module.module
        else:
            below = getattr(module, "_orig_mod", None)
        if not isinstance(below, torch.nn.Module):
            return module
        module = below


def is_sharded(owner: object) -> bool:
    """Return whether this is a module, or what its hooks belong to, of either form of FSDP; told without its import."""
    # not kept by class: a parametrised module has a class of its own, which holds it
    return any(kind.__module__.startswith("torch.distributed.fsdp") for kind in type(owner).__mro__)


def is_distributed(tensor: object) -> bool:
    """Return whether this is a DTensor, of which each process holds a part; told without its import."""
    return any(kind.__module__.startswith("torch.distributed.tensor") for kind in type(tensor).__mro__)


def is_freed(value: torch.Tensor) -> bool:
    """Return whether a parameter has lost its memory, as FSDP takes it from one after a backward pass."""
    return type(value) is torch.nn.Parameter and value.numel() > 0 and value.untyped_storage().size() == 0


def refuse_sharded() -> NoReturn:
    """Refuse parameters that are not there between two layers."""
    raise UnsupportedModelError(
        "`model` must hold its parameters whole; got one whose parameters FSDP shards, and frees during a backward pass. "
        "Use DistributedDataParallel."
    )


def as_tensor(outputs: Any) -> torch.Tensor:
    """Return the tensor of outputs: itself, or the field `logits` that transformers' models give."""
    found = outputs if isinstance(outputs, torch.Tensor) else getattr(outputs, "logits", None)
    if isinstance(found, torch.Tensor):
        return found
    raise ArgumentError(
        f"`model` must return a tensor, or an object with a tensor `logits`; got {type(outputs).__name__}. "
        "Give `select`, a function that takes the tensor out of the outputs; a criterion takes several as arguments of their own."
    )
