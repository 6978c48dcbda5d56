"""The value of a criterion of PyTorch, and the part of each sample in it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

import mgs_core as mgs

#: Criteria whose losses, unless weighted, never cancel, and of these those to which every sample belongs.
_OF_ALL = (
    torch.nn.MSELoss, torch.nn.L1Loss, torch.nn.SmoothL1Loss, torch.nn.HuberLoss, torch.nn.BCELoss, torch.nn.BCEWithLogitsLoss,
    functional.mse_loss, functional.l1_loss, functional.smooth_l1_loss, functional.huber_loss, functional.binary_cross_entropy,
    functional.binary_cross_entropy_with_logits,
)  # fmt: skip
_ONE_SIGN = (*_OF_ALL, torch.nn.CrossEntropyLoss, functional.cross_entropy)


@dataclass(frozen=True)
class Evaluation:
    """Hold what a criterion gives.

    Attributes:
        value: the criterion's own, with its own graph; 0 if nothing counts.
        losses: the part of each sample, (n,); None unless asked for.
        reduce: makes the value of the losses.
    """

    value: torch.Tensor
    losses: torch.Tensor | None
    reduce: Callable[[torch.Tensor], torch.Tensor]

    def weighted(self, weights: torch.Tensor) -> Evaluation:
        """Return what it is with weights (n,) of the samples."""
        if self.losses is None:
            raise TypeError("`losses` must be asked for to be weighted; got None.")
        losses = weights * self.losses
        return Evaluation(self.reduce(losses), losses, self.reduce)


class Parts:
    """Evaluate a criterion and find the part of each sample in its value, as long as this is a constant times the losses' sum.

    The constant, as of a mean over what is not ignored, only the criterion knows: it is the quotient of value and sum. That this
    holds, in value and in gradient, is verified at the 1st, 2nd, 4th, 8th, … use. Where losses of both signs cancel, gradients
    give the constant.
    """

    def __init__(self) -> None:
        """Begin without a use."""
        self._uses = 0

    def evaluate(
        self,
        criterion: Callable[..., Any],
        outputs: torch.Tensor,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        *,
        each: bool,
        whole: bool,
    ) -> Evaluation:
        """Return the criterion's value, with its graph if it enters as a `whole`, and its parts if `each` sample's is needed."""
        n = outputs.shape[0] if outputs.ndim else None
        if not n:
            got = "none, for they have no axis. Leave the batch's axis in." if n is None else "0. Leave empty batches out."
            raise mgs.ArgumentError(f"`outputs` must hold at least one sample; got {got}")
        given: list[Any] = [outputs, *arguments]
        if each:  # views: the gradients that are taken there pass no hooks of the user's tensors
            given, keywords = [_view(part) for part in given], {name: _view(part) for name, part in keywords.items()}
        reduction = str(keywords.get("reduction") or _reduction(criterion))
        rest = {name: value for name, value in keywords.items() if name != "reduction"}
        elements: Any = None
        if each and reduction != "none":
            with _kept_random_state(outputs):
                elements = _unreduced(criterion)(*given, **rest)
        cancels = elements is not None and _cancel(criterion, arguments, keywords, elements)
        looks = cancels or (elements is not None and self._due() and not _is_captured(outputs))
        with torch.set_grad_enabled(torch.is_grad_enabled() and (whole or reduction == "none" or looks)):
            value = criterion(*given, **keywords)
        if not isinstance(value, torch.Tensor) or (each and reduction == "none"):
            losses = _by_sample(value, n) * (n / value.numel())
            return Evaluation(losses.mean(), losses, torch.mean)
        if value.ndim:
            value = _wide(value).mean()
        known = value if reduction == "none" else _without_nothing(value, criterion, arguments, keywords)
        if known is not None:
            value = known
        elif _is_nan(value):  # a mean of nothing?
            elements = _unreduced(criterion)(*given, **rest) if elements is None else elements
            if isinstance(elements, torch.Tensor) and not bool(elements.any()):
                value = elements.sum()
        if not each:
            return Evaluation(value, None, torch.mean)
        losses = _by_sample(elements, n)
        targets = arguments[0] if arguments else None
        of_samples = isinstance(targets, torch.Tensor) and targets.shape[:1] == (n,) and targets.ndim != outputs.ndim
        if of_samples and _is_one_of(criterion, _OF_ALL) and elements.shape != outputs.shape:
            name = getattr(criterion, "__name__", type(criterion).__name__)
            raise mgs.ArgumentError(
                f"`outputs` must have the shape of the targets for {name}; got {tuple(outputs.shape)}, and losses of "
                f"{tuple(elements.shape)}: of each with each. Use outputs.squeeze(-1)."
            )
        own = criterion.parameters() if isinstance(criterion, torch.nn.Module) else ()
        tensors = [part for part in (*given, *keywords.values(), *own) if _has_gradient(part)]
        count = 1 if reduction == "sum" else elements.numel()
        if looks:
            factor = self._factor(value, losses, elements, tensors, count, cancels)
        else:
            factor = _quotient(value, losses, count)
            self._uses += 1
        if reduction == "sum":
            return Evaluation(value, losses * factor, torch.sum)
        return Evaluation(value, losses * n * factor, torch.mean)

    def _due(self) -> bool:
        """Return whether to verify at this use."""
        return self._uses & (self._uses + 1) == 0

    def _factor(
        self,
        value: torch.Tensor,
        losses: torch.Tensor,
        elements: torch.Tensor,
        tensors: list[torch.Tensor],
        count: int,
        cancels: bool,
    ) -> torch.Tensor:
        """Return the constant, about one by `count`, by which the sum of the losses gives the value, as seen from gradients."""
        quotient = _quotient(value, losses, count)
        if not (value.requires_grad and losses.requires_grad and tensors):
            return quotient
        # both gradients begin with about the same, so that what the criterion rounds within, it rounds alike
        inverse = torch.full_like(quotient, count) if cancels else torch.where(quotient == 0, float(count), 1.0 / quotient)
        seed = inverse.clamp(-(2.0**15), 2.0**15)
        of_value = _gradient(value, tensors, seed).to(losses.dtype) / seed
        of_total = _gradient(losses.sum(), tensors, torch.ones_like(seed)).to(losses.dtype)
        square = of_total @ of_total
        factor = torch.where(square == 0, quotient, of_value @ of_total / square)
        if self._due():
            own, total, size = value.detach().to(losses.dtype), losses.detach().sum(), _wide(elements.detach()).abs().sum()
            if not bool(torch.isfinite(own + size + square + of_value.sum()) & (square > 0)):
                return quotient  # nothing can be seen: verify at the next use
            tolerance = min(1e3 * _precision([value, elements, *tensors]), 0.05)
            floor = 0.01 * tolerance * factor.abs()  # what rounding makes of terms of size 1
            differ = (of_value - factor * of_total).abs().max() > tolerance * of_value.abs().max() + floor
            if bool(differ | ((own - factor * total).abs() > tolerance * factor.abs() * size + floor * elements.numel())):
                raise mgs.ArgumentError(
                    "`criterion` must have a value that is a constant times the sum of its unreduced losses where each sample's "
                    'part in it is asked for, as by output="loss", `weighting` and `sample_weight`; got another (as a root, the '
                    "largest losses, a divisor of each sample's or of the outputs', a further term, random numbers of its own). "
                    "Pass a function that returns each sample's part, (n,), whose mean is then the value, or penalise another "
                    'head, as output="trace".'
                )
        self._uses += 1
        return factor if cancels else quotient


def _quotient(value: torch.Tensor, losses: torch.Tensor, count: int) -> torch.Tensor:
    total = losses.detach().sum()
    return torch.where(total == 0, 1.0 / count, value.detach().to(losses.dtype) / total)


def _cancel(criterion: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any], elements: Any) -> bool:
    """Return whether losses of both signs cancel for more than a half; those of some criteria have one sign."""
    if not isinstance(elements, torch.Tensor) or elements.is_meta or _is_captured(elements):
        return False
    if _is_one_of(criterion, _ONE_SIGN) and not _is_weighted(criterion, arguments, keywords):
        return False
    elements = _wide(elements.detach())
    return bool(elements.sum().abs() < 0.5 * elements.abs().sum())


def _is_nan(value: torch.Tensor) -> bool:
    """Return whether a value is NaN, where that can be known now."""
    return not (value.is_meta or _is_captured(value)) and bool(value.isnan())


def _is_captured(value: torch.Tensor) -> bool:
    """Return whether operations are recorded for a graph of the device, so that there are no values to look at."""
    return value.is_cuda and torch.cuda.is_current_stream_capturing()


def _is_one_of(criterion: Callable[..., Any], kinds: Iterable[Any]) -> bool:
    return any(criterion is kind or type(criterion) is kind for kind in kinds)


def _is_weighted(criterion: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Return whether the criterion may have weights, of either sign or zero; what follows the targets may be some."""
    names = ("weight", "pos_weight")
    return len(arguments) > 1 or any(
        keywords.get(name) is not None or getattr(criterion, name, None) is not None for name in names
    )


