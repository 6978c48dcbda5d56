"""Random programs of autograd.numpy: kernels, of parts and in chunks too, and their gradients against a loop."""

from __future__ import annotations

import random

import autograd
import autograd.numpy as anp
import numpy as np
import pytest

import mgs_core as mgs

_SAMPLES, _WIDTH, _LENGTH = 3, 4, 3

#: Operations on (n, d) and on (n, s, d) with the shapes of their parameters; each gives back the shape that it took.
_FLAT = {
    "affine": (lambda h, w, b: anp.dot(h, w) + b, (_WIDTH, _WIDTH), (_WIDTH,)),
    "turned": (lambda h, w: (w @ h.T).T, (_WIDTH, _WIDTH)),
    "weight on the left": (lambda h, w: anp.einsum("oi,ni->no", w, h), (_WIDTH, _WIDTH)),
    "contracted": (lambda h, w: anp.tensordot(h, w, axes=[[1], [1]]), (_WIDTH, _WIDTH)),
    "parts of a weight": (lambda h, w: h @ w[:_WIDTH] + anp.sin(h) @ w[_WIDTH:], (2 * _WIDTH, _WIDTH)),
    "split weight": (lambda h, w: anp.tanh(h @ anp.split(w, 2)[0]) + h @ anp.split(w, 2)[1], (2 * _WIDTH, _WIDTH)),
    "rows of a weight": (lambda h, w: h + w[_chosen(h)], (5, _WIDTH)),
    "elements": (lambda h, w: h * w[0] + w[1], (_WIDTH,)),
    "a number": (lambda h, w: h / (1 + anp.exp(w)), ()),
    "reversed": (lambda h, w: h * w[::-1] + anp.roll(w, 1), (_WIDTH,)),
    "cumulative": (lambda h, w: anp.cumsum(h, axis=1) * anp.cumsum(w), (_WIDTH,)),
    "tiled": (lambda h, w: h * anp.tile(w, 2), (_WIDTH // 2,)),
    "beside": (lambda h, w: anp.concatenate([h[:, 1:], anp.repeat(w, len(h), axis=0)], axis=1), (1, 1)),
    "weight norm": (lambda h, w, g: h @ (g * w / anp.linalg.norm(w, axis=0)), (_WIDTH, _WIDTH), (_WIDTH,)),
    "low rank": (lambda h, a, b: anp.tanh(h @ a) @ b + h @ (a @ b), (_WIDTH, 2), (2, _WIDTH)),
    "bilinear": (lambda h, w: anp.einsum("ni,oij,nj->no", h, w, anp.cos(h)), (_WIDTH, _WIDTH, _WIDTH)),
    "distances": (lambda h, w: anp.sum((h[:, None] - w) ** 2, axis=2), (_WIDTH, _WIDTH)),
    "power": (lambda h, w: (h**2 + 0.5) ** w, (_WIDTH,)),
    "greatest": (anp.maximum, (_WIDTH,)),
    "normalised": (
        lambda h, w, b: (h - anp.mean(h, 1, keepdims=True)) / anp.sqrt(anp.var(h, 1, keepdims=True) + 0.1) * w + b,
        (_WIDTH,),
        (_WIDTH,),
    ),
    "eigenvalues": (lambda h, w: h * anp.linalg.eigh(w + w.T)[0] + anp.linalg.slogdet(w)[1], (_WIDTH, _WIDTH)),
    "inverse": (lambda h, w: anp.linalg.solve(w @ w.T + anp.eye(_WIDTH), h.T).T, (_WIDTH, _WIDTH)),
    "sorted": (lambda h, w: anp.stack([anp.sort(row) for row in h]) * anp.sort(w), (_WIDTH,)),
    "tanh": (anp.tanh,),
}
_SEQUENCES = {
    "positions": (lambda h, w: h + w, (_LENGTH, _WIDTH)),
    "sequence first": (lambda h, w: anp.swapaxes(anp.dot(anp.swapaxes(h, 0, 1), w), 0, 1), (_WIDTH, _WIDTH)),
    "mixed positions": (lambda h, w: anp.einsum("ts,nsd->ntd", w, h), (_LENGTH, _LENGTH)),
    "a weight for each position": (lambda h, w: anp.einsum("sdo,nsd->nso", w, h), (_LENGTH, _WIDTH, _WIDTH)),
    "convolution": (
        lambda h, w: anp.concatenate([h[:, :-1] @ w[0] + h[:, 1:] @ w[1], h[:, -1:] @ w[0]], axis=1),
        (2, _WIDTH, _WIDTH),
    ),
    "recurrence": (
        lambda h, w, u: anp.stack([a := anp.tanh(h[:, 0] @ w), b := anp.tanh(h[:, 1] @ w + a @ u), a * b], axis=1),
        (_WIDTH, _WIDTH),
        (_WIDTH, _WIDTH),
    ),
}


def _chosen(h):
    while hasattr(h, "_value"):
        h = h._value
    return np.abs(3 * h.sum(axis=1)).astype(int) % 5


def program(seed):
    """Return a function of parameters and inputs, its parameters, and inputs."""
    choose, generator = random.Random(seed), np.random.default_rng(seed)
    parameters, steps = {}, []

    def parameter(shape):
        alike = [name for name, value in parameters.items() if value.shape == shape]
        if alike and choose.random() < 0.3:
            return choose.choice(alike)
        parameters[f"parameter {len(parameters)}"] = generator.normal(size=shape) / (shape or (1,))[0] ** 0.5
        return list(parameters)[-1]

    def add(operation, *shapes):
        steps.append((operation, [parameter(shape) for shape in shapes]))

    sequence = choose.random() < 0.3
    if sequence:
        for _ in range(choose.randint(1, 3)):
            add(*choose.choice(list(_SEQUENCES.values())))
        add(lambda h: anp.mean(h, axis=1))
    for _ in range(choose.randint(0, 3)):
        add(*choose.choice(list(_FLAT.values())))
    add(*list(_FLAT.values())[seed % len(_FLAT)])
    if seed >= len(_FLAT):  # else gradients at the last operation may be constants while its inputs are not
        add(anp.matmul, (_WIDTH, 2))

    def run(values, x):
        for operation, names in steps:
            x = operation(x, *(values[name] for name in names))
        return x

    return run, parameters, generator.normal(size=(_SAMPLES, _LENGTH, _WIDTH) if sequence else (_SAMPLES, _WIDTH))


def by_loop(run, values, x, chosen, output):
    """Return the kernel of explicit rows of single samples."""

    def row(a, k):
        own = {name: values[name] for name in chosen}
        head = lambda part: run({**values, **part}, x[a : a + 1])[0, k]  # noqa: E731  # used once
        gradient = autograd.grad(head)(own)
        return anp.concatenate([anp.ravel(gradient[name]) for name in chosen])

    outputs = range(run(values, x[:1]).shape[1])
    rows = [[row(a, k) for k in outputs] for a in range(len(x))]
    rows = anp.stack([anp.concatenate(parts) if output == "trace" else sum(parts) for parts in rows])
    return anp.dot(rows, rows.T)


@pytest.mark.filterwarnings("ignore:Output seems independent")  # of autograd's own loop, for parameters that a program leaves out
@pytest.mark.parametrize("seed", range(36))
def test_kernels_of_random_programs_and_their_gradients_are_those_of_a_loop(seed):
    run, parameters, x = program(seed)
    choose = random.Random(seed)
    chosen = choose.sample(list(parameters), choose.randint(1, len(parameters)))
    output, chunk_size = ("trace", "sum")[seed % 2], (None, 1, 2)[seed % 3]
    options = {"output": output, "parameters": chosen, "chunk_size": chunk_size, "differentiable": True}
    weights = np.arange(1.0, 10.0).reshape(3, 3)  # not symmetric
    expected = by_loop(run, parameters, x, chosen, output)
    truth = autograd.grad(lambda values: anp.sum(weights * by_loop(run, values, x, chosen, output)))(parameters)
    kernel = lambda values: mgs.kernel(mgs.FunctionalModel(run, values), x, **options)  # noqa: E731  # as users write it
    np.testing.assert_allclose(kernel(parameters), expected, rtol=0, atol=1e-11 * np.abs(expected).max())
    _, gradient = mgs.get_backend("numpy").value_and_gradient(lambda values: anp.sum(weights * kernel(values)))(parameters)
    largest = max(np.abs(part).max() for part in truth.values())
    for name, part in truth.items():
        np.testing.assert_allclose(gradient[name], part, rtol=0, atol=1e-9 * max(largest, 1e-3))


def test_choices_between_a_weight_and_data_have_its_shape():
    """Of `where` autograd gives the gradient in the shape of the result."""
    generator = np.random.default_rng(0)
    parameters, x = {"w": generator.normal(size=4), "out": generator.normal(size=(4, 2))}, generator.normal(size=(3, 4))
    short = lambda p, x: anp.where(x > 0, x * p["w"], p["w"][::-1] + p["w"][0]) @ p["out"]  # noqa: E731
    long = lambda p, x: anp.where(x > 0, x * p["w"], p["w"][::-1] + p["w"][0] + 0 * x) @ p["out"]  # noqa: E731
    results = [
        mgs.get_backend("numpy").value_and_gradient(
            lambda p, f=function: anp.sum(mgs.kernel(mgs.FunctionalModel(f, p), x, differentiable=True) ** 2)
        )(parameters)
        for function in (short, long)
    ]
    np.testing.assert_allclose(results[0][0], results[1][0])
    for name in parameters:
        np.testing.assert_allclose(results[0][1][name], results[1][1][name])
