"""Traced steps, whose values are drawn: models that are not defined for all values are no less exact than on values at hand."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from mgs_oracles import close

import mgs_core as mgs

RANDOM = np.random.default_rng(0)
N = 6
X, LABELS = tf.constant(RANDOM.uniform(0.1, 1.0, size=(N, 3))), tf.constant([0, 1, 2, 0, 1, 2])
IDS, LENGTHS = tf.constant(RANDOM.integers(0, 6, (N, 5))), tf.constant([1, 2, 3, 4, 5, 2])
SHAPES = {"w": (3, 3), "table": (6, 3), "s": ()}


def pooled(p, x):
    return tf.tanh(tf.gather(p["table"], x[0]))


MODELS = {
    "power": (lambda p, x: (x ** (1.0 + p["s"] ** 2)) @ p["w"], X),
    "logarithm": (lambda p, x: tf.math.log(x) @ p["w"], X),
    "logarithm of a product": (lambda p, x: tf.math.log(x * tf.exp(p["w"][0])), X),
    "root": (lambda p, x: tf.sqrt(x * tf.abs(p["s"])) * x, X),
    "last token": (lambda p, x: tf.gather(pooled(p, x), x[1] - 1, batch_dims=1) @ p["w"], (IDS, LENGTHS)),
    "last token, in rows": (
        lambda p, x: tf.gather(pooled(p, x), x[1] - 1, batch_dims=1) @ tf.linalg.expm(p["w"]),
        (IDS, LENGTHS),
    ),
    "reciprocal of a root of a parameter": (lambda p, x: x * tf.math.rsqrt(p["s"] * x), X),
}


def parameters():
    random = np.random.default_rng(1)
    return {name: tf.Variable(np.abs(random.normal(size=shape))) for name, shape in SHAPES.items()}


def single(function, values, x, output):
    """The kernel of gradients of one output of one sample each."""
    rows = []
    for a in range(N):
        with tf.GradientTape(persistent=True) as tape:
            outputs = function(values, tf.nest.map_structure(lambda leaf, a=a: leaf[a : a + 1], x))
            heads = tf.unstack(outputs[0])
            if output == "loss":
                heads = [tf.nn.sparse_softmax_cross_entropy_with_logits(LABELS[a : a + 1], outputs)[0]]
        found = [tape.gradient(head, list(values.values()), unconnected_gradients="zero") for head in heads]
        rows.append([np.concatenate([np.ravel(tf.convert_to_tensor(part)) for part in parts]) for parts in found])
    return np.einsum("acp,bcp->ab", rows, rows)


@pytest.mark.parametrize("output", ["trace", "loss"])
@pytest.mark.parametrize("name", MODELS)
def test_models_that_are_not_defined_for_all_values(name, output):
    (function, x), values = MODELS[name], parameters()
    model = mgs.FunctionalModel(function, values)
    found = tf.function(lambda x, y: mgs.kernel(model, x, y, output=output))(x, LABELS)
    close(found, single(function, values, x, output), 1e-10)


def test_values_that_decide_are_refused_with_a_remedy():
    values, refusal = parameters(), r"treat each sample by itself.*drawn values.*mgs.kernel outside of tf.function"
    for product in (lambda x, w: x @ w, lambda x, w: x @ tf.linalg.expm(w)):  # with layer statistics, and with rows
        model = mgs.FunctionalModel(lambda p, x, product=product: tf.gather(product(x[0], p["w"]), x[1]), values)
        with pytest.raises(mgs.SamplesInteractError, match=refusal):
            tf.function(lambda x, index, model=model: mgs.kernel(model, (x, index)))(X, tf.range(N))
    model = mgs.FunctionalModel(lambda p, x: tf.gather(x[0] @ p["w"], x[1]), values)
    close(mgs.kernel(model, (X, tf.range(N))), single(lambda p, x: x @ p["w"], values, X, "trace"))
    nowhere = mgs.FunctionalModel(lambda p, x: tf.sqrt(-1.0 - tf.abs(x * p["s"])), values)
    with pytest.raises(mgs.ArgumentError, match=r"must have finite gradients.*drawn values"):
        tf.function(lambda x: mgs.kernel(nowhere, x))(X)


@pytest.mark.parametrize("meeting", [False, True])
def test_some_integers_begin_at_0_and_others_at_1(meeting):
    """A table of two rows, and lengths: what suits one of the two does not suit the other."""
    values = {"table": tf.Variable(RANDOM.normal(size=(2, 3)))}
    sequences = tf.constant(RANDOM.normal(size=(N, 5, 3)))

    def function(p, x):
        h = tf.gather(p["table"], x[1]) + tf.gather(x[0], x[2] - 1, batch_dims=1)
        return tf.tanh(h + tf.reduce_mean(h, 0, keepdims=True) if meeting else h)

    x = (sequences, tf.constant([0, 1, 0, 1, 1, 0]), LENGTHS)
    model = mgs.FunctionalModel(function, values)
    traced = tf.function(lambda x: mgs.kernel(model, x), autograph=False)
    if meeting:
        with pytest.raises(mgs.SamplesInteractError):
            traced(x)
    else:
        close(traced(x), single(function, values, x, "trace"), 1e-10)
