"""Matrix products."""

from __future__ import annotations

from dataclasses import replace

import torch

from ._registry import Place, Site, elementwise, outer, register

# node → what it calls its two factors
_FACTORS = {"Mm": ("self", "mat2"), "Addmm": ("mat1", "mat2"), "Bmm": ("self", "mat2"), "Baddbmm": ("batch1", "batch2")}


@register(*_FACTORS)
def matrix_product(place: Place) -> Site | None:
    """`beta · self + alpha · left @ right`, of one matrix or one for each group; `W X = (Xᵀ Wᵀ)ᵀ` for a weight on the left."""
    node, (left, right) = place.node, _FACTORS[place.graph.name(place.number)]
    last = len(place.graph.inputs[place.number]) - 1
    if place.slot < last - 1:
        beta = float(node._saved_beta)
        return replace(elementwise(place, beta), shared=beta == 1.0)
    alpha = float(getattr(node, "_saved_alpha", 1.0))

    def arranged(matrix: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        matrix = matrix if matrix.layout == torch.strided else matrix.to_dense()  # adjacency, bags of words
        matrix = matrix if factor == 1 else matrix * factor
        matrix = matrix if place.slot == last else matrix.mT
        return matrix if matrix.ndim == 3 else matrix[None]

    other = f"_saved_{left if place.slot == last else right}"
    right_side = place.slot == last
    return Site(
        lambda d: arranged(d, alpha),
        outer,
        lambda: arranged(getattr(node, other)),
        transposed=not right_side,
        shared=right_side and alpha == 1.0,
    )


@register("Linear")
def linear(place: Place) -> Site | None:
    """`input @ weightᵀ + bias`, as some devices keep it."""
    if place.slot == 2:
        return elementwise(place, 1.0)
    if place.slot == 1:
        return Site(lambda d: d[None], outer, lambda: place.node._saved_input[None], transposed=True)
    return None


@register("Mv")
def matrix_vector(place: Place) -> Site | None:
    """`self @ vec`."""
    if place.slot == 1:
        return Site(lambda d: d[None, :, None], outer, lambda: place.node._saved_self[None])
    return None
