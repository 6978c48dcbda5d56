"""What a record came from: the definition of its recipe, and the versions of the packages that computed it."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from mgs_core.experiments.recipes import Recipe

_APART = ("name", "tuned", "tried")  # fields that do not change a run
_PACKAGES = {"numpy": ("numpy", "autograd"), "jax": ("numpy", "jax", "jaxlib")}


def definition(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of a recipe that differ from their defaults, as JSON holds them."""
    return {
        field.name: _plain(getattr(recipe, field.name))
        for field in fields(recipe)
        if field.name not in _APART and getattr(recipe, field.name) != field.default
    }


@cache
def versions(backend: str) -> dict[str, str]:
    """Return the versions of this library, NumPy and the packages of a backend."""
    found = {"mgs_core": importlib.import_module("mgs_core").__version__}
    packages = _PACKAGES.get(backend, ("numpy", backend))
    if backend == "keras":
        packages = (*packages, importlib.import_module("keras").backend.backend())
    return found | {name: _version(name) for name in packages}


def other_versions(records: Iterable[Mapping[str, Any]], backend: str) -> dict[str, list[str]]:
    """Return the packages that records were made with in other versions than are installed, and these versions."""
    now = versions(backend)
    found: dict[str, set[str]] = {}
    for record in records:
        for name, version in record.get("versions", {}).items():
            if now.get(name) != version:
                found.setdefault(name, set()).add(version)
    return {name: sorted(others) for name, others in sorted(found.items())}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # TensorFlow comes under several names
        return str(getattr(importlib.import_module(package), "__version__", "unknown"))


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"  # of a function
