"""Regularised `fit` on whichever backend Keras runs: its gradient, and all that users combine it with."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers
from keras_oracle import BACKEND, draw_weights, kernel, kernel_function, numpy
from mgs_core.adapters.keras import (
    MGSFunctional,
    MGSMixin,
    MGSRegularizer,
    MGSSequential,
    StrengthSchedule,
    attach,
    regularize,
    sample_loss,
)
from mgs_oracles import slope

import mgs_core as mgs

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(20, 5)).astype("float32")
Y = RANDOM.integers(0, 3, 20)


def network(*hidden) -> keras.Model:
    hidden = hidden or (layers.Dense(6, activation="tanh"),)
    return draw_weights(keras.Sequential([keras.Input((5,)), *hidden, layers.Dense(3, activation="softmax")]))


def functional() -> keras.Model:
    x = keras.Input((5,))
    outputs = layers.Dense(3, activation="softmax")(layers.Dense(6, activation="tanh")(x))
    return draw_weights(keras.Model(x, outputs))


def recurrent() -> keras.Model:
    return network(layers.Reshape((5, 1)), layers.LSTM(3))


def compiled(model: keras.Model, **options):
    options = {"optimizer": keras.optimizers.SGD(0.1), "loss": "sparse_categorical_crossentropy", "jit_compile": False, **options}
    model.compile(**options)
    return model


def fit(model: keras.Model, x=X, y=Y, **options):
    return model.fit(x, y, **{"batch_size": 10, "verbose": 0, "shuffle": False, **options}).history


def changed(model: keras.Model, before: list[np.ndarray]) -> float:
    return max(float(np.max(np.abs(now - then))) for now, then in zip(model.get_weights(), before, strict=True))


REGULARIZERS = {
    "loss": MGSRegularizer("log_determinant", strength=0.7, scale=0.5),
    "trace": MGSRegularizer("trace", strength=0.01, output="trace", transform="log_softmax", max_samples=6),
    "random": MGSRegularizer("cosine", strength=0.5, output="random", probes=2, transform="softmax", seed=3),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("name", "network"), [*((name, network) for name in REGULARIZERS), ("loss", recurrent)])
def test_one_step_descends_the_gradient_of_loss_and_penalty(name, network):
    regularizer = REGULARIZERS[name]
    x, y = X[:8].astype("float64"), Y[:8]
    model = compiled(regularize(network(), regularizer), optimizer=keras.optimizers.SGD(1.0))
    plain = compiled(network())
    options = {"output": regularizer.output, "transform": regularizer.transform}
    if regularizer.output == "random":
        drawn = numpy(keras.random.randint((3, 2), 0, 2, seed=keras.random.SeedGenerator(3)))
        signs = keras.ops.convert_to_tensor((2.0 * drawn - 1.0) / 2**0.5)
        options = {"transform": lambda outputs: keras.ops.softmax(outputs) @ signs}
    if regularizer.output == "loss":
        options["loss"] = sample_loss("sparse_categorical_crossentropy")

    m, measure = regularizer.max_samples, kernel_function(plain, **options)

    def objective(weights):
        plain.set_weights(weights)
        loss = float(np.mean(-np.log(numpy(plain(x)))[np.arange(8), y]))
        return loss + float(numpy(regularizer(keras.ops.convert_to_tensor(measure(x[:m], y[:m])))))

    before = model.get_weights()
    history = fit(model, x, y, batch_size=8)
    descent = [then - now for now, then in zip(model.get_weights(), before, strict=True)]
    direction = [np.random.default_rng(5).normal(size=w.shape) for w in before]
    expected = slope(lambda t: objective([w + t * d for w, d in zip(before, direction, strict=True)]), 1e-3)
    assert sum(np.sum(g * d) for g, d in zip(descent, direction, strict=True)) == pytest.approx(expected, rel=1e-6)
    assert history["loss"][0] == pytest.approx(objective(before), rel=1e-6)


@pytest.mark.parametrize("every", [1, 2])
def test_random_probes_are_drawn_anew_in_each_step(every):
    """They differ from step to step, repeat with the seed, and on average give the penalty of all outputs."""

    def penalties(epochs=4, **options):
        model = regularize(network(), MGSRegularizer("trace", strength=1.0, every=every, **options))
        return fit(compiled(model, optimizer=keras.optimizers.SGD(0.0)), batch_size=20, epochs=epochs)["mgs_penalty"]

    exact = penalties(output="trace")[0]
    drawn = penalties(40, output="random", seed=1)[::every]  # of a step each; 0 where all signs are one, for softmax sums to 1
    assert len(set(np.round(drawn, 5))) > 2
    assert drawn[:2] == penalties(output="random", seed=1)[::every][:2]
    assert np.mean(drawn) == pytest.approx(exact, rel=0.5)
    many = penalties(output="random", probes=500)[::every]
    assert np.ptp(many) < 0.2 * np.ptp(drawn)
    assert np.mean(many) == pytest.approx(exact, rel=0.2)


def test_a_kernel_that_its_parameters_do_not_change_has_a_penalty_without_gradient():
    weights = []
    for regularizer in (None, MGSRegularizer("trace", strength=1.0, output="trace")):
        model = draw_weights(keras.Sequential([keras.Input((5,)), layers.Dense(3)]))
        model = compiled(model if regularizer is None else regularize(model, regularizer), loss="mse")
        history = fit(model, y=keras.ops.one_hot(Y, 3), epochs=3)
        weights.append(model.get_weights())
    assert history["mgs_penalty"][2] == pytest.approx(3 * (1 + np.mean(np.sum(X**2, axis=1))), rel=1e-4)
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_a_regularizer_called_gives_the_whole_penalty():
    matrix = np.array([[2.0, 0.5], [0.5, 1.0]])
    assert MGSRegularizer("trace", strength=0.5, scale=2.0)(matrix) == mgs.Penalty("trace", 0.5, 2.0)(matrix) == 0.75
    with pytest.raises(mgs.ArgumentError, match="`penalty` must be a name for its value"):
        MGSRegularizer(None, weighting="agreement")(matrix)


def test_logs_show_the_penalty_and_validation_does_not():
    for route in (regularize, attach):
        model = compiled(route(network(), REGULARIZERS["loss"]), metrics=["accuracy"])
        history = fit(model, validation_data=(X, Y))
        assert {"loss", "mgs_penalty", "accuracy", "val_loss", "val_accuracy"} == set(history)
        assert history["mgs_penalty"][0] > 0
        losses = -np.log(numpy(model(X)))[np.arange(20), Y]
        assert history["val_loss"][0] == pytest.approx(np.mean(losses), rel=1e-4)  # without the penalty
        assert "mgs_penalty" not in model.evaluate(X, Y, verbose=0, return_dict=True)


def test_progress_bar_shows_the_penalty_and_not_that_of_validation(capsys):
    fit(compiled(regularize(network(), REGULARIZERS["loss"])), validation_data=(X, Y), verbose=1)
    shown = capsys.readouterr().out
    assert "mgs_penalty: " in shown
    assert "val_loss: " in shown
    assert "val_mgs_penalty" not in shown


def test_both_routes_and_zero_strength():
    before = network().get_weights()
    plain, routes = compiled(network()), []
    fit(plain)
    for route in (regularize, attach):
        model = compiled(route(network(), REGULARIZERS["loss"]))
        fit(model)
        routes.append(model.get_weights())
    for one, other in zip(*routes, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    nothing = compiled(regularize(network(), MGSRegularizer("trace", strength=0.0)))
    fit(nothing)
    assert changed(nothing, plain.get_weights()) < 1e-6 < 1e-3 < changed(plain, routes[0])
    assert changed(plain, before) > 1e-3


def test_strength_is_scheduled_without_a_new_trace():
    shared = MGSRegularizer("trace", strength=1.0)
    model, other = (compiled(regularize(network(), shared), optimizer=keras.optimizers.SGD(0.0)) for _ in range(2))
    history = fit(model, epochs=3, callbacks=[StrengthSchedule(lambda epoch: float(epoch))])
    first, second, third = history["mgs_penalty"]
    assert first == 0.0
    assert third == pytest.approx(2 * second, rel=1e-5)
    assert model.mgs_regularizer.strength == 2.0
    assert (shared.strength, other.mgs_regularizer.strength) == (1.0, 1.0)
    assert model.get_config()["mgs_regularizer"]["config"]["strength"] == 2.0
    assert fit(other)["mgs_penalty"][0] == pytest.approx(second, rel=1e-5)
    by_batch = fit(model, epochs=2, callbacks=[StrengthSchedule(lambda batch: float(batch == 0), by="batch")])["mgs_penalty"]
    assert by_batch[0] > 0.0 == by_batch[1]


def test_every_other_step_counts_twice():
    model = compiled(regularize(network(), MGSRegularizer("trace", strength=1.0, every=2)), optimizer=keras.optimizers.SGD(0.0))
    always = compiled(regularize(network(), MGSRegularizer("trace", strength=1.0)), optimizer=keras.optimizers.SGD(0.0))
    lazy, usual = fit(model, X[:10], Y[:10], batch_size=5), fit(always, X[:5], Y[:5], batch_size=5)
    assert lazy["mgs_penalty"] == pytest.approx(usual["mgs_penalty"], rel=1e-5)
    plain = compiled(network(), optimizer=keras.optimizers.SGD(0.0))
    added = lazy["loss"][0] - fit(plain, X[:10], Y[:10], batch_size=5)["loss"][0]
    assert added == pytest.approx(usual["mgs_penalty"][0], rel=1e-4)  # twice, in one of two steps


@pytest.mark.parametrize(
    "penalty",
    [{"penalty": None}, {"strength": 0.0, "output": "trace", "transform": "softmax"}],
    ids=["alone", "beside a penalty"],
)
def test_agreement_weights_the_losses(penalty):
    """They are those of the losses as they are, whatever the penalty's head."""
    regularizer = MGSRegularizer(**penalty, weighting="agreement")
    model = compiled(regularize(network(), regularizer), optimizer=keras.optimizers.SGD(0.0))
    given = np.linspace(0.5, 1.5, 20)
    history = fit(model, batch_size=20, sample_weight=given)
    plain = network()
    weights = mgs.agreement_weights(kernel(plain, X, Y, output="loss", loss=sample_loss("sparse_categorical_crossentropy")))
    losses = -np.log(numpy(plain(X)))[np.arange(20), Y]
    assert history["loss"][0] == pytest.approx(np.mean(given * weights * losses), rel=1e-4)
    assert ("mgs_penalty" in history) == (regularizer.penalty is not None)


