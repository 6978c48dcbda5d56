"""Matrix products."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ._registry import Place, Site, elementwise, outer, register


@register("Mm")
def matrix_product(place: Place) -> Site | None:
    """`self @ mat2`."""
    if place.slot == 1:
        return _on_the_right(lambda: place.node._saved_self)
    return _on_the_left(lambda: place.node._saved_mat2)


@register("Addmm")
def matrix_product_and_sum(place: Place) -> Site | None:
    """`beta · self + alpha · mat1 @ mat2`."""
    node = place.node
    if place.slot == 0:
        return elementwise(place, float(node._saved_beta))
    alpha = float(node._saved_alpha)
    if place.slot == 2:
        return _on_the_right(lambda: node._saved_mat1, alpha)
    return _on_the_left(lambda: node._saved_mat2, alpha)


@register("Linear")
def linear(place: Place) -> Site | None:
    """`input @ weightᵀ + bias`, as some devices keep it."""
    if place.slot == 2:
        return elementwise(place, 1.0)
    if place.slot == 1:
        site = _on_the_right(lambda: place.node._saved_input)
        return Site(site.arrange, site.make, site.inputs, transposed=True)
    return None


@register("Mv")
def matrix_vector(place: Place) -> Site | None:
    """`self @ vec`."""
    if place.slot == 1:
        return Site(lambda d: d[None, :, None], outer, lambda: place.node._saved_self[None])
    return None


@register("Bmm")
def batched_product(place: Place) -> Site | None:
    """`self @ mat2`, one product for each group."""
    if place.slot == 1:
        return Site(lambda d: d, outer, lambda: place.node._saved_self)
    return Site(lambda d: d.mT, outer, lambda: place.node._saved_mat2.mT, transposed=True)


@register("Baddbmm")
def batched_product_and_sum(place: Place) -> Site | None:
    """`beta · self + alpha · batch1 @ batch2`."""
    node = place.node
    if place.slot == 0:
        return elementwise(place, float(node._saved_beta))
    alpha = float(node._saved_alpha)
    if place.slot == 2:
        return Site(lambda d: d * alpha, outer, lambda: node._saved_batch1)
    return Site(lambda d: d.mT * alpha, outer, lambda: node._saved_batch2.mT, transposed=True)


def _on_the_right(inputs: Callable[[], torch.Tensor], alpha: float = 1.0) -> Site:
    return Site(lambda d: (d if alpha == 1 else d * alpha)[None], outer, lambda: inputs()[None])


def _on_the_left(inputs: Callable[[], torch.Tensor], alpha: float = 1.0) -> Site:
    """`W X = (Xᵀ Wᵀ)ᵀ`: the same on transposed matrices."""
    return Site(lambda d: (d if alpha == 1 else d * alpha).mT[None], outer, lambda: inputs().mT[None], transposed=True)
