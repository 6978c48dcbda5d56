"""Summaries, penalties and weights against their formulas, over NumPy and the strict array API."""

from __future__ import annotations

import json

import array_api_strict
import autograd
import numpy as np
import pytest
from array_api_compat import numpy as compat

import mgs_core as mgs

RANDOM = np.random.default_rng(0)
ROWS = RANDOM.normal(size=(6, 4)) + 0.5
KERNEL = ROWS @ ROWS.T  # rank 4 of 6
FULL = KERNEL + np.diag(RANDOM.random(6))
COSINE = KERNEL / np.sqrt(np.outer(np.diag(KERNEL), np.diag(KERNEL)))
OFF = ~np.eye(6, dtype=bool)
FORMULAS = {
    "trace": np.trace(KERNEL) / 6,
    "log_trace": np.log(1 + np.trace(KERNEL) / 12),
    "log_determinant": np.linalg.slogdet(np.eye(6) + KERNEL / 2)[1] / 6,
    "cosine": 1 - COSINE[OFF].mean(),
    "log_determinant_cosine": np.linalg.slogdet(np.eye(6) + COSINE / 2)[1] / 6,
}


@pytest.fixture(params=["numpy", "strict"])
def xp(request):
    return {"numpy": compat, "strict": array_api_strict}[request.param]


@pytest.mark.parametrize("name", FORMULAS)
def test_penalty_is_its_formula(name, xp):
    value = mgs.Penalty(name, strength=3.0, scale=2.0)(xp.asarray(KERNEL))
    assert float(value) == pytest.approx(3.0 * FORMULAS[name], rel=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
def test_gradient_of_penalty_in_the_kernel(name):
    penalty, step = mgs.Penalty(name, strength=1.0, scale=2.0), 1e-6
    direction = RANDOM.normal(size=(6, 6))
    direction = direction + direction.T
    gradient = autograd.grad(penalty)(KERNEL)
    expected = (penalty(KERNEL + step * direction) - penalty(KERNEL - step * direction)) / (2 * step)
    assert np.sum(gradient * direction) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("mean_trace", "tolerance"), [(1.0, 1e-5), (1e3, 1e-3), (1e4, 5e-3), (1e5, 0.05)])
@pytest.mark.parametrize("rank", [1, 20, 256])
def test_log_determinant_of_large_kernels_of_low_rank_is_right_in_float32(rank, mean_trace, tolerance):
    rows = np.random.default_rng(rank).normal(size=(256, rank)).astype(np.float32)
    rows *= np.float32(np.sqrt(mean_trace / np.mean(np.sum(rows**2, axis=1))))
    exact = rows.astype(np.float64)
    expected = np.linalg.slogdet(np.eye(rank) + exact.T @ exact)[1] / 256
    assert float(mgs.Penalty("log_determinant", strength=1.0)(rows @ rows.T)) == pytest.approx(expected, rel=tolerance)


def value_and_gradient(framework, penalty, kernel):
    """Return a penalty of a kernel and its gradient there, as numbers of NumPy."""
    if framework == "numpy":
        return float(penalty(kernel)), autograd.grad(penalty)(kernel)
    pytest.importorskip(framework)
    backend = mgs.get_backend(framework)
    value, gradient = backend.value_and_gradient(penalty)(backend.asarray(kernel))
    return float(backend.to_numpy(value)), backend.to_numpy(gradient)