def several() -> keras.Model:
    a, b = keras.Input((5,), name="a"), keras.Input((2,), name="b")
    h = layers.Dense(6, activation="tanh")(layers.Concatenate()([a, b]))
    outputs = {"first": layers.Dense(3, activation="softmax", name="first")(h), "second": layers.Dense(2, name="second")(h)}
    return draw_weights(keras.Model({"a": a, "b": b}, outputs))


def test_dict_inputs_and_outputs_with_several_losses():
    model = regularize(several(), MGSRegularizer("trace", strength=0.1))
    assert type(model) is MGSFunctional
    x, y = {"a": X, "b": X[:, :2]}, {"first": Y, "second": X[:, :2]}
    losses = {"first": "sparse_categorical_crossentropy", "second": "mse"}
    compiled(model, loss=losses, loss_weights={"first": 1.0, "second": 0.3}, optimizer=keras.optimizers.SGD(0.0))
    history = fit(model, x, y, sample_weight={"first": np.ones(20), "second": np.ones(20)}, batch_size=20)
    outputs = {name: numpy(value) for name, value in model(x).items()}
    total = -np.log(outputs["first"])[np.arange(20), Y] + 0.3 * np.mean((outputs["second"] - X[:, :2]) ** 2, axis=1)
    assert history["loss"][0] == pytest.approx(np.mean(total) + history["mgs_penalty"][0], rel=1e-4)

    def losses_of(outputs, targets):  # both side by side
        first, second = outputs[:, :3], outputs[:, 3:]
        cross_entropy = -keras.ops.log(keras.ops.sum(first * keras.ops.one_hot(targets["first"], 3), axis=1))
        return cross_entropy + 0.3 * keras.ops.mean((second - targets["second"]) ** 2, axis=1)

    y = keras.tree.map_structure(keras.ops.convert_to_tensor, y)
    expected = np.trace(kernel(model, x, y, output=losses_of))
    assert 0.1 * expected / 20 == pytest.approx(history["mgs_penalty"][0], rel=1e-4)
    assert np.trace(kernel(model, x, y, output="loss", loss=sample_loss(model))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has neither on PyTorch")
def test_compiled_steps_and_several_steps_at_once():
    curves = []
    for options in ({}, {"jit_compile": True}, {"steps_per_execution": 2}, {"run_eagerly": True}):
        if BACKEND == "jax" and "run_eagerly" in options:
            continue  # below
        model = compiled(regularize(network(), REGULARIZERS["loss"]), **options)
        curves.append(fit(model, epochs=2)["loss"])
    for curve in curves[1:]:
        np.testing.assert_allclose(curve, curves[0], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "jax", reason="the others are above")
def test_eager_steps_on_jax():
    """Keras then evaluates each step operation by operation, and turns `jit_compile` off."""
    eager, usual = (regularize(network(), REGULARIZERS["loss"]) for _ in range(2))
    with pytest.warns(UserWarning, match="If `run_eagerly` is True, then `jit_compile` cannot also be True"):
        compiled(eager, jit_compile=True, run_eagerly=True)
    curves = [fit(model, X[:10], Y[:10]) for model in (compiled(usual, jit_compile=True), eager)]
    assert curves[0].keys() == curves[1].keys()
    for key, value in curves[0].items():
        assert curves[1][key] == pytest.approx(value, rel=1e-4)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's compiler alone lacks second derivatives")
def test_the_compiler_of_torch_is_refused():
    model = compiled(regularize(network(), REGULARIZERS["loss"]), jit_compile=True)
    with pytest.raises(mgs.UnsupportedModelError, match="`jit_compile` must be off on PyTorch"):
        fit(model)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="XLA has it for TensorFlow's max pooling of float32 alone")
