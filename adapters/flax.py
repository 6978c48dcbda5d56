"""JAX and Flax: penalised and agreement-weighted loss functions, and a monitor; for linen, nnx and any pure function.

    loss_fn = regularized(loss_fn, Penalty("log_determinant", 0.1))          # (params, batch) → loss, Parts
    (loss, parts), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch)

What comes back is a pure function again: it can be jitted, differentiated, mapped and sharded, and it goes with optax and
TrainState.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mgs_core import ArgumentError, Penalty, UnsupportedModelError, agreement_weights, get_backend
from mgs_core._arguments import integer
from mgs_core._tree import select
from mgs_core.contraction import contract
from mgs_core.gradient import weighted_gradient
from mgs_core.heads import Output, make_head
from mgs_core.kernel import kernel
from mgs_core.statistics import merge

from ._flax_arguments import key_of, refuse, step_of
from ._flax_monitor import MGSMonitor, linen_model

__all__ = ["MGSMonitor", "Parts", "linen_model", "regularized"]

_backend: Any = get_backend("jax")


class Parts(NamedTuple):
    """Hold what a regularised loss is made of; a pytree of arrays.

    Attributes:
        loss: the loss alone: the mean over the samples, or the mean weighted by agreement.
        penalty: what the penalty added; 0 on steps that skip it.
        kernel: (m, m) of the samples that were looked at; zeros on steps that skip it.
        weights: (n,) of agreement weighting; None without.
        aux: what the loss function returned besides the loss; None if nothing.
    """

    loss: Any
    penalty: Any
    kernel: Any
    weights: Any
    aux: Any


def regularized(
    loss_fn: Callable[..., Any],
    penalty: Penalty | None = None,
    *,
    output: Output = "loss",
    outputs: Callable[..., Any] | None = None,
    targets: Callable[[Any], Any] | None = None,
    weighting: Literal["agreement"] | None = None,
    every: int = 1,
    max_samples: int | None = None,
    **kernel_options: Any,
) -> Callable[..., tuple[Any, Parts]]:
    """Add a penalty on the kernel of per-sample gradients to a loss function, or weight its samples by agreement.

    The loss of sample a is `loss_fn(params, batch)` on the batch of a alone, so the loss must be a mean over the samples, and no
    sample may depend on another; otherwise the first call is refused. Loss and kernel then share their passes: the penalised step
    takes one forward and one differentiated backward pass, the step weighted by agreement a single backward pass in all.

    Args:
        loss_fn: `(params, batch, *rest) → loss` or `(loss, aux)`. `params` is a pytree or an `nnx.Module`, `batch` a pytree of
            arrays with samples first, `rest` whatever is the same for all samples.
        penalty: the penalty, or None.
        output: the head, as for `mgs_core.kernel`; every head but "loss" needs `outputs`.
        outputs: `(params, batch, *rest) → (n, c)`, the model's outputs.
        targets: `batch → targets`, for heads that need them.
        weighting: "agreement": the loss is `mean(w · losses)`, `w` from the kernel of the losses, constant for the gradient
            `Σ w_a g_a / n`: a `custom_vjp` that is not linear, as clipping of gradients, comes before the weights.
        every: penalise each `every`-th step only, `every` times as much; the function then takes the step's
            number after the batch.
        max_samples: the kernel is that of the first so many samples of each batch; None for all. Bounds the cost.
        **kernel_options: passed to `mgs_core.kernel`: `transform`, `probes`, `seed`, `parameters`, `chunk_size`; `parameters`
            alone for the losses.

    Returns:
        `(params, batch, *rest) → (loss, Parts)`, for `jax.value_and_grad(..., has_aux=True)` or `nnx.value_and_grad`. With
        output="random" it is `(params, batch, key, *rest)`: pass another key at each step, as `jax.random.fold_in(key, step)`
        gives it, for only the mean over many probes is the kernel of "trace". With a `seed` there is no key, and the probes are
        the same at each step. The step's number, where there is one, goes before the key.

    Raises:
        ArgumentError: when arguments do not fit each other.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from mgs_core import Penalty
        >>> from mgs_core.adapters.flax import regularized
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)
        >>> batch = {"x": jnp.eye(2), "y": jnp.ones(2)}
        >>> step = jax.jit(jax.value_and_grad(regularized(loss_fn, Penalty("trace", 0.5)), has_aux=True))
        >>> (loss, parts), gradient = step({"w": jnp.zeros(2)}, batch)
        >>> float(loss), float(parts.loss), float(parts.penalty)
        (3.0, 1.0, 2.0)
    """
    every = integer("every", every, 1)
    max_samples = None if max_samples is None else integer("max_samples", max_samples, 1)
    given = {"loss_fn": loss_fn, "penalty": penalty, "outputs": outputs, "targets": targets}
    options = refuse(given, output, weighting, every, max_samples, kernel_options)
    return _Regularized(loss_fn, penalty, output, outputs, targets, weighting, every, max_samples, options)


@dataclass(frozen=True, eq=False)
class _Regularized:
    """Hold the arguments of `regularized`, and be the function that it returns."""

    loss_fn: Callable[..., Any]
    penalty: Any
    output: Any
    outputs: Any
    targets: Any
    weighting: Any
    every: int
    max_samples: int | None
    options: dict[str, Any]

    def __call__(self, params: Any, batch: Any, *rest: Any) -> tuple[Any, Parts]:
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
        if len({shape[:1] for shape in shapes}) != 1 or shapes[0][:1] in ((), (0,)):
            raise ArgumentError(
                f"`batch` must hold arrays of one number of samples, at least 1, along the first axis; got shapes {shapes}. "
                "Pass what is the same for all samples after it: loss_fn(params, batch, rest)."
            )
        step, rest = step_of(rest) if self.every > 1 else (None, rest)
        key, rest = key_of(rest) if self.output == "random" and "seed" not in self.options else (None, rest)
        if self.weighting is not None and self.penalty is None:
            return self._weighted(params, batch, rest)
        due = None if step is None else jnp.asarray(step) % self.every == 0
        if self.output == "loss" and self.max_samples is None:
            return self._together(params, batch, rest, due)
        value, aux = self._loss(params, batch, rest)  # which may change the state of an nnx module, so not within a branch
        few = jax.tree.map(lambda leaf: leaf[: self.max_samples], batch)
        added, matrix = _when(due, lambda: self._added(self._kernel(params, few, rest, key), value), lambda: _none(few, value))
        return value + added, Parts(value, added, matrix, None, aux)

    def _loss(self, params: Any, batch: Any, rest: tuple[Any, ...]) -> tuple[Any, Any]:
        with _backend.noting("loss_fn", batch):
            result = self.loss_fn(params, batch, *rest)
        value, *aux = result if isinstance(result, tuple) and result else (result, None)
        shape = getattr(value, "shape", () if isinstance(value, float) else None)
        if len(aux) != 1 or shape is None or prod(shape) != 1:
            got = type(value).__name__ if shape is None else f"shape {shape}"
            raise ArgumentError(
                "`loss_fn` must return a scalar, the mean over the samples, or (scalar, aux); "
                f"got {got if len(aux) == 1 else f'{len(result)} values'}. Take the mean, and put all else into aux."
            )
        return jnp.reshape(value, ()), aux[0]

    def _one_pass(
        self, params: Any, batch: Any, rest: tuple[Any, ...], parameters: Any, *, differentiable: bool
    ) -> tuple[Any, list[Any], bool]:
        """Return losses (n,), merged statistics of the same pass, and whether the loss function may give or change more."""
        more: list[bool] = []

        def loss(params: Any, batch: Any) -> Any:
            value, aux = self._loss(params, batch, rest)
            more.append(aux is not None)
            return jnp.reshape(value, (1, 1))

        head = make_head("sum", "identity", None, 1, 0, None).function
        losses, _, found = _backend.one_pass(
            _backend.pure(loss, params), batch, None, head, parameters, differentiable=differentiable, mean=True
        )
        # the pass works on a copy of an nnx module; what is computed twice, and not asked for, XLA leaves out
        return losses[:, 0], merge(found), more[0] or isinstance(params, nnx.Module)

    def _together(self, params: Any, batch: Any, rest: tuple[Any, ...], due: Any) -> tuple[Any, Parts]:
        """Take loss and penalty from the same pass."""

        def penalised(params: Any) -> tuple[Any, Parts]:
            losses, found, more = self._one_pass(params, batch, rest, self.options.get("parameters"), differentiable=True)
            matrix = contract(found, found)
            weights = None if self.weighting is None else _weights(matrix, losses)
            value = jnp.mean(losses if weights is None else weights * losses)
            aux = self._loss(params, batch, rest)[1] if more else None
            added, matrix = self._added(matrix, value)
            return value + added, Parts(value, added, matrix, weights, aux)

        def skipped(params: Any) -> tuple[Any, Parts]:
            value, aux = self._loss(params, batch, rest)
            return value, Parts(value, *_none(batch, value), None, aux)

        result: tuple[Any, Parts] = _when(due, penalised, skipped, params)
        return result

    def _added(self, matrix: Any, value: Any) -> tuple[Any, Any]:
        """Return the penalty and the kernel, of the types that steps without have."""
        return self.every * self.penalty(matrix).astype(value.dtype), matrix.astype(_wide(value)) if self.every > 1 else matrix

    def _kernel(self, params: Any, batch: Any, rest: tuple[Any, ...], key: Any) -> Any:
        if self.output == "loss":
            _, found, _ = self._one_pass(params, batch, rest, self.options.get("parameters"), differentiable=True)
            return contract(found, found)
        model = _backend.pure(lambda params, batch: self.outputs(params, batch, *rest), params)
        targets = None if self.targets is None else self.targets(batch)
        options = {"output": self.output, **self.options}
        if key is not None:
            change, probes = options.pop("transform", "identity"), options.pop("probes", 1)
            options |= {"output": "trace", "transform": _probed(change, probes, key)}
        return kernel(model, batch, targets, differentiable=True, **options)

    def _weighted(self, params: Any, batch: Any, rest: tuple[Any, ...]) -> tuple[Any, Parts]:
        """Take losses, kernel and gradient from one backward pass."""
        losses, found, more = self._one_pass(params, batch, rest, None, differentiable=False)
        parameters = _backend.parameters(_backend.pure(self.loss_fn, params))
        chosen = select(parameters, self.options.get("parameters"))
        seen = [use for use in found if use.parameter in chosen]
        n = len(losses)
        matrix = contract(seen, seen) if seen else jnp.zeros((n, n), losses.dtype)  # parameters that do not move the loss
        weights = _weights(matrix, losses)
        gradient = weighted_gradient(found, weights[:, None] / n)
        value = _attach(jnp.mean(weights * losses), parameters, gradient)
        aux = self._loss(params, batch, rest)[1] if more else None
        return value, Parts(value, jnp.zeros_like(value), matrix, weights, aux)


def _probed(transform: Any, probes: int, key: Any) -> Callable[[Any], Any]:
    """Return the transform with random signs over the outputs after it; the kernel of its trace is that of "random"."""
    change = make_head("trace", transform, None, 1, 0, None).function

    def probed(outputs: Any) -> Any:
        changed = change(outputs, None)
        signs = jax.random.rademacher(key, (changed.shape[-1], probes), changed.dtype)
        return changed @ signs / probes**0.5

    return probed


def _when(due: Any, then: Callable[..., Any], otherwise: Callable[..., Any], *params: Any) -> Any:
    """Return what one of two functions gives, the first where nothing is asked; either may change the state of an nnx module."""
    if due is None:
        return then(*params)
    return (nnx.cond if params and isinstance(params[0], nnx.Module) else jax.lax.cond)(due, then, otherwise, *params)


def _none(batch: Any, value: Any) -> tuple[Any, Any]:
    n = len(jax.tree.leaves(batch)[0])
    return jnp.zeros_like(value), jnp.zeros((n, n), _wide(value))


def _wide(value: Any) -> Any:
    return value.dtype if jnp.finfo(value.dtype).bits > 32 else jnp.dtype(jnp.float32)


def _weights(matrix: Any, losses: Any) -> Any:
    return jax.lax.stop_gradient(agreement_weights(matrix).astype(losses.dtype))


def _attach(value: Any, parameters: dict[str, Any], gradient: dict[str, Any]) -> Any:
    """Return the value, with the given gradient in the parameters; that in all else is the value's own."""
    names = [name for name in parameters if name in gradient]
    known = [jnp.reshape(gradient[name], parameters[name].shape).astype(parameters[name].dtype) for name in names]
    return _value_with_gradient(value, [parameters[name] for name in names], known)


@jax.custom_jvp  # type: ignore[untyped-decorator]  # jax is not followed
def _value_with_gradient(value: Any, parameters: list[Any], gradient: list[Any]) -> Any:
    return value


@_value_with_gradient.defjvp  # type: ignore[untyped-decorator]  # jax is not followed
def _value_with_gradient_tangent(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    (value, parameters, gradient), (change, moves, _) = primals, tangents
    gradient = _once(gradient, parameters)
    return value, sum((jnp.vdot(g, move).astype(change.dtype) for g, move in zip(gradient, moves, strict=True)), change)


@jax.custom_jvp  # type: ignore[untyped-decorator]  # jax is not followed
def _once(gradient: list[Any], parameters: list[Any]) -> list[Any]:
    """Return the gradient, whose own derivative in the parameters is not known."""
    return gradient


@_once.defjvp  # type: ignore[untyped-decorator]  # jax is not followed
def _once_tangent(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    raise UnsupportedModelError(
        '`weighting="agreement"` has no second derivative, for its gradient comes with the kernel; got one asked for. '
        "Take that of `mean(parts.weights · losses)`."
    )
