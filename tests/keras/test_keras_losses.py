"""The losses that a model is compiled with: when they are found, which are refused, and what stays as the user made it."""

from __future__ import annotations

import subprocess
import sys

import keras
import mgs_oracles
import numpy as np
import pytest
from keras import layers, ops
from keras_oracle import BACKEND, close, draw_weights, gradient, kernel, kernel_function, numpy
from mgs_core.adapters.keras import MGSFunctional, MGSRegularizer, MGSSequential, attach, regularize, sample_loss

import mgs_core as mgs

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(12, 5)).astype("float32")
Y = RANDOM.integers(0, 3, 12)
CROSS_ENTROPY = "sparse_categorical_crossentropy"


def sequential() -> keras.Model:
    return draw_weights(keras.Sequential([keras.Input((5,)), layers.Dense(3, activation="softmax")]))


def functional() -> keras.Model:
    x = keras.Input((5,))
    return draw_weights(keras.Model(x, layers.Dense(3, activation="softmax")(x)))


def several() -> keras.Model:
    x = keras.Input((5,))
    outputs = {"a": layers.Dense(3, activation="softmax", name="a")(x), "b": layers.Dense(2, name="b")(x)}
    return draw_weights(keras.Model(x, outputs))


class OwnLoss(keras.Model):
    """Take no loss from `super().compute_loss`."""

    def __init__(self):
        super().__init__()
        self.out = layers.Dense(3)

    def call(self, x):
        return self.out(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean(ops.square(y_pred))


@pytest.mark.parametrize(
    "regularizer", [MGSRegularizer(), MGSRegularizer(None, weighting="agreement")], ids=["loss", "weighting"]
)
@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (None, mgs.ArgumentError, r"`loss` must be given to `compile` .* got None. .*super\(\).compute_loss.* choose another"),
        (CROSS_ENTROPY, mgs.UnsupportedModelError, r"`compute_loss` must take its loss from `super.* that of OwnLoss does not"),
    ],
)
def test_a_loss_of_the_users_own_is_told_what_it_lacks(regularizer, loss, error, message):
    model = regularize(OwnLoss(), regularizer)
    model.compile("sgd", loss)
    with pytest.raises(error, match=message):
        model.fit(X, Y, verbose=0)


def test_a_loss_of_the_users_own_goes_with_another_head():
    model = regularize(OwnLoss(), MGSRegularizer("trace", strength=1.0, output="trace"))
    model.compile(keras.optimizers.SGD(0.0))
    expected = 3 * (1 + np.mean(np.sum(X**2, axis=1)))
    assert model.fit(X, Y, verbose=0).history["mgs_penalty"] == pytest.approx([expected], rel=1e-4)


def level(y_true, y_pred):
    """Be the mean of the samples for one sample and for four, as losses of a batch may be by chance."""
    n = y_pred.shape[0]
    return ops.mean(ops.square(y_pred)) * (1.0 + 0.1 * (n - 4) * (n - 1))


@pytest.mark.parametrize(("loss", "size"), [("dice", 4), ("dice", 12), ("tversky", 4), ("tversky", 12), (level, 4)])
def test_losses_of_a_whole_batch_are_refused_before_a_step(loss, size):
    keras.utils.set_random_seed(0)  # whose batches are not close to their samples' mean
    model = regularize(keras.Sequential([keras.Input((5,)), layers.Dense(3, activation="sigmoid")]), MGSRegularizer())
    model.compile("sgd", loss)
    before, ended = model.get_weights(), []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: ended.append(batch))
    with pytest.raises(mgs.ArgumentError, match="`loss` must be the mean or the sum of losses of single samples"):
        model.fit(X, X[:, :3] > 0, batch_size=size, verbose=0, callbacks=[count])
    assert ended == []
    if BACKEND != "jax":  # after any error in `fit`, Keras on JAX has let go of the weights
        for one, other in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(one, other)


LOSSES = {
    "one": (sequential, CROSS_ENTROPY, None, Y),
    "by shape": (sequential, "crossentropy", None, Y),
    "several": (several, {"a": CROSS_ENTROPY, "b": "mse"}, {"a": 1.0, "b": 0.3}, {"a": Y, "b": X[:, :2]}),
    "some": (several, {"a": CROSS_ENTROPY, "b": None}, None, {"a": Y}),
}


