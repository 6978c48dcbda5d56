"""Hugging Face transformers: a callback that logs the kernel, and a mixin that gives a `Trainer` the penalised loss.

    class PenalisedTrainer(MGSTrainerMixin, transformers.Trainer): pass
    trainer = PenalisedTrainer(model, arguments, train_dataset=data, mgs_loss=MGSLoss(torch.nn.CrossEntropyLoss(), penalty=…))
    trainer.add_callback(MGSCallback(trainer, probe, every=100))

The loss is that of the criterion, of logits and labels, instead of the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
import transformers

import mgs_core as mgs

from ._callbacks import Counter, figures
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
            targets: its targets; where there are none, the labels are, for "target" and the usual loss.
            unit: what the schedule counts: optimizer steps, or epochs from 0.
            **options: passed to `MGSMonitor`: `every`, by default 100 steps or each epoch, `labels`, `sinks`, to which the first
                process writes, `select`, `output`, …, and `prefix`, by which two callbacks are told apart.

        Raises:
            ArgumentError: when the unit is neither, or the schedule is none.
        """
        self._trainer, self._counter = trainer, Counter(unit, targets, options)
        options = self._counter.options(first=trainer.is_world_process_zero())
        inputs, targets = (_to_device(part, trainer.args.device) for part in (inputs, self._counter.targets))
        self.monitor = MGSMonitor(trainer.model, inputs, targets, **options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Take the model, which `model_init` may have made anew, and count on from where a resumed run was."""
        self.monitor.model = self._trainer.model
        self._counter.begin(state.global_step if self._counter.unit == "step" else math.floor(state.epoch or 0) - 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Measure if it is due."""
        self._measure("step", state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Measure if it is due."""
        self._measure("epoch", math.ceil(state.epoch) - 1)

    def _measure(self, unit: str, number: int) -> None:
        if self._counter.due(unit, number):
            self.monitor.step(number)
            control = self._trainer.control
            due = control.should_log  # which `log` takes back, and then the trainer's own figures would be lost
            self._trainer.log(figures(self.monitor.history[-1]))
            control.should_log = due


class MGSTrainerMixin:
    """Give a `transformers.Trainer` an `MGSLoss`; list it before the trainer's class.

    The loss is `mgs_loss(logits, labels)`, instead of the model's own, and instead of what that has besides, as the loss of a
    router among experts. An encoder-decoder gets the labels moved by one for its decoder, as by its own loss.

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
        trainer: Any = self
        names = trainer.args.label_names or ["labels"]
        names = ["labels"] if "labels" in names and "labels" in inputs else names
        if len(names) != 1 or names[0] not in inputs:
            raise mgs.ArgumentError(
                f"`inputs` must have one column of labels for `mgs_loss`; got {sorted(inputs)}. Name it by label_names=[…] in "
                "the TrainingArguments, without which the trainer drops what the model does not take."
            )
        given = dict(inputs)
        labels = given.pop(names[0])
        shift = getattr(trainer.model, "prepare_decoder_input_ids_from_labels", None)
        if shift is not None and not {"decoder_input_ids", "decoder_inputs_embeds"} & given.keys():
            given["decoder_input_ids"] = shift(labels=labels)
        fused = self.mgs_loss.penalty is None or not model.training or labels.device.type == "cpu"
        with nullcontext() if fused else twice_differentiable(recurrent=False):
            outputs = model(**given)
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
    logits = logits if logits.dtype == torch.float64 else logits.float()  # as the models' own losses do
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    return losses * (targets.numel() / (targets != -100).sum().clamp(min=1))


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):  # such as a tokenizer's BatchEncoding
        return {name: _to_device(value, device) for name, value in batch.items()}
    return batch.to(device) if isinstance(batch, torch.Tensor) else batch
