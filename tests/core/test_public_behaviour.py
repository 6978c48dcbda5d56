"""Public names that the other files do not meet: streaming, the default loss, errors."""

from __future__ import annotations

import weakref
from importlib import import_module

import numpy as np
import pytest

import mgs_core as mgs
from mgs_core._namespace import array_namespace
from mgs_core.heads import make_head
from mgs_core.statistics import merge

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


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_probabilities_are_not_taken_for_logits(framework):
    pytest.importorskip(framework)
    backend = mgs.get_backend(framework)
    xp, w = backend.namespace, backend.asarray(RANDOM.normal(size=(3, 2)))

    def softmax(p, x):
        outputs = xp.exp(x @ p["w"])
        return outputs / xp.sum(outputs, axis=-1, keepdims=True)

    x, labels = backend.asarray(PROBE), backend.asarray(np.arange(7) % 2)
    with pytest.raises(mgs.ArgumentError, match='`model` must return logits for the cross-entropy of output="loss"; got prob'):
        mgs.kernel(mgs.FunctionalModel(softmax, {"w": w}), x, labels, output="loss")

    def likelihood(outputs, labels):
        return -xp.log(
            xp.sum(xp.where(labels[:, None] == backend.asarray(np.arange(2)), outputs, xp.zeros_like(outputs)), axis=1)
        )

    found = mgs.kernel(mgs.FunctionalModel(softmax, {"w": w}), x, labels, output="loss", loss=likelihood)
    constant = mgs.FunctionalModel(lambda p, x: x @ p["w"] + 0.5, {"w": 0.0 * w})  # logits that happen to be such
    assert mgs.kernel(constant, x, labels, output="loss").shape == (7, 7)
    logits = mgs.FunctionalModel(lambda p, x: x @ p["w"], {"w": w})
    np.testing.assert_allclose(backend.to_numpy(found), backend.to_numpy(mgs.kernel(logits, x, labels, output="loss")))


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax", "tensorflow"])
def test_targets_of_regression_are_no_shares_of_the_outputs(framework):
    pytest.importorskip(framework)
    backend, shares = mgs.get_backend(framework), RANDOM.dirichlet(np.ones(2), 7)
    model = mgs.FunctionalModel(lambda p, x: x @ p["w"], {"w": backend.asarray(MODEL.parameters["w"])})

    def kernel(targets):
        return backend.to_numpy(mgs.kernel(model, backend.asarray(PROBE), backend.asarray(targets), output="target"))

    rows = np.einsum("ai,ac->aic", PROBE, shares).reshape(7, -1)
    np.testing.assert_allclose(kernel(shares), rows @ rows.T, rtol=1e-5)
    np.testing.assert_allclose(kernel(2 * shares), 4 * rows @ rows.T, rtol=1e-5)  # several labels of a sample, or weighted ones
    with pytest.raises(mgs.ArgumentError, match="`targets` must be labels, or shares of the outputs of at least 0"):
        kernel(shares - 0.5)


@pytest.mark.parametrize("framework", ["jax", "tensorflow"])
def test_targets_of_regression_are_seen_when_a_compiled_kernel_runs(framework):
    pytest.importorskip(framework)
    backend, shares = mgs.get_backend(framework), RANDOM.dirichlet(np.ones(2), 7)
    model = mgs.FunctionalModel(lambda p, x: x @ p["w"], {"w": backend.asarray(MODEL.parameters["w"])})
    kernel = backend.compile(lambda x, targets: mgs.kernel(model, x, targets, output="target"))
    assert np.isfinite(backend.to_numpy(kernel(backend.asarray(PROBE), backend.asarray(shares)))).all()
    if framework == "jax":  # which cannot refuse values
        assert np.isnan(backend.to_numpy(kernel(backend.asarray(PROBE), backend.asarray(shares - 0.5)))).any()
    else:
        with pytest.raises(Exception, match="labels, or shares of the outputs of at least 0"):
            kernel(backend.asarray(PROBE), backend.asarray(shares - 0.5))


