"""Places on the page: axes, ticks and labels that keep apart."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from mgs_core.report.axes import Axis, axis, spread
from mgs_core.report.charts import thinned
from mgs_core.report.numbers import finite

VALUES = st.lists(st.floats(-1e150, 1e150).map(finite).filter(lambda value: value is not None), min_size=1, max_size=8)


def test_linear_places() -> None:
    drawn = Axis(0.0, 10.0, 100.0, 0.0)
    assert [drawn.place(value) for value in (0.0, 2.5, 10.0, 20.0)] == [100.0, 75.0, 0.0, -100.0]


def test_logarithmic_places() -> None:
    drawn = Axis(1.0, 1000.0, 0.0, 300.0, logarithmic=True)
    assert [drawn.place(value) for value in (1.0, 10.0, 100.0, 1000.0)] == [0.0, 100.0, 200.0, 300.0]
    assert [text for _, text in drawn.ticks()] == ["1", "10", "100", "1000"]


def test_large_and_small_ticks_are_short() -> None:
    drawn = axis([1.2e5, 1.3e6], 0.0, 1.0, logarithmic=True)
    assert [text for _, text in drawn.ticks()] == ["2e5", "5e5", "1e6"]
    assert [text for _, text in Axis(-2.5e-5, 0.0, 0.0, 1.0).ticks(5)] == ["−2.5e−5", "−2e−5", "−1.5e−5", "−1e−5", "−5e−6", "0"]


def test_shares_end_at_the_whole() -> None:
    drawn = axis([0.0, 1.0], 0.0, 100.0, share=True)
    assert (drawn.low, drawn.high) == (0.0, 1.0)
    assert drawn.ticks(4) == [(0.0, "0 %"), (25.0, "25 %"), (50.0, "50 %"), (75.0, "75 %"), (100.0, "100 %")]


def test_axis_begins_at_zero() -> None:
    assert axis([0.4, 0.9], 0.0, 1.0, from_zero=True).low == 0.0


@given(VALUES, st.booleans())
def test_axis_holds_all_numbers_and_has_ticks_inside(values: list[float], logarithmic: bool) -> None:
    drawn = axis(values, 0.0, 300.0, logarithmic=logarithmic)
    for value in values:
        if not logarithmic or value > 0:
            assert -0.1 <= drawn.place(value) <= 300.1
    ticks = drawn.ticks()
    assert 2 <= len(ticks) <= 16
    assert all(-0.1 <= place <= 300.1 for place, _ in ticks)


@given(st.lists(st.floats(0, 300), max_size=12), st.floats(1, 40))
def test_labels_keep_apart_in_order_and_inside(wanted: list[float], gap: float) -> None:
    places = spread(wanted, gap, 5.0, 295.0)
    least = min(gap, 290 / max(len(wanted) - 1, 1))
    for first, second in itertools.combinations(range(len(wanted)), 2):
        assert abs(places[first] - places[second]) >= least - 0.02
        if wanted[first] < wanted[second]:
            assert places[first] < places[second]
    assert all(4.98 <= place <= 295.02 for place in places)


@settings(max_examples=30)
@given(st.lists(st.floats(0, 300), min_size=2, max_size=6))
def test_labels_move_as_little_as_possible(wanted: list[float]) -> None:
    wanted = sorted(wanted)
    n = len(wanted)
    steps = np.eye(n)[1:] - np.eye(n)[:-1]
    best = scipy.optimize.minimize(
        lambda places: np.sum((places - wanted) ** 2), np.linspace(10, 290, n), jac=lambda places: 2 * (places - wanted),
        bounds=[(5.0, 295.0)] * n,
        constraints={"type": "ineq", "fun": lambda places: steps @ places - 20.0, "jac": lambda _: steps},
        method="SLSQP", options={"ftol": 1e-12, "maxiter": 300},
    )  # fmt: skip
    np.testing.assert_allclose(spread(wanted, 20.0, 5.0, 295.0), best.x, atol=0.05)


def test_no_label() -> None:
    assert spread([], 10.0, 0.0, 100.0) == []


@pytest.mark.parametrize("n", [1, 99, 100, 101, 1000])
def test_thinning_keeps_both_ends(n: int) -> None:
    epochs = list(range(1, n + 1))
    kept = thinned(epochs)
    assert len(kept) == len(set(kept)) == min(n, 100)
    assert (kept[0], kept[-1]) == (1, n)
    if n > 100:
        assert max(np.diff(kept)) <= math.ceil((n - 1) / 99)
