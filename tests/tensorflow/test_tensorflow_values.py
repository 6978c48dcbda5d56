"""Models in which values decide whether samples interact: a later batch that mixes them is refused, as the first would be."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from mgs_oracles import close

import mgs_core as mgs

_N = 6
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(_N, 3))
PARAMETERS = {"w": RANDOM.normal(size=(3, 5)), "v": RANDOM.normal(size=(5, 2))}
EYE, ORDER, GROUPS = np.eye(_N), np.array([3, 1, 0, 2, 5, 4]), np.array([0, 0, 1, 1, 2, 2])
SWITCH = tf.Variable(0.0, dtype=tf.float64)


def attention(h, mask):
    scores = tf.where(mask, tf.matmul(h, h, transpose_b=True), tf.constant(-1e9, tf.float64))
    return h + tf.nn.softmax(scores) @ h


# how h (n, d) goes on, by what the batch brings along: at first each sample for itself, then not
MIXING = {
    "factor": (lambda h, s: h + s * tf.reduce_mean(h, 0), np.zeros((_N, 1)), np.ones((_N, 1))),
    "variable": (lambda h, s: h + SWITCH * tf.reduce_mean(h, 0), np.zeros((_N, 1)), np.ones((_N, 1))),
    "variable of the first sample": (lambda h, s: h + SWITCH * h[:1], np.zeros((_N, 1)), np.ones((_N, 1))),
    "variable of the second next": (lambda h, s: h + SWITCH * tf.roll(h, 2, 0), np.zeros((_N, 1)), np.ones((_N, 1))),
    "gate": (lambda h, s: h + tf.nn.relu(tf.reduce_mean(tf.tanh(h), 0) + s), np.full((_N, 1), -2.0), np.full((_N, 1), 2.0)),
    "attention within groups": (lambda h, g: attention(h, g[:, None] == g), np.arange(_N), GROUPS),
    "mask of pairs": (
        lambda h, g: tf.reduce_sum(tf.where((g[:, None] == g)[:, :, None], tf.tanh(h)[None], tf.zeros((), tf.float64)), 1),
        np.arange(_N),
        GROUPS,
    ),
    "gather": (tf.gather, np.arange(_N), ORDER),
    "matrix": (lambda h, a: a @ h, EYE, EYE[ORDER]),
    "sort": (
        lambda h, s: tf.transpose(tf.sort(tf.transpose(tf.tanh(h) + 10 * s[:, None]))),
        np.arange(6.0),
        ORDER.astype(float),
    ),
}


@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("name", MIXING)
def test_a_later_batch_that_mixes_samples_is_refused_or_exact(name, before):
    mix, alone, together = MIXING[name]

    def function(p, inputs):
        return tf.tanh(mix(inputs["x"] @ p["w"], inputs["given"])) @ p["v"]

    values = {key: tf.constant(value) for key, value in PARAMETERS.items()}
    for given in [alone] * before + [together]:
        SWITCH.assign(float(given is together))
        inputs = {"x": tf.constant(X), "given": tf.constant(given)}
        with tf.GradientTape() as tape:
            tape.watch(values)
            outputs = tf.reduce_sum(function(values, inputs), 1)
        # of the whole batch: each sample's gradient with all that it depends on
        rows = np.concatenate([np.reshape(part, (_N, -1)) for part in tape.jacobian(outputs, values).values()], 1)
        try:
            kernel = mgs.kernel(mgs.FunctionalModel(function, values), inputs, output="sum")
        except mgs.SamplesInteractError:
            assert given is together
        else:
            close(kernel, rows @ rows.T)


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
@pytest.mark.parametrize("normalised", [False, True])
def test_half_precision_hides_no_interaction(dtype, normalised):
    values = {key: tf.cast(value, dtype) for key, value in PARAMETERS.items()}

    def mixing(factor):
        def function(p, x):
            w = p["w"] / tf.norm(p["w"], axis=0) if normalised else p["w"]  # then rows
            h = x @ w
            return tf.tanh(h + tf.cast(factor, h.dtype) * tf.reduce_mean(h, 0)) @ p["v"]

        return function

    for factor in (0.05, 0.2, 0.5):
        with pytest.raises(mgs.SamplesInteractError, match="treat each sample by itself"):
            mgs.kernel(mgs.FunctionalModel(mixing(factor), values), tf.cast(X, dtype))
    close(
        mgs.kernel(mgs.FunctionalModel(mixing(0.0), values), tf.cast(X, dtype)),
        mgs.kernel(mgs.FunctionalModel(mixing(0.0), PARAMETERS | {key: tf.constant(v) for key, v in PARAMETERS.items()}), X),
        0.2 if dtype == tf.bfloat16 else 0.02,
    )


def distances(outputs, labels):
    apart = tf.reduce_sum(tf.square(outputs[:, None] - outputs[None]), -1)
    return apart, labels[:, None] == labels[None], tf.zeros_like(apart)


def hardest(outputs, labels):
    apart, same, zero = distances(outputs, labels)
    return tf.nn.relu(1 + tf.reduce_max(tf.where(same, apart, zero), -1) - tf.reduce_min(tf.where(same, 1e9 + zero, apart), -1))


def attracted(outputs, labels):
    apart, same, zero = distances(outputs, labels)
    return tf.reduce_mean(tf.where(same, apart, zero), -1)


def repelled(outputs, labels):
    apart, same, zero = distances(outputs, labels)
    return tf.reduce_mean(outputs**2, -1) - tf.reduce_mean(tf.where(same, zero, tf.tanh(apart)), -1)


def clipped(outputs, labels):
    size = tf.reduce_sum(outputs**2, -1)
    _, same, zero = distances(outputs, labels)
    return tf.reduce_mean(tf.where(same, zero, tf.nn.relu(1 - 1e4 * size[:, None] * size)), -1)


@pytest.mark.parametrize("dtype", ["int32", "float64"])
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("loss", [hardest, attracted, repelled, clipped])
def test_losses_that_compare_samples_by_their_labels_are_refused(loss, traced, dtype):
    model = mgs.FunctionalModel(
        lambda p, x: tf.tanh(x @ p["w"]) @ p["v"], {key: tf.Variable(value) for key, value in PARAMETERS.items()}
    )
    if loss is clipped and not traced:
        pytest.skip("the values at hand are clipped too")

    def kernel(x, labels):
        return mgs.kernel(model, x, labels, output="loss", loss=loss)

    with pytest.raises(mgs.SamplesInteractError, match="treat each sample by itself"):
        (tf.function(kernel) if traced else kernel)(tf.constant(X), tf.constant(GROUPS.astype(dtype)))
