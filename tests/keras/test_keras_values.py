"""What loss and penalty amount to in `fit`, number by number."""

from __future__ import annotations

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers
from keras_oracle import BACKEND, close, draw_weights, kernel, kernel_function, numpy
from mgs_core.adapters.keras import MGSMonitor, MGSRegularizer, regularize, sample_loss
from mgs_oracles import slope

import mgs_core as mgs

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(20, 5)).astype("float32")
Y = RANDOM.integers(0, 3, 20)
LOSS = "sparse_categorical_crossentropy"


def network(*between) -> keras.Model:
    parts = [layers.Dense(6, activation="tanh"), *between, layers.Dense(3, activation="softmax")]
    return draw_weights(keras.Sequential([keras.Input((5,)), *parts]))


def history(model, x=X, y=Y, **options):
    model.compile(keras.optimizers.SGD(0.0), LOSS, jit_compile=False, metrics=["accuracy"])
    return model.fit(x, y, **{"batch_size": 10, "verbose": 0, "shuffle": False, **options}).history


def penalty_of(model, x, y) -> float:
    """Return R of the kernel of the losses."""
    return float(numpy(mgs.Penalty("trace", 1.0)(kernel(model, x, y, output="loss", loss=sample_loss(LOSS)))))


@pytest.mark.parametrize("options", [{"class_weight": {0: 3.0, 1: 0.5, 2: 1.0}}, {"sample_weight": np.linspace(0.1, 2.0, 20)}])
def test_weights_of_the_user_act_on_the_loss_alone(options):
    plain = history(network(), **options)
    regularised = history(regularize(network(), MGSRegularizer("trace", strength=0.5)), **options)
    assert regularised["mgs_penalty"][0] > 0.1
    assert regularised["loss"][0] - regularised["mgs_penalty"][0] == pytest.approx(plain["loss"][0], rel=1e-4)
    assert abs(plain["loss"][0] - history(network())["loss"][0]) > 1e-3
    assert regularised["accuracy"] == plain["accuracy"]


@pytest.mark.parametrize(
    "between",
    [(), (layers.Dropout(0.5),), (layers.BatchNormalization(momentum=1.0),)],  # whose running statistics stay
    ids=["plain", "dropout", "batch norm"],
)
def test_kernel_is_that_of_inference(between):
    model = regularize(network(*[type(layer).from_config(layer.get_config()) for layer in between]), MGSRegularizer("trace", 1.0))
    expected = penalty_of(model, X, Y)
    found = history(model, batch_size=20)
    assert found["mgs_penalty"][0] == pytest.approx(expected, rel=1e-4)
    trained = found["loss"][0] - found["mgs_penalty"][0]  # of the training pass, with dropout and the batch's statistics
    assert (abs(trained - model.evaluate(X, Y, verbose=0)[0]) > 1e-3) == bool(between)


@pytest.mark.usefixtures("float64")
def test_running_statistics_are_constants_of_the_penalty():
    """Those that the step has moved: its gradient does not go through how they moved."""

    def normalized() -> keras.Model:
        parts = [layers.Dense(4), layers.BatchNormalization(momentum=0.3), layers.Dense(3, activation="tanh")]
        return draw_weights(keras.Sequential([keras.Input((5,)), *parts]))

    x, y, regularizer = X.astype("float64"), X[:, :3].astype("float64"), MGSRegularizer("log_trace", 2.0, output="trace")
    plain, penalised = normalized(), regularize(normalized(), regularizer)
    before = [numpy(variable) for variable in plain.trainable_variables]
    for model in (plain, penalised):
        model.compile(keras.optimizers.SGD(1.0), "mse", jit_compile=False)
        model.fit(x, y, batch_size=20, verbose=0)
    pairs = zip(plain.trainable_variables, penalised.trainable_variables, strict=True)
    descent = [numpy(one) - numpy(other) for one, other in pairs]
    measure, direction = kernel_function(plain), [np.random.default_rng(3).normal(size=w.shape) for w in before]

    def penalty(t: float) -> float:
        for variable, w, d in zip(plain.trainable_variables, before, direction, strict=True):
            variable.assign(w + t * d)
        return float(numpy(regularizer(keras.ops.convert_to_tensor(measure(x)))))

    assert sum(np.sum(g * d) for g, d in zip(descent, direction, strict=True)) == pytest.approx(slope(penalty, 1e-4), rel=1e-6)


