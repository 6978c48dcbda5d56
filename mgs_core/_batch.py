"""Count and slice the samples of a batch: an array, or a dict, list or tuple of arrays with the samples first."""

from __future__ import annotations

from typing import Any

from mgs_core._errors import ArgumentError
from mgs_core._tree import flatten, unflatten


def count(inputs: Any, targets: Any = None, names: tuple[str, str] = ("inputs", "targets")) -> int:
    """Return the number of samples n.

    Args:
        inputs: array or tree of arrays, samples first.
        targets: targets of the same samples, or None.
        names: what errors call the two.

    Returns:
        n, at least 1.

    Raises:
        ArgumentError: when there is no sample axis, no sample, or the counts differ.
    """
    if inputs is None:
        raise ArgumentError(f"`{names[0]}` must be an array, or a dict, list or tuple of arrays; got None. Pass the batch.")
    sizes = {}
    for name, leaf in {**_named(names[0], inputs), **_named(names[1], targets)}.items():
        if getattr(leaf, "is_nested", False):
            raise ArgumentError(f"`{name}` must not be a nested tensor; got one. Pad the sequences, and mask the padding.")
        if not hasattr(leaf, "shape"):
            raise ArgumentError(
                f"`{name}` must be an array; got {type(leaf).__name__}. Convert it, for instance by numpy.asarray."
            )
        if len(leaf.shape) == 0:  # a shape of TensorFlow is true without axes too
            raise ArgumentError(f"`{name}` must have samples along its first axis; got a scalar. Add the axis: value[None].")
        try:
            sizes[name] = int(leaf.shape[0])
        except Exception as error:  # None, or a symbol of an export, which has an error of its own
            raise ArgumentError(
                f"`{name}` must have a known number of samples; got {leaf.shape[0]}. Fix it: by drop_remainder=True for data of "
                "TensorFlow, by a number in place of a symbol for jax.export."
            ) from error
    if not sizes:
        raise ArgumentError(f"`{names[0]}` must hold at least one array; got {inputs!r}. Pass the batch.")
    if len(set(sizes.values())) != 1:
        raise ArgumentError(f"`{names[0]}` and `{names[1]}` must have the same number of samples; got {sizes}. Slice them.")
    n = next(iter(sizes.values()))
    if n == 0:
        raise ArgumentError(f"`{names[0]}` must hold at least one sample; got 0. Check the batch or the selection that made it.")
    return n


def take(batch: Any, samples: slice) -> Any:
    """Return the samples in the slice, of every leaf.

    Raises:
        ArgumentError: when a leaf cannot be sliced, as sparse tensors of TensorFlow.
    """
    if batch is None:
        return None
    try:
        return unflatten(batch, {name: leaf[samples, ...] for name, leaf in flatten(batch).items()})
    except TypeError as error:
        raise ArgumentError(
            f"`chunk_size` must be None for inputs that cannot be sliced ({error}). Or make them dense."
        ) from error


def _named(prefix: str, batch: Any) -> dict[str, Any]:
    if batch is None:
        return {}
    leaves = flatten(batch)
    return {prefix if name == "parameter" else f"{prefix}[{name}]": leaf for name, leaf in leaves.items()}