def test_what_xla_lacks_is_named_with_the_remedy():
    pooled = [keras.layers.Conv2D(2, 3, padding="same"), keras.layers.MaxPooling2D(dtype="bfloat16"), keras.layers.Flatten()]
    model = regularize(keras.Sequential([keras.Input((4, 4, 1)), *pooled, keras.layers.Dense(3)]), REGULARIZERS["loss"])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=True)
    with pytest.raises(mgs.UnsupportedModelError, match=r"`jit_compile` must be off where XLA lacks .* MaxPoolGradGrad"):
        model.fit(np.ones((4, 4, 4, 1), "float32"), np.zeros(4, int), verbose=0)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = compiled(regularize(network(), MGSRegularizer("log_determinant", strength=0.7)))
        mixed = fit(model, X[:10], Y[:10])
    finally:
        keras.config.set_dtype_policy(before)
    exact = fit(compiled(regularize(network(), MGSRegularizer("log_determinant", strength=0.7))), X[:10], Y[:10])
    tolerance = 0.1 if policy == "mixed_bfloat16" else 0.02
    assert mixed["mgs_penalty"][0] == pytest.approx(exact["mgs_penalty"][0], rel=tolerance)
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())


def test_a_kernel_that_the_gradient_contradicts_is_refused(monkeypatch):
    right = mgs.kernel
    monkeypatch.setattr(mgs, "kernel", lambda *arguments, **options: 2.0 * right(*arguments, **options))
    with pytest.raises(mgs.UnsupportedModelError, match="its kernel sums to"):
        fit(compiled(regularize(network(), REGULARIZERS["loss"])))


