"""The kernel between two batches, as of test and training samples, against the rows of a Jacobian."""

from __future__ import annotations

import autograd
import autograd.numpy as anp
import numpy as np
import pytest

import mgs_core as mgs
from mgs_core._namespace import array_namespace

RANDOM = np.random.default_rng(0)
SHAPES = {"w1": (3, 8), "b1": (8,), "w2": (8, 4), "b2": (4,)}
PARAMETERS = {name: RANDOM.normal(size=shape) / 2 for name, shape in SHAPES.items()}
TEST, TRAIN = RANDOM.normal(size=(5, 3)), RANDOM.normal(size=(7, 3))
TEST_LABELS, TRAIN_LABELS = RANDOM.integers(0, 4, 5), RANDOM.integers(0, 4, 7)
WEIGHTS = RANDOM.random(size=(5, 7))
FRAMEWORKS = pytest.mark.parametrize("framework", ["numpy", "torch", "jax", "tensorflow"])


def network(p, x):
    xp = array_namespace(x)
    return xp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]


def jacobian(x, head=lambda outputs: outputs):
    """Return (n, k, p)."""
    rows = []
    for name, value in PARAMETERS.items():
        part = autograd.jacobian(lambda v, name=name: head(network({**PARAMETERS, name: v}, x)))(value)
        rows.append(part.reshape(*part.shape[: part.ndim - value.ndim], -1))
    return np.concatenate(rows, axis=-1)


def model_and(backend, *arrays):
    model = mgs.FunctionalModel(network, {name: backend.asarray(value) for name, value in PARAMETERS.items()})
    return model, *(backend.asarray(array) for array in arrays)


@FRAMEWORKS
@pytest.mark.parametrize("chunk_size", [None, 5, 4])
def test_it_is_the_product_of_the_two_jacobians(framework, chunk_size):
    pytest.importorskip(framework)
    backend = mgs.get_backend(framework)
    model, test, train = model_and(backend, TEST, TRAIN)
    left, right = jacobian(TEST), jacobian(TRAIN)
    for output, formula in {"full": "acp,bdp->acbd", "trace": "acp,bcp->ab", "sum": "acp,bdp->ab"}.items():
        found = backend.to_numpy(mgs.kernel(model, test, others=train, output=output, chunk_size=chunk_size))
        np.testing.assert_allclose(found, np.einsum(formula, left, right), rtol=1e-4 if framework == "jax" else 1e-10, atol=1e-4)


@FRAMEWORKS
@pytest.mark.parametrize("output", ["target", "loss", "random"])
def test_each_side_has_its_own_targets_and_both_the_same_probes(framework, output):
    pytest.importorskip(framework)
    backend = mgs.get_backend(framework)
    both, labels = np.concatenate([TEST, TRAIN]), np.concatenate([TEST_LABELS, TRAIN_LABELS])
    model, test, train, y, z, both, labels = model_and(backend, TEST, TRAIN, TEST_LABELS, TRAIN_LABELS, both, labels)
    whole = backend.to_numpy(mgs.kernel(model, both, labels, output=output, probes=3))
    found = mgs.kernel(model, test, y, others=train, other_targets=z, output=output, probes=3)
    np.testing.assert_allclose(backend.to_numpy(found), whole[:5, 5:], rtol=1e-4, atol=1e-5)
    compiled = backend.compile(
        lambda x, y, others, z: mgs.kernel(model, x, y, others=others, other_targets=z, output=output, probes=3)
    )
    np.testing.assert_allclose(backend.to_numpy(compiled(test, y, train, z)), whole[:5, 5:], rtol=1e-4, atol=1e-5)


@FRAMEWORKS
def test_its_gradient_counts_both_sides(framework):
    pytest.importorskip(framework)
    backend = mgs.get_backend(framework)
    _, test, train = model_and(backend, TEST, TRAIN)

    def value(parameters, xp):
        between = mgs.kernel(mgs.FunctionalModel(network, parameters), test, others=train, differentiable=True)
        return xp.sum(between * xp.astype(backend.asarray(WEIGHTS), between.dtype))

    def expected(w1):
        def rows(x):
            hidden = anp.tanh(x @ w1 + PARAMETERS["b1"])
            down = (1 - hidden**2)[:, None, :] * PARAMETERS["w2"].T  # (n, c, hidden)
            return hidden, down

        (a, c), (b, d) = rows(TEST), rows(TRAIN)
        kernel = 4 * (a @ b.T + 1) + (TEST @ TRAIN.T + 1) * anp.einsum("aco,bco->ab", c, d)
        return anp.sum(kernel * WEIGHTS)

    parameters = {name: backend.asarray(array) for name, array in PARAMETERS.items()}
    found, gradient = backend.value_and_gradient(lambda p: value(p, backend.namespace))(parameters)
    assert float(found) == pytest.approx(float(expected(PARAMETERS["w1"])), rel=1e-4)
    exact = autograd.grad(expected)(PARAMETERS["w1"])
    np.testing.assert_allclose(backend.to_numpy(gradient["w1"]), exact, rtol=1e-3, atol=1e-3)


