"""The examples of the adapter run, every public name has one, and keras-core is sent to Keras 3."""

from __future__ import annotations

import doctest
import importlib
import inspect
import subprocess
import sys

import mgs_core.adapters.keras as adapter
import pytest


@pytest.mark.parametrize("name", ["_losses", "_models", "_monitor", "_regularizer"])
def test_examples_run(name):
    module = importlib.import_module(f"mgs_core.adapters.keras.{name}")
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


@pytest.mark.parametrize("name", adapter.__all__)
def test_public_names_are_documented(name):
    value = getattr(adapter, name)
    assert ">>>" in (inspect.getdoc(value) or "") or name in ("MGSFunctional", "MGSSequential")  # which regularize makes


ALONE = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: True if name == "keras_core" else None if name == "keras" else find(name, *rest)
sys.modules["keras"] = None
import mgs_core.adapters.keras
"""
OLD = """
import sys, types
sys.modules["keras"] = types.ModuleType("keras")
sys.modules["keras"].__version__ = "2.15.0"
import mgs_core.adapters.keras
"""


@pytest.mark.parametrize(
    ("code", "message"),
    [(ALONE, "`keras` must be Keras 3.13 or later; got keras-core"), (OLD, "`keras` must be Keras 3.13 or later; got 2.15.0")],
)
def test_other_keras_is_refused(code, message):
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert "BackendError" in result.stderr
    assert message in result.stderr
