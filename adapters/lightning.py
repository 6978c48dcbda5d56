"""Lightning: a callback that measures the kernel during training and logs it. A penalty needs no callback: use `MGSLoss`.

trainer = lightning.Trainer(callbacks=[MGSCallback(probe_x, probe_y, every=100)])
"""

from __future__ import annotations

from typing import Any, Literal

import lightning
from lightning.fabric.utilities import move_data_to_device

from ._callbacks import figures, scheduled
from .torch import MGSMonitor


class MGSCallback(lightning.Callback):  # type: ignore[misc]  # no types where it is not installed
    """Measure the kernel of a probe batch on schedule and log its summary by the module's own `log_dict`.

    Attributes:
        monitor: the `MGSMonitor`, from the start of training on.

    Example:
        >>> import torch
        >>> from mgs_core.adapters.lightning import MGSCallback
        >>> callback = MGSCallback(torch.ones(8, 4), every=50)
    """

    def __init__(self, inputs: Any, targets: Any = None, *, unit: Literal["step", "epoch"] = "step", **options: Any) -> None:
        """Hold the probe batch and the schedule.

        Args:
            inputs: probe batch, as for `MGSMonitor`.
            targets: its targets, if the head needs them.
            unit: what the schedule counts: optimizer steps or epochs, from 0; each epoch by default.
            **options: passed to `MGSMonitor`: `every`, `labels`, `sinks`, `select`, `output`, …

        Raises:
            ArgumentError: when the unit is neither.
        """
        options = scheduled(unit, options)
        self.monitor: MGSMonitor | None = None
        self._batch, self._unit, self._options = (inputs, targets), unit, options
        self._last = 0

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Move the probe batch to the module's device and precision."""
        # not by the module's own hook, which knows its batches
        inputs, targets = (move_data_to_device(part, pl_module.device) for part in self._batch)
        self.monitor = MGSMonitor(pl_module, trainer.precision_plugin.convert_input(inputs), targets, **self._options)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Keep the number of optimizer steps that have been taken, by a resumed run as well."""
        self._last = trainer.global_step

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        """Measure if an optimizer step has been taken and it is due."""
        if self._unit == "step" and trainer.global_step != self._last:
            self._last = trainer.global_step
            self._measure(pl_module, trainer.global_step)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure if it is due."""
        if self._unit == "epoch":
            self._measure(pl_module, trainer.current_epoch)

    def _measure(self, module: lightning.LightningModule, number: int) -> None:
        if self.monitor is not None and self.monitor.step(number) is not None:
            module.log_dict(figures(self.monitor.history[-1]))