@pytest.mark.usefixtures("float64")
def test_masked_positions_are_not_in_the_kernel():
    """Nor in the weights; what the model says there changes nothing."""
    ids, labels = RANDOM.integers(1, 9, (8, 5)), RANDOM.integers(0, 3, (8, 5))
    ids[::2, 3:] = 0
    lengths = np.where(np.arange(8) % 2, 5, 3)

    def sequence(mask):
        parts = [keras.Input((5,), dtype="int32"), layers.Embedding(9, 4, mask_zero=mask), layers.Dense(3, activation="softmax")]
        return draw_weights(keras.Sequential(parts))

    def loss(y_true, y_pred):
        y_true, weights = y_true
        values = keras.losses.sparse_categorical_crossentropy(y_true, y_pred) * weights
        return keras.ops.mean(values, axis=-1)

    scaled = (ids > 0) / (ids > 0).mean()
    plain = sequence(mask=False)
    matrix = kernel(plain, ids, (labels, scaled), output="loss", loss=lambda o, t: loss(t, keras.ops.reshape(o, (-1, 5, 3))))
    penalised = regularize(sequence(mask=True), MGSRegularizer("trace", strength=0.5))
    penalised.compile(keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy", jit_compile=False)
    found = penalised.fit(ids, labels, batch_size=8, epochs=4, verbose=0, shuffle=False).history["mgs_penalty"]
    np.testing.assert_allclose(found, [0.5 * np.trace(matrix) / 8] * 4, rtol=1e-5)
    weighted = regularize(sequence(mask=True), MGSRegularizer(None, weighting="agreement"))
    weighted.compile(keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy", jit_compile=False)
    found = weighted.fit(ids, labels, batch_size=8, verbose=0, shuffle=False).history["loss"][0]
    losses = -np.log(np.take_along_axis(plain.predict(ids, verbose=0), labels[..., None], -1))[..., 0]
    expected = (np.asarray(mgs.agreement_weights(matrix)) * (losses * scaled).mean(1)).mean()
    assert found == pytest.approx(expected, rel=1e-5)
    assert lengths.sum() == (ids > 0).sum()


def test_masked_outputs_keep_their_mask():
    ids, y = RANDOM.integers(0, 3, (20, 5)), RANDOM.integers(0, 3, (20, 5))

    def sequence():
        parts = [layers.Embedding(3, 4, mask_zero=True), layers.Dense(3, activation="softmax")]
        return draw_weights(keras.Sequential([keras.Input((5,), dtype="int32"), *parts]))

    plain = history(sequence(), ids, y)["loss"][0]
    found = history(regularize(sequence(), MGSRegularizer("trace", 0.1, output="trace")), ids, y)
    assert found["loss"][0] - found["mgs_penalty"][0] == pytest.approx(plain, rel=1e-4)


def test_values_given_stand_in_for_those_held():
    """The monitor on JAX hands over the state of the step; fixed variables count as much as trainable ones."""
    model, backend = network(layers.BatchNormalization()), mgs.get_backend("keras")
    trainable, fixed = (backend.values(v) for v in (model.trainable_variables, model.non_trainable_variables))
    moved = [1.0 + 2.0 * value for value in trainable], [1.0 + 2.0 * value for value in fixed]
    x, before = keras.ops.convert_to_tensor(X), numpy(mgs.kernel(model, X))
    for given in ((trainable, moved[1]), (moved[0], fixed)):
        found = numpy(mgs.kernel(backend.functional(model, *given), x))
        other = network(layers.BatchNormalization())
        for variables, values in zip((other.trainable_variables, other.non_trainable_variables), given, strict=True):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
        np.testing.assert_allclose(found, numpy(mgs.kernel(other, X)), rtol=0, atol=1e-5 * np.max(found))
        assert np.max(np.abs(found - before)) > 1e-2 * np.max(before)
    np.testing.assert_array_equal(numpy(mgs.kernel(model, X)), before)


def test_partial_last_batch_has_its_own_kernel():
    model = regularize(network(), MGSRegularizer("trace", 1.0))
    parts = [penalty_of(model, X[start : start + 8], Y[start : start + 8]) for start in (0, 8, 16)]  # 8, 8 and 4 samples
    assert history(model, batch_size=8)["mgs_penalty"][0] == pytest.approx(np.mean(parts), rel=1e-4)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras leaves devices to PyTorch")
def test_two_devices():
    """TensorFlow's replicas have a kernel each, and the penalty is their mean; JAX sees the whole batch."""
    expected = penalty_of(network(), X, Y)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        expected = (penalty_of(network(), X[:10], Y[:10]) + penalty_of(network(), X[10:], Y[10:])) / 2
        with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
            found = history(regularize(network(), MGSRegularizer("trace", 1.0)), batch_size=20)
    else:
        if len(keras.distribution.list_devices()) < 2:
            pytest.skip("JAX was started with one device")
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=["cpu:0", "cpu:1"]))
        try:
            found = history(regularize(network(), MGSRegularizer("trace", 1.0)), batch_size=20, callbacks=[MGSMonitor(X[:4])])
        finally:
            keras.distribution.set_distribution(None)
        assert found["mgs_trace"][0] == pytest.approx(float(np.trace(kernel(network(), X[:4]))), rel=1e-4)
    plain = history(network(), batch_size=20)["loss"][0]
    assert found["mgs_penalty"][0] == pytest.approx(expected, rel=1e-4)
    assert found["loss"][0] == pytest.approx(plain + expected, rel=1e-4)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only it has replicas")
