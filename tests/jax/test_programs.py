"""Random programs of JAX operations: kernels, of parts and in chunks too, and penalties' gradients against Jacobian rows."""

from __future__ import annotations

import random
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, vmap

import mgs_core as mgs

W = 4
SQUARE, LINE = (W, W), (W,)


def place(h, k):
    """Give each sample a whole number below k."""
    return (7.0 * jnp.abs(lax.stop_gradient(h)).sum(-1)).astype(jnp.int32) % k


def convolve(h, w, stride=1, **options):
    """Take (n, 4) as two channels of two pixels."""
    return lax.conv_general_dilated(h.reshape(len(h), 2, 2), w, (stride,), "SAME", **options).reshape(len(h), -1)


def along(h, ws, step, **options):
    return lax.scan(lambda h, w: (step(h, w), None), h, ws, **options)[0]


def nested(h, w, u, tables):
    """Nest scans: over weights, and over tables with a weight's part in turn; another table serves all steps."""
    h = along(h, w, lambda h, w: along(h, w, lambda h, v: jnp.tanh(h @ v.T) + u[place(h, 3)]))
    return along(h, tables, lambda h, t: along(h, w[0], lambda h, v: jnp.sin(h @ v) + t[place(h, 3)]))


@jax.custom_vjp
def own_rule(w, h):
    return jnp.tanh(h @ w)


own_rule.defvjp(lambda w, h: (jnp.tanh(h @ w), (w, h)), lambda r, g: (2.0 * r[1].T @ g, g @ r[0].T))

OPERATIONS = [
    (lambda h, w, b: h @ w + b, SQUARE, LINE),
    (lambda h, w: lax.dot_general(w, h, (((0,), (1,)), ((), ()))).T, SQUARE),
    (lambda h, w: jnp.einsum("oi,ij,nj->no", w, w, h), SQUARE),
    (lambda h, w: jnp.einsum("ni,ijk,nj->nk", h, w, jnp.cos(h)), (W, W, W)),
    (lambda h, w: jnp.einsum("bio,nbi->nbo", w, h.reshape(-1, 2, 2)).reshape(-1, W), (2, 2, 2)),
    (lambda h, w: lax.dot_general(h.reshape(-1, 2, 2), w, (((2, 1), (0, 1)), ((), ()))), (2, 2, W)),
    (lambda h, w: h @ w[1:, ::2] + h @ w[:-1, 1::2], (W + 1, 2 * W)),
    (lambda h, w: h + jnp.take(w, place(h, 7), axis=0, fill_value=0.5), (5, W)),
    (lambda h, w: h + jnp.take(w, place(h, 7) - 1, axis=0, mode="clip") + w[place(h, 5) - 5], (5, W)),
    (lambda h, w: h + w[:, place(h, 5).astype(jnp.uint8)].T, (W, 5)),
    (lambda h, w: jnp.einsum("nio,ni->no", w[place(h, 3)], h), (3, W, W)),
    (lambda h, w: h.at[:, jnp.array([0, 0, 2])].add(w).at[:, 1].set(w[0]), (3,)),
    (lambda h, w: h + vmap(lambda r: w.at[1].set(r[0]).at[2].add(r[1]))(h), LINE),
    (lambda h, w: jnp.sort(jnp.cumsum(h * w, 1), 1), LINE),
    (lambda h, w, g: h @ (g * w / jnp.linalg.norm(w, axis=1, keepdims=True)), SQUARE, (W, 1)),
    (lambda h, a, b: h + h @ a @ b + h @ (a @ b), (W, 2), (2, W)),
    (lambda h, w: jnp.clip(h, -jnp.abs(w), jnp.abs(w)) + jnp.maximum(h, w), ()),
    (lambda h, w: convolve(h, w), (2, 2, 3)),
    (lambda h, w: convolve(h, w, feature_group_count=2, rhs_dilation=(2,)), (2, 1, 2)),
    (lambda h, w: convolve(h, w, 2, dimension_numbers=("NWC", "OWI", "NCW")), (W, 3, 2)),
    (lambda h, w: along(h, w.transpose(2, 1, 0), lambda h, v: jnp.tanh(h @ v), reverse=True), (W, W, 2)),
    (lambda h, w: along(h, w, lambda h, v: jnp.tanh(convolve(h, v))), (2, 2, 2, 3)),
    (nested, (2, 2, W, W), (3, W), (2, 3, W)),
    (lambda h, w: lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), 0.9 * c[1]), None), (h, w), length=2)[0][0], SQUARE),
    (lambda h, w, u: vmap(lambda r: lax.cond(r[0] > 0, lambda r: jnp.tanh(r @ w), lambda r: r * u, r))(h), SQUARE, LINE),
    (lambda h, w: own_rule(w, h), SQUARE),
    (lambda h, w: jax.checkpoint(lambda h, w: jnp.tanh(h @ w), prevent_cse=(True, False))(h, w) @ w, SQUARE),
    (lambda h, w: (step := jax.jit(lambda h, w: jnp.tanh(h @ w.T)))(step(h, w), w), SQUARE),
    (lambda h, w: h @ jax.jit(lambda w: (w.T, w[::-1]))(w)[1] + h * jnp.mean(jnp.sin(w)), SQUARE),
    (lambda h, w: vmap(jax.grad(lambda r: jnp.sum(jnp.tanh(r @ w) ** 2)))(h), SQUARE),
    (lambda h, w: jnp.concatenate([jnp.cross(h[:, :3], w), w[0] * h[:, 3:] + jnp.sum(w[:0])], 1), (3,)),
]
PROGRAMS = 6


