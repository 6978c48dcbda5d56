"""Models of Flax as functions, and the monitor of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flax import linen, nnx

from mgs_core import ArgumentError, FunctionalModel, Recorder, Schedule, Summary
from mgs_core._arguments import integer
from mgs_core.monitor import Sink

from ._flax_arguments import arrays_of_jax


class MGSMonitor:
    """Summarise the kernel of a probe batch every so many steps.

    An nnx module is measured in evaluation mode, and left as it was.

    Attributes:
        history: the records so far, as of `mgs_core.Recorder`.

    Example:
        >>> import jax.numpy as jnp
        >>> from mgs_core.adapters.flax import MGSMonitor
        >>> monitor = MGSMonitor(lambda params, x: x @ params["w"], jnp.eye(2), every=2)
        >>> for _ in range(3):
        ...     summary = monitor.step({"w": jnp.zeros((2, 1))})
        >>> [(record["step"], record["mgs_trace"]) for record in monitor.history]
        [(0, 2.0), (2, 2.0)]
    """

    def __init__(
        self,
        model: Any,
        inputs: Any,
        targets: Any = None,
        *,
        every: int | Schedule = 100,
        sinks: Iterable[Sink] = (),
        labels: Any = None,
        apply_options: Mapping[str, Any] | None = None,
        **kernel_options: Any,
    ) -> None:
        """Hold model and probe batch.

        Args:
            model: an `nnx.Module`; a linen module, applied to the variables given at each step; or `(params, inputs) → (n, c)`,
                of which every array of `params` is differentiated, so that batch statistics have no place there.
            inputs: probe batch.
            targets: its targets; where there are none, the labels are, for "target" and the usual loss.
            every: steps between measurements, or a `Schedule`.
            sinks: where records go besides `history`.
            labels: integers (n,) for the class-wise summaries.
            apply_options: passed to a linen module's `apply`, for instance `{"train": False}`.
            **kernel_options: passed to `mgs_core.kernel`.

        Raises:
            ArgumentError: when model and options do not fit.
        """
        if not callable(model) or isinstance(model, FunctionalModel):
            raise ArgumentError(
                f"`model` must be a module or a function (params, inputs) → (n, c); got {type(model).__name__}. Pass the module "
                "itself, a linen one with `apply_options`: its variables come with each step."
            )
        if apply_options and not isinstance(model, linen.Module):
            raise ArgumentError(f"`apply_options` are for linen modules; got {type(model).__name__} as `model`. Leave them out.")
        self._model, self._apply = model, dict(apply_options or {})
        self._recorder = Recorder(inputs, targets, labels=labels, schedule=every, sinks=sinks, **kernel_options)
        self._step = -1
        self.history = self._recorder.history

    def step(self, variables: Any = None, *, number: int | None = None, **extra: Any) -> Summary | None:
        """Count a step, and measure when it is due.

        Args:
            variables: parameters, or a linen module's variables; None for an nnx module, which holds its own.
            number: the step's number, as of a run that is resumed; None counts on from the last.
            **extra: further entries of the record, for instance the loss.

        Returns:
            The summary, or None when it is not due.

        Raises:
            ArgumentError: when the number is no integer, or variables do not fit the model.
        """
        self._step = self._step + 1 if number is None else integer("number", number, 0, "Count steps or epochs.")
        if isinstance(self._model, nnx.Module):
            if variables is not None:
                raise ArgumentError(
                    f"`variables` must be None for an nnx module, which holds its own; got {type(variables).__name__}. Update "
                    "the module by nnx.update, or give MGSMonitor the function `lambda module, inputs: module(inputs)`."
                )
            model = nnx.merge(*nnx.split(self._model))  # with the same arrays, so that the mode of the user's stays
            model.eval()
        elif isinstance(self._model, linen.Module):
            model = linen_model(self._model, variables, **self._apply)
        else:
            model = FunctionalModel(self._model, arrays_of_jax(variables))
        return self._recorder(model, self._step, **extra)


def linen_model(module: linen.Module, variables: Any, **apply_options: Any) -> FunctionalModel:
    """Return a linen module with its variables as a functional model.

    Args:
        module: the module.
        variables: as `module.init` returns them; "params" is differentiated, other collections (batch statistics) are held fixed.
        **apply_options: passed to `module.apply`, for instance `train=False`.

    Returns:
        The model, for `mgs_core.kernel`.

    Raises:
        ArgumentError: when there are no "params".

    Example:
        >>> import flax.linen, jax, jax.numpy as jnp
        >>> import mgs_core as mgs
        >>> from mgs_core.adapters.flax import linen_model
        >>> module = flax.linen.Dense(1, use_bias=False)
        >>> mgs.kernel(linen_model(module, module.init(jax.random.key(0), jnp.eye(2))), jnp.eye(2)).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if not isinstance(module, linen.Module):
        raise ArgumentError(f"`module` must be a linen module; got {type(module).__name__}. Pass an nnx module by itself.")
    if not isinstance(variables, Mapping) or "params" not in variables:
        got = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ArgumentError(f'`variables` must hold "params"; got {got}. Pass what module.init returned.')
    params, fixed = variables["params"], {name: value for name, value in variables.items() if name != "params"}
    return FunctionalModel(lambda p, x: module.apply({"params": p, **fixed}, x, **apply_options), arrays_of_jax(params))
