"""The weighted gradient against explicit rows, for each kind of statistics."""

from __future__ import annotations

import numpy as np
import pytest

from mgs_core._protocol import Convolution, Lookup, Outer, Rows, Scale, Sum
from mgs_core.gradient import weighted_gradient
from mgs_core.statistics import as_rows

DRAW = np.random.default_rng(0)
D = DRAW.normal(size=(4, 2, 3, 5))
USES = [
    Outer("w", DRAW.normal(size=(4, 2, 2, 3, 5)), inputs=DRAW.normal(size=(4, 2, 3, 6))),
    Outer("w", D[:, :, None], inputs=DRAW.normal(size=(4, 1, 3, 12))),
    Convolution(
        "c",
        DRAW.normal(size=(4, 2, 3, 2, 5, 3, 4)),
        images=DRAW.normal(size=(4, 3, 2, 6, 5, 6)),
        window=(3, 2),
        strides=(2, 1),
        pads=((1, 1), (0, 0)),
        dilations=(1, 2),
    ),
    Sum("b", D),
    Scale("g", D, inputs=DRAW.normal(size=(4, 3, 5))),
    Lookup("t", D, indices=DRAW.integers(0, 7, (4, 3)), size=7),
    Rows("r", D[:, :, 0], restore=lambda rows: rows[..., ::-1]),
]


def test_it_is_the_weighted_sum_of_the_rows():
    weights = DRAW.normal(size=(4, 2))
    found = weighted_gradient(USES, weights)
    for name in "wcbgtr":
        rows = sum(as_rows(use, restore=True) for use in USES if use.parameter == name)
        np.testing.assert_allclose(found[name], np.einsum("nk,nkp->p", weights, rows), rtol=1e-12, atol=1e-12)


@pytest.mark.wrong_types
def test_unknown_statistics_are_refused():
    class Other(Sum):
        pass

    Other.__bases__ = (Rows.__mro__[1],)
    with pytest.raises(TypeError, match="`uses` must be layer statistics; got Other"):
        weighted_gradient([Other("x", D)], np.ones((4, 2)))
