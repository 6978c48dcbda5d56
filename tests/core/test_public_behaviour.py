"""Public names that the other files do not meet: streaming, the default loss, errors."""

from __future__ import annotations

import numpy as np
import pytest

import mgs_core as mgs

RANDOM = np.random.default_rng(0)
MODEL = mgs.FunctionalModel(lambda p, x: x @ p["w"], {"w": RANDOM.normal(size=(3, 2))})
PROBE = RANDOM.normal(size=(7, 3))


@pytest.mark.parametrize("output", ["trace", "full"])
def test_kernel_blocks_cover_the_upper_triangle_once(output):
    whole, seen = mgs.kernel(MODEL, PROBE, output=output), np.zeros((7, 7), int)
    for rows, columns, block in mgs.kernel_blocks(MODEL, PROBE, output=output, chunk_size=3):
        part = whole[rows, columns] if output == "trace" else whole[rows, :, columns]
        np.testing.assert_allclose(block, part, rtol=1e-12, atol=1e-12)
        seen[rows, columns] += 1
    assert (seen[np.triu_indices(7)] == 1).all()


def test_cross_entropy_of_labels_and_of_probabilities():
    outputs, labels = RANDOM.normal(size=(5, 4)), np.array([0, 1, 2, 3, 0])
    expected = np.log(np.exp(outputs).sum(1)) - outputs[np.arange(5), labels]
    np.testing.assert_allclose(mgs.cross_entropy(outputs, labels), expected)
    soft = RANDOM.dirichlet(np.ones(4), 5)
    np.testing.assert_allclose(mgs.cross_entropy(outputs, soft), (np.log(np.exp(outputs).sum(1)) - (soft * outputs).sum(1)))
    assert np.isfinite(mgs.cross_entropy(1e4 * outputs, labels)).all()


def test_cross_entropy_of_one_output_is_refused():
    with pytest.raises(mgs.ArgumentError, match=r"`outputs` must have 2 classes or more.*Pass the `loss` that the model"):
        mgs.kernel(MODEL, PROBE, np.zeros(7, int), output="loss", transform=lambda outputs: outputs[:, :1])


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax", "tensorflow"])
def test_classes_that_a_mask_leaves_out_leave_the_loss_finite(framework):
    pytest.importorskip(framework)
    backend = mgs.get_backend(framework)
    masked = np.array([[0.0, -np.inf, 1.0], [2.0, 0.0, 1.0]])
    expected = np.log(np.exp(masked).sum(1)) - masked[[0, 1], [0, 1]]
    for targets in (np.array([0, 1]), np.eye(3)[:2]):
        losses = mgs.cross_entropy(backend.asarray(masked), backend.asarray(targets))
        np.testing.assert_allclose(backend.to_numpy(losses), expected, rtol=1e-6)
        _, gradient = backend.value_and_gradient(
            lambda outputs, targets: backend.namespace.mean(mgs.cross_entropy(outputs, targets))
        )(backend.asarray(masked), backend.asarray(targets))
        softmax = np.exp(masked) / np.exp(masked).sum(1, keepdims=True)
        np.testing.assert_allclose(backend.to_numpy(gradient), (softmax - np.eye(3)[:2]) / 2, atol=1e-6)


def test_a_choice_of_parameters_may_be_an_iterator():
    np.testing.assert_allclose(mgs.kernel(MODEL, PROBE, parameters=iter(["w"]), chunk_size=3), mgs.kernel(MODEL, PROBE))


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax", "tensorflow"])
def test_two_parameters_of_one_name_are_refused(framework):
    pytest.importorskip(framework)
    one = mgs.get_backend(framework).asarray(np.ones((3, 3)))
    model = mgs.FunctionalModel(lambda p, x: x @ p["a.b"] @ p["a"]["b"], {"a.b": one, "a": {"b": one}})
    with pytest.raises(mgs.ArgumentError, match=r"one name for each leaf; got two 'a\.b'"):
        mgs.kernel(model, mgs.get_backend(framework).asarray(PROBE))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": mgs.cross_entropy}, r"`loss` must be None unless output=\"loss\"; got one with output='trace'"),
        ({"probes": 0}, "`probes` must be an integer of at least 1"),
    ],
)
def test_arguments_without_effect_are_refused(arguments, message):
    with pytest.raises(mgs.ArgumentError, match=message):
        mgs.kernel(MODEL, PROBE, np.zeros(7, int), **arguments)


