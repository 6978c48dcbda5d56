"""Refuse models in which samples interact: one sample's scalars must not change with the rest of the batch.

The scalars of a few samples are compared with those of each alone, for each pair of programs at first and from time to time. That
takes values. Where they are known, they are used, with the parameters moved a little, for an output layer that starts at zero
would hide everything in front of it. Under jit, grad or vmap, values are made up: the comparison runs while the function is
traced, and costs nothing when it runs. They hold what the program compares samples with, as the number of an ignored label. Where
made-up values make samples interact and those at hand do not (a mask, a gate), values decide, and all samples are compared at
each call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify, multihost_utils

from mgs_core._errors import SamplesInteractError
from mgs_core._known import Known, Recent
from mgs_core._types import Array

from .bounded import Bound, bounded, has_loops
from .fingerprint import fingerprint
from .marks import marks_of
from .squeeze import squeezed
from .versions import ClosedJaxpr, as_function, has_values, opened, parts

_MOVE = 0.05
#: Roundings of the largest scalar that two programs of the same may differ by (those of the tests' networks: 1.3).
_ROUNDINGS = 100
#: Samples that are compared.
_FEW = 4
#: How loops end where they should end by themselves: a mistake shall not hang.
_LONG = Bound(100_000, lost=False)
_AS_IT_IS = ((1.0, _LONG),)
#: Sizes of made-up weights, tried until loops that wait for convergence end. One that ends with none of them, as a loop of many
#: rounds, is compared for what it has come to.
_GUESSES = (*((gain, Bound(1000, lost=True)) for gain in (1.0, 0.1, 0.01)), (0.01, _LONG))
#: The comparison runs seldom, so that optimising its machine code would take longer than it saves; the older emitter of XLA for
#: CPU (up to jaxlib 0.10) writes it in a third of the time, and one module of it is compiled sooner than many.
_QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
#: `(theta, data, constants) → (scalars of each sample alone, those of the few together)`.
Comparison = Callable[[list[Array], list[Array], list[list[Array]]], tuple[Array, Array]]
#: Programs in which samples do not interact; of another verdict there is none to keep.
_verdicts: Known[bool] = Known()
_comparisons: Recent[Comparison] = Recent()


def refuse_interaction(
    known_by: Hashable,
    whole: Callable[..., list[Any]],
    single: ClosedJaxpr,
    parameters: Sequence[Array],
    samples: Sequence[Array],
) -> None:
    """Compare the scalars of a few samples with those of each alone, unless it is known that they agree for the two programs.

    Args:
        known_by: the fingerprint of `single`; the verdict holds whichever of its parameters are chosen.
        whole: `(parameters, samples) → [(m, k), …]`, of m samples; the first is compared. It may be (1, k), the mean over them.
        single: the jaxpr of one sample: parameters and the leaves of a sample to (k,) and the rest.
        parameters: values or traced arrays.
        samples: leaves of the batch, at least two samples.

    Raises:
        SamplesInteractError: when they differ by more than rounding.
    """
    few = min(len(samples[0]), _FEW)
    shapes = [jax.ShapeDtypeStruct((few, *value.shape[1:]), value.dtype) for value in samples]
    traced = jax.make_jaxpr(whole)([jax.ShapeDtypeStruct(value.shape, value.dtype) for value in parameters], shapes)
    batch = squeezed(traced)  # as `single` is: constants of nested calls are its own then, which are given when it runs
    # what the program of one sample hides, as in `h + h[:1]`, that of a few shows
    key = (known_by, fingerprint(batch, rules=False, constants=False))

    def find() -> tuple[bool, bool]:
        compare = partial(_interact, key, batch, single, parameters, samples)
        mixed = compare()
        holds = not mixed and not compare(made_up=True)
        if not mixed and not holds and not any(map(_traced, samples)):  # values decide: look at all
            mixed = compare(every=True)
        if mixed:
            raise SamplesInteractError(
                "`model` must treat each sample by itself; got outputs that change with the rest of the batch (batch statistics, "
                "attention across the batch, one dropout key for all, a mean over a mask or another loss that divides by a "
                "statistic of the batch). Use inference mode, by `use_running_average=True` and `deterministic=True`, or a key "
                "for each sample; and for a mask weights in the batch."
            )
        return False, holds

    _verdicts.of(key, find)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let made-up values give NaN, the host's arrays be moved, and the comparison be compiled, whatever the user's settings."""
    with jax.debug_nans(False), jax.debug_infs(False), jax.disable_jit(False), jax.transfer_guard("allow"):
        yield


