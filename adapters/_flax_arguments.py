"""Arguments of Flax's `regularized`: what is refused at once, what comes after the batch; and parameters of NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mgs_core import ArgumentError
from mgs_core.kernel import check_options

_FITTING = ["transform", "probes", "seed", "parameters", "chunk_size"]


def refuse(
    given: Mapping[str, Any], output: Any, weighting: Any, every: int, max_samples: int | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Refuse arguments that do not fit each other; return `kernel_options` for repeated use.

    Args:
        given: `loss_fn`, `penalty`, `outputs` and `targets` by name.
        output: as for `regularized`.
        weighting: as for `regularized`.
        every: as for `regularized`.
        max_samples: as for `regularized`.
        options: `kernel_options`.

    Returns:
        The options.

    Raises:
        ArgumentError: at the first that does not.
    """
    for name, function in given.items():
        if not callable(function) and (function is not None or name == "loss_fn"):
            what = "a Penalty" if name == "penalty" else "a function"
            raise ArgumentError(f"`{name}` must be {what}; got {type(function).__name__}. Pass it by name.")
    if weighting not in (None, "agreement"):
        raise ArgumentError(f'`weighting` must be "agreement" or None; got {weighting!r}.')
    if given["penalty"] is None and weighting is None:
        raise ArgumentError('`penalty` must be given without `weighting`; got None. Pass a Penalty, or weighting="agreement".')
    if output == "full":
        raise ArgumentError('`output` must give one scalar a pair of samples; got "full". Use "trace".')
    if output != "loss" and given["outputs"] is None:
        raise ArgumentError(f"`outputs` must be given for output={output!r}; got None. Pass (params, batch) → (n, c).")
    if weighting is not None and (output != "loss" or every > 1 or max_samples is not None):
        raise ArgumentError(
            "`weighting` must go with the losses of all samples at each step; got another `output`, `every` or `max_samples`. "
            "Leave them out."
        )
    unused = sorted(set(options) - ({"parameters"} if output == "loss" else set(_FITTING)))
    if unused:
        which = "`parameters` alone for the losses' own kernel" if output == "loss" else f"among {', '.join(_FITTING)}"
        raise ArgumentError(f"`kernel_options` must be {which}; got {', '.join(unused)}. Check the spelling.")
    checked = check_options(options if output == "loss" else {**options, "output": output}, given["targets"])
    return {name: checked[name] for name in options}


def step_of(rest: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Return the step's number, the first argument after the batch, and the others."""
    return _first("step", rest, _is_step, "an integer when `every` is above 1", "(params, batch, step)")


def key_of(rest: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Return the key of random probes, the first argument after batch and step, and the others."""
    what = 'a key of jax.random, another at each step, for output="random" without a `seed`'
    return _first("key", rest, _is_key, what, "(params, batch, key), or (params, batch, step, key) with `every`")


def _first(name: str, rest: tuple[Any, ...], fits: Callable[[Any], bool], what: str, order: str) -> tuple[Any, tuple[Any, ...]]:
    if not rest or not fits(rest[0]):
        got = repr(rest[0]) if rest else "none"
        raise ArgumentError(f"`{name}` must be {what}; got {got}. Call the function with {order}.")
    return rest[0], rest[1:]


def _is_step(value: Any) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.asarray(value).dtype, jnp.integer)) and jnp.ndim(value) == 0
    except TypeError:  # no number at all
        return False


def _is_key(value: Any) -> bool:
    if not isinstance(value, jax.Array):
        return False
    typed = bool(jnp.issubdtype(value.dtype, jax.dtypes.prng_key))
    return bool(value.ndim == 0 if typed else value.ndim == 1 and value.dtype == jnp.uint32)  # of the newer or the older kind


def arrays_of_jax(parameters: Any) -> Any:
    """Return parameters as arrays of JAX: those of a checkpoint are NumPy's, for which another backend would be taken."""

    def of_jax(leaf: Any) -> Any:
        return jnp.asarray(leaf) if hasattr(leaf, "__array__") and not isinstance(leaf, jax.Array) else leaf

    return jax.tree.map(of_jax, parameters)
