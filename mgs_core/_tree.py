"""Flatten nested dicts, lists and tuples of arrays into named leaves, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mgs_core._errors import ArgumentError
from mgs_core._types import Array, Tree


def flatten(tree: Tree, prefix: str = "") -> dict[str, Array]:
    """Return the leaves by dotted name (`"layers.0.weight"`), in order.

    Args:
        tree: dicts, lists and tuples of arrays.
        prefix: name of the tree itself.

    Returns:
        The leaves by name.

    Raises:
        ArgumentError: when two leaves have the same name, as `{"a.b": x, "a": {"b": y}}` gives.
    """
    if not (_is_mapping(tree) or isinstance(tree, (list, tuple))):
        return {prefix or "parameter": tree}
    leaves: dict[str, Array] = {}
    for key, value in tree.items() if _is_mapping(tree) else enumerate(tree):
        for name, leaf in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items():
            if name in leaves:
                raise ArgumentError(
                    f"A tree of arrays must have one name for each leaf; got two {name!r}. Rename a key with a dot."
                )
            leaves[name] = leaf
    return leaves


def unflatten(tree: Tree, leaves: Mapping[str, Array], prefix: str = "") -> Tree:
    """Return a tree shaped as `tree` with the leaves replaced by name."""
    if _is_mapping(tree):
        return {k: unflatten(v, leaves, f"{prefix}.{k}" if prefix else str(k)) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        values = [unflatten(v, leaves, f"{prefix}.{k}" if prefix else str(k)) for k, v in enumerate(tree)]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return leaves[prefix or "parameter"]


def _is_mapping(tree: Tree) -> bool:
    # autograd's traced dict behaves as a mapping but is not registered as one
    return isinstance(tree, Mapping) or (hasattr(tree, "keys") and hasattr(tree, "items"))


def select(names: Iterable[str], chosen: Iterable[str] | Callable[[str], bool] | None) -> list[str]:
    """Return the names that `chosen` (None = all, names, or a predicate) picks, in order.

    Args:
        names: all names.
        chosen: the user's `parameters` argument.

    Returns:
        The names picked.

    Raises:
        ArgumentError: when a name is unknown, nothing is picked, or there is nothing to pick from.
    """
    names = list(names)
    if not names:
        raise ArgumentError("`model` must have trainable parameters, whose kernel it is; got none. Unfreeze some.")
    if chosen is None:
        picked = names
    elif callable(chosen):
        picked = [name for name in names if chosen(name)]
    else:
        wanted = [chosen] if isinstance(chosen, str) else list(chosen)
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise ArgumentError(f"`parameters` must name parameters of the model; got {unknown}. It has {names}.")
        picked = [name for name in names if name in wanted]
    if not picked:
        raise ArgumentError(f"`parameters` must pick at least one parameter; got none. The model has {names}.")
    return picked


def kept_choice(chosen: Iterable[str] | Callable[[str], bool] | None) -> str | list[str] | Callable[[str], bool] | None:
    """Return the user's `parameters` argument as it can be used more than once: an iterator gives its names only once."""
    if chosen is None or isinstance(chosen, str) or callable(chosen):
        return chosen
    names = list(chosen) if isinstance(chosen, Iterable) else [chosen]
    if not all(isinstance(name, str) for name in names):
        raise ArgumentError(f"`parameters` must be names or a function of one; got {chosen!r}. Pass strings.")
    return names


def add_named(names: dict[str, Any], name: str, value: Any) -> None:
    """Add a value by its name, or by `name#2`, `name#3`, … where others have it."""
    free, number = name, 1
    while free in names:
        number += 1
        free = f"{name}#{number}"
    names[free] = value


def check_parameters(parameters: Mapping[str, Array], is_real: Callable[[Any], bool]) -> None:
    """Refuse parameters that are no arrays of real floating-point numbers.

    Args:
        parameters: by name.
        is_real: says so of a dtype.

    Raises:
        ArgumentError: at the first that is none.
    """
    for name, value in parameters.items():
        dtype = getattr(value, "dtype", None)
        if dtype is None or not is_real(dtype):
            kind = type(value).__name__ if dtype is None else f"dtype {getattr(dtype, 'name', dtype)}"
            raise ArgumentError(
                f"`parameters` must be floating-point arrays; got {kind} for {name!r}. Keep constants out of `parameters`."
            )