def _without_nothing(
    value: torch.Tensor, criterion: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> torch.Tensor | None:
    """Return the value, 0 for a mean of nothing, without a wait for a device; None where only a look at it tells."""
    labels = arguments[0] if len(arguments) == 1 else None
    if _is_weighted(criterion, arguments, keywords) or not isinstance(labels, torch.Tensor) or not labels.numel():
        return None  # some divide by the sum of the weights
    if _is_one_of(criterion, _OF_ALL):
        return value
    if value.device.type == "cpu" or labels.is_floating_point():
        return None
    if _is_one_of(criterion, (torch.nn.CrossEntropyLoss, torch.nn.NLLLoss)):
        keywords = vars(criterion)
    elif not _is_one_of(criterion, (functional.cross_entropy, functional.nll_loss)):
        return None
    if keywords.get("label_smoothing"):
        return None  # its gradient of a mean over nothing is not zero but NaN
    return value.masked_fill((labels == keywords.get("ignore_index", -100)).all(), 0.0)


def _precision(tensors: list[torch.Tensor]) -> float:
    """Return the spacing of the coarsest numbers with which tensors are computed."""
    coarsest = max(2.0**-23, *(torch.finfo(part.dtype).eps for part in tensors))
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        coarsest = max(coarsest, torch.finfo(torch.get_autocast_dtype(device)).eps)
    return max(coarsest, 2.0**-10) if device == "cuda" and _may_use_tensor_float() else coarsest


def _may_use_tensor_float() -> bool:
    """Return whether products of single precision may be TensorFloat-32's."""
    try:
        return bool(torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # of settings by `fp32_precision` that the older names cannot say, as of convolutions alone
        return True


def _by_sample(elements: Any, n: int) -> torch.Tensor:
    """Return the sum of each sample's elements, (n,)."""
    if not isinstance(elements, torch.Tensor) or elements.ndim == 0 or elements.shape[0] != n:
        shape = tuple(getattr(elements, "shape", ()))
        raise mgs.ArgumentError(
            f"`criterion` must be able to give a loss for each of {n} samples; got shape {shape}. "
            "Give it an argument or attribute `reduction`, or return losses of shape (n,); outputs have the samples first. "
            'A loss that compares samples has none: penalise another head, as output="trace".'
        )
    return _wide(elements).reshape(n, -1).sum(1)


def _gradient(value: torch.Tensor, tensors: list[torch.Tensor], seed: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `seed · value` in the tensors, flat."""
    parts = torch.autograd.grad(
        value, tensors, seed.to(value.dtype), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([part.reshape(-1) for part in parts])


def _has_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _view(value: Any) -> Any:
    return value.view_as(value) if _has_gradient(value) and value.layout == torch.strided else value


def _wide(values: torch.Tensor) -> torch.Tensor:
    """Return low-precision values in float32, in which they are summed."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


@contextmanager
def _kept_random_state(outputs: torch.Tensor) -> Iterator[None]:
    """Keep the random state, so that a criterion that draws draws the same again; a graph of the device has none to keep."""
    if _is_captured(outputs):
        yield
        return
    with torch.random.fork_rng([outputs.device] if outputs.device.type == "cuda" else []):
        yield


def _reduction(criterion: Callable[..., Any]) -> str:
    """Return the criterion's reduction: "mean" (of some kind), "sum" or "none"."""
    if hasattr(criterion, "reduction"):
        return str(criterion.reduction)
    try:
        called = criterion.forward if isinstance(criterion, torch.nn.Module) else criterion
        argument = inspect.signature(called).parameters.get("reduction")
    except ValueError:  # a function that does not say what it takes
        argument = None
    return "none" if argument is None else str(argument.default)


def _unreduced(criterion: Callable[..., Any]) -> Callable[..., Any]:
    """Return the criterion, which has a reduction, without."""
    if not hasattr(criterion, "reduction"):
        return partial(_without_traces(criterion), reduction="none")
    unreduced: Any = copy.copy(getattr(criterion, "_orig_mod", criterion))  # that of torch.compile shares all with its copy
    try:
        unreduced.reduction = "none"
    except (AttributeError, RuntimeError) as error:
        raise mgs.ArgumentError(
            f"`criterion` must let its attribute `reduction` be set on a copy where each sample's part is asked for; got "
            f"{type(criterion).__name__}. Pass the module that it was made of, or a function of losses (n,)."
        ) from error
    return _without_traces(unreduced)


def _without_traces(criterion: Callable[..., Any]) -> Callable[..., Any]:
    """Return the criterion such that its buffers, as the moving average of some, stay as they were."""
    if not isinstance(criterion, torch.nn.Module) or type(criterion).__module__ == "torch.nn.modules.loss":
        return criterion
    buffers = {name: value.clone() for name, value in criterion.named_buffers()}

    def call(*arguments: Any, **keywords: Any) -> Any:
        return torch.func.functional_call(criterion, buffers, arguments, keywords)

    return call if buffers else criterion
