"""Run a module and leave it as it was."""

from __future__ import annotations

from typing import Any

import torch

from mgs_core._errors import ArgumentError
from mgs_core._tree import flatten, unflatten


def run_module(module: torch.nn.Module, inputs: Any) -> torch.Tensor:
    """Return the module's outputs; its buffers and the random state stay as they were.

    Args:
        module: called with a tensor, `**dict` or `*sequence`.
        inputs: a tensor, or a dict, list or tuple of arrays.

    Returns:
        The outputs, with their graph.

    Raises:
        ArgumentError: when the module has parameters without a shape yet, or returns no tensor.
    """
    module = unwrap(module)
    if any(torch.nn.parameter.is_lazy(value) for value in module.parameters()):
        raise ArgumentError("`model` must have parameters with shapes; got a lazy module. Run it once on a batch first.")
    inputs = unflatten(inputs, {name: torch.as_tensor(leaf) for name, leaf in flatten(inputs).items()})
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    keywords = inputs if isinstance(inputs, dict) else {}
    arguments = tuple(inputs) if isinstance(inputs, list | tuple) else () if keywords else (inputs,)
    devices = {value.device for value in module.parameters() if value.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        outputs = torch.func.functional_call(module, buffers, arguments, keywords)
    return as_tensor(outputs)


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


def as_tensor(outputs: Any) -> torch.Tensor:
    """Return the tensor of outputs: itself, or the field `logits` that transformers' models give."""
    found = outputs if isinstance(outputs, torch.Tensor) else getattr(outputs, "logits", None)
    if isinstance(found, torch.Tensor):
        return found
    raise ArgumentError(
        f"`model` must return a tensor, or an object with a tensor `logits`; got {type(outputs).__name__}. "
        "Give `select`, a function that takes the tensor out of the outputs."
    )
