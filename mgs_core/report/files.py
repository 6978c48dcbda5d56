"""Write files so that a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from mgs_core._errors import writing


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
    with writing(folder):
        target.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            _replace(target / name, content)
    return target


def check_files(folder: str | Path, names: Iterable[str]) -> None:
    """Refuse files that could not be written, before they are worked for; the folder is made if need be.

    Args:
        folder: where the files are to go.
        names: of the files.

    Raises:
        ArgumentError: when the folder cannot be written, or a folder has the name of a file.
    """
    target = write_files(folder, {})
    with writing(folder):
        for name in names:
            if (target / name).is_dir():
                raise IsADirectoryError(f"{name} is a folder")
            beside = _beside(target / name)
            beside.touch()
            beside.unlink()


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def _replace(path: Path, content: bytes) -> None:
    beside = _beside(path)
    try:
        with beside.open("xb") as file:  # not tempfile's, which nobody else may read whatever the umask
            file.write(content)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
