"""Contributions of layer statistics against explicit per-sample gradients, over NumPy and the strict array API."""

from __future__ import annotations

from dataclasses import replace

import array_api_strict
import numpy as np
import pytest
from array_api_compat import numpy as compat
from hypothesis import given, settings
from hypothesis import strategies as st

from mgs_core import ArgumentError, contraction, statistics
from mgs_core._protocol import Lookup, Outer, Rows, Scale, Sum

NAMESPACES = {"numpy": compat, "strict": array_api_strict}


def rows_of(use) -> np.ndarray:
    """Per-sample gradients from the definition, (n, k, p)."""
    d = np.asarray(use.gradients)
    if isinstance(use, Outer):
        rows = np.einsum("ngsi,nkgso->nkgio", np.asarray(use.inputs), d)
    elif isinstance(use, Sum):
        rows = np.einsum("nkso->nko", d)
    elif isinstance(use, Scale):
        rows = np.einsum("nso,nkso->nko", np.asarray(use.inputs), d)
    elif isinstance(use, Lookup):
        rows = np.einsum("nst,nkso->nkto", np.eye(use.size)[np.asarray(use.indices)], d)
    else:
        rows = d
    return rows.reshape(*d.shape[:2], -1)


def make(kind: str, xp, n: int, k: int = 2, s: int = 3, i: int = 4, o: int = 2, groups: int = 1, seed: int = 0):
    random = np.random.default_rng(seed)

    def draw(*shape):
        return xp.asarray(random.normal(size=shape))

    if kind == "outer":
        return Outer("w", draw(n, k, groups, s, o), inputs=draw(n, groups, s, i))
    if kind == "sum":
        return Sum("w", draw(n, k, s, o))
    if kind == "scale":
        return Scale("w", draw(n, k, s, o), inputs=draw(n, s, o))
    if kind == "lookup":
        return Lookup("w", draw(n, k, s, o), indices=xp.asarray(random.integers(0, i, (n, s))), size=i)
    return Rows("w", draw(n, k, i))


@pytest.fixture(params=NAMESPACES)
def xp(request):
    return NAMESPACES[request.param]


@pytest.mark.parametrize("kind", ["outer", "sum", "scale", "lookup", "rows"])
@pytest.mark.parametrize("route", ["pairwise", "rows"])
@pytest.mark.parametrize("budget", [1, 1 << 25])
def test_contribution_is_that_of_explicit_rows(kind, route, budget, xp, monkeypatch):
    monkeypatch.setattr(contraction, "MEMORY_BUDGET", budget)
    monkeypatch.setattr(contraction, "prefers_pairwise", lambda left, right: route == "pairwise")
    groups = 3 if kind == "outer" else 1
    left, right = make(kind, xp, 5, groups=groups), make(kind, xp, 4, groups=groups, seed=1)
    a, b = rows_of(left), rows_of(right)
    full = np.asarray(contraction.contribution(left, right, full=True))
    np.testing.assert_allclose(full, np.einsum("acp,bdp->acbd", a, b), rtol=1e-12, atol=1e-12)
    summed = np.asarray(contraction.contribution(left, right))
    np.testing.assert_allclose(summed, np.einsum("acp,bcp->ab", a, b), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["outer", "sum", "scale", "lookup", "rows"])
def test_several_uses_of_one_parameter_add_up(kind, xp):
    uses = [make(kind, xp, 5, seed=0), make(kind, xp, 5, seed=1)]
    (merged,) = statistics.merge(uses)
    rows = rows_of(uses[0]) + rows_of(uses[1])
    kernel = contraction.contract([merged], [merged])
    np.testing.assert_allclose(np.asarray(kernel), np.einsum("acp,bcp->ab", rows, rows), rtol=1e-12, atol=1e-12)


def test_uses_of_different_kinds_meet_as_rows(xp):
    outer = make("outer", xp, 5)
    lookup = make("lookup", xp, 5)
    (merged,) = statistics.merge([outer, lookup])
    rows = rows_of(outer) + rows_of(lookup)
    np.testing.assert_allclose(np.asarray(merged.gradients), rows, rtol=1e-12, atol=1e-12)


