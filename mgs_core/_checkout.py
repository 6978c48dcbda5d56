"""Find backends and adapters in a checkout, where they lie beside this package.

They are installed as parts of it. But Python that is started in a checkout finds the folder mgs_core there before what is
installed.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

_PACKAGE = Path(__file__).parent
_BESIDE = {f"mgs_core.{name}": _PACKAGE.parent / name for name in ("backends", "adapters")}


class _Finder:
    """Be asked first, for an installation may be that of another checkout."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return where one of the two packages is, and nothing of others."""
        folder = _BESIDE.get(name)
        if folder is None or not (folder / "__init__.py").is_file():
            return None
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


def complete() -> None:
    """Let the packages be found, if this one lies in a checkout."""
    if not (_PACKAGE / "backends").is_dir():
        sys.meta_path.insert(0, _Finder)
