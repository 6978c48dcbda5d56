"""Suspicious labels: leave-one-out against leaving one out, and wrong labels found on real data."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

import mgs_core as mgs

# the package's attribute of that name is the function
suspicions = importlib.import_module("mgs_core.suspicion")

RANDOM = np.random.default_rng(0)
LABELS = np.arange(18) % 3
FEATURES = np.eye(3)[LABELS] + 0.5 * RANDOM.normal(size=(18, 3))
KERNEL = FEATURES @ FEATURES.T
COSINE = KERNEL / np.sqrt(np.outer(np.diag(KERNEL), np.diag(KERNEL)))
ONE_HOT = np.eye(3)[LABELS]


def left_out(ridge, weights):
    """Predict each sample by kernel regression on all others, one fit each."""
    centred, predictions = ONE_HOT - ONE_HOT.mean(0), []
    for a in range(18):
        rest = np.arange(18) != a
        system = COSINE[np.ix_(rest, rest)] + np.diag(ridge / np.maximum(weights[rest], 1e-3))
        predictions.append(COSINE[a, rest] @ np.linalg.solve(system, centred[rest]))
    return np.array(predictions)


def predicted_by_others(rounds):
    centre = ONE_HOT.mean(0)
    predictions = {ridge: left_out(ridge, np.ones(18)) for ridge in suspicions._RIDGES}
    ridge = min(suspicions._RIDGES, key=lambda ridge: np.mean((ONE_HOT - centre - predictions[ridge]) ** 2))
    predicted = predictions[ridge] + centre
    for _ in range(rounds):
        usual = np.array([predicted[k == LABELS, k].mean() for k in range(3)])
        less = predicted - 0.75 * usual
        scores = np.where(ONE_HOT > 0, -np.inf, less).max(1) - less[np.arange(18), LABELS]
        weights = 1 / (1 + np.exp(3 * scores / scores.std()))
        predicted = left_out(ridge, weights / weights.mean()) + centre
    return predicted


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_scores_are_those_of_leaving_each_sample_out(rounds):
    found = mgs.suspicion(KERNEL, LABELS, rounds=rounds)
    predicted = predicted_by_others(rounds)
    own = predicted[np.arange(18), LABELS]
    scores, suggested = np.where(ONE_HOT > 0, -np.inf, predicted).max(1) - own, predicted.argmax(1)
    usual = np.array([predicted[k == LABELS, k].mean() for k in range(3)])
    assert isinstance(found, mgs.Suspicion)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-8, atol=1e-10)
    np.testing.assert_array_equal(found.suggested, suggested)
    contradicted = [any(q[k] >= usual[k] and q[k] > q[y] for k in range(3)) for q, y in zip(predicted, LABELS, strict=True)]
    np.testing.assert_array_equal(found.contradicted, contradicted)
    assert found.predictable == np.mean(predicted_by_others(0).argmax(1) == LABELS)
    less = predicted - 0.75 * usual
    assert found.weights.mean() == pytest.approx(1)
    assert (np.argsort(found.weights) == np.argsort(less[np.arange(18), LABELS] - (less - 9 * ONE_HOT).max(1))).all()


def test_rounds_end_when_the_weights_settle(monkeypatch):
    made = []
    trust = suspicions._trust
    monkeypatch.setattr(suspicions, "_trust", lambda *arguments: made.append(None) or trust(*arguments))
    settled = mgs.suspicion(KERNEL, LABELS, rounds=100)
    assert 3 < len(made) < 50
    np.testing.assert_allclose(mgs.suspicion(KERNEL, LABELS, rounds=len(made)).scores, settled.scores)
    assert (mgs.suspicion(KERNEL, LABELS, rounds=2).scores != settled.scores).any()


def test_a_class_that_no_sample_bears_is_not_suggested():
    found, wider = mgs.suspicion(KERNEL, LABELS), mgs.suspicion(KERNEL, LABELS, classes=5)
    assert (wider.suggested < 3).all()
    assert not wider.contradicted[~found.contradicted].any()
    np.testing.assert_allclose(wider.weights, found.weights, rtol=1e-6)


def test_of_two_confused_classes_neither_wins_the_others_samples():
    """Two pairs of classes, each pair apart by little; 40 % of the labels of a class are those of its partner."""
    random = np.random.default_rng(1)
    true = np.repeat(np.arange(4), 50)
    features = np.eye(4)[true] + np.eye(2)[true // 2] @ np.kron(np.eye(2), [[1.0, 1.0]]) + 0.35 * random.normal(size=(200, 4))
    labels = np.where(random.random(200) < 0.4, true ^ 1, true)
    found, plain = mgs.suspicion(features @ features.T, labels), mgs.suspicion(features @ features.T, labels, rounds=0)
    right = (found.suggested == true).mean()
    assert right > (plain.suggested == true).mean() + 0.02
    assert right > 0.8


def test_neighbours_are_counted():
    found = mgs.suspicion(KERNEL, LABELS).neighbours
    for a in range(18):
        others = [b for b in np.argsort(-COSINE[a]) if b != a][:10]
        assert found[a] == pytest.approx(np.mean(LABELS[others] != LABELS[a]))


def test_scale_of_samples_and_order_do_not_matter():
    scale, order = RANDOM.uniform(0.5, 2.0, 18), RANDOM.permutation(18)
    found = mgs.suspicion(KERNEL, LABELS)
    np.testing.assert_allclose(mgs.suspicion(KERNEL * np.outer(scale, scale), LABELS).scores, found.scores, rtol=1e-6)
    np.testing.assert_allclose(mgs.suspicion(KERNEL[np.ix_(order, order)], LABELS[order]).scores, found.scores[order], rtol=1e-6)


def test_wrong_labels_stand_out():
    labels = LABELS.copy()
    labels[[0, 7]] = (labels[[0, 7]] + 1) % 3
    features = np.eye(3)[LABELS] + 0.1 * RANDOM.normal(size=(18, 3))
    found = mgs.suspicion(features @ features.T, labels)
    assert set(np.argsort(-found.scores)[:2]) == {0, 7}
    np.testing.assert_array_equal(found.suggested, LABELS)


def test_kernels_that_say_nothing_of_the_labels_are_told():
    for kernel in (np.ones((60, 60)), np.eye(60)):
        with pytest.warns(
            UserWarning, match="predict 0% of each other's labels, .*: the gradients in `kernel` do not tell the classes"
        ):
            found = mgs.suspicion(kernel, np.arange(60) % 3)
        assert found.predictable == 0.0


@pytest.mark.filterwarnings("ignore:The samples predict")
@pytest.mark.parametrize("copies", [2, 10])
def test_equal_samples_with_labels_that_differ_weigh_the_same(copies):
    found = mgs.suspicion(np.ones((2 * copies, 2 * copies)), np.arange(2 * copies) % 2)
    np.testing.assert_allclose(found.weights, 1.0)
    np.testing.assert_allclose(found.scores, found.scores[0])


@pytest.mark.filterwarnings("ignore:The samples predict")
def test_weights_stay_defined_where_all_labels_are_about_as_suspicious():
    rows = 1.0 + 1e-3 * np.random.default_rng(0).normal(size=(40, 3))
    weights = mgs.suspicion(rows @ rows.T, np.arange(40) % 2).weights
    assert weights.min() >= 0
    assert weights.mean() == pytest.approx(1.0)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mgs.suspicion(np.ones((1, 1)), [0]), "at least 2 samples"),
        (lambda: mgs.suspicion(np.ones((2, 3)), [0, 1]), "`kernel` must be square"),
        (lambda: mgs.suspicion(np.full((2, 2), np.nan), [0, 1]), "`kernel` must be finite"),
        (lambda: mgs.suspicion(np.triu(np.ones((2, 2))), [0, 1]), "`kernel` must be symmetric"),
        (lambda: mgs.suspicion(np.zeros((2, 2)), [0, 1]), "`kernel` must have a positive trace"),
        (lambda: mgs.suspicion(np.eye(2), [0.0, 1.0]), "`labels` must be integers of shape"),
        (lambda: mgs.suspicion(np.eye(3), [0, 1, 2_000_000]), r"from 0 without large gaps.*return_inverse=True\)\[1\]"),
        (lambda: mgs.suspicion(np.eye(2), [0, 1, 1]), r"`labels` must be integers of shape \(2,\)"),
        (lambda: mgs.suspicion(np.eye(2), [0, -1]), r"`labels` must be in 0\.\.c−1"),
        (lambda: mgs.suspicion(np.eye(2), [0, 0]), "c ≥ 2"),
        (lambda: mgs.suspicion(np.eye(2), [0, 2], classes=2), "c = 2"),
        (lambda: mgs.suspicion(np.eye(2), [0, 1], rounds=-1), "`rounds` must be an integer of at least 0"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(mgs.ArgumentError, match=message):
        call()


def test_suspicion_is_printed_as_figures_and_suspects():
    labels = np.repeat([0, 1, 2], 8)
    labels[2] = 1
    found = mgs.suspicion(np.kron(np.eye(3), np.ones((8, 8))), labels)
    assert found.order[0] == 2
    lines = str(found).splitlines()
    assert lines[1].split() == ["another", "fits", "better", "1"]
    assert lines[7].split() == ["2", "0", f"{found.scores[2]:+.3f}"]
    assert len(lines) == 17
