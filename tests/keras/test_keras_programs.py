"""Random models of a few layers, some used twice, on masked sequences: kernel and penalty against one-at-a-time gradients."""

from __future__ import annotations

import random

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras_oracle import close, draw_weights, kernel, numpy, rows
from mgs_core.adapters.keras import MGSRegularizer, regularize


class Several(layers.Layer):
    """Uses its weights in several ways."""

    supports_masking = True

    def build(self, shape):
        k = shape[-1]
        self.matrix, self.gain, self.factor = (self.add_weight(shape=shape) for shape in ((k, k), (k,), ()))

    def call(self, x):
        return ops.tanh(x @ self.matrix) * self.gain + self.factor * (x @ ops.transpose(self.matrix)) + ops.sin(self.gain)


LAYERS = {
    "dense": lambda: layers.Dense(4, activation="tanh"),
    "einsum": lambda: layers.EinsumDense("abc,bcd->abd", (3, 4), bias_axes="bd", activation="tanh"),
    "convolution": lambda: layers.Conv1D(4, 2, padding="same", activation="tanh"),
    "depthwise": lambda: layers.DepthwiseConv1D(2, padding="same", activation="tanh"),
    "norm": lambda: layers.LayerNormalization(),
    "prelu": lambda: layers.PReLU(shared_axes=[1]),
    "several": lambda: Several(),
}
JOINS = (layers.Add, layers.Multiply, layers.Maximum)
N = 3


def program(seed: int) -> tuple[keras.Model, np.ndarray]:
    """Return a model and ids; the mask reaches its outputs."""
    draw = random.Random(seed)
    ids = keras.Input((3,), dtype="int32")
    h = layers.Embedding(6, 4, mask_zero=True)(ids)
    drawn = [LAYERS[name]() for name in draw.sample(list(LAYERS), 2)]
    for layer in [*drawn, draw.choice(drawn)]:
        layer.supports_masking = True  # which some of them merely do not say
        join, changed = draw.choice(JOINS), layer(h)
        h = join()([h, changed]) if draw.random() < 0.5 else changed
    x = np.random.default_rng(seed).integers(1, 6, (N, 3))
    x[np.arange(3) >= [[1], [3], [2]]] = 0
    return draw_weights(keras.Model(ids, layers.Dense(1)(h)), seed), x


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("seed", range(3))
def test_random_models_have_the_kernel_and_the_penalty_of_single_gradients(seed):
    model, x = program(seed)
    gradients = rows(model, x)  # (n, c, p)
    close(kernel(model, x), np.einsum("acp,bcp->ab", gradients, gradients), 1e-11)
    y, mask = np.random.default_rng(seed).normal(size=(N, 3, 1)), (x != 0)[..., None]
    slopes = 2.0 * (numpy(model(x)) - y) * mask / np.mean(mask) / 3  # of each sample's loss, of 3 positions, in its outputs
    expected = np.einsum("ac,acp->ap", slopes.reshape(N, -1), gradients)
    regularize(model, MGSRegularizer("trace", 1.0)).compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    found = model.fit(x, y, batch_size=N, verbose=0).history["mgs_penalty"][0]
    assert found == pytest.approx(np.sum(expected**2) / N, rel=1e-6)
