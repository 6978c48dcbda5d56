"""What the README says is so."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

import mgs_core as mgs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(capsys):
    torch = pytest.importorskip("torch")
    code, _ = _code(README)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    x, y = torch.randn(256, 4), torch.arange(256) % 3
    data = torch.utils.data.TensorDataset(x, y)
    names = {
        "model": model,
        "x": x,
        "y": y,
        "loader": torch.utils.data.DataLoader(data, batch_size=32),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    exec(code, names)
    assert names["criterion"].last.penalty > 0
    assert len(names["monitor"].history) == 1
    assert names["kernel"].shape == (128, 128)
    assert "effective_rank" in capsys.readouterr().out


def test_training_without_contradicted_labels_runs():
    torch, generator = pytest.importorskip("torch"), np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 20)
    images = np.eye(3, 5)[labels] + 0.1 * generator.normal(size=(60, 5))
    labels[:2] = 1
    for x, y in ((images, labels), (torch.tensor(images, dtype=torch.float32), torch.tensor(labels))):
        names = {"mgs": mgs, "torch": torch, "model": torch.nn.Linear(5, 3), "x": x, "y": y}
        exec(_code(README)[1], names)
        wrong = names["found"].contradicted
        assert wrong[:2].any()
        assert not wrong[2:].any()
        assert len(names["x"]) == len(names["y"]) == 60 - wrong.sum()
    guide = (ROOT / "docs/audit.md").read_text(encoding="utf-8").partition("## Train without them")[2].partition("\n## ")[0]
    _, own, penalty = _code(guide)
    names |= {"x": torch.tensor(images, dtype=torch.float32), "y": torch.tensor(labels)}
    exec(own, names)
    assert names["found"].contradicted.shape == (60,)
    names |= {"batch": names["x"], "labels": names["y"]}
    torch.manual_seed(0)
    exec(penalty, names)
    jacobian = names["model"].weight.square().sum().item()
    assert (names["loss"] - names["plain"]).item() == pytest.approx(jacobian, rel=0.2)


def _code(page):
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_every_extra_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = set(re.findall(r"\[(\w+)\]`|\.\[(\w+)\]\"", README))
    assert {a or b for a, b in named} <= set(extras)
    assert "app" in {a or b for a, b in named}


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert (ROOT / target).exists(), target


def test_is_at_most_two_screens():
    assert len(README.splitlines()) <= 60