FRAMEWORKS = ["numpy", "torch", "jax", "tensorflow"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(("n", "rank", "mean_trace"), [(64, 3, 9e5), (256, 1, 1e6), (512, 1, 1e6), (64, 3, 1e9)])
def test_log_determinant_is_right_where_rounding_exceeds_one(framework, n, rank, mean_trace):
    """By value to what rounding leaves, and by gradient along K, `Σ λ/(1 + λ) / n`, of which a ridge that moves made 1."""
    rows = np.random.default_rng(0).uniform(size=(n, rank)).astype(np.float32)
    rows *= np.float32(np.sqrt(mean_trace / np.mean(np.sum(rows**2, axis=1))))
    exact, kernel = rows.astype(np.float64), rows @ rows.T
    expected = np.linalg.slogdet(np.eye(rank) + exact.T @ exact)[1] / n
    value, gradient = value_and_gradient(framework, mgs.Penalty("log_determinant", 1.0), kernel)
    assert value == pytest.approx(expected, rel=0.5)
    assert n * np.sum(kernel.astype(np.float64) * gradient) == pytest.approx(rank, abs=2.0)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", ["cosine", "log_determinant_cosine"])
@pytest.mark.parametrize("size", [1e-36, 1e-39, 1e-42, 1e-45])
def test_gradients_that_all_but_vanish_have_a_cosine_with_a_finite_derivative(framework, name, size):
    rows = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    kernel = rows @ rows.T
    kernel[0] *= np.float32(size**0.5)
    kernel[:, 0] *= np.float32(size**0.5)
    value, gradient = value_and_gradient(framework, mgs.Penalty(name, 1.0), kernel)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("framework", ["jax", "tensorflow"])
@pytest.mark.parametrize("name", ["log_determinant", "log_determinant_cosine"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_kernels_that_are_not_finite_have_penalties_that_are_none(framework, name, number):
    """As mixed precision counts on, which skips such steps."""
    kernel = KERNEL.astype(np.float32)
    kernel[0, 1] = kernel[1, 0] = number
    assert np.isnan(value_and_gradient(framework, mgs.Penalty(name, 1.0), kernel)[0])


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # PyTorch's own derivative of its factorisation
def test_determinants_of_pytorch_go_through_its_transforms():
    torch = pytest.importorskip("torch")
    penalty, kernel = mgs.Penalty("log_determinant", 1.0), torch.tensor(KERNEL)
    exact = torch.linalg.inv(torch.eye(6) + kernel) / 6
    torch.testing.assert_close(torch.func.grad(penalty)(kernel), exact)
    torch.testing.assert_close(torch.func.vmap(penalty)(torch.stack([kernel, 2 * kernel]))[1], penalty(2 * kernel))
    torch.testing.assert_close(torch.func.jvp(penalty, (kernel,), (kernel,))[1], (exact * kernel).sum())
    direction = (kernel @ kernel).flatten()  # symmetric, as kernels are moved
    first, second = (hessian.reshape(36, 36) @ direction @ direction for hessian in (
        torch.func.hessian(penalty)(kernel), torch.autograd.functional.hessian(penalty, kernel),
    ))  # fmt: skip
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("mean_trace", [1e6, 1e9])
def test_log_determinant_survives_what_rounding_leaves_of_a_kernel(mean_trace):
    rows = np.random.default_rng(0).normal(size=(256, 1)).astype(np.float32) * np.float32(np.sqrt(mean_trace))
    assert 0 <= mgs.Penalty("log_determinant")(rows @ rows.T) < np.inf


@pytest.mark.parametrize("name", ["log_trace", "log_determinant"])
def test_small_kernels_count(name):
    kernel = np.float32(1e-6) * np.eye(3, dtype=np.float32)
    assert float(mgs.Penalty(name, 1.0)(kernel)) == pytest.approx(1e-6, rel=1e-4)


def test_agreement_is_not_lost_beside_large_gradients():
    kernel = np.array([[1e8, 1, 1], [1, 1e8, -3], [1, -3, 1e8]], dtype=np.float32)
    np.testing.assert_allclose(mgs.agreement(kernel), [2e-4, -2e-4, -2e-4], rtol=1e-6)
    np.testing.assert_allclose(mgs.agreement_weights(kernel), [3, 0, 0])
    half = np.full((64, 64), 3e4, dtype=np.float16)
    np.testing.assert_allclose(mgs.agreement_weights(half), 1.0, rtol=1e-6)
    kernel[0, 1] = kernel[1, 0] = np.nan
    assert np.isnan(mgs.agreement_weights(kernel)).all(), "a kernel that is not finite hides nothing"


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("framework", ["numpy", "torch", "jax", "tensorflow"])
def test_kernels_in_half_precision(name, framework):
    half = KERNEL.astype(np.float16)
    if framework != "numpy":
        pytest.importorskip(framework)
        half = mgs.get_backend(framework).asarray(half)
    value = mgs.Penalty(name, strength=3.0, scale=2.0)(half)
    assert value.dtype == half.dtype
    assert float(value) == pytest.approx(3.0 * FORMULAS[name], rel=2e-3)


@pytest.mark.wrong_types
def test_numbers_may_be_those_of_numpy():
    penalty = mgs.Penalty("trace", np.float32(0.5), np.int64(2))
    assert json.loads(json.dumps(penalty.to_dict())) == {"name": "trace", "strength": 0.5, "scale": 2.0}
    assert mgs.summarize(FULL, ridge=np.float32(1e-6)).trace == pytest.approx(np.trace(FULL))


def test_penalties_of_samples_without_gradient_have_gradients():
    padded = np.zeros((3, 3))
    padded[:2, :2] = KERNEL[:2, :2]
    for name in FORMULAS:
        assert np.all(np.isfinite(autograd.grad(mgs.Penalty(name))(padded)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("median",), "`name` must be one of trace, log_trace"),
        (("trace", -1.0), "`strength` must be a finite number at least 0; got -1.0"),
        (("trace", True), "`strength` must be a finite number"),
        (("trace", float("nan")), "`strength` must be a finite number"),
        (("trace", 1.0, 0.0), "`scale` must be a finite number above 0; got 0.0"),
    ],
)
@pytest.mark.wrong_types
def test_bad_penalties_are_refused(arguments, message):
    with pytest.raises(mgs.ArgumentError, match=message):
        mgs.Penalty(*arguments)


def test_penalty_round_trip():
    penalty = mgs.Penalty("cosine", 0.5)
    assert mgs.Penalty.from_dict(penalty.to_dict()) == penalty


@pytest.mark.wrong_types
def test_kernels_that_are_not_square_are_refused():
    for function in (mgs.Penalty("trace"), mgs.agreement_weights, mgs.summarize):
        for bad in (np.zeros((2, 3)), np.zeros((0, 0)), np.zeros((2, 2, 2, 2))):
            with pytest.raises(mgs.ArgumentError, match="`kernel` must be square"):
                function(bad)
    with pytest.raises(mgs.ArgumentError, match="at least 2 samples"):
        mgs.summarize(np.ones((1, 1)))


def test_a_batch_of_one_as_the_last_of_an_epoch_has_no_pairs(xp):
    one = xp.asarray(np.full((1, 1), 2.0))
    assert float(mgs.Penalty("cosine")(one)) == 0.0
    assert np.asarray(mgs.agreement(one)).tolist() == [0.0]
    assert np.asarray(mgs.agreement_weights(one)).tolist() == [1.0]


def test_weights_are_their_formula(xp):
    r = (FULL.sum(1) - np.diag(FULL)) / np.sqrt(np.diag(FULL))
    kept = np.maximum(r, 0)
    np.testing.assert_allclose(np.asarray(mgs.agreement(xp.asarray(FULL))), r, rtol=1e-12)
    weights = np.asarray(mgs.agreement_weights(xp.asarray(FULL)))
    np.testing.assert_allclose(weights, kept / kept.mean(), rtol=1e-12)
    assert weights.mean() == pytest.approx(1.0)


def test_weights_where_no_sample_agrees_or_moves():
    np.testing.assert_array_equal(mgs.agreement_weights(np.array([[1.0, -0.5], [-0.5, 1.0]])), [1.0, 1.0])
    np.testing.assert_array_equal(mgs.agreement_weights(np.zeros((3, 3))), [1.0, 1.0, 1.0])


def test_summary_is_its_formulas(xp):
    labels = np.array([0, 1, 0, 1, 2, 0])
    summary = mgs.summarize(xp.asarray(KERNEL), labels, ridge=1e-3)
    ridged = KERNEL + 1e-3 * np.trace(KERNEL) / 6 * np.eye(6)
    eigenvalues = np.maximum(np.linalg.eigvalsh(KERNEL), 0)
    shares = eigenvalues[eigenvalues > 1e-12] / eigenvalues.sum()
    same = labels[:, None] == labels
    expected = {
        "trace": np.trace(KERNEL),
        "mean_trace": np.trace(KERNEL) / 6,
        "log_determinant": np.linalg.slogdet(ridged)[1],
        "magnitude": np.log(np.diag(ridged)).sum(),
        "similarity": np.linalg.slogdet(ridged / np.sqrt(np.outer(np.diag(ridged), np.diag(ridged))))[1],
        "effective_rank": np.exp(-(shares * np.log(shares)).sum()),
        "top_share": shares.max(),
        "mean_cosine": COSINE[OFF].mean(),
        "same_class_cosine": COSINE[OFF & same].mean(),
        "other_class_cosine": COSINE[~same].mean(),
        "alignment": (KERNEL * same).sum() / np.linalg.norm(KERNEL) / np.linalg.norm(same),
    }
    assert summary.to_dict() == pytest.approx(expected, rel=1e-9)
    assert "alignment" in str(summary)


def test_labels_may_stand_in_a_column():
    labels = np.arange(6) % 2
    assert mgs.summarize(KERNEL, labels[:, None]) == mgs.summarize(KERNEL, labels)


def test_summary_leaves_out_what_it_cannot_know():
    assert "alignment" not in mgs.summarize(KERNEL).to_dict()
    assert mgs.summarize(KERNEL, np.zeros(6, int)).other_class_cosine is None
    assert mgs.summarize(KERNEL, np.arange(6)).same_class_cosine is None


@pytest.mark.parametrize(
    ("kernel", "options", "message"),
    [
        (np.full((2, 2), np.nan), {}, "`kernel` must be finite"),
        (np.array([[1.0, 0.5], [0.0, 1.0]]), {}, "`kernel` must be symmetric"),
        (np.zeros((2, 2)), {}, "`kernel` must have a positive trace"),
        (np.diag([2.0, -0.5]), {}, "`kernel` must have squared norms on its diagonal; got -0.5"),
        ([[1.0, 0.0], [0.0, 1.0]], {}, "`kernel` must be an array; got list. Convert it"),
        (np.eye(2), {"labels": np.zeros(3, int)}, r"`labels` must be integers of shape \(2,\)"),
        (np.eye(2), {"labels": np.array([0.5, 1.5])}, "`labels` must be integers.*Leave them out for targets of a regression"),
        (np.eye(2), {"ridge": 0.0}, "`ridge` must be a finite number above 0"),
    ],
)
def test_bad_kernels_are_refused(kernel, options, message):
    with pytest.raises(mgs.ArgumentError, match=message):
        mgs.summarize(kernel, **options)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (
            [[1.0, 100.0], [100.0, 1.0]],
            r"`kernel` must have \|K_ab\| of at most √\(K_aa K_bb\).*got 100 for 0 and 1 with 1 and 1",
        ),
        ([[0.0, 1.0], [1.0, 1.0]], r"`kernel` must have \|K_ab\| of at most"),
        ([[1.0 + 0j, 0.0], [0.0, 1.0]], "`kernel` must be real; got dtype complex128"),
    ],
)
def test_matrices_that_are_no_kernels_are_refused(kernel, message):
    with pytest.raises(mgs.ArgumentError, match=message):
        mgs.summarize(np.array(kernel))


