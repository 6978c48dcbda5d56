"""Test the installed package, with the shapes and types of public signatures checked at run time."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1].resolve()
# the root would shadow the installed package
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

TYPED = find_spec("jaxtyping") is not None and find_spec("beartype") is not None  # the minimal environment has neither
if TYPED:
    from jaxtyping import config, install_import_hook

    install_import_hook("mgs_core", "beartype.beartype")


@pytest.fixture(autouse=True)
def _let_wrong_types_through(request: pytest.FixtureRequest):
    """Let tests marked `wrong_types` reach the library's own refusals, which the run-time check would forestall."""
    if not TYPED or request.node.get_closest_marker("wrong_types") is None:
        yield
        return
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