def hardest(labels, outputs):
    apart = ops.sum(ops.square(outputs[:, None] - outputs[None]), -1)
    same = ops.reshape(labels, (-1, 1)) == ops.reshape(labels, (1, -1))
    return ops.relu(1.0 + ops.max(ops.where(same, apart, 0.0), -1) - ops.min(ops.where(same, 1e9, apart), -1))


@pytest.mark.parametrize("loss", [hardest, keras.losses.Circle()], ids=["triplet", "circle"])
def test_losses_that_compare_samples_by_their_labels_are_refused(loss):
    model = keras.Sequential([keras.Input((5,)), layers.Dense(4, activation="tanh"), layers.Dense(3)])
    model = regularize(model, MGSRegularizer("trace", 0.1))
    model.compile("sgd", loss)
    with pytest.raises(mgs.SamplesInteractError, match="treat each sample by itself"):
        model.fit(X, np.arange(12) // 4, verbose=0)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_a_loaded_model_are_those_of_the_model_that_was_trained(name, tmp_path):
    """They are found from the batch alone, also in a function that is traced twice; the model's own stay as they were loaded."""
    make, loss, weights, y = LOSSES[name]
    model = make()
    model.compile("sgd", loss, loss_weights=weights)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    found = kernel_function(again, output="loss", loss=sample_loss(again))
    model.evaluate(X, y, verbose=0)
    expected = kernel(model, X, y, output="loss", loss=sample_loss(model))
    for size in (12, 5):
        part = keras.tree.map_structure(lambda leaf, size=size: leaf[:size], y)
        close(found(X[:size], part), expected[:size, :size], 1e-5)
    assert not again._compile_loss.built
    assert again.evaluate(X, y, verbose=0) == pytest.approx(model.evaluate(X, y, verbose=0), rel=1e-5)


@pytest.mark.parametrize("evaluated", [False, True])
def test_losses_of_outputs_whose_shapes_are_not_known_are_refused(evaluated):
    class Pair(OwnLoss):
        compute_loss = keras.Model.compute_loss

        def call(self, x):
            return self.out(x), 2.0 * self.out(x)

    model, y = Pair(), (ops.convert_to_tensor(X[:, :3]),) * 2
    model(X)
    model.compile("sgd", ["mse", "mse"])
    if evaluated:
        model.evaluate(X, y, verbose=0)
    with pytest.raises(mgs.ArgumentError, match=r"`model` must be sequential or functional for the losses of several outputs"):
        mgs.kernel(model, X, y, output="loss", loss=sample_loss(model))


class Ctc:
    """Sequences of five positions, of four symbols, with two labels each."""

    x = RANDOM.normal(size=(4, 5, 3)).astype("float32")
    y = np.array([[1, 2], [2, 3], [1, 1], [3, 0]])

    @staticmethod
    def network(regularizer=None):
        model = regularize(draw_weights(keras.Sequential([keras.Input((5, 3)), layers.Dense(4)])), regularizer)
        model.compile(keras.optimizers.SGD(0.0), keras.losses.CTC(), jit_compile=False)
        return model


@pytest.mark.skipif(BACKEND == "jax", reason="Keras' CTC loss has a second derivative on JAX")
def test_a_loss_without_second_derivative_is_named_with_the_remedy():
    with pytest.raises(mgs.UnsupportedModelError, match=r'must be twice differentiable for .*CTC loss.*`weighting="agreement"`'):
        Ctc.network(MGSRegularizer()).fit(Ctc.x, Ctc.y, verbose=0)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the other two compile no CTC loss that they cannot differentiate")
def test_a_loss_without_second_derivative_is_named_where_it_is_compiled():
    model = Ctc.network(MGSRegularizer())
    model.compile("sgd", keras.losses.CTC(), jit_compile=True)
    with pytest.raises(mgs.UnsupportedModelError, match=r"must be twice differentiable for .*CTC loss"):
        model.fit(Ctc.x, Ctc.y, verbose=0)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow's errors alone some are ours to name")
def test_other_errors_of_tensorflow_stay_what_they_are():
    import tensorflow as tf

    def missing(y_true, y_pred):
        raise tf.errors.NotFoundError(None, None, "/no/such/file")

    model = regularize(sequential(), MGSRegularizer(output="trace"))
    model.compile("sgd", missing)
    with pytest.raises(tf.errors.NotFoundError, match="/no/such/file"):
        model.fit(X, Y, verbose=0)


def test_agreement_weights_a_loss_without_second_derivative():
    plain, loss = Ctc.network(), keras.losses.CTC(reduction=None)

    def of(a, outputs):
        return loss(Ctc.y[a : a + 1], ops.reshape(outputs, (1, 5, 4)))[0]

    gradients = np.array([gradient(plain, Ctc.x[a : a + 1], lambda outputs, a=a: of(a, outputs)) for a in range(4)])
    weights = mgs.agreement_weights(gradients @ gradients.T)
    losses = numpy(loss(Ctc.y, plain(Ctc.x)))
    found = Ctc.network(MGSRegularizer(None, weighting="agreement")).fit(Ctc.x, Ctc.y, verbose=0).history["loss"]
    assert found == pytest.approx([np.mean(weights * losses)], rel=1e-4)
    assert abs(found[0] - np.mean(losses)) > 1e-3 * np.mean(losses)


KINDS = [(sequential, "Sequential", MGSSequential), (functional, "Functional", MGSFunctional)]
LOAD = "import sys, keras; print([type(keras.models.load_model(path)).__name__ for path in sys.argv[1:]])"


@pytest.mark.parametrize(("make", "plain", "registered"), KINDS, ids=["sequential", "functional"])
def test_what_was_attached_is_saved_once_it_is_regularised(make, plain, registered, tmp_path):
    model = attach(make(), MGSRegularizer("trace"))
    assert type(model).__name__ == plain
    regularize(model, MGSRegularizer("cosine", strength=1.0))
    assert (type(model), model.mgs_regularizer.penalty) == (registered, "cosine")
    model.compile(keras.optimizers.SGD(0.0), CROSS_ENTROPY)
    found = model.fit(X, Y, verbose=0).history["mgs_penalty"]
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again) is registered
    assert again.fit(X, Y, verbose=0).history["mgs_penalty"] == pytest.approx(found, rel=1e-5)


