"""Each way to contract a convolution, which its size would choose, against rows in the core."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from mgs_core.backends.torch import convolutions  # noqa: E402  # after the skip

from mgs_core._protocol import Convolution  # noqa: E402  # after the skip
from mgs_core.statistics import as_rows, unfold  # noqa: E402  # after the skip

WAYS = {"pairs": convolutions._ShiftedKernel, "groups": convolutions._GroupedKernel, "offsets": convolutions._OffsetKernel}
SHAPES = {  # groups, inputs and outputs of a group, image, window, padding, dilation
    "square": (1, 3, 2, (4, 4), (3, 3), (1, 1), (1, 1)),
    "uneven groups": (2, 2, 3, (5, 3), (2, 3), (1, 2), (2, 1)),
    "window wider than half the image": (1, 2, 2, (3, 2), (3, 3), (1, 1), (1, 1)),
    "one axis": (1, 2, 3, (6,), (3,), (0,), (2,)),
    "three axes": (3, 1, 2, (2, 3, 2), (2, 2, 1), (1, 0, 0), (1, 1, 1)),
}


def make(shape, stride=1):
    groups, i, o, image, window, padding, dilation = SHAPES[shape]
    out = [
        (size + 2 * pad - step * (width - 1) - 1) // stride + 1
        for size, width, pad, step in zip(image, window, padding, dilation, strict=True)
    ]
    random = torch.Generator().manual_seed(0)
    images = torch.randn(5, 1, groups, i, *image, generator=random, dtype=torch.float64)
    gradients = torch.randn(5, 1, 1, groups, o, *out, generator=random, dtype=torch.float64)
    pads = tuple((pad, pad) for pad in padding)
    return Convolution(
        "w", gradients, images=images, window=window, strides=(stride,) * len(window), pads=pads, dilations=dilation
    )


def by_rows(use):
    rows = as_rows(unfold(use)).flatten(1)
    return rows @ rows.T


CASES = [(way, shape, stride) for way in WAYS for shape in SHAPES for stride in (1, 2) if (way, stride) != ("pairs", 2)]


@pytest.mark.parametrize(("way", "shape", "stride"), CASES)
def test_kernel_and_gradient_are_those_of_rows(way, shape, stride, monkeypatch):
    use = make(shape, stride)
    positions = use.gradients[0, 0, 0, 0, 0].numel()
    monkeypatch.setattr(convolutions, "_PRODUCTS", 2 * SHAPES[shape][0] * 5 * positions**2)  # two samples at a time, then one
    arrays = [array.clone().requires_grad_() for array in (use.images, use.gradients)]
    flat = arrays if way == "pairs" else [arrays[0].flatten(0, 3), arrays[1].flatten(0, 4)]
    found = WAYS[way].apply(use, *flat)
    expected = by_rows(replace(use, images=arrays[0], gradients=arrays[1]))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    mixing = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    for part, other in zip(*(torch.autograd.grad(value, arrays, mixing) for value in (found, expected)), strict=True):
        torch.testing.assert_close(part, other, rtol=1e-12, atol=1e-12)


def test_size_chooses_the_way(monkeypatch):
    called = []
    for name in ("_ShiftedKernel", "_GroupedKernel", "_OffsetKernel"):
        function = getattr(convolutions, name)
        monkeypatch.setattr(
            function, "forward", staticmethod(lambda ctx, use, *_, name=name: called.append(name) or use.images.sum())
        )
    monkeypatch.setattr(convolutions, "_UNFOLDED", 0)

    def of(n, i, o, size, stride=1):
        out = size // stride
        geometry = {"window": (3, 3), "strides": (stride, stride), "pads": ((1, 1), (1, 1)), "dilations": (1, 1)}
        convolutions.of_convolution(
            Convolution("w", torch.zeros(n, 1, 1, 1, o, out, out), images=torch.zeros(n, 1, 1, i, size, size), **geometry)
        )

    of(8, 128, 128, 2)
    of(8, 16, 16, 16)
    of(8, 128, 128, 16)
    of(8, 128, 128, 32, stride=2)
    assert called == ["_ShiftedKernel", "_GroupedKernel", "_OffsetKernel", "_OffsetKernel"]


def test_rows_are_kept_where_they_are_small():
    small = make("square")
    assert convolutions.kept_rows(small) is not None
    torch.testing.assert_close(
        convolutions.kept_rows(small).gradients[:, 0] @ convolutions.kept_rows(small).gradients[:, 0].T, by_rows(small)
    )
    assert (
        convolutions.kept_rows(replace(small, images=small.images[..., :1, :1], gradients=small.gradients[..., :1, :1])) is None
    )
