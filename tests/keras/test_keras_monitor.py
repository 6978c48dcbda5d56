"""The monitor in `fit`: its figures, and that every other callback sees them."""

from __future__ import annotations

import csv

import keras
import numpy as np
import pytest
from keras import layers
from keras_oracle import BACKEND, draw_weights, kernel
from mgs_core.adapters.keras import MGSMonitor, MGSRegularizer, regularize, sample_loss

import mgs_core as mgs

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(20, 5)).astype("float32")
Y = RANDOM.integers(0, 3, 20)


def network():
    model = draw_weights(keras.Sequential([keras.Input((5,)), layers.Dense(4, activation="tanh"), layers.Dense(3)]))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=False)
    return model


def fit(model, callbacks, **options):
    return model.fit(X, Y, **{"batch_size": 10, "verbose": 0, "shuffle": False, "callbacks": callbacks, **options}).history


def test_figures_are_the_summary_of_the_kernel():
    model, monitor = network(), MGSMonitor(X[:6], labels=Y[:6])
    history = fit(model, [monitor], epochs=2)
    expected = mgs.summarize(kernel(model, X[:6]), Y[:6])
    for name, value in expected.to_dict().items():
        assert history[f"mgs_{name}"][1] == pytest.approx(value, rel=1e-3, abs=1e-4)
    assert monitor.history[1]["mgs_trace"] == history["mgs_trace"][1]
    assert monitor.history[0]["mgs_trace"] != monitor.history[1]["mgs_trace"]


