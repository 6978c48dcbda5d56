"""Find a backend by name, by array or by model, and import it only then."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any, cast

from mgs_core._errors import ArgumentError, BackendError, installing
from mgs_core._protocol import Backend
from mgs_core._tree import flatten
from mgs_core.functional import FunctionalModel

# name → (module that must be importable, roots of the modules whose types belong to it)
_BACKENDS: dict[str, tuple[str, frozenset[str]]] = {
    "numpy": ("autograd", frozenset({"numpy", "autograd"})),
    "torch": ("torch", frozenset({"torch"})),
    "jax": ("jax", frozenset({"jax", "jaxlib", "flax"})),
    "tensorflow": ("tensorflow", frozenset({"tensorflow"})),
    "keras": ("keras", frozenset({"keras"})),  # models only: their arrays are a framework's
}
_loaded: dict[str, Backend] = {}


def available_backends() -> dict[str, bool]:
    """Return the backends by name, and whether the framework of each is installed.

    Returns:
        name → installed.

    Example:
        >>> import mgs_core as mgs
        >>> mgs.available_backends()["numpy"]
        True
    """
    return {name: _is_installed(module) for name, (module, _) in _BACKENDS.items()}


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # of a module that was made by hand
        return False


def get_backend(source: Any) -> Backend:
    """Return the backend for a name, an array or a model.

    Args:
        source: a name from `available_backends()`, an array, or a model.

    Returns:
        The backend; imported on its first use.

    Raises:
        BackendError: when the name is unknown or its framework is not installed.
        ArgumentError: when no backend knows the type of `source`.

    Example:
        >>> import mgs_core as mgs
        >>> mgs.get_backend("numpy").name
        'numpy'
    """
    name = source if isinstance(source, str) else _name_of(source)
    if name not in _BACKENDS:
        raise BackendError(f"`backend` must be one of {', '.join(_BACKENDS)}; got {name!r}. See mgs_core.available_backends().")
    if name not in _loaded:
        if not available_backends()[name]:
            raise BackendError(
                f"`backend` must be installed; got {name!r}, whose package {_BACKENDS[name][0]!r} is missing. "
                f"Run in the checkout: {installing(name)}"
            )
        module = importlib.import_module(f"mgs_core.backends.{name}")
        _loaded[name] = cast(Backend, module.backend)
    return _loaded[name]


def _name_of(source: Any) -> str:
    if isinstance(source, FunctionalModel):
        source = _leaf(source.parameters)
        # NumPy's own scalars pass: an update of a parameter without axes makes one
        if isinstance(source, (bool, int, float)) and not hasattr(source, "dtype"):
            raise ArgumentError(
                f"`parameters` must hold arrays; got the number {source!r}. Convert it to an array of your framework."
            )
    name = _known_by(source)
    if name is None:
        raise ArgumentError(
            f"`model` must be a FunctionalModel or a model or array of {', '.join(_BACKENDS)}; got {type(source).__name__}. "
            "Wrap a plain function: mgs_core.FunctionalModel(function, parameters)."
        )
    return name


def _leaf(parameters: Any) -> Any:
    """Return the array of a tree that tells the backend; JAX is asked too, for users register their trees with it."""
    leaves = list(flatten(parameters).values())
    if "jax" in sys.modules and (not leaves or _known_by(leaves[0]) is None):
        leaves = sys.modules["jax"].tree_util.tree_leaves(parameters)
    if not leaves:
        raise ArgumentError("`parameters` must hold at least one array; got none. Pass the model's parameters.")
    return next((leaf for leaf in leaves if _known_by(leaf) not in (None, "numpy")), leaves[0])  # others take NumPy's too


def _known_by(source: Any) -> str | None:
    """Return the name of the backend that the type of an array or a model belongs to."""
    modules = [kind.__module__ for kind in type(source).__mro__]
    if any(module.partition(".")[0] == "keras" for module in modules):
        return "keras"  # a Keras model is also a model of its framework
    for module in modules:
        for name, (_, roots) in _BACKENDS.items():
            if module.partition(".")[0] in roots or module.startswith(f"mgs_core.backends.{name}."):
                return name
    return None
