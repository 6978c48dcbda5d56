"""The zoo as fixtures; without PyTorch there is nothing to test."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

try:
    import torch
except ImportError:
    collect_ignore_glob = ["test_*.py"]
    ZOO = {}
else:
    _spec = importlib.util.spec_from_file_location("torch_zoo", Path(__file__).with_name("zoo.py"))
    _zoo = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_zoo)
    ZOO, build = _zoo.ZOO, _zoo.build


@pytest.fixture(params=ZOO, ids=list(ZOO))
def case(request):
    return build(request.param)


@pytest.fixture
def of():
    """Return the builder of one model by name."""
    return build


@pytest.fixture
def by_loop():
    """Return what makes the trace kernel of a function of parameters from a loop of ordinary gradients; it has a graph."""

    def kernel(function, values, x, names=None):
        parameters = [values[name] for name in names or values]
        rows = []
        for a in range(len(x)):
            for output in function(values, x[a : a + 1])[0]:
                parts = torch.autograd.grad(output, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
                rows.append(torch.cat([part.reshape(-1) for part in parts]))
        stacked = torch.stack(rows).reshape(len(x), -1, len(rows[0]))
        return torch.einsum("acp,bcp->ab", stacked, stacked)

    return kernel


@pytest.fixture
def fresh():
    """Return what copies parameters to leaves that need gradients."""
    return lambda parameters: {name: value.clone().requires_grad_() for name, value in parameters.items()}