def _interact(
    key: Hashable,
    batch: ClosedJaxpr,
    single: ClosedJaxpr,
    parameters: Sequence[Array],
    samples: Sequence[Array],
    *,
    made_up: bool = False,
    every: bool = False,
) -> bool:
    """Return whether samples interact: a few by the values at hand or by none of them, or every one."""
    values = (*parameters, *samples, *(constant for jaxpr in (single, batch) for constant in jaxpr.consts))
    guessed = has_loops(batch) and (made_up or any(map(_traced, values)))
    for gain, bound in _GUESSES if guessed else _AS_IT_IS:
        found = _differ(key, batch, single, parameters, samples, gain, bound, made_up, every)
        if found is not None:
            return found
    return False


@_undisturbed()
def _differ(
    key: Hashable,
    batch: ClosedJaxpr,
    single: ClosedJaxpr,
    parameters: Sequence[Array],
    samples: Sequence[Array],
    gain: float,
    bound: Bound,
    made_up: bool,
    every: bool,
) -> bool | None:
    """Return whether scalars of samples alone differ from those of all together; None where a loop has not ended."""
    with jax.ensure_compile_time_eval():
        draw = np.random.default_rng(0)
        known: dict[int, Array] = {}
        theta = [_made_up(value, draw, gain) if made_up else _moved(value, draw, gain) for value in parameters]
        constants = [
            [known.setdefault(id(c), _made_up(c, draw, gain) if made_up or _traced(c) else _on_host(c)) for c in jaxpr.consts]
            for jaxpr in (single, batch)
        ]
        batches = list(_every(samples, batch) if every else _few(samples, batch, draw, made_up))
    eps = float(jnp.finfo(single.out_avals[0].dtype).eps)
    for data in batches:
        given = (theta, data, constants)
        compare = _compare((key, bound), batch, single, bound, *given)
        with jax.ensure_compile_time_eval():  # a model may call back to the host
            alone, together = map(_fetched, compare(*given))
        if bound.lost and not np.all(np.isfinite(alone)):
            return None
        if not _agree(alone, together, eps):
            return True
    return False


def _few(samples: Sequence[Array], batch: ClosedJaxpr, draw: np.random.Generator, made_up: bool) -> Iterator[list[Array]]:
    """Yield the values of a few samples; where they are made up, with each number that the program compares them with."""
    variables = parts(batch)[0].invars[-len(samples) :]
    few = variables[0].aval.shape[0]
    first = [
        _made_up(variable.aval, draw, sample=True)
        if made_up or _traced(value)
        else _on_host(value[np.linspace(0, len(value) - 1, few).astype(int)])
        for value, variable in zip(samples, variables, strict=True)
    ]
    yield first
    # each once: what is traced at first, what is known when that is made up too
    unknown = [at for at, value in enumerate(samples) if _traced(value) != made_up]
    marks = marks_of(batch, len(samples)) if unknown else []
    for at in unknown:
        for variant in marks[at].variants(first[at], draw):
            yield [*first[:at], variant, *first[at + 1 :]]