def test_losses_of_a_model_with_running_statistics():
    hidden = [layers.Dense(4, activation="tanh"), layers.BatchNormalization()]
    model = draw_weights(keras.Sequential([keras.Input((5,)), *hidden, layers.Dense(3)]))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=False)
    options = {"output": "loss", "loss": sample_loss(loss)}
    history = fit(model, [MGSMonitor(X[:6], Y[:6], **options)], epochs=2)
    expected = mgs.summarize(mgs.kernel(model, X[:6], Y[:6], **options))
    assert history["mgs_trace"][1] == pytest.approx(expected.trace, rel=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_fit_goes_on_where_the_model_diverges(value):
    class Diverge(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.layers[0].kernel.assign(np.full((5, 4), value, "float32"))

    monitor = MGSMonitor(X[:6], labels=Y[:6], batches=1)
    with pytest.warns(RuntimeWarning, match="The kernel of the probe batch has no summary, NaN is recorded") as warned:
        history = fit(network(), [monitor, Diverge()], epochs=2)
    assert sum("probe batch" in str(warning.message) for warning in warned) == 1
    assert np.isnan(history["mgs_log_determinant"]).all()
    assert len(history["mgs_trace"]) == len(history["mgs_alignment"]) == 2
    assert len(monitor.history) == 6


def test_measurement_is_compiled_once(monkeypatch):
    """PyTorch does not compile it: there each measurement evaluates the kernel."""
    calls, kernel_of = [], mgs.kernel
    monkeypatch.setattr(mgs, "kernel", lambda *arguments, **options: calls.append(1) or kernel_of(*arguments, **options))
    fit(network(), [MGSMonitor(X[:4], batches=1)], epochs=3)
    assert len(calls) == (3 + 6 if BACKEND == "torch" else 1)


class Spy(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.seen = dict(logs)


def test_callbacks_see_the_figures_in_any_order(tmp_path):
    best = tmp_path / "best.weights.h5"

    def others():
        return [
            Spy(),
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
            keras.callbacks.ModelCheckpoint(best, "mgs_trace", mode="min", save_best_only=True, save_weights_only=True),
            keras.callbacks.EarlyStopping("mgs_trace", mode="max", min_delta=1e9, patience=1),
        ]

    for last in (False, True):
        callbacks = others()
        given = [*callbacks, MGSMonitor(X[:4])] if last else [MGSMonitor(X[:4]), *callbacks]
        history = fit(network(), given, epochs=5)
        assert "mgs_trace" in callbacks[0].seen
        assert len(history["mgs_trace"]) == 2  # stopped early
        with (tmp_path / "log.csv").open() as file:
            row = next(iter(csv.DictReader(file)))
        assert float(row["mgs_trace"]) == pytest.approx(history["mgs_trace"][0])
        assert best.exists()
        assert given[-1] is callbacks[-1] or last  # the user's own list stays as it was


def test_tensorboard_sees_the_figures(tmp_path):
    pytest.importorskip("tensorboard")
    tf = pytest.importorskip("tensorflow")
    history = fit(network(), [keras.callbacks.TensorBoard(tmp_path), MGSMonitor(X[:4])])
    written = {}
    for path in tmp_path.rglob("events*"):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            written |= {value.tag: float(tf.make_ndarray(value.tensor)) for value in event.summary.value if value.tag != "keras"}
    assert written["epoch_mgs_trace"] == pytest.approx(history["mgs_trace"][0])


def test_schedule_repeats_the_last_figures_and_batches_go_to_the_history():
    records = []
    sink = mgs.CallbackSink(lambda numbers, step: records.append((step, numbers)))
    monitor = MGSMonitor(X[:4], Y[:4], every=2, batches=2, output="loss", sinks=[sink])
    history = fit(network(), [monitor], epochs=3, batch_size=5)
    assert history["mgs_trace"][0] == history["mgs_trace"][1] != history["mgs_trace"][2]
    assert [record.get("epoch") for record in monitor.history if "epoch" in record] == [0, 2]
    assert [record["batch"] for record in monitor.history if "batch" in record] == [0, 2, 4, 6, 8, 10]
    assert len(records) == len(monitor.history)
    assert fit(network(), [MGSMonitor(X[:4])])["mgs_trace"]  # a model after another


def test_monitor_of_a_regularised_model_leaves_training_alone():
    curves = []
    for callbacks in ([], [MGSMonitor(X[:4], batches=1)]):
        model = regularize(network(), MGSRegularizer("trace", strength=0.01))
        curves.append(fit(model, callbacks, epochs=2))
    assert curves[0]["loss"] == pytest.approx(curves[1]["loss"], rel=1e-6)
    assert curves[0]["mgs_penalty"] == pytest.approx(curves[1]["mgs_penalty"], rel=1e-6)
    assert {"mgs_penalty", "mgs_trace", "mgs_log_determinant"} < set(curves[1])


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ouput": "trace"}, "`kernel_options` must be among output, transform, .*; got ouput"),
        ({"output": "loss"}, "`targets` must be given"),
        ({"every": 1.5}, "`every` must be an integer"),
        ({"batches": 0}, "`every` must be an integer of at least 1; got 0"),
    ],
)
def test_options_are_refused_before_the_first_measurement(options, message):
    with pytest.raises(mgs.ArgumentError, match=message):
        MGSMonitor(X, **options)


@pytest.mark.wrong_types
def test_options_may_be_integers_of_numpy():
    monitor = MGSMonitor(X[:4], every=np.int64(2), batches=np.int64(2), chunk_size=np.int64(2))
    fit(network(), [monitor], epochs=2)
    assert next(iter(monitor.history[0])) == "batch"


def test_the_losses_are_those_that_the_model_was_compiled_with():
    model = draw_weights(keras.Sequential([keras.Input((5,)), layers.Dense(3, activation="softmax")]))
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy", jit_compile=False)
    history = fit(model, [MGSMonitor(X[:6], Y[:6], output="loss")])
    expected = mgs.summarize(mgs.kernel(model, X[:6], Y[:6], output="loss", loss=sample_loss(model)))
    assert history["mgs_trace"][0] == pytest.approx(expected.trace, rel=1e-3)
    with pytest.raises(mgs.ArgumentError, match="`targets` must be given"):  # the loss of the model may take other targets
        MGSMonitor(X[:6], labels=Y[:6], output="loss")
