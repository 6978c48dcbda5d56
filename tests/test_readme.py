"""What the README says is so."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["kernel"].shape == (100, 100)
    assert names["penalty"] == pytest.approx(0.01 * np.trace(names["kernel"]) / 100)
    assert "effective_rank" in capsys.readouterr().out


def test_every_extra_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = set(re.findall(r"\[(\w+)\]`|\.\[(\w+)\]\"", README))
    assert {a or b for a, b in named} <= set(extras)
    assert "app" in {a or b for a, b in named}


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_is_at_most_two_screens():
    assert len(README.splitlines()) <= 60
