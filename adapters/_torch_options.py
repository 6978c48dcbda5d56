"""The options of `MGSLoss`: refused as it is made, not at the first step."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch

import mgs_core as mgs
from mgs_core.heads import Output as Output
from mgs_core.heads import Transform as Transform
from mgs_core.kernel import check_options as check_kernel_options

#: What PyTorch's losses leave out, and the head "target" too.
_IGNORED = -100


def check_options(
    *,
    criterion: Any,
    penalty: Any,
    weighting: Any,
    output: Any,
    transform: Any,
    probes: Any,
    every: Any,
    max_samples: Any,
    batch_norm: Any,
    model: Any,
    parameters: Any,
    select: Any,
) -> tuple[int, int | None, Any]:
    """Refuse options that are out of range; return `every` and `max_samples` as integers of Python, and `parameters`."""
    every = mgs.Schedule(every).every  # as an int, or refused
    if max_samples is not None:
        if isinstance(max_samples, bool) or not isinstance(max_samples, Integral) or max_samples < 1:
            raise mgs.ArgumentError(f"`max_samples` must be an integer of at least 1; got {max_samples!r}.")
        max_samples = int(max_samples)
    if weighting not in (None, "agreement"):
        raise mgs.ArgumentError(f'`weighting` must be "agreement" or None; got {weighting!r}.')
    if output == "loss" and transform != "identity":
        raise mgs.ArgumentError(
            f'`transform` must be "identity" for output="loss"; got {transform!r}. The criterion has its own.'
        )
    if not callable(criterion) or isinstance(criterion, type):
        raise mgs.ArgumentError(f"`criterion` must be callable as criterion(outputs, targets); got {criterion!r}.")
    if not isinstance(model, torch.nn.Module | None):
        raise mgs.ArgumentError(f"`model` must be a torch.nn.Module; got {type(model).__name__}.")
    if not (penalty is None or callable(penalty)):
        raise mgs.ArgumentError(
            f'`penalty` must be a mgs_core.Penalty; got {penalty!r}. Make one: mgs_core.Penalty("trace", strength=3e-3).'
        )
    backend: Any = mgs.get_backend("torch")
    backend.Configured(torch.nn.Identity(), select, batch_norm)  # refuses them
    # labels of one sample stand in for the targets that are to come
    given = {"output": output, "transform": transform, "probes": probes, "parameters": parameters}
    parameters = check_kernel_options(given, torch.zeros(1, dtype=torch.int64))["parameters"]
    if model is None and not (parameters is None or callable(parameters)):
        raise mgs.ArgumentError(
            f"`model` must be given for parameters to have names; got None and {parameters!r}. Pass the module."
        )
    if output == "full" and penalty is not None:
        raise mgs.ArgumentError('`output` must be a head with one kernel for a penalty; got "full". Use "trace", its sum.')
    return every, max_samples, parameters


def labels_of(criterion: Any, targets: Any) -> Any:
    """Return the targets; what the criterion ignores among labels as the head "target" knows it."""
    ignored = getattr(criterion, "ignore_index", _IGNORED)
    known = not isinstance(ignored, int) or ignored == _IGNORED
    if known or not isinstance(targets, torch.Tensor) or targets.is_floating_point() or targets.numel() != len(targets):
        return targets
    return torch.where(targets == ignored, _IGNORED, targets.to(torch.int64))
