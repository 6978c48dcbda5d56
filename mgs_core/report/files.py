"""Write files so that a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mgs_core._errors import ArgumentError


def write_files(folder: str | Path, contents: Mapping[str, bytes]) -> Path:
    """Write files into a folder, each in one step, in the order given.

    Args:
        folder: where the files go; made if need be.
        contents: what goes into each, by name.

    Returns:
        The folder.

    Raises:
        ArgumentError: when the folder cannot be written.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            _replace(target / name, content)
    except OSError as error:
        raise ArgumentError(
            f"`folder` must be a folder that can be written; got {str(folder)!r} ({error}). Choose another."
        ) from error
    return target


def _replace(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)  # mkstemp lets nobody else read it
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
