"""Convolutions in one to three dimensions, with groups, strides, dilations, and transposed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch.nn import functional

from mgs_core._protocol import Convolution, LayerStatistics, Outer

from ..namespace import namespace
from ._registry import Place, Site, elementwise, register


@register("Convolution")
def convolution(place: Place) -> Site | None:
    """`convolution(input, weight, bias)`: the samples are in the first axis, all else belongs to the features."""
    if place.slot == 2:
        return elementwise(place, 1.0, (1,))
    if place.slot != 1:
        return None
    node, out = place.node, place.output
    geometry = _Geometry(
        window=tuple(place.weight[2:]),
        strides=tuple(node._saved_stride),
        padding=tuple(node._saved_padding),
        dilations=tuple(node._saved_dilation),
        groups=int(node._saved_groups),
        image=tuple(node._saved_input.shape[1:]),
        out=tuple(out[1:]),
    )
    transposed = bool(node._saved_transposed)
    last = not transposed and _channels_last(node._saved_input)

    def flat(array: torch.Tensor) -> torch.Tensor:
        return (array.movedim(1, -1) if last else array).reshape(1, array.shape[0], -1)

    make = partial(_transposed, geometry) if transposed else partial(_plain, geometry, last)
    return Site(flat, make, lambda: flat(node._saved_input), transposed=not transposed)


def _channels_last(x: torch.Tensor) -> bool:
    """Return whether the channels of each pixel are beside each other in memory, so that they should stay so."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@dataclass(frozen=True)
class _Geometry:
    """Hold sizes; of image and out, channels first."""

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int
    image: tuple[int, ...]
    out: tuple[int, ...]


def _plain(geometry: _Geometry, last: bool, gradients: torch.Tensor, inputs: torch.Tensor, **common: Any) -> LayerStatistics:
    """Every output position is a position; the patch below it is the input."""
    groups = geometry.groups

    def shaped(array: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        channels, *space = shape
        lead = array.shape[:-1]
        array = array.reshape(*lead, *space, channels).movedim(-1, len(lead)) if last else array
        return array.reshape(*lead, groups, channels // groups, *space)

    return Convolution(
        gradients=shaped(gradients.squeeze(2), geometry.out),
        images=shaped(inputs.squeeze(1), geometry.image),
        window=geometry.window,
        strides=geometry.strides,
        pads=tuple((size, size) for size in geometry.padding),
        dilations=geometry.dilations,
        **common,
    )


def _transposed(geometry: _Geometry, gradients: torch.Tensor, inputs: torch.Tensor, **common: Any) -> LayerStatistics:
    """Every input position is a position; the patch of gradients above it is what it meets."""
    n, k, _, s, _ = gradients.shape
    groups, image, positions = geometry.groups, geometry.image, prod(geometry.image[1:])
    d = functional.pad(
        gradients.reshape(n * k * s, *geometry.out), [size for size in reversed(geometry.padding) for _ in range(2)]
    )
    patches = namespace.mgs_patches(d, geometry.window, geometry.strides, geometry.dilations)
    for axis, length in enumerate(reversed(image[1:]), 1):  # output padding leaves room for windows that no input has
        patches = patches.narrow(-axis, 0, length)
    patches = patches.reshape(n, k, s, groups, -1, positions).permute(0, 1, 3, 2, 5, 4)
    x = inputs.reshape(n, s, groups, image[0] // groups, -1).permute(0, 2, 1, 4, 3)
    return Outer(
        gradients=patches.reshape(n, k, groups, s * positions, -1), inputs=x.reshape(n, groups, s * positions, -1), **common
    )
