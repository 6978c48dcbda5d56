"""Tables whose rows are looked up."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from mgs_core._errors import UnsupportedModelError
from mgs_core._protocol import Lookup

from ._registry import Place, Site, outer, register


def _rows_of(gradients: torch.Tensor, inputs: torch.Tensor, *, size: int, **common: Any) -> Lookup:
    return Lookup(gradients=gradients.squeeze(2), indices=inputs[:, 0, :, 0], size=size, **common)


def _table(place: Place, indices: torch.Tensor, ignored: int | None = None) -> Site:
    """Return the site of a table (size, …) read at indices (*lead)."""
    size = place.weight[0]

    def arrange(gradient: torch.Tensor) -> torch.Tensor:
        if ignored is not None:
            gradient = gradient * (indices != ignored)[..., None].to(gradient.dtype)
        return gradient.reshape(1, *indices.shape, -1)

    return Site(arrange, partial(_rows_of, size=size), lambda: torch.where(indices < 0, indices + size, indices)[None, ..., None])


@register("Embedding")
def embedding(place: Place) -> Site | None:
    """`weight[indices]`, without gradient at the padding index."""
    node = place.node
    _refuse_scaling(node)
    size, padding = place.weight[0], _signed(node._saved_padding_idx)
    return _table(place, node._saved_indices, padding if 0 <= padding < size else None)


@register("IndexSelect")
def index_select(place: Place) -> Site | None:
    """`self.index_select(dim, index)`."""
    node = place.node
    return _table(place, node._saved_index) if _signed(node._saved_dim) == 0 and place.slot == 0 else None


@register("Index")
def index(place: Place) -> Site | None:
    """`self[index]` with one tensor of integers."""
    indices = place.node._saved_indices
    if place.slot != 0 or len(indices) != 1 or indices[0] is None or indices[0].dtype == torch.bool:
        return None
    return _table(place, indices[0])


@register("EmbeddingBag")
def embedding_bag(place: Place) -> Site | None:
    """Sums or means of rows of a table: the product of a matrix of counts, (bags, size), with the table."""
    node = place.node
    mode, size = int(node._saved_mode), place.weight[0]
    if mode == 2 or place.slot != 0:  # a maximum, or the weights of the samples
        return None
    _refuse_scaling(node)

    def counts() -> torch.Tensor:
        indices, offsets, weights = node._saved_indices, node._saved_offsets, node._saved_per_sample_weights
        bags = place.output[0]
        positions = torch.arange(indices.shape[0], device=indices.device)
        bag = torch.searchsorted(offsets[:bags].contiguous(), positions, right=True) - 1
        dtype = place.graph.dtype((place.number, 0))
        share = torch.ones_like(indices, dtype=dtype) if weights is None else weights
        share = share * (indices != _signed(node._saved_padding_idx)).to(dtype)
        table = torch.zeros(bags, size, dtype=dtype, device=indices.device).index_put((bag, indices), share, accumulate=True)
        if mode == 1:
            table = table / table.sum(1, keepdim=True).clamp(min=1)
        return table[None]

    return Site(lambda gradient: gradient[None], outer, counts)


def _refuse_scaling(node: Any) -> None:
    if node._saved_scale_grad_by_freq:
        raise UnsupportedModelError(
            "`model` must not divide the gradients of an embedding by counts over the batch; got `scale_grad_by_freq=True`. "
            "Set it to False."
        )


def _signed(value: int) -> int:
    """Return an integer that PyTorch shows without its sign."""
    return value - (1 << 64) if value >= 1 << 63 else value
