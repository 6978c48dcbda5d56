"""Runs as a whole: what the records hold, what a seed fixes, and that every backend draws the same curves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import mgs_core as mgs

onnx = pytest.importorskip("onnx")
experiments = pytest.importorskip("mgs_core.experiments")
RECIPES, Recipe, Settings, train = (getattr(experiments, name) for name in ("RECIPES", "Recipe", "Settings", "train"))

SETTINGS = Settings(samples=150, epochs=3, seeds=1, probe_samples=32, batch_size=32)
BACKENDS = [name for name, installed in mgs.available_backends().items() if installed and name not in ("numpy", "keras")]


def records(recipe, settings=SETTINGS, seed=0):
    *epochs, run = train(recipe, seed, settings)
    assert [record["epoch"] for record in epochs] == list(range(1, settings.epochs + 1))
    return epochs, run


def test_records_hold_what_they_say():
    epochs, run = records(RECIPES["none"], replace(SETTINGS, epochs=25))
    assert run["last_test_accuracy"] == epochs[-1]["test_accuracy"]
    assert run["best_test_accuracy"] == max(record["test_accuracy"] for record in epochs)
    for name in ("memorisation", "mgs_trace", "mgs_log_determinant", "mgs_similarity", "mgs_effective_rank"):
        assert run[name] == epochs[-1][name]
    assert epochs[-1]["train_loss"] < 0.1 * epochs[0]["train_loss"]
    # learnt by heart: it predicts the given labels, the wrong ones too, and has lost on clean data
    assert epochs[-1]["train_accuracy"] > 0.95
    assert epochs[-1]["memorisation"] > 0.9 > epochs[0]["memorisation"]
    assert epochs[-1]["mgs_log_determinant"] == pytest.approx(epochs[-1]["mgs_magnitude"] + epochs[-1]["mgs_similarity"])
    assert run["seconds"] > sum(record["train_seconds"] + record["seconds"] for record in epochs) * 0.99


def test_without_noise_nothing_can_be_memorised():
    epochs, run = records(RECIPES["none"], replace(SETTINGS, noise=0.0))
    assert run["memorisation"] is None
    assert all(record["memorisation"] is None for record in epochs)


def test_a_seed_fixes_a_run():
    def figures(seed):
        return [
            {name: value for name, value in record.items() if "seconds" not in name}
            for record in records(RECIPES["mixup"], seed=seed)[0]
        ]

    first = figures(0)
    assert first == figures(0)
    assert first != figures(1)


def test_early_stopping_keeps_what_is_best_on_held_out_noisy_labels():
    epochs, run = records(RECIPES["early-stopping"], replace(SETTINGS, epochs=20))
    kept = int(np.argmax([record["validation_accuracy"] for record in epochs]))
    for record in epochs[kept:]:
        assert record["test_accuracy"] == epochs[kept]["test_accuracy"]
        assert record["mgs_trace"] == epochs[kept]["mgs_trace"]
    assert run["last_test_accuracy"] == epochs[kept]["test_accuracy"]


def test_few_samples_leave_one_to_stop_by():
    epochs, _ = records(RECIPES["early-stopping"], replace(SETTINGS, samples=4, probe_samples=2, noise=0.0))
    assert {record["validation_accuracy"] for record in epochs} <= {0.0, 1.0}


def test_an_audit_that_contradicts_every_label_leaves_nothing_to_select(tmp_path):
    x, y = np.repeat(np.eye(2, 3), 2, axis=0), np.array([0, 1, 0, 1])  # each sample twice, with opposite labels
    np.savez(tmp_path / "pairs.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    settings = replace(SETTINGS, data=str(tmp_path / "pairs.npz"), samples=None, noise=0.0, probe_samples=2, batch_size=4)
    with pytest.raises(mgs.ArgumentError, match="`select` must leave samples to train on; the audit contradicts"):
        records(RECIPES["mgs-select"], settings)


def test_relabelling_keeps_wrong_labels_out():
    settings = replace(SETTINGS, samples=400, epochs=15)
    plain, relabelled = records(RECIPES["none"], settings)[1], records(RECIPES["mgs-relabel"], settings)[1]
    assert relabelled["memorisation"] < 0.3 < plain["memorisation"]
    assert relabelled["last_test_accuracy"] > plain["last_test_accuracy"] + 0.05


@pytest.mark.parametrize("name", ["mgs-select", "co-teaching", "sam", "jacobian-penalty", "generalised-cross-entropy"])
def test_what_is_known_to_withstand_wrong_labels_does(name):
    settings = replace(SETTINGS, samples=400, epochs=15)
    plain, other = records(RECIPES["none"], settings)[1], records(RECIPES[name], settings)[1]
    assert other["memorisation"] < 0.8 * plain["memorisation"]
    assert other["last_test_accuracy"] > plain["last_test_accuracy"] + 0.02


def test_selection_leaves_out_what_the_audit_contradicts_and_nothing_else():
    settings = replace(SETTINGS, samples=300)
    data = experiments.training.draw(settings, 0)
    run = experiments.training.Trainer(RECIPES["mgs-select"], data, settings, 0)
    kept = ~mgs.audit(data.train_inputs, data.train_labels, batch_size=settings.batch_size).contradicted
    assert 0.4 * data.wrong.sum() < (~kept).sum() < data.wrong.sum()
    np.testing.assert_array_equal(run._inputs, data.train_inputs[kept])
    np.testing.assert_array_equal(run._targets, data.train_labels[kept])


def test_gradient_disparity_is_the_distance_of_the_mean_gradients():
    epoch = records(RECIPES["none"], replace(SETTINGS, epochs=1))[0][0]
    run = experiments.training.Trainer(RECIPES["none"], experiments.training.draw(SETTINGS, 0), replace(SETTINGS, epochs=1), 0)
    run.epoch(1)
    x, y = run._data.train_inputs[: SETTINGS.probe_samples], run._data.train_labels[: SETTINGS.probe_samples]
    half, gradient = len(y) // 2, mgs.get_backend("numpy").value_and_gradient
    means = [
        gradient(lambda p, part=part: mgs.cross_entropy(run._model.function(p, x[part]), y[part]).mean())(run._parameters)[1]
        for part in (slice(0, half), slice(half, None))
    ]
    distance = np.sqrt(sum(np.sum((means[0][name] - means[1][name]) ** 2) for name in means[0]))
    assert epoch["gradient_disparity"] == pytest.approx(distance, rel=1e-4)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_models_are_valid_and_have_the_same_parameters_with_and_without_masks(model):
    network = experiments.models.build(model, (8, 8), 10, seed=0)
    for proto in (network.plain, network.masked):
        onnx.checker.check_model(proto, full_check=True)
    plain, masked = (mgs.onnx.load(proto) for proto in (network.plain, network.masked))
    x = np.random.default_rng(0).normal(size=(5, 8, 8)).astype(np.float32)
    ones = {name: np.ones((5, width), np.float32) for name, width in network.masks.items()}
    np.testing.assert_allclose(masked({"x": x, **ones}), plain(x), rtol=1e-5, atol=1e-5)
    zeros = {name: 0 * mask for name, mask in ones.items()}
    np.testing.assert_allclose(masked({"x": x, **zeros}), 0, atol=1e-6)  # nothing passes, and biases begin at 0
    assert list(plain.parameters) == list(masked.parameters)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(mgs.ArgumentError, match=r"`model` must be one of mlp, cnn, or the path of an .onnx file; got 'rnn'"):
        experiments.models.build("rnn", (8, 8), 10, seed=0)
    with pytest.raises(mgs.ArgumentError, match="`model` must be mlp for samples that are no images"):
        experiments.models.build("cnn", (8,), 10, seed=0)
    for taken in ((4, 4, 4), (8, 4, 4), (4, 8, 8)):  # channels first
        experiments.models.build("cnn", taken, 10, seed=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "model"),
    [(name, "mlp") for name in ("none", "dropout", "gradient-penalty", "mgs-trace", "mgs-log-determinant", "mgs-agreement")]
    + [("spectral-norm", "mlp"), ("mgs-trace", "cnn")],
)
def test_backends_draw_the_same_curves(backend, name, model):
    """From one start, on one order of batches: losses to 1e-3, kernels to 1e-2, accuracies to one test sample in two hundred."""
    settings = replace(SETTINGS, model=model, epochs=2)
    numpy, other = (records(RECIPES[name], replace(settings, backend=backend))[0] for backend in ("numpy", backend))
    for a, b in zip(numpy, other, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-3)
        assert b["mgs_trace"] == pytest.approx(a["mgs_trace"], rel=1e-2)
        assert b["mgs_log_determinant"] == pytest.approx(a["mgs_log_determinant"], rel=1e-2)
        assert b["test_accuracy"] == pytest.approx(a["test_accuracy"], abs=5e-3)
