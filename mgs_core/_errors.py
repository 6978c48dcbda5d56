"""The taxonomy of refusals.

Every error of this library derives from `MgsError` and says which argument is wrong, what was got and the remedy. Four kinds:

* `ArgumentError`: the call is wrong; change the argument.
* `BackendError`: the backend is unknown, or a package that is needed is not installed; install the extra.
* `SamplesInteractError`: never supportable; per-sample gradients do not exist for this model.
* `UnsupportedModelError`: not supported (yet); the message names the layer and what to use instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING


class MgsError(Exception):
    """Base class of every error that this library raises on purpose."""

    if not TYPE_CHECKING:  # by this TensorFlow's AutoGraph sees that a class takes a message, and raises it within a tf.function
        __init__ = Exception.__init__


class ArgumentError(MgsError, ValueError):
    """Report an argument that has the wrong type, shape, range or content."""


class NotFiniteError(ArgumentError):
    """Report gradients, or a kernel of them, that are NaN, infinite or all 0, as those of a model that has diverged or died."""


class BackendError(MgsError, ImportError):
    """Report a backend that is unknown, or a package that is not installed."""


class SamplesInteractError(MgsError, ValueError):
    """Report that one sample's output depends on another sample, so that per-sample gradients do not exist."""


class UnsupportedModelError(MgsError, NotImplementedError):
    """Report a model, layer or operation that this library cannot treat exactly."""


@contextmanager
def renamed(**names: str) -> Iterator[None]:
    """Let an `ArgumentError` call its argument as the caller does, who passes it on: `renamed(source="data")`.

    The name changes at the beginning and in the code of the remedy: `labels.ravel()`, `labels[:, None]`, `unique(labels)`.
    """
    try:
        yield
    except ArgumentError as error:
        message = str(error)
        found = re.match(r"`(\w+)`", message)
        if not found or found[1] not in names:
            raise
        old, new = found[1], names[found[1]]
        message = re.sub(rf"^`{old}`|\b{old}(?=\.\w+\(|\[)|(?<=\(){old}(?=[,)])", lambda hit: hit[0].replace(old, new), message)
        raise type(error)(message) from error


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """Say of a folder that it cannot be written, where that is so."""
    try:
        yield
    except OSError as error:
        raise ArgumentError(
            f"`folder` must be a folder that can be written; got {str(folder)!r} ({error}). Choose another."
        ) from error


def installing(extra: str) -> str:
    """Return the command that installs an extra, from the checkout, for no index has this package yet."""
    return f'pip install ".[{extra}]" -c constraints.txt'


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Say which extra to install where an import fails; `what` needs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("mgs_core"):
            raise
        raise BackendError(
            f"{what} needs the package {error.name!r}, which is not installed. Run in the checkout: {installing(name)}"
        ) from error
