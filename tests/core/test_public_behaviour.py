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
    with pytest.raises(mgs.ArgumentError, match="`loss` must be given for a model of one output"):
        mgs.kernel(MODEL, PROBE, np.zeros(7, int), output="loss", transform=lambda outputs: outputs[:, :1])


def test_errors_are_of_one_family():
    for error in (mgs.ArgumentError, mgs.BackendError, mgs.SamplesInteractError, mgs.UnsupportedModelError):
        assert issubclass(error, mgs.MgsError)
    assert issubclass(mgs.ArgumentError, ValueError)


def test_summarize_returns_a_frozen_summary():
    summary = mgs.summarize(mgs.kernel(MODEL, PROBE))
    assert isinstance(summary, mgs.Summary)
    with pytest.raises(AttributeError):
        summary.trace = 0.0