class Net(MGSMixin, keras.Model):
    """A subclass that saves its regulariser."""

    def __init__(self, width=4, **options):
        super().__init__(**options)
        self.width = width
        self.hidden, self.norm, self.out = layers.Dense(width, activation="tanh"), layers.BatchNormalization(), layers.Dense(3)

    def call(self, x, training=None):
        return self.out(self.norm(self.hidden(x), training=training))

    def get_config(self):
        return {**super().get_config(), "width": self.width}


class OneLayer(keras.Model):
    """A subclass that knows nothing of regularisers."""

    def __init__(self):
        super().__init__()
        self.out = layers.Dense(3, activation="softmax")

    def call(self, x):
        return self.out(x)


class Plain(OneLayer):
    """Have an old `compute_loss`."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return 2.0 * super().compute_loss(x, y, y_pred, sample_weight)


def test_subclassed_models():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net = compiled(regularize(Net(), REGULARIZERS["loss"]), loss=loss)
    statistics = fit(net)["mgs_penalty"]
    assert statistics[0] > 0
    assert np.max(np.abs(numpy(net.norm.moving_mean))) > 0  # the batch statistics are those of the training pass
    plain = compiled(regularize(Plain(), REGULARIZERS["loss"]))
    assert type(plain) is Plain
    assert fit(plain)["mgs_penalty"][0] > 0
    regularize(plain, None)
    assert "mgs_penalty" not in fit(plain)


def test_a_subclassed_model_that_passes_for_built():
    class Outer(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.last = layers.Dense(4, activation="tanh"), layers.Dense(3, activation="softmax")

        def call(self, x):
            return self.last(self.first(x))

    model = Outer()
    model.built = True  # as `build` says of a model whose layers it does not know
    assert fit(compiled(regularize(model, REGULARIZERS["loss"])))["mgs_penalty"][0] > 0


class Distance(keras.losses.Loss):
    """Take for granted that Keras brings targets and outputs to one dtype."""

    def call(self, y_true, y_pred):
        return keras.ops.mean(keras.ops.square(y_pred - y_true), axis=-1)


def test_targets_of_any_dtype_that_the_loss_takes():
    one_hot, penalties = np.eye(3)[Y], []
    for loss, y in ((Distance(), one_hot.astype("int64")), ("mse", one_hot)):
        penalties += fit(compiled(regularize(network(), REGULARIZERS["loss"]), loss=loss), y=y)["mgs_penalty"]
    for y in (Y, Y.astype("float32")):
        penalties += fit(compiled(regularize(network(), REGULARIZERS["loss"])), y=y)["mgs_penalty"]
    assert penalties[0] == pytest.approx(penalties[1], rel=1e-5)
    assert penalties[2] == pytest.approx(penalties[3], rel=1e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the other two refuse losses without reduction")
def test_losses_without_reduction_are_summed_and_the_penalty_counts_once():
    models = []
    for reduction in ("sum", None):
        loss = keras.losses.SparseCategoricalCrossentropy(reduction=reduction)
        models.append(compiled(regularize(network(), REGULARIZERS["loss"]), loss=loss))
        fit(models[-1], x=X[:10], y=Y[:10])
    assert changed(models[0], models[1].get_weights()) < 1e-5


@pytest.mark.parametrize("name", ["loss", "agreement"])
def test_what_layers_add_to_the_loss_stays_in_it(name):
    """The second pass, and the check of the first batch, do not drop it."""
    regularizer = MGSRegularizer(None, weighting="agreement") if name == "agreement" else REGULARIZERS[name]

    def network(**options):
        return keras.Sequential([keras.Input((5,)), layers.Dense(3, activation="softmax", **options)])

    losses = []
    for added in ({}, {"activity_regularizer": keras.regularizers.L2(0.1), "kernel_regularizer": "l2"}):
        net = draw_weights(network(**added))
        compiled(regularize(net, regularizer), optimizer=keras.optimizers.SGD(0.0))
        losses.append([fit(net, batch_size=len(X))["loss"][0] for _ in range(2)])
    assert losses[1][0] == pytest.approx(losses[1][1], rel=1e-6)
    net(X)
    added = sum(float(numpy(loss)) for loss in net.losses)
    assert losses[1][0] - losses[0][0] == pytest.approx(added, rel=1e-5)
    mgs.kernel(net, X)
    assert sum(float(numpy(loss)) for loss in net.losses) == pytest.approx(added)


class Elsewhere(OneLayer):
    """Take the loss from elsewhere than `compute_loss`."""

    def train_step(self, *given):
        logs = {"loss": keras.ops.zeros(())}
        return (logs, given[0]) if keras.backend.backend() == "jax" else logs


def test_training_steps_that_pass_the_penalty_by_are_refused():
    with pytest.raises(mgs.UnsupportedModelError, match="`train_step` must take its loss from `self"):
        fit(compiled(regularize(Elsewhere(), REGULARIZERS["loss"])))
    net = compiled(regularize(network(), REGULARIZERS["loss"]))
    with pytest.raises(mgs.ArgumentError, match="`x` must be given to `compute_loss`"):
        net.compute_loss(y=Y, y_pred=net(X))


def test_batch_statistics_move_once_a_step():
    """The second pass leaves the model's state alone."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    moved = []
    for regularizer in (None, REGULARIZERS["loss"]):
        net = Net()
        net(X)
        draw_weights(net)
        compiled(regularize(net, regularizer), loss=loss, optimizer=keras.optimizers.SGD(0.0))
        fit(net)
        moved.append(numpy(net.norm.moving_mean))
    np.testing.assert_allclose(moved[0], moved[1], rtol=1e-5)


