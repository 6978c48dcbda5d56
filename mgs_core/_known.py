"""Keep what was found out about a structure of computation, for the last used ones, and find it out anew from time to time.

Where the samples are, and whether they interact, is found by evaluation: it depends on the structure (the operations, their
shapes and settings), but in some models on values too, as that of `h + s·h.mean(0)` does on s. So what is kept is verified at the
2nd, 4th, 8th, 16th, … use of a structure, which costs nothing in the long run; what has been seen to depend on values, at each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import MethodType
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from mgs_core._errors import NotFiniteError, SamplesInteractError

T = TypeVar("T")

#: Values that are kept, each for one shape of batch: of what is large, as compiled programs.
KEPT = 64
#: Findings, which are small, and of which sequences padded batch by batch ask for hundreds in turn.
KEPT_FINDINGS = 512


class Recent(Generic[T]):
    """Hold the values that were used last, by key."""

    def __init__(self, kept: int = KEPT) -> None:
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._kept = kept

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._values)

    def take(self, key: Hashable) -> T | None:
        """Return the value and forget it; None where there is none. In one step, for threads share it."""
        return self._values.pop(key, None)

    def put(self, key: Hashable, value: T) -> T:
        """Keep a value as the last used one, and forget the first beyond those that are kept; return the value."""
        self._values[key] = value
        while len(self._values) > self._kept:
            try:
                self._values.popitem(last=False)
            except KeyError:  # another thread did
                break
        return value


@dataclass
class _Entry:
    """Hold what was found, how often it was asked for, and whether it has been seen to depend on values."""

    value: Any
    uses: int = 1
    varies: bool = False


class Known(Generic[T]):
    """Hold findings by structure, and verify them."""

    def __init__(self) -> None:
        self._recent: Recent[_Entry] = Recent(KEPT_FINDINGS)

    def __len__(self) -> int:
        """Return how many structures are kept."""
        return len(self._recent)

    def of(self, key: Hashable, find: Callable[[], tuple[T, bool]]) -> T:
        """Return what is known about a structure, or is found now.

        Args:
            key: equal for equal structures.
            find: returns the finding, which can be compared, and whether it may hold for other values too; else it is not kept.

        Returns:
            The finding.

        Raises:
            SamplesInteractError: when `find` does; it is not kept either, for other values may do.
        """
        entry = self._recent.take(key)
        if entry is not None and not entry.varies:
            entry.uses += 1
            if entry.uses & (entry.uses - 1):  # no power of two
                found: T = self._recent.put(key, entry).value
                return found
        try:
            value, holds = find()
        except SamplesInteractError:
            self._recent.put(key, _Entry(None, varies=True))
            raise
        except NotFiniteError:
            if entry is None or entry.varies:
                raise
            entry.uses -= 1  # values that are not finite say nothing: verify at the next use
            kept: T = self._recent.put(key, entry).value
            return kept
        varies = entry is not None and (entry.varies or value != entry.value)
        if varies:
            self._recent.put(key, _Entry(None, varies=True))
        elif holds:
            self._recent.put(key, entry or _Entry(value))
        return value

    def kept(self, key: Hashable) -> T | None:
        """Return what is known without verifying it, as where a step is traced and values cannot be looked at."""
        entry = self._recent.take(key)
        return None if entry is None else self._recent.put(key, entry).value


class KnownByOwner(Generic[T]):
    """Hold what is known about each function or module, as long as it lives."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Any, dict[Any, Known[T]]] = WeakKeyDictionary()

    def of(self, owner: Any) -> Known[T]:
        """Return what is known about a module, function or bound method; nothing yet for what takes no weak reference."""
        # a bound method is made anew each time that it is named, the object behind it is not
        owner, part = (owner.__self__, owner.__func__) if isinstance(owner, MethodType) else (owner, None)
        try:
            return self._known.setdefault(owner, {}).setdefault(part, Known())
        except TypeError:
            return Known()
