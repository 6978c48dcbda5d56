"""Lift weights that a file keeps in attributes to initialisers, so that they can be parameters."""

from __future__ import annotations

import numpy as np

from mgs_core.onnx.errors import damaged
from mgs_core.onnx.graph import Graph

#: Operators of ai.onnx.ml whose coefficients and intercepts are attributes.
LIFTED = ("LinearClassifier", "LinearRegressor")


def lift(graph: Graph) -> None:
    """Give the linear models of ai.onnx.ml their coefficients and intercepts as inputs.

    Args:
        graph: changed in place; initialisers are named "<node>.coefficients" and "<node>.intercepts".

    Raises:
        ArgumentError: when the sizes do not fit.
    """
    for node in graph.nodes:
        if node.domain != "ai.onnx.ml" or node.operator not in LIFTED:
            continue
        values = np.asarray(node.attributes["coefficients"], dtype=node.dtype(1))
        shift = node.attributes.get("intercepts")
        rows = len(shift) if shift else node.attributes.get("targets", 0) or _classes(node.attributes)
        if rows < 1 or values.size % rows or values.ndim != 1:
            raise damaged(str(node), f"has {values.size} coefficients for {rows} rows")
        names = [f"{node.name}.coefficients"]
        graph.initializers[names[0]] = values.reshape(rows, -1)
        if shift:
            names.append(f"{node.name}.intercepts")
            graph.initializers[names[1]] = np.asarray(shift, dtype=node.dtype(1))
        node.inputs, node.explicit = (node.inputs[0], *names), 1 + len(names)


def _classes(attributes: dict[str, object]) -> int:
    for name in ("classlabels_ints", "classlabels_strings"):
        labels = attributes.get(name)
        if isinstance(labels, list):
            return len(labels)
    return 0
