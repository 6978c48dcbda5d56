"""Say beforehand how each parameter of a model will enter the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from mgs_core import _batch
from mgs_core._errors import ArgumentError, SamplesInteractError, UnsupportedModelError
from mgs_core._namespace import array_namespace
from mgs_core._protocol import LayerReport, LayerStatistics
from mgs_core._registry import get_backend
from mgs_core._types import Array
from mgs_core.contraction import operations
from mgs_core.heads import make_head
from mgs_core.statistics import merge

_SLOW = "exact but slow, one backward pass a sample; use it in a matrix product, or freeze it"


@dataclass(frozen=True)
class Report:
    """Hold one `LayerReport` for each parameter; prints as a table.

    Attributes:
        layers: the rows of the table.
        penalty: why the kernel cannot be differentiated for a penalty; empty when it can.
        outputs: what outputs that are not (n, c) need for a kernel; empty when they are.
    """

    layers: tuple[LayerReport, ...]
    penalty: str = ""
    outputs: str = ""

    @property
    def ok(self) -> bool:
        """Return whether no parameter is refused."""
        return all(layer.route != "refused" for layer in self.layers)

    def __str__(self) -> str:
        """Return the table as text."""
        table = [("parameter", "kind", "route", "size", "operations", "remedy")]
        table += [(a.parameter, a.kind, a.route, str(a.size), f"{a.cost:.1e}", a.remedy) for a in self.layers]
        widths = [max(len(row[column]) for row in table) for column in range(5)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[5]]).rstrip() for row in table]
        lines += [f"A penalty is refused: {self.penalty}"] if self.penalty else []
        return "\n".join([*lines, *([self.outputs] if self.outputs else [])])


def check(model: Any, inputs: Any) -> Report:
    """Report, for each parameter, the kind of its use and the route into the kernel: statistics, rows or refused.

    Args:
        model: as for `kernel`.
        inputs: a batch as for `kernel`; whether samples interact cannot be seen of one sample.

    Returns:
        The report.

    Raises:
        UnsupportedModelError: when no kernel can be had, whatever parameters are chosen.

    Cost:
        One kernel's statistics of the batch for one scalar a sample, twice, and once more for each parameter where some are
        refused; a few samples are enough.

    Example:
        >>> import numpy as np
        >>> import mgs_core as mgs
        >>> model = mgs.FunctionalModel(lambda p, x: x @ p["w"] + p["b"], {"w": np.ones((3, 2)), "b": np.zeros(2)})
        >>> print(mgs.check(model, np.ones((4, 3))))
        parameter  kind   route       size  operations  remedy
        w          outer  statistics  6     1.0e+03
        b          sum    statistics  2     4.0e+01
    """
    _batch.count(inputs)
    backend = get_backend(model)
    sizes = {name: prod(array.shape) for name, array in backend.parameters(model).items()}
    ranks: list[int] = []

    def uneven(outputs: Array, targets: Any) -> Array:
        ranks.append(outputs.ndim)
        return _uneven(outputs, targets)

    head = make_head(uneven, "identity", None, 1, 0, None)

    def uses_of(chosen: list[str] | None, differentiable: bool = False) -> list[LayerStatistics]:
        return backend.statistics(model, inputs, None, head.function, chosen, differentiable=differentiable)

    uses: list[LayerStatistics] = []
    refused: dict[str, str] = {}
    try:
        uses = uses_of(None)
    except SamplesInteractError:
        for name in sizes:
            try:
                uses += uses_of([name])
            except SamplesInteractError as error:
                refused[name] = str(error)
    once: dict[str, str] = {}  # those that are behind an operation without a second derivative
    chosen = [name for name in sizes if name not in refused]
    try:
        if chosen:
            uses_of(chosen, differentiable=True)
    except UnsupportedModelError:
        for name in chosen:
            try:
                uses_of([name], differentiable=True)
            except UnsupportedModelError as error:
                once[name] = str(error)
    layers = []
    for name, size in sizes.items():
        own = [use for use in uses if use.parameter == name]
        kinds = {type(use).__name__.lower() for use in own}
        cost = sum(operations(use) for use in merge(own))
        if name in refused:
            layers.append(LayerReport(name, "unknown", "refused", size, refused[name]))
        else:
            remedies = [_SLOW] if "rows" in kinds else []
            remedies += [f"no penalty: {once[name]}"] if name in once else []
            kind, route = "+".join(sorted(kinds)) or "unused", "rows" if "rows" in kinds else "statistics"
            layers.append(LayerReport(name, kind, route, size, "; ".join(remedies), cost))
    flat = "" if set(ranks) <= {2} else "The outputs are to be flattened for a kernel: transform=lambda f: f.reshape(len(f), -1)."
    return Report(tuple(layers), next(iter(once.values()), ""), flat)


def _uneven(outputs: Array, _: Any) -> Array:
    """Return a sum of the outputs with unequal weights, for that of a softmax's outputs is always 1."""
    xp = array_namespace(outputs)
    if xp.isdtype(outputs.dtype, "complex floating"):
        raise ArgumentError(f"`model` must return real outputs; got {outputs.dtype}. Return real and imaginary parts.")
    if outputs.ndim != 2:  # images, or one number for each sample
        outputs = xp.reshape(outputs, (outputs.shape[0], -1))
    c = outputs.shape[-1]
    return xp.sum(outputs * (xp.arange(1, c + 1, dtype=outputs.dtype)[None, :] / c), axis=-1)
