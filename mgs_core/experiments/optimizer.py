"""Adam with decoupled weight decay over a dict of arrays of any framework."""

from __future__ import annotations

import math
from typing import TypeAlias

from mgs_core._namespace import array_namespace
from mgs_core._types import Array

Parameters: TypeAlias = dict[str, Array]
State: TypeAlias = tuple[Parameters, Parameters]


def cosine_decay(step: int, steps: int) -> float:
    """Return the factor on the learning rate, from 1 at the first step towards 0 after the last."""
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))


def adam_start(parameters: Parameters) -> State:
    """Return the moments before the first step."""
    zeros = {name: value * 0.0 for name, value in parameters.items()}
    return zeros, zeros


def adam_step(
    parameters: Parameters, gradient: Parameters, state: State, *, step: int, rate: float, weight_decay: float = 0.0
) -> tuple[Parameters, State]:
    """Return the parameters and moments after one step (Kingma and Ba 2015; decay as Loshchilov and Hutter 2019).

    Args:
        parameters: θ by name.
        gradient: of the loss, by name.
        state: the moments.
        step: number of the step, from 0.
        rate: learning rate.
        weight_decay: weights of two or more axes shrink by `rate · weight_decay`; biases and gains do not.

    Returns:
        (parameters, state), new dicts.
    """
    first, second, moved = {}, {}, {}
    for name, value in parameters.items():
        xp, g = array_namespace(value), gradient[name]
        first[name] = 0.9 * state[0][name] + 0.1 * g
        second[name] = 0.999 * state[1][name] + 0.001 * g * g
        mean = first[name] / (1.0 - 0.9 ** (step + 1))
        square = second[name] / (1.0 - 0.999 ** (step + 1))
        shrunk = value * (1.0 - rate * weight_decay) if value.ndim > 1 else value
        moved[name] = shrunk - rate * mean / (xp.sqrt(square) + 1e-8)
    return moved, (first, second)
