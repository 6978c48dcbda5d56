"""The zoo as fixtures; without PyTorch there is nothing to test."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

try:
    import torch  # noqa: F401  # what the zoo needs
except ImportError:
    collect_ignore_glob = ["test_*.py"]
    ZOO = {}
else:
    _spec = importlib.util.spec_from_file_location("torch_zoo", Path(__file__).with_name("zoo.py"))
    _zoo = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_zoo)
    ZOO, build = _zoo.ZOO, _zoo.build


@pytest.fixture(params=ZOO, ids=list(ZOO))
def case(request):
    return build(request.param)


@pytest.fixture
def of():
    """Return the builder of one model by name."""
    return build