@pytest.mark.parametrize("output", ["target", "loss"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
@pytest.mark.parametrize("framework", ["numpy", "torch", "jax", "tensorflow"])
def test_labels_of_few_bits_name_one_of_many_outputs(framework, dtype, output):
    pytest.importorskip(framework)
    backend, weights, labels = mgs.get_backend(framework), RANDOM.normal(size=(3, 600)), np.array([0, 1, 2, 3, 100, 100, 0])

    def kernel(labels):
        model = mgs.FunctionalModel(lambda p, x: x @ p["w"], {"w": backend.asarray(weights)})
        return mgs.kernel(model, backend.asarray(PROBE), labels, output=output)

    def of(labels, function=kernel):
        return backend.to_numpy(function(backend.asarray(labels)))

    np.testing.assert_allclose(of(labels.astype(dtype)), of(labels.astype("int32")), rtol=1e-6)
    np.testing.assert_allclose(of(labels.astype(dtype), backend.compile(kernel)), of(labels.astype("int32")), rtol=1e-5)
    with pytest.raises(mgs.ArgumentError, match="`targets` must be integers to be labels; got dtype"):
        of(labels > 0)


def test_indices_of_few_bits_reach_every_row_of_a_table():
    words, table = RANDOM.integers(0, 100, (7, 2)), {"table": RANDOM.normal(size=(600, 4))}
    model = mgs.FunctionalModel(lambda p, x: p["table"][x].sum(axis=1), table)
    for chunk_size in (7, 1):
        found = mgs.kernel(model, words.astype(np.uint8), chunk_size=chunk_size)
        np.testing.assert_allclose(found, mgs.kernel(model, words))


def test_check_sees_through_a_softmax():
    pytest.importorskip("tensorflow")
    backend = mgs.get_backend("tensorflow")

    def softmax(p, x):
        outputs = backend.namespace.exp(x @ p["w"])
        return outputs / backend.namespace.sum(outputs, axis=-1, keepdims=True)

    model = mgs.FunctionalModel(softmax, {"w": backend.asarray(RANDOM.normal(size=(3, 2)))})
    (layer,) = mgs.check(model, backend.asarray(PROBE)).layers
    assert (layer.kind, layer.route) == ("outer", "statistics")


def test_errors_are_of_one_family():
    for error in (mgs.ArgumentError, mgs.BackendError, mgs.SamplesInteractError, mgs.UnsupportedModelError):
        assert issubclass(error, mgs.MgsError)
    assert issubclass(mgs.ArgumentError, ValueError)


def test_summarize_returns_a_frozen_summary():
    summary = mgs.summarize(mgs.kernel(MODEL, PROBE))
    assert isinstance(summary, mgs.Summary)
    with pytest.raises(AttributeError):
        summary.trace = 0.0


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax", "tensorflow"])
def test_targets_that_are_not_finite(framework):
    """Without a gradient of the loss there is an error that says so; losses that leave them out have their kernel."""
    pytest.importorskip(framework)
    backend = mgs.get_backend(framework)
    xp, targets, weights = backend.namespace, RANDOM.normal(size=(7, 2)), RANDOM.normal(size=(3, 2))
    targets[1, 0] = np.nan
    w, scale, x, y = (backend.asarray(array.astype("float32")) for array in (weights, np.ones((1, 2)), PROBE, targets))

    def plain(outputs, targets):
        return xp.sum((outputs - targets) ** 2, axis=-1)

    def masked(outputs, targets):
        known = xp.astype(~xp.isnan(targets), outputs.dtype)
        return xp.sum(known * (outputs - xp.where(xp.isnan(targets), xp.zeros_like(targets), targets)) ** 2, axis=-1)

    model = mgs.FunctionalModel(lambda p, x: (x @ p["w"]) * p["scale"], {"w": w, "scale": scale})
    with pytest.raises(mgs.ArgumentError, match=r"`model` must have finite gradients; got NaN.*targets"):
        mgs.kernel(model, x, y, output="loss", loss=plain)
    kernel = backend.to_numpy(mgs.kernel(model, x, y, output="loss", loss=masked))
    outputs = PROBE @ weights
    slopes = 2 * np.nan_to_num(outputs - targets)
    expected = (PROBE @ PROBE.T) * (slopes @ slopes.T) + (slopes * outputs) @ (slopes * outputs).T
    np.testing.assert_allclose(kernel, expected, rtol=1e-4, atol=1e-4)
