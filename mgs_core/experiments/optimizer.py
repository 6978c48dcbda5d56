"""Adam with decoupled weight decay over a dict of arrays of any framework."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np

from mgs_core._errors import ArgumentError
from mgs_core._namespace import array_namespace
from mgs_core._types import Array

Parameters: TypeAlias = dict[str, Array]
#: The first and the second moments; a step may carry more behind them.
Moments: TypeAlias = tuple[Parameters, ...]

_FIRST, _SECOND = 0.9, 0.999


def check_learning_rate(value: float) -> None:
    """Refuse a learning rate that is no finite number above 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ArgumentError(f"`learning_rate` must be a finite number above 0; got {value!r}.")


def schedule(step: int, steps: int, learning_rate: float) -> Array:
    """Return what changes from step to step, as one array, so that a compiled step is compiled once.

    Args:
        step: number of the step, from 0.
        steps: number of all steps.
        learning_rate: at the start; it falls to 0 along half a cosine.

    Returns:
        (3,), float32: the learning rate, and the bias corrections `1/(1 − β₁ᵗ)` and `1/(1 − β₂ᵗ)` of the moments.
    """
    rate = learning_rate * 0.5 * (1.0 + math.cos(math.pi * step / steps))
    return np.asarray([rate, 1.0 / (1.0 - _FIRST ** (step + 1)), 1.0 / (1.0 - _SECOND ** (step + 1))], dtype=np.float32)


def start(parameters: Parameters) -> Moments:
    """Return the moments before the first step."""
    return {name: value * 0.0 for name, value in parameters.items()}, {name: value * 0.0 for name, value in parameters.items()}


def adam(
    parameters: Parameters, gradient: Parameters, moments: Moments, now: Array, *, weight_decay: float = 0.0
) -> tuple[Parameters, Moments]:
    """Return the parameters and moments after one step (Kingma and Ba 2015; decay as Loshchilov and Hutter 2019).

    Args:
        parameters: θ by name.
        gradient: of the loss, by name.
        moments: as `start` and earlier steps gave them.
        now: what `schedule` says of this step, as an array of the parameters' framework.
        weight_decay: weights of two or more axes shrink by `rate · weight_decay`; biases and gains do not.

    Returns:
        (parameters, moments), new dicts.
    """
    first, second, moved = {}, {}, {}
    rate, first_correction, second_correction = now[0], now[1], now[2]
    for name, value in parameters.items():
        xp, g = array_namespace(value), gradient[name]
        first[name] = _FIRST * moments[0][name] + (1.0 - _FIRST) * g
        second[name] = _SECOND * moments[1][name] + (1.0 - _SECOND) * g * g
        stride = first[name] * first_correction / (xp.sqrt(second[name] * second_correction) + 1e-8)
        kept = value * (1.0 - rate * weight_decay) if weight_decay and value.ndim > 1 else value
        moved[name] = kept - rate * stride
    return moved, (first, second)
