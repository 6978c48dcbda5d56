"""Check arguments that several functions take."""

from __future__ import annotations

import operator
from typing import Any

from mgs_core._errors import ArgumentError


def integer(name: str, value: Any, least: int, remedy: str = "") -> int:
    """Return an integer of any kind, as NumPy's, as Python's.

    Args:
        name: of the argument.
        value: what was passed.
        least: the smallest that is allowed.
        remedy: ends the message.

    Returns:
        The integer.

    Raises:
        ArgumentError: when it is none, a bool, or too small.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ArgumentError(f"`{name}` must be an integer of at least {least}; got {value!r}.{remedy and ' ' + remedy}")
    return number
