"""The monitor of PyTorch modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import index
from typing import Any

import torch

import mgs_core as mgs

_backend: Any = mgs.get_backend("torch")


class MGSMonitor:
    """Measure the kernel of a probe batch during training.

    The model is measured in evaluation mode and left as it was: modes, gradients, buffers and random state.

    Attributes:
        model: the module that is measured; another may take its place.
        history: the records, as of `mgs_core.Recorder`.

    Example:
        >>> import torch
        >>> from mgs_core.adapters.torch import MGSMonitor
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> monitor = MGSMonitor(model, torch.eye(2), every=2)
        >>> for _ in range(4):
        ...     summary = monitor.step()
        >>> [(record["step"], record["mgs_trace"]) for record in monitor.history]
        [(0, 2.0), (2, 2.0)]
    """

    def __init__(
        self,
        model: torch.nn.Module,
        inputs: Any,
        targets: Any = None,
        *,
        labels: Any = None,
        every: mgs.Schedule | int = 100,
        sinks: Iterable[Any] = (),
        select: Callable[[Any], torch.Tensor] | None = None,
        **kernel_options: Any,
    ) -> None:
        """Hold the model and the probe batch.

        Args:
            model: the module that is trained.
            inputs: probe batch: a tensor; a dict for `model(**inputs)`; a list or tuple for `model(*inputs)`, as `(a_dict,)`.
            targets: its targets; where there are none, the labels are, for "target" and the usual loss.
            labels: integers (n,) for the class-wise summaries.
            every: calls of `step` between measurements, or a `mgs_core.Schedule`; a call may stand for a step or an epoch.
            sinks: where records go besides `history`.
            select: takes the outputs' tensor out of what the model returns.
            **kernel_options: passed to `mgs_core.kernel`: `output`, `transform`, `parameters`, `chunk_size`, …
        """
        self.model, self._select = model, select
        _backend.Configured(model, select=select)  # refused now, if at all
        self._schedule = every if isinstance(every, mgs.Schedule) else mgs.Schedule(every)
        self._recorder = mgs.Recorder(inputs, targets, labels=labels, schedule=self._schedule, sinks=sinks, **kernel_options)
        self._next = 0

    @property
    def history(self) -> list[dict[str, Any]]:
        """Return the records so far."""
        return self._recorder.history

    def step(self, number: int | None = None, **extra: Any) -> mgs.Summary | None:
        """Count a step and measure if it is due.

        Args:
            number: the step's number; None counts on from the last.
            **extra: further entries of the record, for instance the loss.

        Returns:
            The summary, or None when no measurement is due.

        Raises:
            ArgumentError: when the number is no integer.
        """
        try:
            number = self._next if number is None else index(number)
        except TypeError:
            raise mgs.ArgumentError(f"`number` must be an integer; got {number!r}. Count steps or epochs.") from None
        self._next = number + 1
        if not self._schedule(number):
            return None
        with _evaluation_mode(self.model):
            return self._recorder(_backend.Configured(self.model, select=self._select), number, **extra)


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        try:
            model.eval()
        except NotImplementedError as error:  # of torch.export
            raise mgs.UnsupportedModelError(
                f"`model` must have an evaluation mode; got {type(model).__name__} ({error}). Monitor the module it was made of."
            ) from error
        yield
    finally:
        for module, mode in modes:
            module.training = mode
