"""Undo two habits of exporters that change what the parameters are.

* The output weight that is tied to an embedding comes as a transposed copy of the table.
* Keras' recurrent layers have one bias; ONNX has two, and the second comes as zeros.
"""

from __future__ import annotations

import numpy as np

from mgs_core.onnx.graph import Graph, Node


def tie(graph: Graph) -> dict[str, str]:
    """Replace transposed copies of lookup tables by a transposition of the table, and so share its gradient.

    Only the exact transpose of a table that `Gather` reads is tied: two layers that merely start from the same values are not.

    Args:
        graph: changed in place.

    Returns:
        Name of each copy → name of its table.
    """
    tables = {
        node.inputs[0]
        for node in graph.nodes
        if node.operator == "Gather" and node.inputs[0] in graph.initializers and graph.initializers[node.inputs[0]].ndim == 2
    }
    ties: dict[str, str] = {}
    for name, value in graph.initializers.items():
        for table in sorted(tables - {name}):
            source = graph.initializers[table]
            alike = value.shape == source.shape[::-1] and value.dtype == source.dtype and value.size > 0
            if alike and np.any(value != value[0, 0]) and np.array_equal(value, source.T):
                ties[name] = table
                break
    for copy, table in ties.items():
        del graph.initializers[copy]
        graph.nodes.insert(0, Node("Transpose", "", 13, f"{copy} (tied)", (table,), (copy,), {"perm": [1, 0]}, 1))
    return ties


def halve(graph: Graph) -> list[str]:
    """Cut the biases of recurrent layers whose second half, that of the state's products, is nothing but zeros.

    Args:
        graph: changed in place.

    Returns:
        Names of the initialisers that were cut.
    """
    uses = [name for node in graph.nodes for name in node.inputs]
    cut = []
    for node in graph.nodes:
        name = node.inputs[3] if node.operator in ("RNN", "GRU", "LSTM") and node.has(3) else ""
        value = graph.initializers.get(name)
        if value is None or value.ndim != 2 or uses.count(name) > 1 or value.shape[1] % 2:
            continue
        half = value.shape[1] // 2
        if np.any(value[:, :half]) and not np.any(value[:, half:]):
            graph.initializers[name] = value[:, :half]
            cut.append(name)
    return cut
