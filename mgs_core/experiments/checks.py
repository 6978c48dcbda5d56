"""Check samples and their labels, as arrays of a user or from a file."""

from __future__ import annotations

import warnings

import numpy as np

from mgs_core._errors import ArgumentError
from mgs_core._types import Array


def check_inputs(name: str, x: Array) -> None:
    """Refuse what are no samples.

    Args:
        name: what the user calls them.
        x: should be real numbers of shape (n, …), n at least 2, finite.

    Raises:
        ArgumentError: when they are not.
    """
    real = (np.issubdtype(x.dtype, np.number) or x.dtype == bool) and not np.iscomplexobj(x)
    if not real or x.ndim < 2 or len(x) < 2 or x.size == 0:
        apart = f"Give each sample an axis: {name}[:, None]" if x.ndim == 1 else "Pass more"
        remedy = apart if real else "Convert them to numbers"
        raise ArgumentError(
            f"`{name}` must be real numbers of shape (n, …), n ≥ 2; got dtype {x.dtype}, shape {x.shape}. {remedy}."
        )
    if not np.all(np.isfinite(x)):
        raise ArgumentError(f"`{name}` must be finite; got NaN or infinity. Remove or replace these values.")


def check_labels(name: str, y: Array, samples: int, numbered: str) -> None:
    """Refuse what does not number the class of each sample.

    Args:
        name: what the user calls them.
        y: should be integers from 0 of shape (n,).
        samples: n.
        numbered: what numbers the classes from 0.

    Raises:
        ArgumentError: when they are not.
    """
    if y.shape == (samples,) and np.issubdtype(y.dtype, np.integer) and y.min() >= 0:
        return
    if y.shape == (samples, 1):
        remedy = f"Drop the second axis: {name}.ravel()."
    elif y.ndim == 2 and len(y) == samples and y.size:
        remedy = f"Take the class of each row: {name}.argmax(axis=1)."
    elif y.shape != (samples,):
        remedy = "Give each sample one label."
    elif np.issubdtype(y.dtype, np.floating) and not np.all(y == np.floor(y)):
        remedy = "Classes are numbered; what is measured has none: this is for classifiers."
    else:
        remedy = f"Number the classes from 0: {numbered}."
    some = f", {(y if y.dtype == object else np.unique(y)).ravel()[:5].tolist()}" if y.size else ""
    raise ArgumentError(
        f"`{name}` must be integers from 0, shape ({samples},); got dtype {y.dtype}, shape {y.shape}{some}. {remedy}"
    )


def count_classes(labels: Array, name: str) -> int:
    """Return the largest label + 1, the number of outputs that a network for them has.

    Args:
        labels: integers of at least 0.
        name: what the user calls them.

    Raises:
        ArgumentError: when nearly all of many classes are without samples, for memory grows with their number.
    """
    classes, distinct = int(labels.max()) + 1, len(np.unique(labels))
    if classes > max(1000, 10 * distinct):
        raise ArgumentError(
            f"`{name}` must number its classes from 0 without large gaps; got {distinct} classes and labels up to {classes - 1}. "
            f"Renumber them: numpy.unique({name}, return_inverse=True)[1]."
        )
    return classes


def warn_of_units(x: Array) -> None:
    """Warn of a table that half of the columns have next to no part in, as where others are in much larger units.

    Both their variance and their range must be small: pixels at an edge and rare categories vary little, but range like others.

    Args:
        x: (n, …), real numbers; only tables (n, d) are looked at. What calls this is called by the user.
    """
    if x.ndim != 2:
        return
    ranges, variances = np.ptp(x, axis=0), np.var(x, axis=0, dtype=np.float64)
    half = np.count_nonzero(ranges) // 2  # constant columns say nothing in any unit
    squares = np.sort([variances[ranges > 0], np.square(ranges[ranges > 0], dtype=np.float64)])
    if half and np.all(squares[:, :half].sum(axis=1) < 0.01 * squares.sum(axis=1)):
        warnings.warn(
            f"Column {variances.argmax()} of `inputs` has {variances.max() / variances.sum():.0%} of their variance and half of "
            "the columns together less than 1%, so that the networks see little of these, for inputs are scaled as a whole. "
            "Bring the columns to one scale: (x - x.mean(0)) / x.std(0).",
            UserWarning,
            stacklevel=3,
        )
