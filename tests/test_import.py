"""What `import mgs_core` loads."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {"torch", "jax", "tensorflow", "keras", "onnx", "matplotlib", "sklearn", "autograd"}


def test_import_loads_no_framework() -> None:
    code = f"import sys, mgs_core; print(sorted({HEAVY!r} & set(sys.modules)))"
    # -P: the repository root must not shadow the installed package
    result = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"
