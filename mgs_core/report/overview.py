"""The table: one row for each regulariser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mgs_core.report.numbers import MISSING, mean, written_with_error
from mgs_core.report.runs import Comparison, read

COLUMNS: tuple[tuple[str, str, bool], ...] = (
    ("test %, last (± s.e.)", "last_test_accuracy", True),
    ("test %, best", "best_test_accuracy", True),
    ("memorised %", "memorisation", True),
    ("trace", "mgs_trace", False),
    ("log det", "mgs_log_determinant", False),
    ("similarity", "mgs_similarity", False),
    ("eff. rank", "mgs_effective_rank", False),
)


def table(records: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return one row for each regulariser, the highest last test accuracy first.

    Figures are `mean ± standard error` over the seeds (n − 1 degrees of freedom), the mean alone where there is one seed, and a
    dash where there is no number. Only finished runs count, unless a regulariser has none: its last epochs are then shown, and
    the column "runs" says so.

    Args:
        records: the dicts of `records.jsonl`; any field may be missing or None.

    Returns:
        Rows with the same keys in the same order.

    Raises:
        ArgumentError: when there is no record of an epoch or a run.

    Example:
        >>> from mgs_core.report import table
        >>> runs = [{"event": "run", "regularizer": "none", "seed": s, "last_test_accuracy": a} for s, a in enumerate((0.5, 0.7))]
        >>> row = table(runs)[0]
        >>> row["regulariser"], row["test %, last (± s.e.)"], row["runs"]
        ('none', '60.0 ± 10.0', '2')
    """
    comparison = read(records)
    return [row(comparison, name) for name in ranked(comparison)]


def ranked(comparison: Comparison) -> list[str]:
    """Return the regularisers, the highest mean of the last test accuracy first, those without one last."""

    def place(name: str) -> tuple[bool, float]:
        values = comparison.finals(name, "last_test_accuracy")
        return (not values, -mean(values) if values else 0.0)

    return sorted(comparison.regularizers, key=place)


def row(comparison: Comparison, name: str) -> dict[str, str]:
    """Return the row of one regulariser."""
    cells = {title: written_with_error(comparison.finals(name, field), share=share) for title, field, share in COLUMNS}
    seconds = comparison.finals(name, "seconds")
    finished, total = comparison.counted(name)
    return {
        "regulariser": name,
        **cells,
        "seconds": f"{mean(seconds):.1f}" if seconds else MISSING,
        "runs": str(total) if finished == total else f"{finished} of {total}" if finished else f"{total} unfinished",
    }
