"""Lightning: a callback that measures the kernel during training and logs it.

    trainer = lightning.Trainer(callbacks=[MGSCallback(probe_x, probe_y, every=100)])

A penalty needs no callback: use `MGSLoss`.
"""

from __future__ import annotations

from typing import Any, Literal

import lightning
from lightning.fabric.utilities import move_data_to_device

from ._callbacks import Counter, figures
from .torch import MGSMonitor


class MGSCallback(lightning.Callback):  # type: ignore[misc]  # no types where it is not installed
    """Measure the kernel of a probe batch on schedule; its summary goes to the loggers, and to `trainer.callback_metrics`.

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
            inputs: probe batch, as for `MGSMonitor`; hooks of the module that change batches do not see it.
            targets: its targets; where there are none, the labels are, for "target" and the usual loss.
            unit: what the schedule counts: optimizer steps, or epochs from 0.
            **options: passed to `MGSMonitor`: `every`, by default 100 steps or each epoch, `labels`, `sinks`, to which the first
                process writes, `select`, `output`, …, and `prefix`, by which two callbacks are told apart.

        Raises:
            ArgumentError: when the unit is neither, or the schedule is none.
        """
        self.monitor: MGSMonitor | None = None
        self._inputs, self._counter = inputs, Counter(unit, targets, options)

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Move the probe batch to the module's device and precision; keep the records of an earlier fit."""
        # not by the module's own hook, which knows its batches
        inputs, targets = (move_data_to_device(part, pl_module.device) for part in (self._inputs, self._counter.targets))
        options = self._counter.options(first=trainer.is_global_zero)
        monitor = MGSMonitor(pl_module, trainer.precision_plugin.convert_input(inputs), targets, **options)
        monitor.history.extend([] if self.monitor is None else self.monitor.history)
        self.monitor = monitor

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Count on from the steps, or epochs, that have been taken, by a resumed run as well."""
        self._counter.begin(trainer.global_step if self._counter.unit == "step" else trainer.current_epoch - 1)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        """Measure if an optimizer step has been taken and it is due."""
        if self._counter.due("step", trainer.global_step):
            self._measure(trainer, pl_module, trainer.global_step)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure if it is due."""
        if self._counter.due("epoch", trainer.current_epoch):
            self._measure(trainer, pl_module, trainer.current_epoch)

    def _measure(self, trainer: lightning.Trainer, module: lightning.LightningModule, number: int) -> None:
        if self.monitor is None:
            return
        self.monitor.step(number)
        found = figures(self.monitor.history[-1])
        module.log_dict(found, logger=False)
        # at once, whatever `log_every_n_steps`, and by Lightning's own number of the row: that of the last batch
        row = trainer.fit_loop.epoch_loop._batches_that_stepped - (self._counter.unit == "epoch")
        for logger in trainer.loggers:
            logger.log_metrics({**found, "epoch": trainer.current_epoch}, step=row)
