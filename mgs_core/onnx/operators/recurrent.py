"""Recurrent layers, unrolled over their steps.

Letters: s steps, n samples, h units. Weights stay whole until they meet data, so that each use of them is recognised: the input's
products for all steps at once, the state's step by step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mgs_core._types import Array, Namespace
from mgs_core.onnx.extensions import extension
from mgs_core.onnx.graph import Node
from mgs_core.onnx.operators.arithmetic import clip
from mgs_core.onnx.operators.registry import Run, operator

Function = Callable[[Array], Array]
#: `(gates of the input at one step, state, rest of the state) → (state, rest)`.
Cell = Callable[[Array, Array, Array], tuple[Array, Array]]

_DEFAULTS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
# the slopes that a function has when the file names none
_ALPHA = {"LeakyRelu": 0.01, "ThresholdedRelu": 1.0, "HardSigmoid": 0.2, "Elu": 1.0, "Affine": 1.0, "ScaledTanh": 1.0}
_BETA = {"HardSigmoid": 0.5, "Affine": 0.0, "ScaledTanh": 1.0}


@operator("RNN", since=7, many=True)
def rnn(node: Node, xp: Namespace) -> Run:
    """Evaluate `h = f(x Wᵀ + h Rᵀ + b)`."""

    def cell(functions: list[Function], r: Array, *_: Array) -> Cell:
        return lambda x, h, rest: (functions[0](x + xp.matmul(h, r)), rest)

    return _layer(node, xp, 1, cell)


@operator("GRU", since=7, many=True)
def gru(node: Node, xp: Namespace) -> Run:
    """Evaluate gates z and r, the candidate c, and `h = (1 − z) c + z h`."""
    late = node.attributes.get("linear_before_reset", 0)

    def cell(functions: list[Function], r: Array, bias: Array, _: Array) -> Cell:
        f, g = functions
        size = r.shape[0]
        of_gates, of_candidate = r[:, : 2 * size], r[:, 2 * size :]

        def step(x: Array, h: Array, rest: Array) -> tuple[Array, Array]:
            if late:
                mixed = _plus(xp.matmul(h, r), bias)
                gates = f(x[..., : 2 * size] + mixed[..., : 2 * size])
                candidate = g(x[..., 2 * size :] + gates[..., size:] * mixed[..., 2 * size :])
            else:
                gates = f(x[..., : 2 * size] + xp.matmul(h, of_gates))
                candidate = g(x[..., 2 * size :] + xp.matmul(gates[..., size:] * h, of_candidate))
            z = gates[..., :size]
            return (1.0 - z) * candidate + z * h, rest

        return step

    return _layer(node, xp, 3, cell, late=bool(late))


@operator("LSTM", since=7, many=True)
def lstm(node: Node, xp: Namespace) -> Run:
    """Evaluate gates i, o, f and the candidate, `c = f c + i g`, and `h = o · tanh(c)`; peepholes on demand."""
    coupled = node.attributes.get("input_forget", 0)

    def cell(functions: list[Function], r: Array, _: Array, peepholes: Array) -> Cell:
        f, g, out = functions
        size = r.shape[0]

        def step(x: Array, h: Array, c: Array) -> tuple[Array, Array]:
            gates = x + xp.matmul(h, r)
            new = g(gates[..., 3 * size :])
            if peepholes is None:  # all gates at once
                gates = f(gates[..., : 3 * size])
                i, o, forget = (gates[..., at * size : (at + 1) * size] for at in range(3))
                c = (1.0 - i if coupled else forget) * c + i * new
                return o * out(c), c
            i, o, forget = (gates[..., at * size : (at + 1) * size] for at in range(3))
            i = f(i + c * peepholes[:size])
            c = (1.0 - i if coupled else f(forget + c * peepholes[2 * size :])) * c + i * new
            o = o + c * peepholes[size : 2 * size]
            return f(o) * out(c), c

        return step

    return _layer(node, xp, 4, cell)


def _layer(
    node: Node, xp: Namespace, gates: int, make: Callable[[list[Function], Array, Array, Array], Cell], *, late: bool = False
) -> Run:
    """Return the function of a layer: one or two directions, any initial state, sequences of unequal length.

    The cell takes the products of the input, all biases added, and makes the next state; with `late` it adds the state's biases.
    """
    direction, swapped = node.attributes.get("direction", "forward"), node.attributes.get("layout", 0)
    turns = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}.get(direction)
    if turns is None:
        raise node.damaged(f"has direction {direction!r}")
    functions = _functions(node, xp, len(turns))

    def run(
        x: Array, w: Array, r: Array, b: Array = None, lengths: Array = None, h0: Array = None, c0: Array = None, p: Array = None
    ) -> list[Array]:
        x = xp.permute_dims(x, (1, 0, 2)) if swapped else x
        steps, n, _ = x.shape
        size = r.shape[-1]
        width = gates * size
        if w.shape[0] != len(turns) or w.shape[1] != width or not steps:
            raise node.damaged(f"has weights {tuple(w.shape)} and {tuple(r.shape)} for {steps} steps in direction {direction}")
        outputs, last_h, last_c = [], [], []
        for at, turn in enumerate(turns):
            start = xp.zeros((n, size), dtype=x.dtype)
            h = start if h0 is None else (h0[:, at, :] if swapped else h0[at, ...])
            c = start if c0 is None else (c0[:, at, :] if swapped else c0[at, ...])
            of_input = None if b is None else b[at, :width]
            of_state = None if b is None or b.shape[1] == width else b[at, width:]  # zeros are left out, see `habits.halve`
            ahead = _plus(xp.matmul(x, _turned(xp, w[at, ...])), of_input)
            ahead = ahead if late else _plus(ahead, of_state)
            cell = make(functions[at], _turned(xp, r[at, ...]), of_state, None if p is None else p[at, ...])
            found: list[Any] = [None] * steps
            for t in reversed(range(steps)) if turn else range(steps):
                new_h, new_c = cell(ahead[t, ...], h, c)
                found[t] = new_h
                if lengths is not None:
                    inside = xp.expand_dims(lengths, axis=-1) > t
                    found[t] = xp.where(inside, new_h, xp.zeros_like(new_h))
                    new_h, new_c = xp.where(inside, new_h, h), xp.where(inside, new_c, c)
                h, c = new_h, new_c
            outputs.append(xp.stack(found, axis=1 if swapped else 0))
            last_h.append(h)
            last_c.append(c)
        whole = xp.stack(outputs, axis=2 if swapped else 1)
        return [whole, xp.stack(last_h, axis=1 if swapped else 0), xp.stack(last_c, axis=1 if swapped else 0)]

    if node.operator != "LSTM":
        return lambda x, w, r, b=None, lengths=None, h0=None: run(x, w, r, b, lengths, h0)[:2]
    return run


def _turned(xp: Namespace, weight: Array) -> Array:
    return xp.permute_dims(weight, (1, 0))


def _plus(x: Array, bias: Array) -> Array:
    return x if bias is None else x + bias


def _functions(node: Node, xp: Namespace, directions: int) -> list[list[Function]]:
    """Return the activation functions of each direction."""
    default = _DEFAULTS[node.operator]
    count = len(default) * directions
    names = (node.attributes.get("activations") or default * directions)[:count]  # the default of RNN is for two directions
    if len(names) != count:
        raise node.damaged(f"names {len(names)} activation functions; {count} are needed")
    alphas, betas = iter(node.attributes.get("activation_alpha") or ()), iter(node.attributes.get("activation_beta") or ())
    limit = node.attributes.get("clip")
    made = []
    for name in names:
        alpha = next(alphas, _ALPHA[name]) if name in _ALPHA else 0.0
        beta = next(betas, _BETA[name]) if name in _BETA else 0.0
        made.append(_limited(xp, _function(node, xp, name, alpha, beta), limit))
    return [made[at * len(default) : (at + 1) * len(default)] for at in range(directions)]


def _limited(xp: Namespace, function: Function, limit: float | None) -> Function:
    if limit is None:
        return function
    return lambda x: function(clip(xp, x, xp.full_like(x, -limit), xp.full_like(x, limit)))


def _function(node: Node, xp: Namespace, name: str, alpha: float, beta: float) -> Function:
    table: dict[str, Function] = {
        "Tanh": xp.tanh,
        "Sigmoid": extension(xp, "sigmoid"),
        "Relu": extension(xp, "relu"),
        "Affine": lambda x: alpha * x + beta,
        "LeakyRelu": lambda x: xp.where(x > 0, x, alpha * x),
        "ThresholdedRelu": lambda x: xp.where(x > alpha, x, xp.zeros_like(x)),
        "ScaledTanh": lambda x: alpha * xp.tanh(beta * x),
        "HardSigmoid": lambda x: clip(xp, alpha * x + beta, xp.zeros_like(x), xp.ones_like(x)),
        "Elu": lambda x: xp.where(x > 0, x, alpha * xp.expm1(xp.where(x > 0, xp.zeros_like(x), x))),
        "Softsign": lambda x: x / (1.0 + xp.abs(x)),
        "Softplus": lambda x: xp.logaddexp(x, xp.zeros_like(x)),
    }
    if name not in table:
        raise node.damaged(f"names the activation function {name!r}; known are {', '.join(table)}")
    return table[name]
