"""Keras' own export, through tf2onnx: parameters, values and the kernel that the Keras backend gives."""

from __future__ import annotations

import numpy as np
import pytest

import mgs_core as mgs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def keras():
    found = pytest.importorskip("keras")
    pytest.importorskip("tf2onnx")
    if found.backend.backend() != "tensorflow":
        pytest.skip("Keras runs on another backend")
    return found


def networks(keras):
    layers = keras.layers
    attention = keras.Input((5, 6))
    mixed = layers.LayerNormalization()(layers.MultiHeadAttention(2, 3)(attention, attention) + attention)
    return {
        "convolutional": keras.Sequential([
            keras.Input((8, 8, 2)), layers.Conv2D(4, 3, padding="same", strides=2), layers.BatchNormalization(), layers.ReLU(),
            layers.DepthwiseConv2D(3), layers.Flatten(), layers.Dense(3),
        ]),
        "recurrent": keras.Sequential([keras.Input((4, 3)), layers.LSTM(5), layers.Dense(3)]),
        "attention": keras.Model(attention, layers.Dense(3)(layers.GlobalAveragePooling1D()(mixed))),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["convolutional", "recurrent", "attention"])
def test_export_has_the_parameters_values_and_kernel_of_the_model(keras, name, tmp_path):
    keras.utils.set_random_seed(0)
    model, random = networks(keras)[name], np.random.default_rng(0)
    for weight in model.trainable_weights:
        weight.assign(0.5 * random.normal(size=weight.shape))  # the exporter merges equal weights
    x = np.random.default_rng(1).normal(size=(4, *model.input_shape[1:])).astype(np.float32)
    outputs = np.asarray(keras.ops.convert_to_numpy(model(x)))
    model.export(str(tmp_path / "model.onnx"), format="onnx", verbose=False)
    loaded = mgs.onnx.load(tmp_path / "model.onnx")
    np.testing.assert_allclose(loaded(x), outputs, rtol=1e-4, atol=1e-5)
    found = sum(value.size for value in loaded.parameters.values())
    assert found == sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    expected = np.asarray(mgs.get_backend(model).to_numpy(mgs.kernel(model, keras.ops.convert_to_tensor(x))))
    np.testing.assert_allclose(mgs.kernel(loaded, x), expected, rtol=1e-3, atol=1e-4 * expected.max())
