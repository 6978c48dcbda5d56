"""Say beforehand how each parameter of a model will enter the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from mgs_core import _batch
from mgs_core._errors import SamplesInteractError
from mgs_core._protocol import LayerReport
from mgs_core._registry import get_backend
from mgs_core.heads import make_head


@dataclass(frozen=True)
class Report:
    """Hold one `LayerReport` for each parameter; prints as a table.

    Attributes:
        layers: the rows of the table.
    """

    layers: tuple[LayerReport, ...]

    @property
    def ok(self) -> bool:
        """Return whether no parameter is refused."""
        return all(layer.route != "refused" for layer in self.layers)

    def __str__(self) -> str:
        """Return the table as text."""
        table = [("parameter", "kind", "route", "size", "remedy")]
        table += [(a.parameter, a.kind, a.route, str(a.size), a.remedy) for a in self.layers]
        widths = [max(len(row[column]) for row in table) for column in range(4)]
        return "\n".join(
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]).rstrip() for row in table
        )


def check(model: Any, inputs: Any) -> Report:
    """Report, for each parameter, the kind of its use and the route into the kernel: statistics, rows or refused.

    Args:
        model: as for `kernel`.
        inputs: a batch of at least 2 samples, as for `kernel`.

    Returns:
        The report.

    Cost:
        One kernel's statistics of the batch for the sum of the outputs; a few samples are enough.

    Example:
        >>> import numpy as np
        >>> import mgs_core as mgs
        >>> model = mgs.FunctionalModel(lambda p, x: x @ p["w"] + p["b"], {"w": np.ones((3, 2)), "b": np.zeros(2)})
        >>> print(mgs.check(model, np.ones((4, 3))))
        parameter  kind   route       size  remedy
        w          outer  statistics  6
        b          sum    statistics  2
    """
    _batch.count(inputs)
    backend = get_backend(model)
    sizes = {name: prod(array.shape) for name, array in backend.parameters(model).items()}
    head = make_head("sum", "identity", None, 1, 0, None)
    try:
        uses = backend.statistics(model, inputs, None, head.function, None, differentiable=False)
    except SamplesInteractError as error:
        return Report(tuple(LayerReport(name, "unknown", "refused", size, str(error)) for name, size in sizes.items()))
    kinds: dict[str, set[str]] = {name: set() for name in sizes}
    for use in uses:
        kinds[use.parameter].add(type(use).__name__.lower())
    layers = []
    for name, size in sizes.items():
        slow = "rows" in kinds[name]
        remedy = "exact but slow, one backward pass a sample; use it in a matrix product, or freeze it" if slow else ""
        kind = "+".join(sorted(kinds[name])) or "unused"
        layers.append(LayerReport(name, kind, "rows" if slow else "statistics", size, remedy))
    return Report(tuple(layers))