def test_replicas_share_random_probes():
    import tensorflow as tf

    drawn = numpy(keras.random.randint((3, 2), 0, 2, seed=keras.random.SeedGenerator(5)))
    signs = tf.constant((2.0 * drawn - 1.0) / 2**0.5, tf.float32)
    kernels = [kernel(network(), half, transform=lambda outputs: outputs @ signs) for half in (X[:10], X[10:])]
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        regularizer = MGSRegularizer("trace", 1.0, output="random", probes=2, seed=5)
        found = history(regularize(network(), regularizer), batch_size=20, epochs=2)["mgs_penalty"]
    assert found[0] == pytest.approx(np.mean([np.trace(one) / 10 for one in kernels]), rel=1e-4)
    assert found[1] != found[0]  # drawn anew


NNX = """
import keras, numpy as np
from mgs_core.adapters.keras import MGSMonitor, MGSRegularizer, regularize
assert keras.config.is_nnx_enabled()
keras.utils.set_random_seed(0)
model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.Dense(3)])
regularize(model, MGSRegularizer("trace", 1.0, output="trace")).compile(keras.optimizers.SGD(0.0), "mse")
x = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")
found = model.fit(x, x[:, :3], batch_size=8, verbose=0, callbacks=[MGSMonitor(x)]).history
# the monitor comes after the statistics of the batch normalisation have moved
assert 0 < found["mgs_penalty"][0] < np.inf and 0 < found["mgs_mean_trace"][0] < np.inf
"""


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "jax", reason="flax.nnx is of JAX")
def test_keras_on_nnx():
    environment = {**os.environ, "KERAS_NNX_ENABLED": "true"}
    command = [sys.executable, "-P", "-W", "ignore", "-c", NNX]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_strength_is_that_of_the_penalty_unless_it_is_given():
    assert MGSRegularizer().strength == mgs.Penalty("trace").strength
    assert MGSRegularizer("cosine").strength == mgs.Penalty("cosine").strength
    assert MGSRegularizer("cosine", 0.25).strength == 0.25
    assert MGSRegularizer(None, weighting="agreement").strength == 0.0


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no sparse inputs there")
@pytest.mark.parametrize("kind", ["scipy", "framework"])
def test_sparse_inputs(kind):
    """The kernel is that of the dense ones, and `fit` takes them."""
    dense = (X * (X > 0.5)).astype("float32")
    sparse = pytest.importorskip("scipy.sparse").csr_matrix(dense)
    if kind == "framework" and BACKEND == "jax":
        sparse = pytest.importorskip("jax.experimental.sparse").BCOO.fromdense(dense)
    elif kind == "framework":
        sparse = pytest.importorskip("tensorflow").sparse.from_dense(dense)
    parts = [layers.Dense(4, activation="tanh"), layers.Dense(3, activation="softmax")]
    model = draw_weights(keras.Sequential([keras.Input((5,), sparse=True), *parts]))
    close(mgs.kernel(model, sparse), kernel(model, dense), 1e-6)
    model = regularize(model, MGSRegularizer("trace", strength=0.1, max_samples=6))
    curves = [history(model, x, callbacks=[MGSMonitor(x)]) for x in (dense, sparse)]
    for name in ("loss", "mgs_penalty", "mgs_trace"):
        assert curves[1][name] == pytest.approx(curves[0][name], rel=1e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="others have no ragged tensors")
def test_ragged_inputs_are_refused():
    import tensorflow as tf

    ids = keras.Input((None,), dtype="int32")
    model = keras.Model(ids, layers.Dense(3)(layers.GlobalAveragePooling1D()(layers.Embedding(10, 4)(ids))))
    with pytest.raises(mgs.ArgumentError, match=r"must be dense; got a RaggedTensor. Pass inputs.to_tensor\(\), and mask"):
        mgs.kernel(model, tf.ragged.constant([[1, 2, 3], [4]]))