def program(seed):
    """Return a function of parameters and inputs, and its parameters; all operations are dealt out, in an order that is drawn."""
    order, draw = list(OPERATIONS), np.random.default_rng(seed)
    random.Random(0).shuffle(order)
    steps, parameters = [], {"last": jnp.asarray(draw.normal(size=(W, 2)))}
    for operation, *shapes in order[seed::PROGRAMS]:
        names = []
        for shape in shapes:
            alike = [name for name, value in parameters.items() if value.shape == shape]
            names.append(alike[0] if alike and draw.random() < 0.5 else f"{len(parameters)}")
            parameters.setdefault(names[-1], jnp.asarray(draw.normal(size=shape) / (*shape, 1)[0] ** 0.5))
        steps.append((operation, names))

    def run(parameters, h):
        for operation, names in steps:
            h = operation(h, *(parameters[name] for name in names))
        return h @ parameters["last"]

    return run, parameters


@pytest.mark.parametrize("seed", [0, 2, 3, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 4, 5))])
def test_kernels_of_random_programs_and_their_gradients_are_those_of_jacobians(seed):
    run, parameters = program(seed)
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(3, W)))
    chosen = list(parameters)[:: 1 + seed % 2]
    weights = jnp.arange(9.0).reshape(3, 3)  # not symmetric

    def by_rows(parameters):
        def row(sample):
            jacobian = jax.jacrev(lambda some: run({**parameters, **some}, sample[None])[0])({k: parameters[k] for k in chosen})
            return jnp.concatenate([leaf.reshape(2, -1) for leaf in jacobian.values()], 1)

        rows = vmap(row)(x)
        rows = rows if seed % 3 else rows.sum(1, keepdims=True)
        return jnp.einsum("acp,bcp->ab", rows, rows)

    def ours(parameters):
        options = {"output": "trace" if seed % 3 else "sum", "chunk_size": 2 if seed == 1 else None}
        return mgs.kernel(mgs.FunctionalModel(run, parameters), x, parameters=chosen, differentiable=True, **options)

    def value(kernel, parameters):
        found = kernel(parameters)
        return jnp.sum(weights * found), found

    (_, expected), truth = jax.jit(jax.value_and_grad(partial(value, by_rows), has_aux=True))(parameters)
    (_, found), gradient = jax.jit(jax.value_and_grad(partial(value, ours), has_aux=True))(parameters)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * float(jnp.max(jnp.abs(expected))))
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in truth.values())
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-9 * largest), gradient, truth)


def agrees(function, parameters, x):
    """Compare the kernel with that of Jacobian rows, and return the layers' kinds."""
    model = mgs.FunctionalModel(function, parameters)
    rows = [leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(jax.jacrev(lambda p: function(p, x)[:, 0])(parameters))]
    np.testing.assert_allclose(mgs.kernel(model, x), sum(row @ row.T for row in rows), rtol=1e-12)
    return {layer.parameter: layer.kind for layer in mgs.check(model, x).layers}


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_that_are_looped_over_have_statistics(axis):
    draw = np.random.default_rng(0)
    weights = jnp.asarray(draw.normal(size=(3, W, W)).swapaxes(0, axis))

    def function(p, h):
        for w in p["w"] if axis == 0 else jnp.unstack(p["w"], axis=1):
            h = jnp.tanh(h @ w)
        return jnp.log2(1.0 + jnp.sum(h**2, 1, keepdims=True))

    assert agrees(function, {"w": weights}, jnp.asarray(draw.normal(size=(5, W)))) == {"w": "outer"}


def test_a_constant_is_not_taken_for_a_sample():
    """Both programs are one to the letter, of a constant, the parameter and a sample, and of the parameter and two samples."""
    draw = np.random.default_rng(0)
    constant, w = (jnp.asarray(draw.normal(size=(W, W))) for _ in range(2))
    x, y = (jnp.asarray(draw.normal(size=(3, W, W))) for _ in range(2))
    agrees(lambda p, x: jnp.sum((x * constant) @ p, (1, 2))[:, None], w, x)
    found = mgs.kernel(mgs.FunctionalModel(lambda p, both: jnp.sum((both[1] * p) @ both[0], (1, 2))[:, None], w), (x, y))
    rows = jnp.reshape(y * jnp.sum(x, 2)[:, None, :], (3, -1))
    np.testing.assert_allclose(found, rows @ rows.T, rtol=1e-12)
