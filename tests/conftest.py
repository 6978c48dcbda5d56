"""Test the installed package, with the shapes and types of public signatures checked at run time."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1].resolve()
# the root would shadow the installed package
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

sys.path.append(str(ROOT / "tests" / "helpers"))

TYPED = find_spec("jaxtyping") is not None and find_spec("beartype") is not None  # the minimal environment has neither
if TYPED:
    from beartype import BeartypeConf, beartype
    from jaxtyping import config, install_import_hook

    # the hook takes a name only; an integer is a float, as PEP 484 has it
    sys.modules["mgs_typecheck"] = ModuleType("mgs_typecheck")
    sys.modules["mgs_typecheck"].check = beartype(conf=BeartypeConf(is_pep484_tower=True))
    install_import_hook("mgs_core", "mgs_typecheck.check")


@pytest.fixture(autouse=True)
def _let_wrong_types_through(request: pytest.FixtureRequest):
    """Let tests marked `wrong_types` reach the library's own refusals, which the run-time check would forestall."""
    if not TYPED or request.node.get_closest_marker("wrong_types") is None:
        yield
        return
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
