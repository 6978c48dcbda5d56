"""Convolutions in one to three dimensions, with groups, strides, dilations, and transposed."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # PyTorch's own abbreviation

from mgs_core._protocol import LayerStatistics, Outer

from ..namespace import namespace
from ._registry import Place, Site, elementwise, register


@register("Convolution")
def convolution(place: Place) -> Site | None:
    """`convolution(input, weight, bias)`: the samples are in the first axis, all else belongs to the features."""
    if place.slot == 2:
        return elementwise(place, 1.0, (1,))
    if place.slot != 1:
        return None
    node = place.node
    window = tuple(place.weight[2:])
    stride, dilation, padding = (tuple(values) for values in (node._saved_stride, node._saved_dilation, node._saved_padding))
    geometry: dict[str, Any] = {"window": window, "stride": stride, "dilation": dilation, "groups": int(node._saved_groups)}
    out = place.output

    def arrange(gradient: torch.Tensor) -> torch.Tensor:
        return gradient.reshape(1, out[0], -1)

    def inputs() -> torch.Tensor:
        x: torch.Tensor = node._saved_input
        return x.reshape(1, x.shape[0], -1)

    shapes: dict[str, Any] = {"image": tuple(node._saved_input.shape[1:]), "out": tuple(out[1:]), "padding": padding}
    make = _transposed if node._saved_transposed else _plain
    return Site(arrange, partial(make, **geometry, **shapes), inputs, transposed=not node._saved_transposed)


def _plain(
    gradients: torch.Tensor, inputs: torch.Tensor, *, window: Any, stride: Any, dilation: Any, groups: int, image: Any, out: Any,
    padding: Any, **common: Any,
) -> LayerStatistics:  # fmt: skip
    """Every output position is a position; the patch below it is the input."""
    n, k, _, s, _ = gradients.shape
    patches = _patches(inputs.reshape(n * s, *image), window, stride, dilation, padding, out[1:])
    patches = patches.reshape(n, s, groups, -1, prod(out[1:])).permute(0, 2, 1, 4, 3).reshape(n, groups, s * prod(out[1:]), -1)
    d = gradients.reshape(n, k, s, groups, out[0] // groups, -1).permute(0, 1, 3, 2, 5, 4)
    return Outer(gradients=d.reshape(n, k, groups, s * prod(out[1:]), -1), inputs=patches, **common)


def _transposed(
    gradients: torch.Tensor, inputs: torch.Tensor, *, window: Any, stride: Any, dilation: Any, groups: int, image: Any, out: Any,
    padding: Any, **common: Any,
) -> LayerStatistics:  # fmt: skip
    """Every input position is a position; the patch of gradients above it is what it meets."""
    n, k, _, s, _ = gradients.shape
    patches = _patches(gradients.reshape(n * k * s, *out), window, stride, dilation, padding, image[1:])
    patches = patches.reshape(n, k, s, groups, -1, prod(image[1:])).permute(0, 1, 3, 2, 5, 4)
    x = inputs.reshape(n, s, groups, image[0] // groups, -1).permute(0, 2, 1, 4, 3)
    x = x.reshape(n, groups, s * prod(image[1:]), -1)
    return Outer(gradients=patches.reshape(n, k, groups, s * prod(image[1:]), -1), inputs=x, **common)


def _patches(x: torch.Tensor, window: Any, stride: Any, dilation: Any, padding: Any, count: Any) -> torch.Tensor:
    """Return the windows, (n, channels, *window, *count)."""
    x = F.pad(x, [amount for size in reversed(padding) for amount in (size, size)])
    patches = namespace.mgs_patches(x, window, stride, dilation)
    for axis, length in enumerate(reversed(count), 1):
        patches = patches.narrow(-axis, 0, length)
    return patches
