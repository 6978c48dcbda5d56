"""Hugging Face transformers: a callback that logs the kernel, and a mixin that gives a `Trainer` the penalised loss.

class PenalisedTrainer(MGSTrainerMixin, transformers.Trainer): pass
trainer = PenalisedTrainer(model, arguments, train_dataset=data, mgs_loss=MGSLoss(torch.nn.CrossEntropyLoss(), penalty=…))
trainer.add_callback(MGSCallback(trainer, probe, every=100))
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
import transformers

import mgs_core as mgs

from ._callbacks import figures, scheduled
from .torch import MGSLoss, MGSMonitor, twice_differentiable


class MGSCallback(transformers.TrainerCallback):  # type: ignore[misc]  # no types where it is not installed
    """Measure the kernel of a probe batch on schedule and log its summary through the trainer.

    Attributes:
        monitor: the `MGSMonitor`.

    Example:
        >>> import torch
        >>> import transformers
        >>> from mgs_core.adapters.huggingface import MGSCallback
        >>> issubclass(MGSCallback, transformers.TrainerCallback)
        True
    """

    def __init__(
        self,
        trainer: Any,
        inputs: Any,
        targets: Any = None,
        *,
        unit: Literal["step", "epoch"] = "step",
        **options: Any,
    ) -> None:
        """Hold the trainer, the probe batch and the schedule.

        Args:
            trainer: the `transformers.Trainer`, whose `log` is used.
            inputs: probe batch for `model(**inputs)`, without labels.
            targets: its targets, if the head needs them.
            unit: what the schedule counts: optimizer steps, or epochs from 0; each epoch by default.
            **options: passed to `MGSMonitor`: `every`, `labels`, `sinks`, `select`, `output`, …

        Raises:
            ArgumentError: when the unit is neither.
        """
        options = scheduled(unit, options)
        device = trainer.args.device
        inputs, targets = (_to_device(part, device) for part in (inputs, targets))
        self.monitor = MGSMonitor(trainer.model, inputs, targets, **options)
        self._trainer, self._unit = trainer, unit

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Measure if it is due."""
        if self._unit == "step":
            self._measure(state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Measure if it is due."""
        if self._unit == "epoch":
            self._measure(round(state.epoch) - 1)

    def _measure(self, number: int) -> None:
        if self.monitor.step(number) is not None:
            self._trainer.log(figures(self.monitor.history[-1]))


class MGSTrainerMixin:
    """Give a `transformers.Trainer` an `MGSLoss`; list it before the trainer's class.

    The loss is `mgs_loss(logits, labels)`, instead of the model's own.

    Example:
        >>> import transformers
        >>> from mgs_core.adapters.huggingface import MGSTrainerMixin
        >>> class PenalisedTrainer(MGSTrainerMixin, transformers.Trainer):
        ...     pass
    """

    def __init__(self, *arguments: Any, mgs_loss: MGSLoss, **keywords: Any) -> None:
        """Make the trainer.

        Args:
            *arguments: passed to the trainer.
            mgs_loss: takes the logits and the labels.
            **keywords: passed to the trainer.

        Raises:
            ArgumentError: when the trainer is told of a loss of its own, or `mgs_loss` is not an MGSLoss.
        """
        super().__init__(*arguments, **keywords)
        trainer: Any = self
        if trainer.args.label_smoothing_factor or trainer.compute_loss_func is not None:
            raise mgs.ArgumentError(
                "`label_smoothing_factor` and `compute_loss_func` must be left out, for `mgs_loss` takes their place; got one of "
                "them. Put them into its criterion: CrossEntropyLoss(label_smoothing=…)."
            )
        if not isinstance(mgs_loss, MGSLoss):
            raise mgs.ArgumentError(f"`mgs_loss` must be an MGSLoss; got {mgs_loss!r}. Wrap it: MGSLoss(…, penalty=…).")
        self.mgs_loss = mgs_loss.to(trainer.args.device)  # with the criterion's weights
        self.model_accepts_loss_kwargs = False  # so that the trainer divides by the steps that it accumulates

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss, and the outputs if asked for."""
        if "labels" not in inputs:
            raise mgs.ArgumentError(
                f"`inputs` must have labels for `mgs_loss`; got {sorted(inputs)}. Name that column labels; and where the model "
                "takes none, set remove_unused_columns=False, or the trainer drops it."
            )
        labels = inputs["labels"]
        fused = self.mgs_loss.penalty is None or not model.training or labels.device.type == "cpu"
        with nullcontext() if fused else twice_differentiable(recurrent=False):
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        self.mgs_loss.train(model.training)
        loss = self.mgs_loss(outputs, labels)
        if not isinstance(outputs, Mapping):  # the trainer takes the first of what it returns for the loss
            outputs = (loss, *(outputs if isinstance(outputs, tuple) else (outputs,)))
        return (loss, outputs) if return_outputs else loss


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each next token, unreduced: the criterion of a causal language model.

    Args:
        logits: (n, s, vocabulary).
        labels: the tokens, (n, s); -100 where there is nothing to predict.

    Returns:
        Losses, (n, s - 1), divided by the mean share of tokens to predict, so that their mean is that over such tokens.

    Example:
        >>> import torch
        >>> from mgs_core.adapters.huggingface import next_token_loss
        >>> next_token_loss(torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], [3, 0, -100]])).round(decimals=2)
        tensor([[1.8500, 1.8500],
                [1.8500, 0.0000]])
    """
    targets = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    return losses / (targets != -100).to(losses.dtype).mean()


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):  # such as a tokenizer's BatchEncoding
        return {name: _to_device(value, device) for name, value in batch.items()}
    return batch.to(device) if isinstance(batch, torch.Tensor) else batch