CONTINUE = """
import json, sys
import keras, numpy as np
data, found = np.load(sys.argv[1]), []
for path in sys.argv[2:]:
    if not path.endswith("plain.keras"):
        import mgs_core.adapters.keras
    model = keras.models.load_model(path)
    history = model.fit(data["x"], data["y"], batch_size=10, verbose=0, shuffle=False).history
    found.append([type(model).__name__, history, int(model.optimizer.iterations)])
print(json.dumps(found))
"""


def test_saved_model_goes_on_in_a_new_process(tmp_path):
    np.savez(tmp_path / "data.npz", x=X, y=Y)
    paths, here = [tmp_path / f"{name}.keras" for name in ("plain", "regularised", "functional")], []
    for route, make, path in zip((attach, regularize, regularize), (network, network, functional), paths, strict=True):
        model = compiled(route(make(), REGULARIZERS["loss"]), optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
        fit(model)
        model.save(path)
        here.append(fit(model))
    command = [sys.executable, "-P", "-W", "ignore", "-c", CONTINUE, str(tmp_path / "data.npz"), *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    (plain, without, _), *regularised = json.loads(result.stdout.splitlines()[-1])
    assert plain == "Sequential"
    assert "mgs_penalty" not in without
    for name, expected, found in zip(("MGSSequential", "MGSFunctional"), here[1:], regularised, strict=True):
        assert (found[0], found[2]) == (name, 4)
        assert found[1]["mgs_penalty"] == pytest.approx(expected["mgs_penalty"], rel=1e-4)
        assert found[1]["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_subclass_comes_back_from_its_file(tmp_path):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net = compiled(regularize(Net(5), REGULARIZERS["loss"]), loss=loss)
    fit(net)
    net.save(tmp_path / "net.keras")
    again = keras.models.load_model(tmp_path / "net.keras", custom_objects={"Net": Net})
    assert (type(again), again.mgs_regularizer.get_config()) == (Net, REGULARIZERS["loss"].get_config())
    found, expected = fit(again), fit(net)
    assert found["mgs_penalty"] == pytest.approx(expected["mgs_penalty"], rel=1e-4)


def test_configurations_come_back(tmp_path):
    for regularizer in REGULARIZERS.values():
        again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(regularizer))
        assert again.get_config() == regularizer.get_config()
    net = regularize(Net(5), REGULARIZERS["trace"])
    again = Net.from_config(net.get_config())
    assert (again.width, again.mgs_regularizer.get_config()) == (5, REGULARIZERS["trace"].get_config())
    functional = regularize(several(), REGULARIZERS["trace"])
    assert type(keras.models.model_from_json(functional.to_json())) is MGSFunctional
    assert MGSSequential.from_config(regularize(network(), REGULARIZERS["trace"]).get_config()).mgs_regularizer is not None


def test_clones_have_no_regularizer():
    model = regularize(network(), REGULARIZERS["loss"])
    assert getattr(keras.models.clone_model(model), "mgs_regularizer", None) is None
    assert "MGSRegularizer(penalty='log_determinant'" in repr(model.mgs_regularizer)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MGSRegularizer("nonsense"), "`penalty` must be one of trace"),
        (lambda: MGSRegularizer(""), "`penalty` must be one of trace"),
        (lambda: MGSRegularizer(strength=-1.0), "`strength` must be a finite number at least 0; got -1.0"),
        (lambda: MGSRegularizer(scale=0.0), "`scale` must be a finite number above 0"),
        (lambda: MGSRegularizer(None), "`penalty` must be the name of a penalty unless"),
        (lambda: MGSRegularizer(output="full"), "`output` must be one of loss"),
        (lambda: MGSRegularizer(transform="exp"), "`transform` must be one of identity"),
        (lambda: MGSRegularizer(transform="softmax"), '`transform` must be "identity" for output="loss"; got \'softmax\''),
        (lambda: MGSRegularizer(weighting="some"), "`weighting` must be one of None, agreement"),
        (lambda: MGSRegularizer(every=0), "`every` must be an integer of at least 1"),
        (lambda: MGSRegularizer(max_samples=True), "`max_samples` must be an integer"),
        (lambda: MGSRegularizer(weighting="agreement", max_samples=3), "`max_samples` must be None with weighting"),
        (lambda: setattr(MGSRegularizer(), "every", 3), "`every` must stay as it was made"),
        (lambda: setattr(MGSRegularizer(), "strength", 3), "`strength` must stay as it was made.* Use StrengthSchedule"),
        (lambda: MGSRegularizer(None, -1.0, weighting="agreement"), "`strength` must be a finite number"),
        (lambda: regularize(layers.Dense(2), MGSRegularizer()), "`model` must be a keras.Model; got Dense"),
        (lambda: regularize(network(), "l2"), "`regularizer` must be an MGSRegularizer or None; got str"),
        (lambda: sample_loss(network()), "`model` must be compiled with a loss; got 'sequential"),
        (lambda: StrengthSchedule(lambda n: 1.0, by="day"), '`by` must be "epoch" or "batch"'),
        (lambda: fit(compiled(network()), callbacks=[StrengthSchedule(float)]), "`model` must have a regularizer for"),
        (lambda: mgs.kernel(keras.Sequential([layers.Dense(2)]), X), "`model` must be built"),
        (lambda: mgs.kernel(keras.Sequential([keras.Input((5,)), layers.Flatten()]), X), "`model` must have trainable variables"),
    ],
)
@pytest.mark.wrong_types
def test_bad_arguments_are_named(call, message):
    with pytest.raises(mgs.ArgumentError, match=message):
        call()