def _every(samples: Sequence[Array], batch: ClosedJaxpr) -> Iterator[list[Array]]:
    """Yield the values of all samples, a few at a time: neighbours, and such as lie far apart."""
    n, few = len(samples[0]), parts(batch)[0].invars[-1].aval.shape[0]
    held = [_on_host(value) for value in samples]
    for start in range(0, n, few):
        start = min(start, n - few)  # in their order, on which a model may rely
        yield [value[start : start + few] for value in held]
    for start in range(n // few if n >= 2 * few else 0):  # neighbours may be alike
        yield [value[start :: n // few][:few] for value in held]


def _fetched(value: Array) -> Any:
    """Return the value as NumPy's; of several processes each has a part where the model says how outputs are sharded."""
    if not has_values(value):
        value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value, np.float64)


def _agree(alone: Any, together: Any, eps: float) -> bool:
    """Return whether the scalars (m, k) of each of m samples alone are those of all together, or (1, k) their means.

    They may differ by a share of how much a scalar varies from sample to sample, for an offset that all have hides nothing then;
    but by a few roundings of the largest in any case.
    """
    size = float(np.max(np.abs(together), initial=0.0, where=np.isfinite(together)))
    finite, share = np.isfinite(alone), max(eps**0.5, 1e-6)
    top, bottom = np.max(alone, 0, where=finite, initial=-np.inf), np.min(alone, 0, where=finite, initial=np.inf)
    spread = np.subtract(top, bottom, where=top > bottom, out=np.zeros_like(top))
    allowed = np.minimum(np.maximum(share * spread, _ROUNDINGS * eps * size), share * size)
    alone = alone if len(together) == len(alone) else np.mean(alone, 0, keepdims=True)
    defined = np.isfinite(alone) | np.isfinite(together)
    difference = np.abs(alone[defined] - together[defined])
    # written so that NaN on one side, which a batch of one can give, is refused too
    return bool(np.all(difference <= np.broadcast_to(allowed, together.shape)[defined]))


def _compare(key: Hashable, batch: ClosedJaxpr, single: ClosedJaxpr, bound: Bound, *given: Any) -> Comparison:
    """Return the compiled comparison, an earlier one of the same programs where there is one."""

    def compare(theta: list[Array], data: list[Array], constants: list[list[Array]]) -> tuple[Array, Array]:
        one = as_function(bounded(opened(single), bound))
        alone = jax.vmap(lambda *leaves: one(*constants[0], *theta, *leaves)[0])(*data)
        together, *_ = as_function(bounded(opened(batch), bound))(*constants[1], *theta, *data)
        return alone, together

    effects = (*single.effects, *batch.effects)
    if any(type(effect).__name__ == "ErrorEffect" for effect in effects):  # of checks, which mean nothing on made-up values
        checked = checkify.checkify(compare)
        function = jax.jit(lambda *given: checked(*given)[1])
    else:
        function = jax.jit(compare)
    # a compiled program takes values even where a call would become part of the function that is being traced
    return _comparisons.put(key, _comparisons.take(key) or _compiled(function.lower(*given)))


def _compiled(lowered: Any) -> Any:
    options = _QUICKLY
    while options:
        try:
            return lowered.compile(options)
        except jax.errors.JaxRuntimeError as error:  # options come and go with XLA's versions; it names one that it does not know
            known = {name: value for name, value in options.items() if name not in str(error)}
            options = known if len(known) < len(options) else {}
    return lowered.compile()


def _moved(value: Array, draw: np.random.Generator, gain: float) -> Array:
    if _traced(value):
        return _made_up(value, draw, gain)
    known = np.asarray(value, np.float64)
    with np.errstate(all="ignore"):  # a model that has diverged
        scale = _MOVE * (float(np.std(known) if known.size else 0.0) or 1.0)
        return _array(known + scale * draw.normal(size=value.shape), value.dtype)


def _traced(value: Array) -> bool:
    return not has_values(value)


def _on_host(value: Array) -> Array:
    """Return the value as an array of NumPy, so that one compiled comparison serves, wherever values are."""
    return value if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else np.asarray(value)


def _made_up(like: Array | jax.ShapeDtypeStruct, draw: np.random.Generator, gain: float = 1.0, *, sample: bool = False) -> Array:
    """Return a value made up in place of a traced one; weights are multiplied by the gain."""
    shape, dtype = like.shape, like.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0, impl=dtype._impl.name), shape)
    if jnp.issubdtype(dtype, jnp.inexact):
        if len(shape) >= 2 or sample:
            width = 1 if sample else np.prod(shape[:-1])
            return _array(gain * draw.normal(size=shape) / np.sqrt(max(width, 1)), dtype)
        return _array(draw.uniform(0.5, 1.5, size=shape), dtype)  # gains, variances
    if sample and (length := prod(shape[1:])):  # perhaps a mask: samples must not have alike numbers of ones by chance
        few = shape[0]
        ones = np.arange(few) % 2 if length == 1 else 1 + (length - 1) * np.arange(few) // max(few - 1, 1)
        return _array(np.reshape(draw.permuted(np.arange(length) < ones[:, None], axis=1), shape), dtype)
    return _array(draw.integers(0, 2, size=shape), dtype)


def _array(value: Any, dtype: Any) -> Array:
    return value.astype(dtype)  # by NumPy, for JAX would compile a program for each shape
