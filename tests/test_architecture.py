"""The rules of dependency, and that packaging lists what is there."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FRAMEWORKS = ("torch", "jax", "tensorflow", "keras")
FILES = sorted(path for room in ("mgs_core", "backends", "adapters") for path in (ROOT / room).rglob("*.py"))
ALLOWED = {"array_api_compat", "mgs_core"}
ALLOWED_IN = {
    "adapters/_flax_arguments.py": {"jax"},
    "adapters/_flax_monitor.py": {"flax"},
    "adapters/flax.py": {"flax", "jax"},
    "mgs_core/_types.py": {"jaxtyping"},
    "mgs_core/_terminal.py": {"rich"},
    "mgs_core/cli.py": {"rich", "typer"},
    "mgs_core/experiments": {"numpy", "onnx", "sklearn"},
    "mgs_core/onnx": {"numpy", "onnx"},
    "mgs_core/report": {"jinja2", "matplotlib", "numpy"},
    "backends/jax": {"jax", "numpy"},
    "backends/numpy": {"autograd", "numpy"},
    "backends/torch": {"torch"},
    "adapters/_torch_criterion.py": {"torch"},
    "adapters/_torch_monitor.py": {"torch"},
    "adapters/_torch_options.py": {"torch"},
    "adapters/torch.py": {"torch"},
    "adapters/lightning.py": {"lightning"},
    "adapters/huggingface.py": {"torch", "transformers"},
    "backends/tensorflow": {"numpy", "tensorflow"},
    "backends/keras": {"keras", "torch"},
    "adapters/keras": {"keras", "tensorflow"},
}


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots.add((node.module or "").partition(".")[0])
    return roots


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_rules(path):
    place = path.relative_to(ROOT).as_posix()
    extra = set().union(*(names for prefix, names in ALLOWED_IN.items() if place.startswith(prefix)))
    assert imported(path) - ALLOWED - extra - set(sys.stdlib_module_names) == set()


def modules(path: Path) -> list[str]:
    """Return the modules that a file imports, by their absolute names."""
    *room, _ = path.relative_to(ROOT).with_suffix("").parts
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = room[: len(room) - node.level + 1] if node.level else []
            within = ".".join([*above, *([node.module] if node.module else [])])
            found += [within, *(f"{within}.{alias.name}" for alias in node.names)]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_are_entered_by_their_doors(path):
    place = path.relative_to(ROOT)
    own = ".".join(place.parts[:2]) if place.parts[0] == "backends" else "nothing"
    rooms = [
        module
        for module in modules(path)
        if module.startswith(("backends.", "adapters.", "mgs_core.backends", "mgs_core.adapters"))
    ]
    entered = [module for module in rooms if not module.startswith(own) and not module.startswith(".".join(place.parts[:-1]))]
    assert entered == []


@pytest.mark.parametrize("name", ["torch.py", "_torch_monitor.py", "lightning.py", "huggingface.py"])
def test_adapters_import_public_names_only(name):
    tree = ast.parse((ROOT / "adapters" / name).read_text(encoding="utf-8"))
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [module for module in modules if module.startswith("mgs_core.")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_every_package_is_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in FILES if path.name == "__init__.py"}
    assert listed == {name if name.startswith("mgs_core") else f"mgs_core.{name}" for name in found}


def test_import_loads_no_framework():
    code = "import sys, mgs_core; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {*FRAMEWORKS, "onnx", "matplotlib", "sklearn", "autograd"} & set(loaded)
