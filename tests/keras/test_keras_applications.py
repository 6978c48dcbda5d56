"""Whole networks of keras.applications, without their weights: the kernel against single gradients."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras_oracle import gradient, kernel

X = np.random.default_rng(0).uniform(0, 255, (3, 64, 64, 3)).astype("float32")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileNetV3Small", "EfficientNetB0"])
def test_kernel_of_an_application(name):
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(weights=None, input_shape=(64, 64, 3), classes=4, classifier_activation=None)
    rows = np.array([gradient(model, X[a : a + 1], lambda outputs: keras.ops.sum(outputs)) for a in range(3)])
    expected = rows @ rows.T
    np.testing.assert_allclose(kernel(model, X, output="sum"), expected, rtol=0, atol=2e-4 * np.max(expected))
