"""What the callbacks of PyTorch's trainers share: the unit of their schedule, their targets, and what they log of a record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mgs_core as mgs
from mgs_core.monitor import targets_of


class Counter:
    """Say when to measure, by the trainer's own count of steps, which may leave numbers out, or of epochs.

    Attributes:
        unit: "step" or "epoch".
        targets: of the probe batch, still where the user has them.
    """

    def __init__(self, unit: Any, targets: Any, options: Mapping[str, Any]) -> None:
        """Take the schedule out of the options; by default each hundredth step, or each epoch.

        Args:
            unit: what is counted.
            targets: of the probe batch, or None.
            options: the user's.

        Raises:
            ArgumentError: when the unit is neither, or the schedule is none.
        """
        if unit not in ("step", "epoch"):
            raise mgs.ArgumentError(f'`unit` must be "step" or "epoch"; got {unit!r}.')
        every = options.get("every", 100 if unit == "step" else 1)
        self.unit, self.targets, self._options = unit, targets_of(targets, options.get("labels"), options), options
        self._schedule = every if isinstance(every, mgs.Schedule) else mgs.Schedule(every)
        self._last = -1

    def options(self, *, first: bool) -> dict[str, Any]:
        """Return the options of `MGSMonitor`, which measures whenever it is asked to; of several processes the first writes."""
        return {**self._options, "every": 1, **({} if first else {"sinks": ()})}

    def begin(self, number: int) -> None:
        """Count on from a number, as a resumed run does."""
        self._last = number

    def due(self, unit: str, number: int) -> bool:
        """Return whether a measurement was due since the number before this one."""
        if unit != self.unit:
            return False
        before, self._last = self._last, number
        return any(map(self._schedule, range(before + 1, number + 1)))


def figures(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is logged of a record: the trainer counts steps, and takes time, by itself."""
    return {name: value for name, value in record.items() if name not in ("step", "seconds")}
