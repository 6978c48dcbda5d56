"""Every public name has an example, an entry in the documentation and a test."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import mgs_core

ROOT = Path(__file__).parents[1]
TESTS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}


def is_error(name: str) -> bool:
    value = getattr(mgs_core, name)
    return inspect.isclass(value) and issubclass(value, Exception)


@pytest.mark.parametrize("name", mgs_core.__all__)
def test_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(mgs_core, name))


@pytest.mark.parametrize("name", [name for name in mgs_core.__all__ if not is_error(name)])
def test_has_an_example(name: str) -> None:
    assert ">>>" in (inspect.getdoc(getattr(mgs_core, name)) or "")


@pytest.mark.parametrize("name", mgs_core.__all__)
def test_is_documented(name: str) -> None:
    api = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert re.search(rf"^\.\. auto\w+:: {name}$", api, re.MULTILINE)


@pytest.mark.parametrize("name", mgs_core.__all__)
def test_is_tested(name: str) -> None:
    assert [path for path, text in TESTS.items() if re.search(rf"\b(mgs|mgs_core)\.{name}\b", text)]


def public(path: Path) -> list[str]:
    """Return the public names of an adapter: its `__all__`, or the functions and classes that it defines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    listed = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    ]
    if listed:
        return list(ast.literal_eval(listed[0]))
    found = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [name for name in found if not name.startswith("_")]


ADAPTERS = {path.stem: path for path in (ROOT / "adapters").glob("[!_]*.py")}
ADAPTERS["keras"] = ROOT / "adapters" / "keras" / "__init__.py"


@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
def test_names_of_adapters_are_documented_and_tested(adapter: str) -> None:
    api = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    section = api.partition(f".. currentmodule:: mgs_core.adapters.{adapter}\n")[2].partition("currentmodule")[0]
    names = public(ADAPTERS[adapter])
    assert names
    assert [name for name in names if not re.search(rf"^\.\. auto\w+:: {name}$", section, re.MULTILINE)] == []
    tests = [text for path, text in TESTS.items() if path != Path(__file__) and f"adapters.{adapter}" in text]
    assert [name for name in names if not any(re.search(rf"\b{name}\b", text) for text in tests)] == []