@pytest.mark.wrong_types
def test_arguments_may_be_numbers_of_numpy(tmp_path):
    two = np.int64(2)
    numbers = {"strength": np.float32(0.5), "scale": np.float32(2), "probes": two, "every": two, "max_samples": two, "seed": two}
    model = compiled(regularize(network(), MGSRegularizer("log_trace", output="random", **numbers)))
    fit(model)
    model.save(tmp_path / "model.keras")
    found = keras.saving.load_model(tmp_path / "model.keras").mgs_regularizer.get_config()
    assert {name: found[name] for name in numbers} == numbers


def squares(reduce):
    return lambda y, outputs: reduce(keras.ops.square(keras.ops.one_hot(keras.ops.cast(y[:, 0], int), 3) - outputs))


@pytest.mark.parametrize("name", ["mean", "sum"])
def test_losses_that_are_scalars_have_the_kernel_of_their_samples(name):
    reduce = getattr(keras.ops, name)
    curves, kernels = [], []
    for loss in (squares(reduce), squares(lambda values: reduce(values, axis=-1))):
        model = compiled(regularize(network(), MGSRegularizer("log_determinant", strength=0.7)), loss=loss)
        curves.append(fit(model, y=Y[:, None], batch_size=20)["mgs_penalty"])  # of one step: a sum has steps of its own
        kernels.append(kernel(draw_weights(model), X, Y[:, None], output="loss", loss=sample_loss(model)))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    np.testing.assert_allclose(*kernels, rtol=1e-5, atol=1e-6)


