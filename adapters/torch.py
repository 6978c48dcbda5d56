"""PyTorch: a loss that penalises or weights by the kernel, and a monitor.

    criterion = MGSLoss(torch.nn.CrossEntropyLoss(), penalty=mgs.Penalty("trace", 5e-3))
    loss = criterion(model(x), y)
    loss.backward()

The outputs' graph is all they need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

import mgs_core as mgs

from ._torch_criterion import Evaluation, Parts
from ._torch_monitor import MGSMonitor
from ._torch_options import Output, Transform, check_options, labels_of

__all__ = ["Configured", "LossRecord", "MGSLoss", "MGSMonitor", "twice_differentiable"]

_backend: Any = mgs.get_backend("torch")
Configured = _backend.Configured
twice_differentiable = _backend.twice_differentiable


@dataclass(frozen=True)
class LossRecord:
    """Hold the parts of one value of `MGSLoss`, detached and where they were computed.

    Attributes:
        total: the value.
        criterion: the part of the criterion alone, weighted as it entered.
        penalty: the part of the penalty, the factor `every` included; None on steps without.
        kernel: the kernel that was penalised, or else weighted by; None on steps without.
        weights: the weights of the samples, (n,); None without weighting.
    """

    total: torch.Tensor
    criterion: torch.Tensor
    penalty: torch.Tensor | None = None
    kernel: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    @cached_property
    def summary(self) -> mgs.Summary | None:
        """Return the kernel's summary, computed now."""
        return None if self.kernel is None else mgs.summarize(self.kernel)


