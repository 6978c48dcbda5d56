"""Models: bring what the user passes to a pure function, its parameters by name, and the leaves of a batch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgs_core._errors import ArgumentError, MgsError
from mgs_core._protocol import HeadFunction
from mgs_core._tree import check_parameters
from mgs_core._types import Array, Tree
from mgs_core.functional import FunctionalModel

from .versions import has_values


def functional(model: Any) -> FunctionalModel:
    """Return a functional model, of an nnx module too, and an `flax.nnx` module as the function that applies it.

    Args:
        model: a FunctionalModel or an nnx.Module.

    Returns:
        The functional model.

    Raises:
        ArgumentError: when it is neither.
    """
    if isinstance(model, FunctionalModel):
        return pure(model.function, model.parameters)
    if not _is_module(model):
        raise ArgumentError(
            f"`model` must be a FunctionalModel or a flax.nnx.Module for the JAX backend; got {type(model).__name__}. "
            "Wrap a pure function: mgs_core.FunctionalModel(function, parameters)."
        )
    return pure(lambda module, inputs: module(inputs), model)


def pure(function: Callable[[Any, Any], Any], parameters: Any) -> FunctionalModel:
    """Return a function of an nnx module as one of the module's parameters; other functions as they are.

    Args:
        function: `(parameters, inputs) → outputs`.
        parameters: a pytree, or an nnx.Module; of the latter, the state of kind `nnx.Param` counts. It is left as it is: each
            call works on a copy.

    Returns:
        The functional model.
    """
    if not _is_module(parameters):
        return FunctionalModel(function, parameters)
    nnx = sys.modules["flax.nnx"]
    graph, state, rest = nnx.split(parameters, nnx.Param, ...)

    def on_values(values: Tree, inputs: Any) -> Any:
        own, others = jax.tree.map(lambda leaf: leaf, (state, rest))
        nnx.replace_by_pure_dict(own, values)
        return function(nnx.merge(graph, own, others), inputs)

    return FunctionalModel(on_values, nnx.to_pure_dict(state))


def _is_module(model: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")  # where it has not been imported, there can be no module of it
    return nnx is not None and isinstance(model, nnx.Module)


def named(parameters: Tree) -> dict[str, Array]:
    """Return the leaves of any pytree by dotted name.

    Args:
        parameters: the pytree.

    Returns:
        Arrays by name.

    Raises:
        ArgumentError: when a leaf is no array of floating-point numbers, or two have the same name.
    """
    leaves = {}
    for path, value in jax.tree_util.tree_flatten_with_path(parameters)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "parameter"
        if name in leaves:
            raise ArgumentError(f"`parameters` must have one name for each leaf; got two {name!r}. Rename a key with a dot.")
        leaves[name] = value
    check_parameters(leaves, lambda dtype: bool(jnp.issubdtype(dtype, jnp.floating)))
    return {name: jnp.asarray(value) for name, value in leaves.items()}


def leaves_of(batch: Any, *, finite: bool = True) -> list[Array]:
    """Return the arrays of a batch.

    Args:
        batch: any pytree with samples first.
        finite: whether known values must be. A loss may take −∞ in a mask, or NaN where a target is missing.

    Returns:
        The arrays.

    Raises:
        ArgumentError: when known values are not finite and must be.
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(batch)]
    for leaf in leaves if finite else ():
        known = has_values(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)
        if known and not np.all(np.isfinite(np.asarray(leaf))):  # on the host, for jax.numpy would trace it under jit
            raise ArgumentError("`inputs` must be finite; got NaN or infinity. Remove or replace these values.")
    return leaves


@contextmanager
def noting(name: str, arrays: Any) -> Iterator[None]:
    """Let an error of a user's own function go on as it is, with a note on what the function is traced for.

    Args:
        name: of the argument that the function came by.
        arrays: what it is called with, in any pytree.
    """
    try:
        yield
    except MgsError:  # which names the argument itself
        raise
    except Exception as error:
        notes = getattr(error, "__notes__", ())
        if not any(note.startswith("mgs_core") for note in notes):  # of a function within this one
            shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(arrays)]
            linen = " Pass a linen module by mgs_core.adapters.flax.linen_model(module, variables, train=False)."
            error.add_note(
                f"mgs_core called `{name}` on arrays of shapes {shapes}, to trace it; it must take batches of any size."
                f"{linen if type(error).__module__.startswith('flax') else ''}"
            )
        raise


def scalars(outputs: Any, head: HeadFunction, targets: Any, n: int) -> Array:
    """Return the heads (n, k) of a model's outputs.

    Args:
        outputs: an array (n, c), or what the head's transform makes one of.
        head: the head.
        targets: its targets.
        n: number of samples.

    Returns:
        (n, k).

    Raises:
        ArgumentError: when the outputs do not fit.
    """
    shape = getattr(outputs, "shape", None)
    if shape is not None and (len(shape) != 2 or shape[0] != n):
        raise ArgumentError(
            f"`model` must return outputs of shape (n, c) with n = {n}; got {shape}. "
            "Keep the samples first and flatten the outputs of each."
        )
    try:
        with noting("output", (outputs, targets)):
            values = head(outputs, targets)
    except (ArgumentError, AttributeError, TypeError) as error:
        if shape is not None or "`targets`" in str(error):
            raise
        values = error
    if getattr(values, "shape", (0,))[:1] != (n,) or values.ndim != 2:
        failed = f", and {type(values).__name__}: {values}" if isinstance(values, Exception) else ""
        raise ArgumentError(
            f"`transform` must pick outputs of shape (n, c); got {type(outputs).__name__} from the model{failed}. "
            'For instance: transform=lambda outputs: outputs["logits"].'
        ) from (values if isinstance(values, Exception) else None)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise ArgumentError(
            f"`model` must have outputs, or losses, of real floating-point numbers; got dtype {values.dtype}. "
            "Leave out conversions to integers; of complex numbers take real and imaginary parts."
        )
    return values
