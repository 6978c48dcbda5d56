"""The oracles of the method, against models as users write them in TensorFlow, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from mgs_oracles import check_kernels, check_symmetries, close, directions, slope

import mgs_core as mgs

RANDOM = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape)


def mlp(p, x):
    return tf.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]


def normalised(p, x):
    h = x @ p["w1"]
    mean, variance = tf.nn.moments(h, -1, keepdims=True)
    h = tf.nn.batch_normalization(h, mean, variance, p["shift"], p["gain"], 1e-5)
    return tf.tanh(h) @ p["w2"]


def inference_normalised(p, x):
    h = tf.tanh(tf.nn.bias_add(tf.matmul(x, p["w1"], transpose_b=True), p["b1"]))
    mean, variance = tf.constant([0.1, -0.2, 0.3], h.dtype), tf.constant([0.5, 1.5, 2.0], h.dtype)
    return tf.nn.batch_normalization(h, mean, variance, p["shift"], p["gain"], 1e-3) @ p["w2"]


def sequence(p, x):  # (n, s, i): a weight shared over positions, then attention
    q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
    scores = tf.nn.softmax(tf.matmul(q, k, transpose_b=True))
    return tf.reduce_mean(tf.tanh(tf.matmul(scores, v) + p["position"]), axis=1) @ p["out"]


def heads(p, x):  # attention with einsum, as Keras writes it, and a class token
    token = tf.tile(p["token"], [x.shape[0], 1, 1])
    x = tf.concat([token, x], axis=1)
    q, k, v = (tf.einsum("nsi,iha->nsha", x, p[name]) for name in "qkv")
    scores = tf.nn.softmax(tf.einsum("nsha,ntha->nhst", q, k) / 2.0)
    mixed = tf.einsum("nhst,ntha->nsha", scores, v) + p["bias"]
    return tf.einsum("nsha,hao->nso", mixed, p["o"])[:, 0]


def sequence_first(p, x):  # positions before samples inside
    h = tf.tanh(tf.tensordot(tf.transpose(x, (1, 0, 2)), p["w1"], 1))
    flat = tf.reshape(h, (-1, h.shape[-1])) @ p["w2"]
    return tf.reduce_sum(tf.reshape(flat, (x.shape[1], x.shape[0], -1)), axis=0)


def shared(p, x):  # one weight, twice, once transposed; a bias used by two layers
    h = tf.tanh(x @ p["w"] + p["b"])
    return tf.tanh(tf.matmul(h, p["w"], transpose_b=True)) @ p["w"] + p["b"]


def twice(p, x):  # the same use in a loop: recurrence
    h = x
    for _ in range(3):
        h = tf.tanh(h @ p["w"] + p["b"])
    return h


def loop(p, x):  # a loop of the graph: rows
    h = tf.while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, tf.tanh(h @ p["w"] + p["b"])), (0, x), maximum_iterations=3)[1]
    return h @ p["out"]


def tied(p, x):  # embedding and output weight are one; ids are the data
    h = tf.tanh(tf.reduce_mean(tf.gather(p["table"], x) * p["gain"], axis=1) / p["divisor"])
    return tf.matmul(h, p["table"], transpose_b=True) - p["b"]


def derived(p, x):  # weights that are functions of parameters: rows
    w = p["v"] / tf.sqrt(tf.reduce_sum(p["v"] ** 2, axis=0, keepdims=True)) + p["a"] @ p["c"]
    return tf.tanh(x @ w) @ p["w2"]


def grouped(p, x):  # one weight for each group
    h = tf.tanh(tf.matmul(tf.transpose(tf.reshape(x, (x.shape[0], 2, -1)), (1, 0, 2)), p["w"]))
    return tf.reshape(tf.transpose(h, (1, 0, 2)), (x.shape[0], -1)) @ p["out"]


def left(p, x):  # weight on the left, samples last
    return tf.transpose(tf.tanh(p["w"] @ tf.transpose(x) + p["b"][:, None]))


def sliced(p, x):  # packed weights, scaled
    first, second = tf.split(-2.0 * p["w"], 2, axis=1)
    return tf.tanh(x @ first) * (x @ second) + p["b"][0] + tf.unstack(p["b"])[1]


def signed(p, x):  # uses of one parameter whose signs and factors differ, so that cross terms show them
    h = tf.tanh(x @ p["w"] + p["b"] - tf.constant(0.3, x.dtype) * p["b"]) - p["b"]
    return tf.tanh(h @ -p["u"] / p["d"] + p["d"]) @ (p["u"] / 3.0) + p["d"] * tf.reduce_sum(h, axis=1, keepdims=True)


def masked(p, x):  # a pruned weight: the factor is no scalar, so rows
    return tf.tanh(x @ (p["w"] * tf.constant([[1.0, 0.0], [0.5, 1.0]], x.dtype))) @ p["out"]


def reused(p, x):  # a window that is also a plain weight: cross terms need its coordinates
    h = tf.nn.depthwise_conv2d(x, p["depth"], strides=(1, 1, 1, 1), padding="SAME")
    h = tf.tanh(tf.nn.conv2d_transpose(h, p["up"], (x.shape[0], 4, 4, 2), strides=2))
    flat = tf.reshape(x, (x.shape[0], -1))
    plain = [flat[:, : tf.size(p[name])] * tf.reshape(p[name], (1, -1)) for name in ("depth", "up")]
    return tf.reduce_sum(h, axis=(1, 2)) + plain[0][:, 4:6] ** 2 + plain[1][:, 3:5]


def convolved(p, x):
    h = tf.tanh(tf.nn.bias_add(tf.nn.conv2d(x, p["w1"], strides=(1, 2), padding="SAME", dilations=1), p["b1"]))
    h = tf.nn.depthwise_conv2d(h, p["depth"], strides=(1, 1, 1, 1), padding="VALID")
    h = tf.tanh(tf.nn.conv2d(h, p["mix"], 1, [[0, 0], [1, 0], [0, 2], [0, 0]]))
    h = tf.nn.conv2d_transpose(h, p["up"], (x.shape[0], 5, 6, 2), strides=2)
    return tf.reduce_sum(tf.tanh(h), axis=(1, 2))


def volume(p, x):  # one and three spatial axes
    h = tf.tanh(tf.nn.conv1d(x, p["line"], stride=1, padding="SAME"))
    h = tf.tanh(tf.nn.conv3d(tf.reshape(h, (x.shape[0], 3, 2, 2, 2)), p["cube"], (1, 2, 1, 1, 1), "SAME"))
    h = tf.nn.conv3d_transpose(h, p["uncube"], (x.shape[0], 4, 2, 2, 2), (1, 2, 1, 1, 1), "SAME")
    return tf.reduce_mean(tf.tanh(h), axis=(1, 2, 3))


@tf.custom_gradient
def scaled_identity(x):
    return tf.identity(x), lambda upstream: upstream * 3.0


def custom(p, x):  # the gradient that the author defines counts
    return tf.tanh(x @ scaled_identity(p["w1"])) @ p["w2"]


MODELS: dict[str, tuple[Callable[..., Any], dict[str, np.ndarray], np.ndarray]] = {
    "mlp": (mlp, {"w1": draw(5, 7), "b1": draw(7), "w2": draw(7, 3), "b2": draw(3)}, draw(6, 5)),
    "wide": (mlp, {"w1": draw(2, 3), "b1": draw(3), "w2": draw(3, 2), "b2": draw(2)}, draw(20, 2)),
    "normalised": (normalised, {"w1": draw(5, 7), "gain": draw(7), "shift": draw(7), "w2": draw(7, 3)}, draw(6, 5)),
    "inference_normalised": (
        inference_normalised,
        {"w1": draw(3, 5), "b1": draw(3), "gain": draw(3), "shift": draw(3), "w2": draw(3, 2)},
        draw(6, 5),
    ),
    "sequence": (
        sequence,
        {"q": draw(4, 4), "k": draw(4, 4), "v": draw(4, 5), "position": draw(3, 5), "out": draw(5, 2)},
        draw(6, 3, 4),
    ),
    "square": (
        sequence,
        {"q": draw(4, 4), "k": draw(4, 4), "v": draw(4, 4), "position": draw(4, 4), "out": draw(4, 4)},
        draw(4, 4, 4),
    ),
    "heads": (
        heads,
        {**{name: draw(4, 2, 3) for name in "qkv"}, "bias": draw(2, 3), "o": draw(2, 3, 3), "token": draw(1, 1, 4)},
        draw(5, 3, 4),
    ),
    "sequence_first": (sequence_first, {"w1": draw(4, 5), "w2": draw(5, 2)}, draw(6, 3, 4)),
    "shared": (shared, {"w": draw(4, 5), "b": draw(5)}, draw(6, 4)),
    "square shared": (shared, {"w": draw(4, 4), "b": draw(4)}, draw(6, 4)),
    "square sequence_first": (sequence_first, {"w1": draw(4, 5), "w2": draw(5, 2)}, draw(4, 4, 4)),
    "twice": (twice, {"w": draw(4, 4), "b": draw(4)}, draw(6, 4)),
    "loop": (loop, {"w": draw(4, 4), "b": draw(4), "out": draw(4, 2)}, draw(6, 4)),
    "tied": (
        tied,
        {"table": draw(8, 4), "gain": draw(4), "divisor": 2.0 + draw(4) ** 2, "b": draw(8)},
        RANDOM.integers(0, 8, (6, 3)),
    ),
    "derived": (derived, {"v": draw(5, 4), "a": draw(5, 2), "c": draw(2, 4), "w2": draw(4, 3)}, draw(6, 5)),
    "grouped": (grouped, {"w": draw(2, 3, 4), "out": draw(8, 3)}, draw(6, 6)),
    "left": (left, {"w": draw(3, 5), "b": draw(3)}, draw(6, 5)),
    "sliced": (sliced, {"w": draw(5, 6), "b": draw(2, 3)}, draw(6, 5)),
    "signed": (signed, {"w": draw(5, 4), "b": draw(4), "u": draw(4, 4), "d": 2.0 + draw(4) ** 2}, draw(6, 5)),
    "masked": (masked, {"w": draw(2, 2), "out": draw(2, 3)}, draw(5, 2)),
    "reused": (reused, {"depth": draw(2, 1, 2, 2), "up": draw(1, 1, 2, 4)}, draw(4, 2, 2, 2)),
    "convolved": (
        convolved,
        {"w1": draw(3, 2, 2, 4), "b1": draw(4), "depth": draw(2, 2, 4, 2), "mix": draw(2, 3, 8, 2), "up": draw(3, 3, 2, 2)},
        draw(4, 4, 8, 2),
    ),
    "volume": (volume, {"line": draw(2, 3, 4), "cube": draw(2, 2, 1, 2, 3), "uncube": draw(3, 1, 2, 2, 3)}, draw(4, 6, 3)),
    "custom": (custom, {"w1": draw(5, 4), "w2": draw(4, 3)}, draw(6, 5)),
}


def tensors(parameters: dict[str, np.ndarray]) -> dict[str, tf.Tensor]:
    return {name: tf.constant(value) for name, value in parameters.items()}


def jacobian_rows(function, parameters, x) -> np.ndarray:
    """A loop over the samples of ordinary gradients: (n, c, p)."""

    @tf.function(autograph=False)
    def of_one(values, sample):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(values)
            outputs = tf.unstack(function(values, sample)[0])
        each = [tape.gradient(output, values, unconnected_gradients="zero") for output in outputs]
        return [[tf.reshape(tf.convert_to_tensor(g[name]), [-1]) for name in parameters] for g in each]

    values = tensors(parameters)
    return np.array([[np.concatenate(g) for g in of_one(values, tf.constant(x[a : a + 1]))] for a in range(len(x))])


@pytest.fixture(params=MODELS, ids=list(MODELS))
def case(request):
    return MODELS[request.param]


def model_of(function, parameters) -> mgs.FunctionalModel:
    return mgs.FunctionalModel(function, tensors(parameters))


def test_kernel_is_that_of_a_per_sample_loop(case):
    function, parameters, x = case
    check_kernels(partial(mgs.kernel, model_of(function, parameters), x), jacobian_rows(function, parameters, x))


@pytest.mark.parametrize("name", ["mlp", "shared", "heads", "tied", "sequence_first", "convolved", "loop"])
def test_permuting_samples_permutes_the_kernel_and_layers_add_up(name):
    function, parameters, x = MODELS[name]
    check_symmetries(partial(mgs.kernel, model_of(function, parameters)), parameters, x)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "custom"])  # whose gradient is not its derivative
def test_gradient_of_a_penalty_is_that_of_central_differences(name):
    function, parameters, x = MODELS[name]
    y = np.arange(len(x)) % function(tensors(parameters), tf.constant(x)).shape[1]
    penalty, backend = mgs.Penalty("log_determinant", strength=1.0, scale=2.0), mgs.get_backend("tensorflow")

    def objective(p, x, y):
        model = mgs.FunctionalModel(function, p)
        return penalty(mgs.kernel(model, x, y, output="loss", transform="softmax", differentiable=True, loss=squared))

    def squared(outputs, labels):
        return tf.reduce_sum((outputs - 1.0 / (1.0 + tf.cast(labels[:, None], outputs.dtype))) ** 2, axis=1)

    batch, direction = (tf.constant(x), tf.constant(y)), directions(parameters)
    compiled = backend.compile(backend.value_and_gradient(objective))

    def at(t):
        return compiled(tensors({name: value + t * direction[name] for name, value in parameters.items()}), *batch)

    expected = slope(lambda t: at(t)[0])
    found = [at(0.0)]
    if name in ("mlp", "loop", "convolved"):
        found.append(backend.value_and_gradient(objective)(tensors(parameters), *batch))  # eagerly
    for _, gradient in found:
        actual = sum(np.sum(gradient[name] * direction[name]) for name in parameters)
        assert actual == pytest.approx(expected, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", ["sequence_first", "square sequence_first", "left", "heads", "sliced", "convolved"])
def test_layers_have_statistics(name):
    function, parameters, x = MODELS[name]
    assert {layer.route for layer in mgs.check(model_of(function, parameters), x).layers} == {"statistics"}


def test_values_that_say_nothing_are_not_believed():
    """A gradient of zero fits any place of the samples, and what it was taken for must not be remembered."""
    function, parameters, x = MODELS["square sequence_first"]
    x, zeros = x + 1.0, {name: 0.0 * value for name, value in parameters.items()}

    def silent(p, x):
        return function(p, tf.tanh(x))

    close(mgs.kernel(model_of(silent, zeros), x), np.zeros((4, 4)))
    rows = jacobian_rows(silent, parameters, x)
    close(mgs.kernel(model_of(silent, parameters), x), np.einsum("acp,bcp->ab", rows, rows))


def test_models_that_differ_in_constants_alone_are_told_apart():
    parameters, x = {"w": draw(3, 3)}, draw(3, 3, 3)
    for order, axis in (((0, 1, 2), 1), ((1, 0, 2), 0)):

        def function(p, x, order=order, axis=axis):
            return tf.reduce_sum(tf.tanh(tf.matmul(tf.transpose(x, order), p["w"])), axis=axis)

        rows = jacobian_rows(function, parameters, x)
        close(mgs.kernel(model_of(function, parameters), x), np.einsum("acp,bcp->ab", rows, rows))


def test_grouped_convolution():  # whose gradient TensorFlow lacks on a CPU: against one convolution for each group
    x, window = draw(4, 5, 6, 4), draw(2, 3, 2, 6)

    def apart(p, x):
        pairs = zip(tf.split(x, 2, axis=-1), (p["first"], p["second"]), strict=True)
        return tf.reduce_sum(tf.tanh(tf.concat([tf.nn.conv2d(part, w, 1, "SAME") for part, w in pairs], axis=-1)), (1, 2))

    grouped = model_of(lambda p, x: tf.reduce_sum(tf.tanh(tf.nn.conv2d(x, p["w"], 1, "SAME")), (1, 2)), {"w": window})
    parts = {"first": window[..., :3], "second": window[..., 3:]}
    close(mgs.kernel(grouped, x), mgs.kernel(model_of(apart, parts), x))

    def plainly(w, x):  # each element times its own datum: cross terms with the convolution show the order of the elements
        return tf.reshape(x, (x.shape[0], -1))[:, : tf.size(w)] * tf.reshape(w, (1, -1))

    twice = model_of(lambda p, x: tf.concat([grouped.function(p, x), plainly(p["w"], x)], 1), {"w": window})
    both = model_of(lambda p, x: tf.concat([apart(p, x), plainly(tf.concat([p["first"], p["second"]], -1), x)], 1), parts)
    close(mgs.kernel(twice, x, output="sum"), mgs.kernel(both, x, output="sum"))


def test_dilated_convolution():  # whose gradient TensorFlow lacks on a CPU: against the same window with zeros between
    x, window = draw(4, 7, 8, 2), draw(2, 2, 2, 3)

    def convolution(x, w, **options):
        return tf.reduce_sum(tf.tanh(tf.nn.conv2d(x, w, 1, "SAME", **options)), (1, 2))

    def spread(p, x):
        zero = tf.zeros_like(p["a"])
        above, below = (tf.concat([p[a], zero, zero, p[b]], axis=1) for a, b in ("ab", "cd"))
        return convolution(x, tf.concat([above, tf.zeros_like(above), below], axis=0))

    parts = {name: window[i : i + 1, j : j + 1] for name, i, j in (("a", 0, 0), ("b", 0, 1), ("c", 1, 0), ("d", 1, 1))}
    dilated = model_of(lambda p, x: convolution(x, p["w"], dilations=(2, 3)), {"w": window})
    close(mgs.kernel(dilated, x), mgs.kernel(model_of(spread, parts), x))
