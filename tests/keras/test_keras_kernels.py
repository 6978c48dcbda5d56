"""Kernels of Keras models against one-at-a-time gradients in float64, layer by layer."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers
from keras_oracle import close, draw_weights, kernel, numpy, rows

import mgs_core as mgs

RANDOM = np.random.default_rng(0)
pytestmark = pytest.mark.usefixtures("float64")


def draw(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape)


def chain(parts):
    return lambda: keras.Sequential([*parts(), layers.Activation("tanh"), layers.Flatten(), layers.Dense(2)])


def attention(make):
    def build():
        x, layer = keras.Input((5, 4)), make()
        return keras.Model(x, layers.Dense(2)(layers.Flatten()(layer(x, x))))

    return build


def shared():  # one layer called twice, a model inside a model called twice
    x = keras.Input((4,))
    layer = layers.Dense(4, activation="tanh")
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, activation="tanh")])
    return keras.Model(x, layers.Dense(2)(inner(layer(inner(layer(x))))))


class Tied(keras.Model):
    """Reads another layer's weight."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden = layers.Embedding(7, 4), layers.Dense(4, activation="tanh")

    def call(self, ids):
        h = self.hidden(keras.ops.mean(self.embedding(ids), axis=1))
        return keras.ops.matmul(h, keras.ops.transpose(self.embedding.embeddings))


class Bare(keras.Model):
    """Has weights of its own, and no `training` argument."""

    def build(self, shape):
        self.a = self.add_weight(shape=(shape[-1], 3), name="a")
        self.b = self.add_weight(shape=(3,), name="b")

    def call(self, x):
        return keras.ops.tanh(keras.ops.einsum("ni,io->no", x, self.a)) * self.b


def several():  # dict inputs, dict outputs
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    h = layers.Dense(4, activation="tanh")(layers.Concatenate()([a, b]))
    return keras.Model({"a": a, "b": b}, {"first": layers.Dense(2)(h), "second": layers.Dense(3)(h)})


IMAGE, LINE, VOLUME = draw(4, 6, 5, 4), draw(4, 6, 4), draw(3, 4, 4, 3, 2)
IDS = RANDOM.integers(1, 7, (4, 5))
MODELS = {
    "dense": (chain(lambda: [layers.Dense(5, activation="tanh"), layers.Dropout(0.5)]), draw(5, 4)),
    "dense over time": (chain(lambda: [layers.Dense(5)]), LINE),
    "einsum": (chain(lambda: [layers.EinsumDense("abc,cde->abde", (6, 3, 2), bias_axes="de")]), LINE),
    "conv1": (chain(lambda: [layers.Conv1D(3, 2, padding="causal", dilation_rate=1)]), LINE),
    "conv2": (chain(lambda: [layers.Conv2D(3, (3, 2), strides=2, padding="same")]), IMAGE),
    "conv3": (chain(lambda: [layers.Conv3D(3, 2)]), VOLUME),
    "depthwise1": (chain(lambda: [layers.DepthwiseConv1D(2)]), LINE),
    "depthwise2": (chain(lambda: [layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same")]), IMAGE),
    "separable1": (chain(lambda: [layers.SeparableConv1D(3, 2)]), LINE),
    "separable2": (chain(lambda: [layers.SeparableConv2D(3, 2)]), IMAGE),
    "transpose1": (chain(lambda: [layers.Conv1DTranspose(3, 2, strides=2)]), LINE),
    "transpose2": (chain(lambda: [layers.Conv2DTranspose(3, 3, strides=2, padding="same")]), IMAGE),
    "transpose3": (chain(lambda: [layers.Conv3DTranspose(2, 2)]), VOLUME),
    "embedding": (chain(lambda: [layers.Embedding(7, 4)]), IDS),
    "layer norm": (chain(lambda: [layers.Dense(4), layers.LayerNormalization()]), LINE),
    "group norm": (chain(lambda: [layers.Dense(4), layers.GroupNormalization(2)]), LINE),
    "rms norm": (chain(lambda: [layers.Dense(4), layers.RMSNormalization()]), LINE),
    "batch norm": (chain(lambda: [layers.Conv2D(3, 2), layers.BatchNormalization()]), IMAGE),
    "attention": (attention(lambda: layers.MultiHeadAttention(2, 3)), draw(4, 5, 4)),
    "grouped attention": (attention(lambda: layers.GroupQueryAttention(3, 4, 2)), draw(4, 5, 4)),
    "lstm": (chain(lambda: [layers.LSTM(3)]), LINE),
    "gru": (chain(lambda: [layers.GRU(3, return_sequences=True)]), LINE),
    "bidirectional": (chain(lambda: [layers.Bidirectional(layers.LSTM(2))]), LINE),
    "masked lstm": (chain(lambda: [layers.Embedding(7, 3, mask_zero=True), layers.LSTM(3)]), np.where(np.arange(5) < 3, IDS, 0)),
    "time distributed": (chain(lambda: [layers.TimeDistributed(layers.Dense(3))]), LINE),
    "prelu": (chain(lambda: [layers.Dense(4), layers.PReLU()]), draw(5, 4)),
    "shared": (shared, draw(5, 4)),
    "tied": (Tied, IDS),
    "bare": (Bare, draw(5, 4)),
    "several": (several, {"a": draw(5, 4), "b": draw(5, 3)}),
}


RARE = {"dense over time", "conv1", "depthwise1", "separable1", "transpose1", "transpose3", "bidirectional", "masked lstm"}


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] if name in RARE else [], id=name) for name in MODELS])
def case(request):
    build, x = MODELS[request.param]
    model = build()
    model(keras.tree.map_structure(keras.ops.convert_to_tensor, x))
    return draw_weights(model), x


