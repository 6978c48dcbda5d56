"""Every public name has an example, an entry in the documentation and a test."""

from __future__ import annotations

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
    assert [path for path, text in TESTS.items() if re.search(rf"\b{name}\b", text)]