def test_blocks_cover_each_pair_once():
    model, whole, seen = mgs.FunctionalModel(network, PARAMETERS), np.zeros((5, 7)), np.zeros((5, 7), int)
    for rows, columns, block in mgs.kernel_blocks(model, TEST, others=TRAIN, chunk_size=3):
        whole[rows, columns] = block
        seen[rows, columns] += 1
    assert (seen == 1).all()
    np.testing.assert_allclose(whole, mgs.kernel(model, TEST, others=TRAIN))


def test_regression_by_the_kernel_predicts_what_a_linear_model_learns():
    start, targets = RANDOM.normal(size=(3, 1)), RANDOM.normal(size=(2, 1))
    train = TRAIN[:2]  # fewer samples than parameters, so that where training starts is seen in the end
    linear = mgs.FunctionalModel(lambda p, x: x @ p["w"], {"w": start})
    learnt = start
    for _ in range(3000):
        learnt = learnt - 0.1 * train.T @ (train @ learnt - targets)
    change = mgs.kernel(linear, TEST, others=train) @ np.linalg.inv(mgs.kernel(linear, train)) @ (targets - train @ start)
    np.testing.assert_allclose(TEST @ start + change, TEST @ learnt, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"other_targets": TRAIN_LABELS}, "`other_targets` must be None without `others`"),
        ({"others": TRAIN, "output": "loss", "targets": TEST_LABELS}, '`other_targets` must be given for output="loss"'),
        ({"others": TRAIN, "other_targets": TEST_LABELS}, "`others` and `other_targets` must have the same number of samples"),
        ({"others": TRAIN[:0]}, "`others` must hold at least one sample; got 0"),
    ],
)
def test_bad_others_are_refused(arguments, message):
    with pytest.raises(mgs.ArgumentError, match=message):
        mgs.kernel(mgs.FunctionalModel(network, PARAMETERS), TEST, **arguments)


def test_a_monitor_has_one_batch():
    with pytest.raises(mgs.ArgumentError, match=r"`kernel_options` must be among .*; got others"):
        mgs.Recorder(TRAIN, others=TEST)


SHAPED_AS_ONE_SAMPLE = {
    "shift": (lambda p, x: x @ p["w"] + p["b"], {"w": (3, 2), "b": (1, 2)}),
    "shift alone": (lambda p, x: x + p["b"], {"b": (1, 3)}),
    "scale": (lambda p, x: x * p["s"], {"s": (1, 3)}),
    "positions": (
        lambda p, x: array_namespace(x).reshape(array_namespace(x).reshape(x, (-1, 3, 1)) + p["p"], (x.shape[0], 6)),
        {"p": (1, 3, 2)},
    ),
}


@FRAMEWORKS
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("name", SHAPED_AS_ONE_SAMPLE)
def test_parameters_of_the_shape_of_one_sample_count_for_one_sample_too(framework, chunk_size, name):
    pytest.importorskip(framework)
    backend, (function, shapes) = mgs.get_backend(framework), SHAPED_AS_ONE_SAMPLE[name]
    values = {key: np.ones(shape) for key, shape in shapes.items()}
    rows = [autograd.jacobian(lambda v, key=key: function({**values, key: v}, TEST))(values[key]) for key in values]
    flat = np.concatenate([part.reshape(5, part.shape[1], -1) for part in rows], axis=-1)
    model = mgs.FunctionalModel(function, {key: backend.asarray(value) for key, value in values.items()})
    found = mgs.kernel(model, backend.asarray(TEST), chunk_size=chunk_size)
    np.testing.assert_allclose(backend.to_numpy(found), np.einsum("akp,bkp->ab", flat, flat), rtol=1e-5)