class MGSLoss(torch.nn.Module):
    """Add a penalty on the kernel to a criterion, or weight its samples by their agreement, or both.

    The value is `criterion + strength · R(K)`, with the kernel K of the batch's per-sample gradients in the parameters that the
    outputs, and the criterion's other arguments, depend on. With `weighting="agreement"` the criterion is `mean(w · loss)` with
    `w = agreement_weights(K_loss)`.
    In evaluation mode, and where gradients are off, it is the criterion alone.

    Attributes:
        last: the `LossRecord` of the last call.

    Cost:
        A penalty takes about three to four plain steps (second derivatives); `every=k` spreads it. Weighting takes the gradient
        from the statistics that gave the kernel, so that a step costs little more than a plain one.

    Example:
        >>> import torch
        >>> import mgs_core as mgs
        >>> from mgs_core.adapters.torch import MGSLoss
        >>> model = torch.nn.Linear(4, 3)
        >>> criterion = MGSLoss(torch.nn.CrossEntropyLoss(), penalty=mgs.Penalty("trace", 5e-3))
        >>> loss = criterion(model(torch.ones(2, 4)), torch.tensor([0, 2]))
        >>> loss.backward()
        >>> bool(criterion.last.total == criterion.last.criterion + criterion.last.penalty)
        True
    """

    def __init__(
        self,
        criterion: Any,
        *,
        penalty: mgs.Penalty | None = None,
        weighting: Literal["agreement"] | None = None,
        output: Output = "loss",
        transform: Transform = "identity",
        probes: int = 1,
        every: int = 1,
        max_samples: int | None = None,
        batch_norm: Literal["refuse", "frozen"] = "refuse",
        model: torch.nn.Module | None = None,
        parameters: Any = None,
        select: Callable[[Any], torch.Tensor] | None = None,
        reuse: bool = True,
    ) -> None:
        """Hold the criterion and the options.

        Args:
            criterion: a loss module or function with an attribute or argument `reduction`, or a callable
                `(outputs, targets) → (n, …)` without reduction. Its value enters as it is. Where each sample's part in it is
                needed, it is called a second time, unreduced, with the same random numbers and with copies of its buffers.
            penalty: what to add; None adds nothing.
            weighting: "agreement" or None.
            output: the head whose kernel is penalised, as for `mgs_core.kernel`. Agreement always uses the losses. For "target"
                labels that are the criterion's `ignore_index` have no gradient.
            transform: applied to the outputs before that head, as for `mgs_core.kernel`.
            probes: of `output="random"`; drawn anew for each call.
            every: penalise every k-th call, k times as strongly.
            max_samples: the penalised kernel is that of the first so many samples of each batch; None for all. Bounds the cost.
            batch_norm: "refuse" raises where batch normalisation mixes the samples; "frozen" takes the statistics of the batch
                for constants of the per-sample gradients, as the kernel of a model that trains with it needs.
            model: names the parameters and leaves out others; not kept alive. A deep copy of the criterion knows its copy too.
            parameters: as for `mgs_core.kernel`; names need `model`.
            select: takes the outputs' tensor out of what the model returns; by default the tensor itself, or its `logits`.
            reuse: take the gradient of a step that is weighted but not penalised from the statistics of the kernel. Parameters
                get it as always; intermediate tensors do not, nor can it be differentiated again. False takes another backward
                pass, as do models with hooks on tensors and others (docs/torch.md).

        Raises:
            ArgumentError: when an option is out of range.
        """
        super().__init__()
        every, max_samples, parameters = check_options(
            criterion=criterion, penalty=penalty, weighting=weighting, output=output, transform=transform, probes=probes,
            every=every, max_samples=max_samples, batch_norm=batch_norm, model=model, parameters=parameters,
            select=select,
        )  # fmt: skip
        self.criterion = criterion
        self.penalty, self.weighting, self.every, self.max_samples = penalty, weighting, every, max_samples
        self.last: LossRecord | None = None
        self._head: dict[str, Any] = {"output": output, "transform": transform, "probes": probes}
        self._parts = Parts()
        self._graph: dict[str, Any] = {"batch_norm": batch_norm, "plans": _backend.Plans()}
        self._models = None if model is None else _backend.Models(model)
        self._chosen = parameters
        self._select = select
        self._reuse = reuse
        self._calls = 0

    def extra_repr(self) -> str:
        """Return the options that are set, for `print`."""
        shown = {"penalty": self.penalty, "weighting": self.weighting, **self._head, "max_samples": self.max_samples}
        given = [f"{name}={value!r}" for name, value in shown.items() if value is not None]
        return ", ".join([*given, f"every={self.every}"])

    def forward(self, outputs: Any, *arguments: Any, sample_weight: torch.Tensor | None = None, **keywords: Any) -> torch.Tensor:
        """Return the loss.

        Args:
            outputs: what the model returned, samples first.
            *arguments: the targets, and whatever else the criterion takes.
            sample_weight: factors on the samples' losses, (n,).
            **keywords: passed to the criterion.

        Returns:
            A scalar.

        Raises:
            ArgumentError: when each sample's part of the criterion is needed and it gives none, or one whose sum is not a
                constant times its value; or when the outputs have no graph.
        """
        outputs = _backend.tensor(outputs if self._select is None else self._select(outputs))
        active = self.training and torch.is_grad_enabled()
        due = self.penalty if active and self._calls % self.every == 0 else None
        weighted = active and self.weighting is not None
        each = weighted or sample_weight is not None or (due is not None and self._head["output"] == "loss")
        whole = not weighted and sample_weight is None
        found = self._parts.evaluate(self.criterion, outputs, arguments, keywords, each=each, whole=whole)
        if sample_weight is not None and found.losses is not None:
            shape = tuple(getattr(sample_weight, "shape", ()))
            if shape != found.losses.shape:
                got = f"shape {shape}" if shape else type(sample_weight).__name__
                raise mgs.ArgumentError(f"`sample_weight` must be a tensor of shape ({len(found.losses)},); got {got}.")
            found = found.weighted(sample_weight)
        penalty = kernel = weights = None
        try:
            value, penalty, kernel, weights = self._regularise(due, weighted, outputs, arguments, keywords, found)
        except mgs.ArgumentError:
            value = found.value if whole or found.losses is None else found.reduce(found.losses)
            if bool(torch.isfinite(value)):
                raise  # what has no finite value has no kernel; it is passed on, so that a GradScaler skips the step
        if active and (self.penalty is not None or self.weighting is not None):
            self._calls += 1
        total = value if penalty is None else value + penalty
        kept = (None if part is None else part.detach() for part in (penalty, kernel, weights))
        self.last = LossRecord(total.detach(), value.detach(), *kept)
        return total

    def _regularise(
        self,
        due: mgs.Penalty | None,
        weighted: bool,
        outputs: torch.Tensor,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        found: Evaluation,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return the value, weighted if need be; the penalty that is due; the kernel and the weights."""
        value, losses, penalty, kernel, weights = found.value, found.losses, None, None, None
        graph = {**self._graph, "others": (arguments, keywords)}
        attach = None
        if due is not None:
            kernel = self._kernel(outputs, losses, arguments, graph)
            penalty = self.every * _penalty(due, kernel)
        if weighted and losses is not None:
            if kernel is not None and self._head["output"] == "loss" and self.max_samples is None:
                agreeing = kernel.detach()
            else:
                agreeing, attach = self._agreement(outputs, losses, graph, reuse=self._reuse and kernel is None)
            weights = mgs.agreement_weights(agreeing).to(losses.dtype)
            kernel = agreeing if kernel is None else kernel
            value = found.weighted(weights).value
        return value if attach is None else attach(value), penalty, kernel, weights

    def _kernel(
        self, outputs: torch.Tensor, losses: torch.Tensor | None, arguments: tuple[Any, ...], graph: dict[str, Any]
    ) -> torch.Tensor:
        """Return the kernel to penalise."""
        if self._head["output"] == "loss" and losses is not None:
            return self._loss_kernel(outputs, losses, graph, differentiable=True, samples=self.max_samples)
        head = self._head["output"]
        targets = arguments[0] if arguments and (head == "target" or callable(head)) else None
        if head == "target":
            targets = labels_of(self.criterion, targets)
        model = _backend.evaluated(outputs, self._models, samples=self.max_samples, **graph)
        kernel: torch.Tensor = mgs.kernel(
            model, outputs.detach(), targets, seed=self._calls, parameters=self._chosen, differentiable=True, **self._head
        )
        return kernel

    def _loss_kernel(
        self,
        outputs: torch.Tensor,
        losses: torch.Tensor,
        graph: dict[str, Any],
        *,
        differentiable: bool = False,
        samples: int | None = None,
    ) -> torch.Tensor:
        model = _backend.evaluated(outputs, self._models, samples=samples, **graph)
        kernel: torch.Tensor = mgs.kernel(
            model, outputs.detach(), output=lambda *_: losses, parameters=self._chosen, differentiable=differentiable
        )
        return kernel

    def _agreement(
        self, outputs: torch.Tensor, losses: torch.Tensor, graph: dict[str, Any], *, reuse: bool
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor] | None]:
        """Return the kernel to weight by, and, where the same statistics give the gradient, what attaches it to the value."""
        model = _backend.evaluated(outputs, self._models, **graph)
        found = _backend.kernel_and_gradient(model, losses, self._chosen) if reuse else None
        if found is None:
            return self._loss_kernel(outputs, losses, graph), None
        kernel, gradient = found

        def attach(value: torch.Tensor) -> torch.Tensor:
            (slopes,) = torch.autograd.grad(value, losses, retain_graph=True)
            gradients = gradient(slopes)
            attach_to: Any = _Attach.apply
            attached: torch.Tensor = attach_to(value.detach(), losses, gradients, *(model.parameters[name] for name in gradients))
            return attached

        return kernel, attach


def _penalty(penalty: mgs.Penalty, kernel: torch.Tensor) -> torch.Tensor:
    """Return the penalty; NaN of a kernel that is not finite, as the loss itself is, where a factorisation would raise."""
    try:
        value: torch.Tensor = penalty(kernel)
    except RuntimeError:  # of which torch.linalg.LinAlgError is one
        if bool(torch.isfinite(kernel).all()):
            raise
        return kernel.sum() * torch.nan
    return value


class _Attach(torch.autograd.Function):
    """Give a value the gradients that are known already."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, losses: torch.Tensor, gradients: dict[str, torch.Tensor], *parameters: torch.Tensor
    ) -> torch.Tensor:
        ctx.gradients = [
            gradient.reshape(parameter.shape).to(parameter.dtype)
            for gradient, parameter in zip(gradients.values(), parameters, strict=True)
        ]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise mgs.ArgumentError("`reuse` must be False for a loss that is differentiated twice; got True.")
        gradients, ctx.gradients = ctx.gradients, ()
        if not gradients:
            raise mgs.ArgumentError("`reuse` must be False for a backward pass through the same loss a second time; got True.")
        # the None for the losses still walks their graph, which frees it and tells hooks that wait for it
        if above[0].device.type != "cpu" or float(above[0]) != 1.0:
            torch._foreach_mul_(gradients, above[0])
        return (None, None, None, *gradients)
