"""ONNX's own node tests, on every backend that is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import mgs_core as mgs
from mgs_core.onnx.operators.registry import find

_path = Path(__file__).parents[2] / "docs" / "onnx_coverage.py"
_spec = importlib.util.spec_from_file_location("onnx_coverage", _path)
coverage = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(coverage)

CASES = coverage.cases()
#: Frameworks that compile each operation for each shape take minutes.
SLOW = ("jax", "tensorflow")
BACKENDS = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name, installed in mgs.available_backends().items()
    if installed and name != "keras"
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", range(8))
@pytest.mark.filterwarnings("ignore")  # the tests divide by 0 and take logarithms of negative numbers on purpose
def test_node_tests_pass(backend, part):
    failed, ran = {}, 0
    for case in CASES[part::8]:
        if coverage.why_skipped(case, backend):
            continue
        ran += 1
        try:
            coverage.run(case, backend)
        except Exception as error:
            failed[case.name] = f"{type(error).__name__}: {str(error)[:300]}"
    assert not failed
    assert ran > 100


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore")
def test_what_is_skipped_is_refused(backend):
    """A skip that is no longer needed, and one that would hide a wrong result, fails here."""
    wrong = {}
    for case in CASES:
        if coverage.why_skipped(case, backend):
            try:
                coverage.run(case, backend)
                wrong[case.name] = "passes"
            except mgs.UnsupportedModelError:
                continue
            except Exception as error:
                wrong[case.name] = f"{type(error).__name__}: {str(error)[:300]}"
    assert not wrong


def test_what_is_listed_as_refused_has_no_implementation():
    assert not [name for name in coverage.OPERATORS if find("", name, 28) or find("ai.onnx.ml", name, 5)]


def test_the_table_lists_every_operator():
    text = _path.with_name("onnx.md").read_text(encoding="utf-8")
    names = [f"{domain}.{name}" if domain else name for domain, name in coverage.supported()]
    assert not [name for name in names if f"| {name} |" not in text and name not in ("Scatter", "Upsample")]
