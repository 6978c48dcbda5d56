"""Every example in a docstring runs, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import mgs_core as mgs

MODULES = ["mgs_core", *(module.name for module in pkgutil.walk_packages(mgs.__path__, "mgs_core."))]


def load(name):
    """Import a module; those of a framework that is not installed are skipped."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if not name.startswith(("mgs_core.backends.", "mgs_core.adapters.")):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    assert doctest.testmod(load(name), optionflags=doctest.ELLIPSIS).failed == 0


@pytest.mark.parametrize("name", mgs.__all__)
def test_public_names_are_documented(name):
    value = getattr(mgs, name)
    text = inspect.getdoc(value)
    assert text
    assert ">>>" in text or issubclass(value, Exception)
