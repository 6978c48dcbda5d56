"""What the callbacks of PyTorch's trainers share: the unit of their schedule, and what they log of a record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mgs_core as mgs


def scheduled(unit: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `MGSMonitor`, by default with a measurement each epoch where these are counted.

    Args:
        unit: what the schedule counts.
        options: the user's.

    Returns:
        The options.

    Raises:
        ArgumentError: when the schedule cannot count the unit.
    """
    if unit not in ("step", "epoch"):
        raise mgs.ArgumentError(f'`unit` must be "step" or "epoch"; got {unit!r}.')
    return {"every": 1, **options} if unit == "epoch" else dict(options)


def figures(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is logged of a record: the trainer counts steps, and takes time, by itself."""
    return {name: value for name, value in record.items() if name not in ("step", "seconds")}
