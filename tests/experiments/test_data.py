"""Data sets: what is loaded, split, drawn, corrupted and refused."""

from __future__ import annotations

import numpy as np
import pytest

import mgs_core as mgs

pytest.importorskip("sklearn")
from sklearn.datasets import load_digits

from mgs_core.experiments import load_dataset
from mgs_core.experiments.data import corrupt

ARRAYS = {
    "x_train": np.arange(48, dtype=np.uint8).reshape(12, 2, 2),
    "y_train": np.arange(12) % 3,
    "x_test": np.arange(8, dtype=np.uint8).reshape(2, 2, 2),
    "y_test": np.array([0, 2]),
}


@pytest.fixture
def save(tmp_path):
    def write(**changes):
        path = tmp_path / "data.npz"
        np.savez(path, **{name: value for name, value in {**ARRAYS, **changes}.items() if value is not None})
        return str(path)

    return write


def test_digits_are_split_without_overlap_and_scaled():
    data = load_dataset("digits")
    bundle = load_digits()
    assert data.classes == 10
    assert data.train_inputs.shape == (1078, 8, 8)
    assert data.test_inputs.shape == (719, 8, 8)
    assert data.train_inputs.mean() == pytest.approx(0, abs=1e-5)
    assert data.train_inputs.std() == pytest.approx(1, abs=1e-5)
    # back on the scale of the source, the two parts are the source, each image with its label
    both = np.concatenate([data.train_inputs, data.test_inputs]).reshape(1797, -1)
    slope = np.ptp(bundle.images) / np.ptp(both)
    images = np.round((both - both.min()) * slope).astype(int)
    labels = np.concatenate([data.train_labels, data.test_labels])
    ours = sorted(zip(map(bytes, images.astype(np.uint8)), labels.tolist(), strict=True))
    theirs = sorted(zip(map(bytes, bundle.data.astype(np.uint8)), bundle.target.tolist(), strict=True))
    assert ours == theirs