def test_batches_that_use_parameters_differently_meet_as_rows(xp):
    def named(name, use):
        return replace(use, parameter=name)

    left = [named("a", make("outer", xp, 5)), named("b", make("sum", xp, 5))]
    right = [named("b", make("sum", xp, 4, seed=1)), named("a", make("lookup", xp, 4, seed=1)), named("c", make("sum", xp, 4))]
    expected = sum(np.einsum("acp,bcp->ab", rows_of(a), rows_of(b)) for a, b in ((left[0], right[1]), (left[1], right[0])))
    np.testing.assert_allclose(np.asarray(contraction.contract(left, right)), expected, rtol=1e-12, atol=1e-12)
    nothing = np.asarray(contraction.contract(left[:1], right[2:]))
    np.testing.assert_array_equal(nothing, np.zeros((5, 4)))
    assert np.asarray(contraction.contract(left[:1], right[2:], full=True)).shape == (5, 2, 4, 2)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 6), m=st.integers(1, 6), k=st.integers(1, 3), s=st.integers(1, 5), t=st.integers(1, 5),
    i=st.integers(1, 9), o=st.integers(1, 9), groups=st.integers(1, 3), kind=st.sampled_from(["outer", "lookup"]),
)  # fmt: skip
def test_any_shape_gives_the_same_by_either_route(n, m, k, s, t, i, o, groups, kind):
    groups = groups if kind == "outer" else 1
    left = make(kind, compat, n, k, s, i, o, groups)
    right = make(kind, compat, m, k, t, i, o, groups, seed=1)
    a, b = rows_of(left), rows_of(right)
    for full, formula in ((False, "acp,bcp->ab"), (True, "acp,bdp->acbd")):
        expected = np.einsum(formula, a, b)
        np.testing.assert_allclose(contraction.contribution(left, right, full=full), expected, rtol=1e-10, atol=1e-10)


def test_cost_model_takes_rows_for_many_positions_and_pairs_for_wide_layers():
    assert contraction.prefers_pairwise(*[make("outer", compat, 8, k=1, s=1, i=100, o=100)] * 2)
    assert not contraction.prefers_pairwise(*[make("outer", compat, 8, k=1, s=100, i=3, o=3)] * 2)


@pytest.mark.wrong_types
def test_unknown_or_mixed_kinds_are_refused():
    with pytest.raises(TypeError, match="`right` must be of the kind of `left`, Sum; got Rows"):
        contraction.contribution(make("sum", compat, 2), make("rows", compat, 2))
    with pytest.raises(TypeError, match="`use` must be layer statistics; got Use"):
        statistics.as_rows(type("Use", (), {"gradients": np.zeros((2, 1, 1))})())
    with pytest.raises(TypeError, match="`left` must be Outer or Lookup"):
        contraction._pairwise(make("sum", compat, 2), make("sum", compat, 2), False)


@pytest.mark.parametrize("pairwise", [True, False])
@pytest.mark.parametrize("full", [True, False])
def test_a_bias_is_counted_in_with_its_weight(pairwise, full, xp, monkeypatch):
    monkeypatch.setattr(contraction, "prefers_pairwise", lambda left, right: pairwise)
    sides, rows = [], []
    for n, seed in ((5, 0), (4, 1)):
        weight = replace(make("outer", xp, n, groups=3, seed=seed), origin="layer")
        n, k, groups, s, o = weight.gradients.shape
        flat = xp.reshape(xp.permute_dims(weight.gradients, (0, 1, 3, 2, 4)), (n, k, s, groups * o))
        sides.append([weight, Sum("b", flat, origin="layer"), Sum("c", 2.0 * flat, origin="other")])
        rows.append(np.concatenate([rows_of(use) for use in sides[-1]], axis=2))
    kernel = np.asarray(contraction.contract(*sides, full=full))
    np.testing.assert_allclose(kernel, np.einsum("acp,bdp->acbd" if full else "acp,bcp->ab", *rows), rtol=1e-12, atol=1e-12)
    kernel = np.asarray(contraction.contract(sides[0], sides[0], full=full))
    np.testing.assert_allclose(
        kernel, np.einsum("acp,bdp->acbd" if full else "acp,bcp->ab", rows[0], rows[0]), rtol=1e-12, atol=1e-12
    )
    merged = statistics.merge([sides[0][0], sides[0][0]])[0]
    assert merged.origin is None


def test_a_kernel_of_no_statistics_is_refused():
    with pytest.raises(ArgumentError, match="`left` and `right` must hold the statistics of a parameter; got none"):
        contraction.contract([], [])
