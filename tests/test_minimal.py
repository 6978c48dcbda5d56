"""What an installation without extras can do, and what it says of the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mgs_core as mgs
from mgs_core._errors import extra


def test_a_kernel_of_a_linear_model() -> None:
    inputs = np.array([[1.0, 0.0], [1.0, 2.0]])
    model = mgs.FunctionalModel(lambda p, x: x @ p["weight"], {"weight": np.zeros((2, 1))})
    np.testing.assert_allclose(mgs.kernel(model, inputs), inputs @ inputs.T)


def test_python_that_is_started_in_the_checkout_finds_all_parts() -> None:
    code = (
        "import mgs_core, numpy; print(mgs_core.__file__, mgs_core.get_backend('numpy').namespace and mgs_core.backends.__file__)"
    )
    folder = Path(__file__).parents[1]
    unsafe = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder, env=unsafe)
    assert found.stdout.split() == [str(folder / "mgs_core" / "__init__.py"), str(folder / "backends" / "__init__.py")]


def test_help_needs_no_extra() -> None:
    code = (
        "import sys; sys.modules['onnx'] = None\nimport inspect, mgs_core\nprint('audit' in dict(inspect.getmembers(mgs_core)))"
    )
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_the_command_is_a_module_too_and_tells_its_version() -> None:
    found = subprocess.run([sys.executable, "-P", "-m", "mgs_core", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout == f"mgs {mgs.__version__}\n"


@pytest.mark.parametrize("wanted", ["mgs_core.onnx", "mgs_core.audit", "mgs_core.onnx.load"])
def test_what_needs_an_extra_names_it(wanted: str) -> None:
    code = f"import sys; sys.modules['onnx'] = None\nimport mgs_core\n{wanted}"
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert found.stderr.splitlines()[-1] == (
        "mgs_core._errors.BackendError: mgs_core.onnx needs the package 'onnx', which is not installed. "
        'Run in the checkout: pip install ".[onnx]" -c constraints.txt'
    )


def test_a_module_of_this_library_that_is_missing_is_no_matter_of_an_extra() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"mgs_core\.no_such"), extra("app", "This"):
        __import__("mgs_core.no_such")
