"""Find the array-API namespace of arrays: array-api-compat knows most, backends register the rest."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import array_api_compat

from mgs_core._errors import ArgumentError
from mgs_core._types import Array, Namespace

# array types whose namespace a backend registers: root of their module → backend
_FROM_BACKEND = {"autograd": "numpy", "jax": "jax", "jaxlib": "jax", "tensorflow": "tensorflow", "torch": "torch"}
_registered: list[tuple[Callable[[Array], bool], Namespace]] = []
#: Registered namespaces by the arrays' type, for a kernel asks some hundred times.
_by_type: dict[type, Namespace] = {}


def register_namespace(matches: Callable[[Array], bool], namespace: Namespace) -> None:
    """Register the namespace of an array type that array-api-compat does not know.

    Args:
        matches: predicate on one array.
        namespace: object with the array-API functions for the arrays that match. One that makes arrays on a default device has
            `mgs_beside(array)`, which returns the namespace that makes them where that one is.
    """
    _registered.append((matches, namespace))
    _by_type.clear()


def array_namespace(*arrays: Array) -> Namespace:
    """Return the array-API namespace in which the arrays live.

    A registered type (a traced array, say) wins over a plain one, because its functions accept both.

    Args:
        *arrays: arrays; Python scalars and None are ignored.

    Returns:
        The namespace: a module or module-like object.

    Raises:
        ArgumentError: when there is no array, or arrays of two frameworks meet.
    """
    found = [a for a in arrays if a is not None and not isinstance(a, (int, float, complex, bool))]
    kinds = set(map(type, found))
    known = _by_type.get(next(iter(kinds))) if len(kinds) == 1 else None
    if known is not None:
        return _beside(known, found[0])
    for array in found:
        _load_backend_of(type(array).__module__)
    for number, (matches, namespace) in enumerate(_registered):
        own = [array for array in found if matches(array)]
        if not own:
            continue
        others = [array for array in found if not matches(array)] if len(own) < len(found) else []
        if any(other(array) for array in others for other, _ in _registered[number + 1 :]):
            raise _of_several(found)
        if len(kinds) == 1:
            _by_type[type(own[0])] = namespace
        return _beside(namespace, own[0])
    try:
        return cast(Namespace, array_api_compat.array_namespace(*found))
    except TypeError as error:
        raise _of_several(found) from error


def _beside(namespace: Namespace, array: Array) -> Namespace:
    beside = getattr(namespace, "mgs_beside", None)
    return namespace if beside is None else beside(array)


def _of_several(found: list[Array]) -> ArgumentError:
    kinds = sorted({f"{type(a).__module__}.{type(a).__name__}" for a in found})
    return ArgumentError(f"`arrays` must be arrays of one framework; got {', '.join(kinds) or 'none'}. Convert them first.")


@cache
def _load_backend_of(module: str) -> None:
    """Load the backend that registers the namespace of arrays of this module."""
    backend = _FROM_BACKEND.get(module.partition(".")[0])
    if backend is not None and f"mgs_core.backends.{backend}" not in sys.modules:
        from mgs_core._registry import get_backend  # here, because the registry rests on this module's users

        get_backend(backend)


class _Host:
    """Be the namespace of NumPy, imported at its first use: array-api-compat's takes longer than all of this package."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("array_api_compat.numpy"), name)


#: NumPy with array-API names, for what is computed on the host.
host: Namespace = _Host()
