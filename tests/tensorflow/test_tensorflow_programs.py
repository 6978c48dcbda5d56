"""Random programs of TensorFlow operations: kernels, of parts and in chunks too, and their gradients against a loop."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import tensorflow as tf

import mgs_core as mgs
from mgs_core.heads import make_head

_SAMPLES, _WIDTH, _LENGTH, _PROGRAMS = 3, 4, 3, 6


def _ids(h, size):
    return tf.cast(tf.abs(3 * tf.stop_gradient(tf.reduce_sum(h, -1))), tf.int32) % size


def _moments(h, w, b):
    mean, variance = tf.nn.moments(h, -1, keepdims=True)
    return tf.nn.batch_normalization(h, mean, variance, b, w, 1e-3)


def _transposed(h, w):
    return tf.nn.conv1d_transpose(h, w, [h.shape[0], 2 * _LENGTH, _WIDTH], 2, "SAME")[:, ::2]


#: Operations on (n, d) and on (n, s, d) with the shapes of their parameters; each gives back the shape that it took.
_FLAT = {
    "product": (lambda h, w: h @ w, (_WIDTH, _WIDTH)),
    "weight on the left": (lambda h, w: tf.transpose(tf.matmul(w, h, transpose_a=True, transpose_b=True)), (_WIDTH, _WIDTH)),
    "blocks": (
        lambda h, w: tf.reshape(tf.einsum("nhi,hio->nho", tf.reshape(h, [-1, 2, 2]), w), [-1, _WIDTH]),
        (2, 2, 2),
    ),
    "summed features": (lambda h, w: h + tf.einsum("ni,ij->n", h, w)[:, None], (_WIDTH, _WIDTH)),
    "a product for each sample": (
        lambda h, w: tf.squeeze(h[:, None] @ tf.broadcast_to(w, [h.shape[0], *w.shape]), 1),
        (_WIDTH, _WIDTH),
    ),
    "parts of a weight": (lambda h, w: h @ w[_WIDTH:] - tf.sin(h) @ tf.split(w, 2)[0], (2 * _WIDTH, _WIDTH)),
    "every other row": (lambda h, w: h @ w[::-2], (2 * _WIDTH, _WIDTH)),
    "weight of another shape": (lambda h, w: h @ tf.reshape(tf.transpose(w, [2, 0, 1]), [_WIDTH, _WIDTH]), (2, _WIDTH, 2)),
    "multiplied": (lambda h, w: h @ (-0.5 * w), (_WIDTH, _WIDTH)),
    "multiplied and of another shape": (
        lambda h, w: h @ tf.reshape(tf.transpose(3.0 * w, [1, 2, 0]) / 2.0, [_WIDTH, _WIDTH]),
        (_WIDTH, 2, 2),
    ),
    "multiplied table": (lambda h, w: h + tf.gather(-w, _ids(h, 5)), (5, _WIDTH)),
    "three kinds of use": (lambda h, w: h @ w + h * w[0] - tf.gather(w, _ids(h, _WIDTH)), (_WIDTH, _WIDTH)),
    "lookup": (lambda h, w: h * tf.gather(w, _ids(h, 5)), (5, _WIDTH)),
    "columns looked up": (lambda h, w: h + tf.transpose(tf.gather(w, _ids(h, 5), axis=1)), (_WIDTH, 5)),
    "elements": (lambda h, w: h * w[0] + w[1] - w[0], (_WIDTH,)),
    "quotients": (lambda h, w: w / (2.5 + h**2) + h / (2.5 + w**2), (_WIDTH,)),
    "self scaled": (lambda h, w: h * -w / 2.0 + (3.0 * w) * tf.stop_gradient(w), (_WIDTH,)),
    "a number": (lambda h, w: h * w - w, ()),
    "shifted": (lambda h, w: h * tf.cumsum(w) + tf.roll(tf.reverse(w, [0]), 1, 0), (_WIDTH,)),
    "padded": (lambda h, w: h + tf.pad(w, [[1, 0]]), (_WIDTH - 1,)),
    "scattered": (lambda h, w: h * tf.tensor_scatter_nd_update(tf.ones(_WIDTH, w.dtype), [[1], [3]], w), (2,)),
    "beside": (lambda h, w: tf.concat([h[:, 1:], tf.tile(w, [h.shape[0], 1])], 1), (1, 1)),
    "chosen": (lambda h, w: tf.where(h > 0, h * w, w), (_WIDTH,)),
    "weight norm": (lambda h, w, g: h @ (g * w / tf.norm(w, axis=0)), (_WIDTH, _WIDTH), (_WIDTH,)),
    "low rank": (lambda h, a, b: h + h @ a @ b + h @ (a @ b), (_WIDTH, 2), (2, _WIDTH)),
    "bilinear": (lambda h, w: tf.einsum("ni,ijk,nk->nj", h, w, tf.cos(h)), (_WIDTH, _WIDTH, _WIDTH)),
    "normalised": (_moments, (_WIDTH,), (_WIDTH,)),
    "branches": (lambda h, w: tf.cond(tf.reduce_sum(w) > 0, lambda: h * w, lambda: h - w), (_WIDTH,)),
    "mapped": (lambda h, w: tf.map_fn(lambda row: tf.linalg.matvec(w, row), h), (_WIDTH, _WIDTH)),
    "complex": (lambda h, w: tf.math.imag(tf.complex(h, tf.sin(h)) @ tf.cast(w, tf.complex128)), (_WIDTH, _WIDTH)),
    "function": (lambda h, w: tf.function(lambda a, b: tf.tanh(a @ b) + b[0], autograph=False)(h, w), (_WIDTH, _WIDTH)),
    "tanh": (tf.tanh,),
}
_SEQUENCES = {
    "positions": (lambda h, w: h + w, (_LENGTH, _WIDTH)),
    "positions last": (lambda h, w: tf.transpose(tf.transpose(h, [1, 2, 0]) * w[..., None], [2, 0, 1]), (_LENGTH, _WIDTH)),
    "sequence first": (lambda h, w: tf.transpose(tf.transpose(h, [1, 0, 2]) @ w, [1, 0, 2]), (_WIDTH, _WIDTH)),
    "mixed positions": (lambda h, w: w @ h, (_LENGTH, _LENGTH)),
    "a weight for each position": (lambda h, w: tf.einsum("nsi,sio->nso", h, w), (_LENGTH, _WIDTH, _WIDTH)),
    "convolution": (lambda h, w: tf.nn.conv1d(h, w, 1, "SAME"), (2, _WIDTH, _WIDTH)),
    "dilated": (lambda h, w: tf.nn.convolution(h, w, 1, "SAME", dilations=2), (2, _WIDTH, _WIDTH)),
    "transposed": (_transposed, (2, _WIDTH, _WIDTH)),
    "depthwise": (lambda h, w: tf.nn.depthwise_conv2d(h[:, None], w, [1, 1, 1, 1], "SAME")[:, 0], (1, 3, _WIDTH, 1)),
    "depthwise, two for each": (
        lambda h, w: tf.add_n(tf.split(tf.nn.depthwise_conv2d(h[:, None], w, [1, 1, 1, 1], "SAME")[:, 0], 2, 2)),
        (1, 2, _WIDTH, 2),
    ),
    "class token": (lambda h, w: tf.concat([tf.tile(w, [h.shape[0], 1, 1]), h[:, 1:]], 1), (1, 1, _WIDTH)),
    "tied": (lambda h, w: tf.tanh(tf.matmul(tf.gather(w, _ids(h, 7)) + h, w, transpose_b=True)) @ w, (7, _WIDTH)),
}


def program(seed):
    """Return a function of parameters and inputs, its parameters, and inputs."""
    choose, draw = random.Random(seed), np.random.default_rng(seed).normal
    parameters, steps = {}, []

    def parameter(shape):
        alike = [name for name, value in parameters.items() if value.shape == shape]
        if alike and choose.random() < 0.3:
            return choose.choice(alike)
        name = f"parameter {len(parameters)}"
        parameters[name] = np.asarray(draw(size=shape)) / math.sqrt(shape[0] if shape else 1)
        return name

    def add(table, names):
        for operation, *shapes in (table[name] for name in names):
            steps.append((operation, [parameter(shape) for shape in shapes]))

    def dealt(table, place, programs):  # so that each operation is in one of the programs, and those with rows are together
        return list(table)[place * len(table) // programs : (place + 1) * len(table) // programs]

    sequence = seed < _PROGRAMS // 2
    if sequence:
        add(_SEQUENCES, dealt(_SEQUENCES, seed, _PROGRAMS // 2))
        steps.append((lambda h: tf.reduce_mean(tf.tanh(h), 1), []))
    add(_FLAT, dealt(_FLAT, seed, _PROGRAMS))
    steps.append((tf.matmul, [parameter((_WIDTH, 2))]))

    def run(values, x):
        for operation, names in steps:
            x = operation(x, *(values[name] for name in names))
        return x

    shape = (_SAMPLES, _LENGTH, _WIDTH) if sequence else (_SAMPLES, _WIDTH)
    return run, parameters, tf.constant(draw(size=shape))


@pytest.mark.parametrize(
    ("seed", "differentiable"),
    [
        *((seed, seed % 3 == 1) for seed in range(_PROGRAMS)),
        *(pytest.param(seed, True, marks=pytest.mark.slow) for seed in range(_PROGRAMS) if seed % 3 != 1),
    ],
)
def test_kernels_of_random_programs_and_their_gradients_are_those_of_a_loop(seed, differentiable):
    run, parameters, x = program(seed)
    output, chunk_size = ("trace", "sum", "full")[seed % 3], (None, None, None, 2)[seed % 4]
    chosen = random.Random(seed).sample(list(parameters), max(1, len(parameters) - 1))
    values = {name: tf.constant(value) for name, value in parameters.items()}
    head = make_head(output, "identity", None, 1, 0, None)
    weights = np.random.default_rng(0).normal(size=(_SAMPLES, _SAMPLES))  # not symmetric
    rows, model = [], mgs.FunctionalModel(run, values)
    with tf.GradientTape(persistent=True) as outer:
        if differentiable:
            outer.watch(values)
        for a in range(_SAMPLES):
            with tf.GradientTape(persistent=True) as tape:
                tape.watch(values)
                scalars = tf.unstack(head.function(run(values, x[a : a + 1]), None)[0])
            found = [tape.gradient(s, [values[name] for name in chosen], unconnected_gradients="zero") for s in scalars]
            rows.append([tf.concat([tf.reshape(tf.convert_to_tensor(g), [-1]) for g in each], 0) for each in found])
        rows = tf.stack(rows)
        expected = tf.einsum("acp,bdp->acbd", rows, rows) if head.full else tf.einsum("acp,bcp->ab", rows, rows)
        kernel = mgs.kernel(model, x, output=output, parameters=chosen, chunk_size=chunk_size, differentiable=differentiable)
        scalars = [tf.reduce_sum(weights * (tf.einsum("acbd->ab", K) if head.full else K)) for K in (kernel, expected)]
    np.testing.assert_allclose(kernel, expected, rtol=0, atol=1e-11 * np.max(np.abs(expected)))
    if not differentiable:
        return
    actual, truth = (
        [tf.convert_to_tensor(g) for g in outer.gradient(s, list(values.values()), unconnected_gradients="zero")] for s in scalars
    )
    largest = max(np.max(np.abs(gradient)) for gradient in truth)
    for one, other in zip(actual, truth, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-9 * largest)
