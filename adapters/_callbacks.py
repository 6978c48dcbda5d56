"""What the callbacks of PyTorch's trainers share: the unit of their schedule, and what they log of a record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mgs_core as mgs


def check_unit(unit: Any) -> None:
    """Refuse a unit that the schedule cannot count."""
    if unit not in ("step", "epoch"):
        raise mgs.ArgumentError(f'`unit` must be "step" or "epoch"; got {unit!r}.')


def figures(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is logged of a record: the trainer counts steps, and takes time, by itself."""
    return {name: value for name, value in record.items() if name not in ("step", "seconds")}
