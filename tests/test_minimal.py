"""What an installation without extras can do."""

from __future__ import annotations

import numpy as np

import mgs_core as mgs


def test_a_kernel_of_a_linear_model() -> None:
    inputs = np.array([[1.0, 0.0], [1.0, 2.0]])
    model = mgs.FunctionalModel(lambda p, x: x @ p["weight"], {"weight": np.zeros((2, 1))})
    np.testing.assert_allclose(mgs.kernel(model, inputs), inputs @ inputs.T)
