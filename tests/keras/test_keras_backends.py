"""The three Keras backends, from the same weights: each in a process of its own, compared here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest

SCRIPT = """
import sys
import keras, numpy as np
from keras import layers
from mgs_core.adapters.keras import MGSRegularizer, regularize, sample_loss
import mgs_core as mgs

random = np.random.default_rng(0)
image, ids = random.normal(size=(32, 8, 8, 3)).astype("float32"), random.integers(1, 20, (32, 6))
labels, loss = random.integers(0, 4, 32), "sparse_categorical_crossentropy"


def network():
    a, b = keras.Input((8, 8, 3)), keras.Input((6,), dtype="int32")
    h = layers.Conv2D(8, 3, strides=2, padding="same", activation="tanh")(a)
    h = layers.BatchNormalization()(layers.DepthwiseConv2D(3, activation="tanh")(h))
    g = layers.LayerNormalization()(layers.Embedding(20, 8)(b))
    g = layers.GlobalAveragePooling1D()(layers.MultiHeadAttention(2, 4)(g, g))
    h = layers.Concatenate()([layers.Flatten()(h), g])
    model = keras.Model([a, b], layers.Dense(4, activation="softmax")(layers.Dense(16, activation="tanh")(h)))
    draw = np.random.default_rng(1)
    model.set_weights([np.abs(0.3 * draw.normal(size=w.shape)) + (0.5 if w.ndim < 2 else -0.25) for w in model.get_weights()])
    return model


of_loss = {"output": "loss", "loss": sample_loss(loss)}
found = {"full": mgs.kernel(network(), [image, ids]), "loss": mgs.kernel(network(), [image, ids], labels, **of_loss)}
regularizers = {"penalty": MGSRegularizer("log_determinant", 0.5), "agreement": MGSRegularizer(None, weighting="agreement")}
for name, regularizer in {"none": None, **regularizers}.items():
    model = regularize(network(), regularizer)
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss, jit_compile=keras.backend.backend() == "jax")
    history = model.fit([image, ids], labels, batch_size=8, epochs=5, verbose=0, shuffle=False).history
    found |= {f"{name} {key}": curve for key, curve in history.items()}
np.savez(sys.argv[1], **{key: keras.ops.convert_to_numpy(value) for key, value in found.items()})
"""


@pytest.mark.slow
def test_backends_have_the_same_kernels_and_curves(tmp_path):
    """To 2e-5 of the largest entry of a kernel in float32, and to 1e-3 of a curve after 20 steps, in which rounding grows."""
    names = [name for name in ("tensorflow", "jax", "torch") if importlib.util.find_spec(name)]
    if len(names) < 2:
        pytest.skip("only one of the frameworks is installed")
    found = {}
    for name in names:
        path = tmp_path / f"{name}.npz"
        environment = {**os.environ, "KERAS_BACKEND": name, "JAX_ENABLE_X64": "0"}
        command = [sys.executable, "-P", "-W", "ignore", "-c", SCRIPT, str(path)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
        found[name] = dict(np.load(path))
    for one, other in combinations(names, 2):
        assert found[one].keys() == found[other].keys()
        assert {"penalty mgs_penalty", "none loss", "agreement loss"} < found[one].keys()
        for key, value in found[one].items():
            tolerance = 1e-3 if key.partition(" ")[1] else 2e-5
            size = np.max(np.abs(value))
            np.testing.assert_allclose(found[other][key], value, rtol=0, atol=tolerance * size, err_msg=f"{one} {other} {key}")
    curves = found[names[0]]
    for key in ("penalty loss", "agreement loss"):  # which would all agree if nothing were done
        assert np.max(np.abs(curves[key] - curves["none loss"])) > 0.01