@pytest.mark.parametrize(("dtype", "small"), [(np.float32, 1e-23), (np.float16, 1e-4)])
def test_kernels_of_which_small_squares_are_lost_have_a_summary(dtype, small):
    rows = np.array([[1.0, 0.0], [0.1, 0.0], [small, 0.0]])
    kernel = (rows @ rows.T).astype(dtype)
    assert kernel[2, 2] == 0 < kernel[0, 2]
    assert np.isfinite(mgs.summarize(kernel).similarity)


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_alignment_is_that_of_any_size(size):
    labels = np.arange(6) % 2
    assert mgs.summarize(size * KERNEL, labels).alignment == pytest.approx(mgs.summarize(KERNEL, labels).alignment)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mgs.Penalty("trace")(np.eye(2, dtype=int)), "`kernel` must hold real floating-point numbers; got dtype int64"),
        (lambda: mgs.Penalty(["trace"]), r"`name` must be one of trace, .*; got \['trace'\]"),
        (lambda: mgs.Penalty("trace", 10**400), "`strength` must be a finite number at least 0"),
    ],
)
def test_penalties_refuse_what_does_not_fit(call, message):
    with pytest.raises(mgs.ArgumentError, match=message):
        call()


@pytest.mark.parametrize("name", ["trace", "log_trace", "log_determinant", "cosine", "log_determinant_cosine"])
def test_the_default_strength_suits_the_name(name):
    penalty = mgs.Penalty(name)
    assert penalty.strength > 0
    assert penalty == mgs.Penalty(name, penalty.strength) == mgs.Penalty.from_dict({"name": name})
    K = np.eye(3) + 0.1
    assert float(penalty(K)) == pytest.approx(penalty.strength * float(mgs.Penalty(name, 1.0)(K)))
