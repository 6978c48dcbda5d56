"""The main job runs on TensorFlow, with the curves of NumPy."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx")
pytest.importorskip("sklearn")

from mgs_core.experiments import RECIPES, Settings, compare


def test_compare_has_the_curves_of_numpy(tmp_path):
    recipes, records = [RECIPES["none"], RECIPES["mgs-trace"]], {}
    for backend in ("numpy", "tensorflow"):
        settings = Settings(samples=100, epochs=2, seeds=1, backend=backend)
        records[backend] = compare(settings, recipes, tmp_path / backend)
    for one, other in zip(records["numpy"], records["tensorflow"], strict=True):
        for name in ("train_loss", "test_accuracy", "mgs_trace", "mgs_log_determinant"):
            if one.get(name) is not None:
                assert other[name] == pytest.approx(one[name], rel=1e-3)