def test_scalar_losses_that_are_no_mean_or_cannot_be_weighted_are_refused():
    root = squares(lambda values: keras.ops.sqrt(keras.ops.mean(values)))
    with pytest.raises(mgs.ArgumentError, match=r"`loss` must be the mean or the sum of losses of single samples; got .*axis=-1"):
        fit(compiled(regularize(network(), MGSRegularizer("trace")), loss=root), y=Y[:, None])
    with pytest.raises(mgs.ArgumentError, match="`loss` must return one value for each sample to be weighted"):
        fit(
            compiled(regularize(network(), MGSRegularizer(None, weighting="agreement")), loss=squares(keras.ops.mean)),
            y=Y[:, None],
        )


def test_targets_of_some_outputs_alone():
    x = keras.Input((5,))
    h = layers.Dense(6, activation="tanh")(x)
    outputs = {"a": layers.Dense(3, activation="softmax", name="a")(h), "b": layers.Dense(2, name="b")(h)}
    model = draw_weights(keras.Model(x, outputs))
    loss = {"a": "sparse_categorical_crossentropy", "b": None}
    compiled(regularize(model, MGSRegularizer("trace", strength=1.0)), loss=loss, optimizer=keras.optimizers.SGD(0.0))
    found = fit(model, y={"a": Y}, batch_size=20, epochs=2)["mgs_penalty"]
    alone = keras.Model(x, outputs["a"])
    expected = mgs.Penalty("trace", 1.0)(kernel(alone, X, Y, output="loss", loss=sample_loss(loss["a"])))
    assert found == pytest.approx([float(expected)] * 2, rel=1e-4)


