"""The array-API namespace of PyTorch tensors, with PyTorch's own kernels for what the array API lacks.

The names that begin with `mgs_` are those of `mgs_core/contraction.py` and `mgs_core/onnx/extensions.py`, which say what each
takes and returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, TypeAlias

import array_api_compat.torch as compat
import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional

from mgs_core._errors import ArgumentError

from .contraction import contribution, weighted_gradient
from .convolutions import patches
from .determinant import log_determinant
from .products import full_precision, symmetric_product

Sizes: TypeAlias = Sequence[int]
Pairs: TypeAlias = Sequence[tuple[int, int]]
#: Functions that make an array from none.
_MAKERS = ("arange", "empty", "eye", "full", "linspace", "ones", "zeros")
_SCATTER = {"mul": "prod", "max": "amax", "min": "amin", "add": "sum"}


class TorchNamespace:
    """Offer array-API names; those not defined here are array-api-compat's.

    What it makes from nothing is on one device; None is PyTorch's default.
    """

    mgs_contribution = staticmethod(contribution)
    mgs_counts_biases = True
    mgs_product = staticmethod(symmetric_product)
    mgs_weighted_gradient = staticmethod(weighted_gradient)
    mgs_sum_by_index = staticmethod(lambda values, at, size: values.new_zeros(size, values.shape[1]).index_add(0, at, values))
    matmul = staticmethod(full_precision(torch.matmul))
    mgs_lookup = staticmethod(lambda table, indices: table[indices])
    mgs_einsum = staticmethod(torch.einsum)
    mgs_relu = staticmethod(torch.relu)
    mgs_sigmoid = staticmethod(torch.sigmoid)
    mgs_erf = staticmethod(torch.erf)
    mgs_softmax = staticmethod(torch.softmax)
    mgs_patches = staticmethod(patches)
    mgs_log_softmax = staticmethod(torch.log_softmax)

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        """Return array-api-compat's function of that name."""
        function = getattr(compat, name)
        return partial(function, device=self._device) if name in _MAKERS else function

    def mgs_beside(self, array: torch.Tensor) -> TorchNamespace:
        """Return the namespace that makes arrays where this one is."""
        return _beside(array.device)

    def asarray(self, value: Any, dtype: Any = None) -> torch.Tensor:
        """Return the value as a tensor; a tensor keeps its graph."""
        if isinstance(value, torch.Tensor):
            return value if dtype is None else value.to(dtype)
        return torch.as_tensor(value, dtype=dtype, device=self._device)

    mgs_log_determinant = staticmethod(log_determinant)

    @staticmethod
    def mgs_convolution(
        x: torch.Tensor, weight: torch.Tensor, *, strides: Sizes, pads: Pairs, dilations: Sizes, groups: int
    ) -> torch.Tensor:
        """Return the cross-correlation."""
        x, padding = _own_padding(x, pads)
        nothing = [0] * len(padding)
        return torch.convolution(x, weight, None, strides, padding, dilations, False, nothing, groups)

    @staticmethod
    def mgs_convolution_transpose(
        x: torch.Tensor,
        weight: torch.Tensor,
        *,
        strides: Sizes,
        pads: Pairs,
        dilations: Sizes,
        groups: int,
        output_padding: Sizes,
    ) -> torch.Tensor:
        """Return the adjoint of a convolution: without padding, then cut (or filled with zeros) to size."""
        nothing = [0] * len(strides)
        y = torch.convolution(x, weight, None, strides, nothing, dilations, True, nothing, groups)
        widths = [(-before, extra - after) for (before, after), extra in zip(pads, output_padding, strict=True)]
        return functional.pad(y, _reversed(widths))

    @staticmethod
    def mgs_max_pool(x: torch.Tensor, *, window: Sizes, strides: Sizes, pads: Pairs, dilations: Sizes) -> torch.Tensor:
        """Return the greatest of each window; padding counts as −∞."""
        lowest = -float("inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
        x = functional.pad(x, _reversed(pads), value=lowest)
        pool = _by_rank(len(window), functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)
        pooled: torch.Tensor = pool(x, window, strides, 0, dilations)
        return pooled

    @staticmethod
    def mgs_average_pool(x: torch.Tensor, *, window: Sizes, strides: Sizes, pads: Pairs, dilations: Sizes) -> torch.Tensor:
        """Return the mean of each window; padding counts as zeros."""
        x = functional.pad(x, _reversed(pads))
        if any(dilation != 1 for dilation in dilations):
            return patches(x, window, strides, dilations).mean(tuple(range(2, 2 + len(window))))
        pool = _by_rank(len(window), functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)
        pooled: torch.Tensor = pool(x, window, strides)
        return pooled

    @staticmethod
    def mgs_labels(labels: torch.Tensor, c: int) -> Any:
        """Return labels as integers of NumPy, without the −100 that PyTorch's losses leave out.

        None where that would wait, and within the transforms of `torch.func`, in which there are no values.
        """
        if labels.device.type != "cpu" or torch._C._functorch.is_functorch_wrapped_tensor(labels):
            return None
        labels = labels.detach()
        labels = labels[labels != -100]
        whole = labels.to(torch.int64)
        return whole.numpy() if bool((whole == labels).all()) else labels.numpy()

    @staticmethod
    def mgs_values(array: torch.Tensor) -> Any:
        """Return the values as an array of NumPy; None where that would wait, or there are none."""
        if array.device.type != "cpu" or torch._C._functorch.is_functorch_wrapped_tensor(array) or get_proxy_mode() is not None:
            return None
        array = array.detach()
        return (array.float() if array.dtype == torch.bfloat16 else array).numpy()

    @staticmethod
    def mgs_pad(x: torch.Tensor, widths: Pairs, *, value: float = 0.0) -> torch.Tensor:
        """Return x with a value added around it."""
        return functional.pad(x, _reversed(widths), value=value)

    @staticmethod
    def mgs_scatter(data: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor, *, reduction: str) -> torch.Tensor:
        """Return data with updates written at indices."""
        if reduction == "none":
            return data.index_put((indices,), updates)
        if reduction not in _SCATTER:
            raise ArgumentError(f"`reduction` must be none, {', '.join(_SCATTER)}; got {reduction!r}. Choose one of them.")
        return data.scatter_reduce(0, indices.to(torch.int64), updates, _SCATTER[reduction], include_self=True)


@cache
def _beside(device: torch.device) -> TorchNamespace:
    return TorchNamespace(device)


def _by_rank(rank: int, *functions: Callable[..., Any]) -> Callable[..., Any]:
    if rank > len(functions):
        raise ArgumentError(f"`window` must have at most {len(functions)} axes; got {rank}. PyTorch has no more.")
    return functions[rank - 1]


def _reversed(widths: Pairs) -> list[int]:
    """Return pairs in the order of `torch.nn.functional.pad`: the last axis first."""
    return [width for pair in reversed(list(widths)) for width in pair]


def _own_padding(x: torch.Tensor, pads: Pairs) -> tuple[torch.Tensor, list[int]]:
    """Return x and the padding that a convolution can add itself, which is the same on both sides."""
    if all(before == after for before, after in pads):
        return x, [before for before, _ in pads]
    return functional.pad(x, _reversed(pads)), [0] * len(pads)


namespace = TorchNamespace()
