"""The table: one row for each regulariser, short for a terminal and in full for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mgs_core.report.numbers import MISSING, mean, written, written_with_error
from mgs_core.report.runs import Comparison, read

COLUMNS: tuple[tuple[str, str, str, bool], ...] = (  # title in short, title in full, field, in percent
    ("test % ± s.e.", "test %, last", "last_test_accuracy", True),
    ("best % ± s.e.", "test %, best", "best_test_accuracy", True),
    ("memor. % ± s.e.", "memorised %", "memorisation", True),
    ("trace", "trace", "mgs_trace", False),
    ("log det", "log-determinant", "mgs_log_determinant", False),
    ("simil. part", "similarity part", "mgs_similarity", False),
    ("eff. rank", "effective rank", "mgs_effective_rank", False),
)


def table(records: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return one row for each regulariser, the highest last test accuracy first.

    Figures are means over the seeds; `±` is the standard error of the mean (n − 1 degrees of freedom), left out where there is
    one seed, and a dash stands where there is no number. Test accuracy is that of the end of training and of the best epoch. Only
    finished runs count, unless a regulariser has none: its last epochs are then shown, and the column "runs" says so. Failed runs
    do not count, and it says that too. Rows are short enough for a terminal of 80 columns; the page has all standard errors.

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
        >>> row["regulariser"], row["test % ± s.e."], row["runs"]
        ('none', '60.0±10.0', '2')
    """
    comparison = read(records)
    return [_short(comparison, name) for name in ranked(comparison)]


def ranked(comparison: Comparison) -> list[str]:
    """Return the regularisers, the highest mean of the last test accuracy first, those without one last."""

    def place(name: str) -> tuple[bool, float]:
        values = comparison.finals(name, "last_test_accuracy")
        return (not values, -mean(values) if values else 0.0)

    return sorted(comparison.regularizers, key=place)


def full_row(comparison: Comparison, name: str) -> dict[str, str]:
    """Return the row of one regulariser with all standard errors."""
    cells = {title: written_with_error(comparison.finals(name, field), share=share) for _, title, field, share in COLUMNS}
    return {"regulariser": name, **cells, "time s": _seconds(comparison, name), "runs": _runs(comparison, name)}


def _short(comparison: Comparison, name: str) -> dict[str, str]:
    cells = {}
    for title, _, field, share in COLUMNS:
        values = comparison.finals(name, field)
        if share:
            cells[title] = written_with_error(values, share=True).replace(" ± ", "±")
        else:
            cells[title] = written(mean(values) if values else None, digits=3)
    return {"regulariser": name, **cells, "time s": _seconds(comparison, name), "runs": _runs(comparison, name)}


def _seconds(comparison: Comparison, name: str) -> str:
    values = comparison.finals(name, "seconds")
    return f"{mean(values):.1f}" if values else MISSING


def _runs(comparison: Comparison, name: str) -> str:
    finished, total = comparison.counted(name)
    if finished:
        return str(total) if finished == total else f"{finished} of {total}"
    return f"{total} failed" if len(comparison.failed(name)) == total else f"{total} unfinished"