def test_kernel_is_that_of_single_gradients(case):
    model, x = case
    before, expected = model.get_weights(), rows(model, x)
    close(kernel(model, x), np.einsum("acp,bcp->ab", expected, expected), 1e-11)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_kernel_between_two_batches_is_the_product_of_their_gradients():
    build, x = MODELS["dense"]
    model = build()
    model(x)
    expected = rows(draw_weights(model), x)
    close(mgs.kernel(model, x[:2], others=x[2:]), np.einsum("acp,bcp->ab", expected[:2], expected[2:]), 1e-11)


def test_unrolled_recurrence_has_statistics():
    """On TensorFlow a loop of the graph hides where its weights meet data."""
    for options, routes in (({"unroll": True}, {"statistics"}), ({}, {"statistics", "rows"})):
        model = keras.Sequential([keras.Input((6, 4)), layers.GRU(3, **options), layers.Dense(2)])
        assert {layer.route for layer in mgs.check(model, LINE).layers} <= routes


class Noise(layers.Layer):
    """Draws random numbers, in training alone or always."""

    def __init__(self, always):
        super().__init__(name="noise")
        self.always, self.source = always, keras.random.SeedGenerator(0)

    def call(self, x, training=False):
        return x + keras.random.normal(keras.ops.shape(x), seed=self.source) if training or self.always else x


def test_random_numbers_at_inference_are_refused():
    noisy, still = (
        keras.Sequential([keras.Input((4,)), layers.Dense(3), Noise(always), layers.Dense(2)]) for always in (True, False)
    )
    with pytest.raises(mgs.UnsupportedModelError, match="got random numbers, drawn with training=False by layer noise"):
        mgs.kernel(noisy, draw(3, 4))
    assert kernel(still, draw(3, 4)).shape == (3, 3)
    x = keras.Input((4,))
    dropped = keras.Model(x, layers.Dense(2)(layers.Dropout(0.5)(layers.Dense(3)(x), training=True)))
    assert kernel(dropped, draw(3, 4)).shape == (3, 3)  # Keras itself overrides that argument at inference


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="Keras itself refuses it there")
def test_random_numbers_without_a_generator_are_refused_too():
    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(2)(layers.Lambda(lambda x: x + keras.random.normal(keras.ops.shape(x)), (4,))(x)))
    with pytest.raises(mgs.UnsupportedModelError, match="by layer without a SeedGenerator of its own"):
        mgs.kernel(model, draw(3, 4))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="others have no strings")
def test_text_within_the_model():
    """Its number of samples is not known where the model is traced."""
    import tensorflow as tf

    text = tf.constant([["a b c"], ["b"], ["c a"], ["a a b"]])
    vectorize = layers.TextVectorization(max_tokens=6, output_sequence_length=3)
    vectorize.adapt(text)
    rest = [layers.Embedding(6, 3), layers.Flatten(), layers.Dense(2)]
    whole = keras.Sequential([keras.Input((1,), dtype="string"), vectorize, *rest])
    close(mgs.kernel(whole, text), kernel(keras.Sequential([keras.Input((3,), dtype="int64"), *rest]), vectorize(text)))


def test_preprocessing_layers_leave_the_kernel_exact():
    x = draw(4, 8, 8, 1)
    normalize = layers.Normalization()
    normalize.adapt(x)
    before = [normalize, layers.RandomFlip(), layers.RandomRotation(0.1), layers.Rescaling(0.5)]
    after = [layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(2)]
    whole = keras.Sequential([keras.Input((8, 8, 1)), *before, *after])
    rest = keras.Sequential([keras.Input((8, 8, 1)), *after])
    close(kernel(whole, x), kernel(rest, 0.5 * numpy(normalize(x))), 1e-6)


def test_layers_in_float8_are_refused():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Dense(2)])
    model.layers[0].quantize("float8")
    with pytest.raises(mgs.UnsupportedModelError, match=r"`model` must have gradients in its variables; got .*float8"):
        mgs.kernel(model, draw(3, 4))


def test_stateful_layers_are_refused():
    model = keras.Sequential([keras.Input((5, 2), batch_size=4), layers.LSTM(3, stateful=True, name="memory"), layers.Dense(2)])
    with pytest.raises(
        mgs.UnsupportedModelError, match=r"must treat each sample by itself; got stateful layer memory, .*stateful=False"
    ):
        mgs.kernel(model, draw(4, 5, 2))