def test_seeds_draw_other_samples_and_repeat():
    first, again, other = (load_dataset("digits", samples=100, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.train_inputs, again.train_inputs)
    assert not np.array_equal(first.train_labels, other.train_labels)


def test_samples_are_drawn_in_equal_shares(save):
    assert sorted(np.bincount(load_dataset("digits", samples=205).train_labels)) == [20] * 5 + [21] * 5
    rare = save(y_train=np.array([0] * 10 + [1, 2]))
    assert sorted(np.bincount(load_dataset(rare, samples=6).train_labels)) == [1, 1, 4]


def test_a_file_is_read_as_it_is(save):
    data = load_dataset(save())
    assert data.name == "data"
    mean, deviation = ARRAYS["x_train"].mean(), ARRAYS["x_train"].std()
    np.testing.assert_allclose(data.test_inputs, (ARRAYS["x_test"] - mean) / deviation, rtol=1e-5)
    order = np.argsort(data.train_inputs[:, 0, 0])
    np.testing.assert_allclose(data.train_inputs[order], (ARRAYS["x_train"] - mean) / deviation, rtol=1e-5)
    np.testing.assert_array_equal(data.train_labels[order], ARRAYS["y_train"])


@pytest.mark.parametrize("kind", ["symmetric", "pair"])
def test_corruption_has_its_rate_and_kind(kind):
    clean = load_dataset("digits")
    noisy = corrupt(clean, 0.4, kind, seed=3)
    np.testing.assert_array_equal(noisy.true_labels, clean.train_labels)
    np.testing.assert_array_equal(noisy.wrong, noisy.train_labels != clean.train_labels)
    expected = 0.4 * (0.9 if kind == "symmetric" else 1.0)
    assert noisy.wrong.mean() == pytest.approx(expected, abs=3 * np.sqrt(0.24 / 1078))
    if kind == "pair":
        np.testing.assert_array_equal(noisy.train_labels[noisy.wrong], (noisy.true_labels[noisy.wrong] + 1) % 10)
    else:
        shifts = np.bincount((noisy.train_labels - noisy.true_labels)[noisy.wrong] % 10, minlength=10)[1:]
        assert shifts.min() > 0.5 * shifts.mean()
    assert not corrupt(clean, 0.0, kind).wrong.any()
    np.testing.assert_array_equal(corrupt(clean, 0.4, kind, seed=3).train_labels, noisy.train_labels)


@pytest.mark.parametrize("kind", ["symmetric", "pair"])
def test_labels_become_those_of_classes_that_have_samples(save, kind):
    """Numbered from 1, or with a gap: no sample is of class 0."""
    labels = np.array([1, 2, 7])
    noisy = corrupt(load_dataset(save(y_train=labels[np.arange(12) % 3], y_test=labels[:2])), 1.0, kind)
    assert set(noisy.train_labels) <= set(labels.tolist())
    if kind == "pair":
        np.testing.assert_array_equal(noisy.train_labels, [{1: 2, 2: 7, 7: 1}[label] for label in noisy.true_labels.tolist()])


def test_mnist_is_fetched_or_its_absence_explained(monkeypatch):
    import sklearn.datasets

    class Bunch:
        data = np.arange(70000 * 784, dtype=np.uint32).reshape(70000, 784) % 251
        target = np.array([str(i % 10) for i in range(70000)])

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", lambda name, **options: Bunch)
    data = load_dataset("mnist", samples=20)
    assert data.train_inputs.shape == (20, 28, 28)
    assert data.test_inputs.shape == (10000, 28, 28)

    def fail(name, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fail)
    with pytest.raises(mgs.ArgumentError, match=r"`source` must be within reach; mnist could not be fetched .*no route to host"):
        load_dataset("mnist")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": None}, "`source` must hold x_train, y_train, x_test, y_test; .* lacks x_test"),
        ({"y_train": np.array([{}] * 12)}, "Pickled objects are refused"),
        ({"x_train": np.array(["a"] * 12).reshape(12, 1)}, "`x_train` must be real numbers.*Convert them to numbers"),
        ({"x_train": np.zeros(12)}, r"`x_train` must be real numbers of shape.*Give each sample an axis: x_train\[:, None\]"),
        ({"x_train": np.full((12, 2, 2), np.nan)}, "`x_train` must be finite"),
        ({"x_train": np.zeros((12, 3))}, r"samples of one shape; got \(3,\) and \(2, 2\)"),
        ({"y_train": np.zeros(12)}, r"must be integers.*from 0: numpy\.searchsorted\(numpy\.unique\(y_train\), y_train\)\."),
        ({"y_train": np.arange(12) - 1}, r"`y_train` must be integers from 0.*Number the classes from 0"),
        ({"y_train": np.zeros(11, int)}, r"`y_train` must be integers from 0, shape \(12,\).*Give each sample one label"),
        ({"y_train": np.eye(12, 3)}, r"Take the class of each row: y_train\.argmax\(axis=1\)"),
        ({"y_train": np.zeros((12, 1), int)}, r"Drop the second axis: y_train\.ravel\(\)"),
        ({"y_train": np.zeros((12, 0), int)}, "Give each sample one label"),
        ({"y_train": np.arange(12) / 8}, "what is measured has none: this is for classifiers"),
        ({"y_train": np.zeros(12, int)}, "`y_train` must hold at least 2 classes"),
        ({"y_test": np.array([0, 3])}, "`y_train` must hold at least 2 classes, and all that `y_test` holds"),
        (
            {"x_test": np.zeros((1, 2, 2)), "y_test": np.zeros(1, int)},
            r"`x_test` must be real numbers of shape \(n, …\), n ≥ 2; .*shape \(1, 2, 2\)",
        ),
        ({"x_train": np.zeros((0, 2, 2)), "y_train": np.zeros(0, int)}, r"n ≥ 2; .*shape \(0, 2, 2\)\. Pass more"),
    ],
)
def test_bad_files_are_refused(changes, message, save):
    with pytest.raises(mgs.ArgumentError, match=message):
        load_dataset(save(**changes))


def test_bad_sources_are_refused(tmp_path, save):
    with pytest.raises(mgs.ArgumentError, match=r"`source` must be the path of an \.npz file, or a name"):
        load_dataset("cifar")
    with pytest.raises(mgs.ArgumentError, match="`source` must be a file that exists"):
        load_dataset(str(tmp_path / "none.npz"))
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(mgs.ArgumentError, match="is no archive such as"):
        load_dataset(str(damaged))
    with pytest.raises(mgs.ArgumentError, match="`samples` must be an integer between 2 and 12"):
        load_dataset(save(), samples=13)


@pytest.mark.wrong_types
def test_bad_noise_is_refused(save):
    data = load_dataset(save())
    for rate in (-0.1, 1.1, True, "0.4", float("nan")):
        with pytest.raises(mgs.ArgumentError, match="`rate` must be a probability"):
            corrupt(data, rate)
    with pytest.raises(mgs.ArgumentError, match="`kind` must be one of symmetric, pair; got 'worst'"):
        corrupt(data, 0.1, "worst")