class Guided:
    """Train as the guides of Keras do it: every metric but the loss gets targets and outputs."""

    def train_step(self, *given):
        return getattr(self, BACKEND)(*given)

    def tensorflow(self, data):
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            outputs = self(x, training=True)
            loss = self.compute_loss(x=x, y=y, y_pred=outputs)
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return self.told(loss, y, outputs)

    def torch(self, data):
        import torch

        x, y = data
        self.zero_grad()
        outputs = self(x, training=True)
        loss = self.compute_loss(x=x, y=y, y_pred=outputs)
        loss.backward()
        variables = self.trainable_weights
        with torch.no_grad():
            self.optimizer.apply([variable.value.grad for variable in variables], variables)
        return self.told(loss, y, outputs)

    def told(self, loss, y, outputs):
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, outputs)
        return {metric.name: metric.result() for metric in self.metrics}

    def jax(self, state, data):
        import jax

        trainable, fixed, optimizer, metrics = state
        x, y = data

        def objective(trainable, fixed):
            outputs, fixed = self.stateless_call(trainable, fixed, x, training=True)
            return self.compute_loss(x, y, outputs), fixed

        (_, fixed), gradient = jax.value_and_grad(objective, has_aux=True)(trainable, fixed)
        trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradient, trainable)
        return {}, (trainable, fixed, optimizer, metrics)


def test_training_steps_of_the_guides_are_regularised_or_told_what_they_lack():
    class Guiding(Guided, MGSMixin, keras.Sequential):
        pass

    def logs(base, strength):
        model = draw_weights(base([keras.Input((5,)), layers.Dense(6, activation="tanh"), layers.Dense(3, activation="softmax")]))
        regularize(model, MGSRegularizer("trace", strength=strength, output="target"))
        return fit(compiled(model, metrics=["accuracy"]), epochs=2)

    if BACKEND == "jax":
        with pytest.raises(mgs.ArgumentError, match="`train_step` must give `compute_loss` the metrics' variables too"):
            logs(Guiding, 0.1)
        return
    found, expected = logs(Guiding, 0.1), logs(MGSSequential, 0.1)
    assert found["mgs_penalty"] == pytest.approx(expected["mgs_penalty"], rel=1e-5)
    assert found["accuracy"] == expected["accuracy"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("layer", [layers.Dropout(0.3), layers.BatchNormalization()])
def test_lazy_penalties_go_with_layers_that_hold_a_state(layer):
    model = regularize(network(layers.Dense(6), layer), MGSRegularizer("trace", strength=1.0, every=2))
    history = fit(compiled(model), epochs=2)
    assert np.all(np.isfinite(history["loss"]))
    assert np.all(np.array(history["mgs_penalty"]) > 0)


def test_probabilities_are_not_taken_for_logits():
    model = compiled(network())
    fit(model)
    with pytest.raises(mgs.ArgumentError, match=r"must return logits .* got layer 'dense.*' with softmax.*sample_loss\(model\)"):
        mgs.kernel(model, X, Y, output="loss")
    assert numpy(mgs.kernel(model, X, Y, output="loss", loss=sample_loss(model))).shape == (20, 20)
    scores = mgs.kernel(model, X, Y, output="loss", transform=keras.ops.log)
    np.testing.assert_allclose(numpy(scores), numpy(mgs.kernel(model, X, Y, output="loss", loss=sample_loss(model))), rtol=1e-3)


class Gated(keras.Model):
    """Make the scores first and the gate last."""

    def __init__(self):
        super().__init__()
        self.out, self.hidden = layers.Dense(3), layers.Dense(4, activation="tanh")
        self.gate = layers.Dense(4, activation="sigmoid")

    def call(self, x):
        return self.out(self.hidden(x) * self.gate(x))


def test_logits_are_not_taken_for_probabilities():
    inputs = keras.Input((5,))
    hidden = keras.Sequential([layers.Dense(4, activation="sigmoid")])
    graph = keras.Model(inputs, layers.Dense(3)(hidden(inputs)))
    gated = Gated()
    gated(X)
    for model in (graph, gated, keras.Sequential([keras.Input((5,)), graph])):
        assert numpy(mgs.kernel(model, X, Y, output="loss")).shape == (20, 20)
