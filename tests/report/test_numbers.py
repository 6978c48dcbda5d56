"""Statistics against SciPy, and how numbers are written."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from mgs_core.report.numbers import finite, mean, rank_correlation, ranks, standard_error, written, written_with_error

NUMBERS = st.floats(-1e6, 1e6).map(lambda value: round(value, 3))
FEW = st.integers(0, 4).map(float)  # many ties


@given(st.lists(NUMBERS, min_size=1, max_size=20))
def test_mean_and_standard_error(values: list[float]) -> None:
    assert mean(values) == pytest.approx(np.mean(values), abs=1e-9)
    if len(values) > 1:
        assert standard_error(values) == pytest.approx(scipy.stats.sem(values), rel=1e-9, abs=1e-9)
    else:
        assert standard_error(values) is None


@given(st.lists(FEW, min_size=1, max_size=20))
def test_ranks_share_ties(values: list[float]) -> None:
    assert ranks(values) == scipy.stats.rankdata(values).tolist()


@given(st.lists(st.tuples(FEW, NUMBERS), min_size=3, max_size=20))
def test_rank_correlation(pairs: list[tuple[float, float]]) -> None:
    first, second = zip(*pairs, strict=True)
    found = rank_correlation(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(scipy.stats.spearmanr(first, second).statistic, abs=1e-9)


def test_two_pairs_have_no_rank_correlation() -> None:
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, "3", True, [1.0], 10**400, 1e200, -1e200])
def test_what_is_no_number(value: object) -> None:
    assert finite(value) is None


def test_numbers_are_finite() -> None:
    assert finite(3) == 3.0
    assert finite(1e-310) == 0.0
    assert finite(np.float64(0.5)) == 0.5


@pytest.mark.parametrize(
    ("value", "share", "text"),
    [
        (None, False, "–"), (0.0, False, "0"), (-0.0, False, "0"), (0.9236, True, "92.4"), (-0.0001, True, "0.0"),
        (1.0, True, "100.0"),
        (-1234.5, False, "−1234"), (12.345678, False, "12.35"), (1.5e7, False, "1.50e7"),
        (99999.4, False, "99999"), (100000.0, False, "1.00e5"), (-2.5e-5, False, "−2.50e−5"),
    ],
)  # fmt: skip
def test_written(value: float | None, share: bool, text: str) -> None:
    assert written(value, share=share) == text


@pytest.mark.parametrize(
    ("values", "share", "text"),
    [
        ([], True, "–"), ([0.5], True, "50.0"), ([0.5, 0.7], True, "60.0 ± 10.0"), ([100.0, 102.0, 104.0], False, "102.0 ± 1.2"),
        ([1e7, 3e7], False, "2.00e7 ± 1.0e7"), ([5.0, 5.0], False, "5.00 ± 0.00"), ([1000.0, 1400.0], False, "1200 ± 200"),
    ],
)  # fmt: skip
def test_written_with_error(values: list[float], share: bool, text: str) -> None:
    assert written_with_error(values, share=share) == text
