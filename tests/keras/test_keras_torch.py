"""PyTorch: the penalty is replayed from a traced graph where that gives the same."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers
from keras_oracle import BACKEND, draw_weights, numpy
from mgs_core.adapters.keras import MGSRegularizer, _training, regularize, sample_loss

import mgs_core as mgs

pytestmark = pytest.mark.skipif(BACKEND != "torch", reason="TensorFlow and JAX trace by themselves")
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(28, 5)).astype("float32")
Y = RANDOM.integers(0, 3, 28)


class ByValue(layers.Layer):
    """A layer whose Python reads values, openly or past the tracing."""

    def __init__(self, read, **options):
        super().__init__(**options)
        self.read = read

    def call(self, x):
        return x * (2.0 if self.read(x) > 0.0 else 0.5)


def openly(x):
    return float(keras.ops.stop_gradient(keras.ops.sum(x[0])))


def past(x):
    return float(x.detach().numpy()[0].sum())


def train(*between, regularizer=None):
    """Return the histories of two runs of `fit`, of 3 batches of 8 and one of 4, and the graphs that were replayed."""
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(6, activation="tanh"), *between, layers.Dense(3, activation="softmax")]
    model = draw_weights(keras.Sequential([keras.Input((5,)), *hidden]))
    regularize(model, regularizer or MGSRegularizer("log_determinant", strength=0.5, max_samples=6))
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy", jit_compile=False)
    history = [model.fit(X, Y, batch_size=8, epochs=3, verbose=0, shuffle=False).history for _ in range(2)]
    replay = model._mgs._replay
    graphs = [] if replay is None else [graph for key, graph in replay._graphs.items() if key in replay._proven]
    return history, [numpy(variable) for variable in model.trainable_variables], graphs


@pytest.mark.parametrize("name", ["plain", "dropout", "batch norm", "lstm"])
def test_replayed_steps_are_those_that_are_evaluated(name, monkeypatch):
    between = {
        "plain": lambda: [],
        "dropout": lambda: [layers.Dropout(0.3)],
        "batch norm": lambda: [layers.BatchNormalization(momentum=0.5)],  # whose statistics move from step to step
        "lstm": lambda: [layers.Reshape((3, 2)), layers.LSTM(4)],
    }[name]
    curves, weights, graphs = train(*between())
    assert len(graphs) == 2  # one for each size of batch
    monkeypatch.setattr(_training, "_TRACED", 0)
    expected, expected_weights, none = train(*between())
    assert none == []
    for one, other in zip(curves, expected, strict=True):
        for key, value in one.items():
            assert other[key] == pytest.approx(value, rel=1e-4)
    for one, other in zip(weights, expected_weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("read", [openly, past])
def test_a_model_that_reads_values_is_evaluated(read, monkeypatch):
    curves, _, graphs = train(ByValue(read))
    assert graphs == []
    monkeypatch.setattr(_training, "_TRACED", 0)
    expected, _, _ = train(ByValue(read))
    for one, other in zip(curves, expected, strict=True):
        assert one["mgs_penalty"] == pytest.approx(other["mgs_penalty"], rel=1e-4)


def test_another_loss_is_traced_anew():
    model = draw_weights(keras.Sequential([keras.Input((5,)), layers.Dense(3)]))
    regularize(model, MGSRegularizer("trace", strength=0.5))
    found = []
    for loss in ("mse", "mae", "mse"):
        model.compile(keras.optimizers.SGD(0.0), loss, jit_compile=False)
        found.append(model.fit(X, X[:, :3], batch_size=7, epochs=2, verbose=0).history["mgs_penalty"][1])
    assert found[0] == pytest.approx(found[2], rel=1e-5)
    assert abs(found[0] - found[1]) > 0.1 * found[0]


class Scaled(keras.losses.Loss):
    """A loss with a number that a callback may change."""

    factor = 1.0

    def call(self, y_true, y_pred):
        return self.factor * keras.ops.mean((y_true - y_pred) ** 2, axis=-1)


@pytest.mark.parametrize("keyword", [False, True])
def test_numbers_in_a_loss_may_change_between_steps(keyword):
    model = draw_weights(keras.Sequential([keras.Input((5,)), layers.Dense(3)]))
    regularize(model, MGSRegularizer("trace", strength=0.5))
    loss = keras.losses.Huber(1e-3) if keyword else Scaled()
    model.compile(keras.optimizers.SGD(0.0), loss, jit_compile=False)

    def change(epoch, logs=None):
        if keyword:
            loss._fn_kwargs["delta"] = 1e-3 if epoch < 4 else 2e-3
        else:
            loss.factor = 1.0 if epoch < 4 else 2.0

    callbacks = [keras.callbacks.LambdaCallback(on_epoch_begin=change)]
    found = model.fit(X, X[:, :3], batch_size=7, epochs=8, verbose=0, callbacks=callbacks).history["mgs_penalty"]
    assert found[:4] == pytest.approx([found[0]] * 4, rel=1e-5)
    assert found[4:] == pytest.approx([4 * found[0]] * 4, rel=1e-2)
    assert len(model._mgs._replay._proven) == 2


def test_shapes_without_end_are_not_traced():
    model = draw_weights(keras.Sequential([keras.Input((5,)), layers.Dense(3)]))
    regularize(model, MGSRegularizer("trace", strength=0.5))
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    found = [model.fit(X[:n], X[:n, :3], batch_size=n, epochs=4, verbose=0).history["mgs_penalty"] for n in range(2, 9)]
    assert len(model._mgs._replay._graphs) == 4
    for curve in found:
        assert curve == pytest.approx([curve[0]] * 4, rel=1e-5)


def test_layers_may_be_frozen_between_steps():
    """Keras on PyTorch freezes them at once; on the others, what is compiled stays until the next `compile`."""
    first = layers.Dense(6, activation="tanh")
    model = draw_weights(keras.Sequential([keras.Input((5,)), first, layers.Dense(3, activation="softmax")]))
    regularize(model, MGSRegularizer("trace", strength=1.0))
    model.compile(keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy", jit_compile=False)
    found = []
    for trainable in (True, False, True):
        first.trainable = trainable
        found.append(model.fit(X, Y, batch_size=28, epochs=3, verbose=0).history["mgs_penalty"])
        kernel = mgs.kernel(model, X, Y, output="loss", loss=sample_loss("sparse_categorical_crossentropy"))
        assert found[-1] == pytest.approx([float(mgs.Penalty("trace", 1.0)(kernel))] * 3, rel=1e-4)
    assert found[1][0] < 0.9 * found[0][0]


def test_the_gradient_of_a_replayed_penalty_is_refused_a_derivative():
    import torch
    from mgs_core.backends.keras.replay import Replay

    weight = torch.randn(3, requires_grad=True)
    value = Replay()(lambda parameters, _: (parameters[0] ** 3).sum(), [weight], [])
    torch.testing.assert_close(torch.autograd.grad(value, weight, retain_graph=True)[0], 3 * weight**2)
    (gradient,) = torch.autograd.grad(value, weight, create_graph=True)
    torch.testing.assert_close(gradient, 3 * weight**2)
    with pytest.raises(mgs.ArgumentError, match="`create_graph` must be False for the gradient of a penalty"):
        torch.autograd.grad(gradient.sum(), weight)