def test_the_end_of_a_regularizer_gives_the_class_back(tmp_path):
    """Its training goes on as if there had been none, and the file loads without this library."""
    paths = []
    for make, plain, registered in KINDS:
        models = [make(), make()]
        for model in models:
            model.compile(keras.optimizers.SGD(0.1, momentum=0.9), CROSS_ENTROPY, metrics=["accuracy"])
        regularize(models[1], MGSRegularizer("trace", strength=0.0))
        assert type(models[1]) is registered
        for model in models:
            model.fit(X, Y, verbose=0)
        assert regularize(models[1], None) is models[1]
        assert type(models[1]).__name__ == plain
        curves = [model.fit(X, Y, verbose=0).history for model in models]
        assert curves[0].keys() == curves[1].keys() == {"accuracy", "loss"}
        assert curves[0]["loss"] == pytest.approx(curves[1]["loss"], rel=1e-5)
        assert int(models[1].optimizer.iterations) == 2
        for one, other in zip(*(model.get_weights() for model in models), strict=True):
            mgs_oracles.close(one, other, 1e-5)
        paths.append(str(tmp_path / f"{plain}.keras"))
        models[1].save(paths[-1])
    command = [sys.executable, "-P", "-W", "ignore", "-c", LOAD, *paths]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[-1:] == ["['Sequential', 'Functional']"], result.stderr[-2000:]


def test_a_subclass_keeps_its_class_without_a_regularizer():
    class Net(MGSSequential):
        pass

    model = regularize(Net([keras.Input((5,)), layers.Dense(3)]), MGSRegularizer())
    assert type(regularize(model, None)) is Net
    assert model.mgs_regularizer is None


def test_what_users_set_on_a_model_stays_there():
    model = sequential()
    model.compute_loss = own = lambda x, y, y_pred, sample_weight=None, training=True: ops.mean(y_pred)
    regularize(model, MGSRegularizer())
    assert model.compute_loss is own
    model.compile("sgd", CROSS_ENTROPY)
    with pytest.raises(mgs.UnsupportedModelError, match="`train_step` must take its loss from `self"):
        model.fit(X, Y, verbose=0)


def test_plain_models_are_plain_without_a_regularizer():
    assert type(regularize(sequential(), None)) is keras.Sequential
    assert type(attach(regularize(sequential(), MGSRegularizer()), None)) is keras.Sequential