@pytest.mark.parametrize("output", ["target", "loss"])
@pytest.mark.parametrize("framework", ["numpy", "torch", "jax", "tensorflow"])
def test_labels_may_stand_in_a_column_and_shares_have_any_dtype(framework, output):
    pytest.importorskip(framework)
    backend, labels = mgs.get_backend(framework), np.array([0, 1, 1, 0, 1, 0, 0])
    model = mgs.FunctionalModel(lambda p, x: x @ p["w"], {"w": backend.asarray(MODEL.parameters["w"].astype("float32"))})

    def kernel(targets):
        inputs = backend.asarray(PROBE.astype("float32"))
        return backend.to_numpy(mgs.kernel(model, inputs, backend.asarray(targets), output=output))

    for same in (
        labels[:, None],
        np.eye(2)[labels],
        np.eye(2, dtype=bool)[labels],
        np.eye(2, dtype=np.int64)[labels],
        np.eye(2, dtype=np.float16)[labels],
    ):
        np.testing.assert_allclose(kernel(same), kernel(labels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax", "tensorflow"])
def test_one_output_has_no_labels(framework):
    pytest.importorskip(framework)
    backend = mgs.get_backend(framework)

    def kernel(labels):
        model = mgs.FunctionalModel(lambda p, x: x @ p["w"], {"w": backend.asarray(RANDOM.normal(size=(3, 1)))})
        return mgs.kernel(model, backend.asarray(PROBE), labels, output="target")

    for labels in (np.arange(7) % 2, np.arange(7.0) % 2, np.ones((7, 1))):
        for function in (kernel, backend.compile(kernel)):
            with pytest.raises(mgs.ArgumentError, match=r"must name one of 2 outputs or more; the model has one.*\n?.*trace"):
                function(backend.asarray(labels))


@pytest.mark.wrong_types
def test_targets_of_several_outputs_are_refused():
    with pytest.raises(mgs.ArgumentError, match="`targets` must be one array, of labels or probabilities; got dict"):
        mgs.kernel(MODEL, PROBE, {"a": np.zeros(7, int)}, output="target")


@pytest.mark.parametrize("inputs", [{}, [], ()])
def test_a_batch_of_nothing_is_refused(inputs):
    with pytest.raises(mgs.ArgumentError, match="`inputs` must hold at least one array; got"):
        mgs.kernel(MODEL, inputs)


def test_arrays_of_two_frameworks_are_refused():
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    for arrays in ((torch.ones(1), jax.numpy.ones(1)), (jax.numpy.ones(1), np.ones(1), torch.ones(1))):
        with pytest.raises(mgs.ArgumentError, match="`arrays` must be arrays of one framework"):
            array_namespace(*arrays)


def test_keys_that_jax_cannot_sort_are_keys():
    pytest.importorskip("jax")
    model = mgs.FunctionalModel(lambda p, x: x @ p["w"] @ p[0], {"w": np.ones((3, 2)), 0: np.ones((2, 2))})
    assert mgs.kernel(model, PROBE).shape == (7, 7)


def test_blocks_hold_the_statistics_of_two_chunks(monkeypatch):
    made, alive = [], []

    def watched(*arguments):
        found = merge(*arguments)
        made.extend(weakref.ref(use) for use in found)
        alive.append(sum(use() is not None for use in made))
        return found

    monkeypatch.setattr(import_module("mgs_core.kernel"), "merge", watched)
    for _ in mgs.kernel_blocks(MODEL, PROBE, chunk_size=2):
        pass
    assert len(made) == 10
    assert max(alive) == 2


@pytest.mark.parametrize("probes", [1, 3])
def test_random_signs_are_the_same_in_all_frameworks(probes):
    weights, found = RANDOM.normal(size=(3, 11)), {}
    for framework in ("numpy", "torch", "jax", "tensorflow"):
        if not mgs.available_backends()[framework]:
            continue
        backend = mgs.get_backend(framework)
        model = mgs.FunctionalModel(lambda p, x: x @ p["w"], {"w": backend.asarray(weights)})
        found[framework] = backend.to_numpy(mgs.kernel(model, backend.asarray(PROBE), output="random", probes=probes, seed=5))
    for kernel in found.values():
        np.testing.assert_allclose(kernel, found["numpy"], rtol=1e-5, atol=1e-4)
    signs = make_head("random", "identity", None, 400, 5, None).function(np.eye(11), None)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert np.max(np.abs(signs @ signs.T / 400 - np.eye(11))) < 0.25  # five times what chance allows


def test_arrays_of_a_framework_tell_the_backend_beside_those_of_numpy():
    jax = pytest.importorskip("jax")
    for parameters in ({"w": np.ones((3, 2)), "b": jax.numpy.ones(2)}, {"b": jax.numpy.ones(2), "w": np.ones((3, 2))}):
        model = mgs.FunctionalModel(lambda p, x: x @ p["w"] + p["b"], parameters)
        assert mgs.get_backend(model).name == "jax"
        assert mgs.kernel(model, PROBE).shape == (7, 7)
