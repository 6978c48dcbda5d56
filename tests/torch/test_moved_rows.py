"""Models in which data choose branches, or take rows to other samples: one batch's plan is not the next one's."""

from __future__ import annotations

import pytest

import mgs_core as mgs

torch = pytest.importorskip("torch")

from mgs_core.adapters.torch import MGSLoss  # noqa: E402  # after the skip
from torch import nn  # noqa: E402  # after the skip

BOTH = nn.Linear(3, 5, dtype=torch.float64), nn.Linear(5, 2, dtype=torch.float64)


def loop(values) -> torch.Tensor:
    """Kernel of values (n, k), by a loop of ordinary gradients."""
    parameters = [parameter for layer in BOTH for parameter in layer.parameters()]

    def row(value):
        parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in parts])

    rows = torch.stack([torch.stack([row(value) for value in sample]) for sample in values])
    return torch.einsum("akp,bkp->ab", rows, rows)


# nodes (12, ·) of four graphs become graphs (4, ·); `graph` says which graph a node belongs to
POOLING = {
    "index_add": lambda h, graph: torch.zeros(4, 5, dtype=h.dtype).index_add(0, graph, h),
    "scatter_add": lambda h, graph: torch.zeros(4, 5, dtype=h.dtype).scatter_add(0, graph[:, None].expand(-1, 5), h),
    "index_put": lambda h, graph: torch.zeros(4, 5, dtype=h.dtype).index_put((graph,), h, accumulate=True),
    "matrix": lambda h, graph: torch.nn.functional.one_hot(graph, 4).to(h.dtype).T @ h,
    "sparse matrix": lambda h, graph: torch.nn.functional.one_hot(graph, 4).to(h.dtype).T.to_sparse_csr() @ h,
    "mask": lambda h, graph: (h * (graph == torch.arange(4)[:, None])[..., None]).sum(1),
    "order": lambda h, graph: h.reshape(4, 3, 5).sum(1)[graph[::3].argsort()],
    "gather": lambda h, graph: h.reshape(4, 3, 5).sum(1).gather(0, graph[::3].argsort()[:, None].expand(-1, 5)),
    "index_select": lambda h, graph: h.reshape(4, 3, 5).sum(1).index_select(0, graph[::3].argsort()),
    "embedding": lambda h, graph: torch.nn.functional.embedding(graph[::3].argsort(), h.reshape(4, 3, 5).sum(1)),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("name", POOLING)
def test_each_batch_of_one_structure_finds_its_rows(name):
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    criterion = MGSLoss(nn.CrossEntropyLoss(), penalty=mgs.Penalty("trace", 1.0))
    moved = [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], [3, 3, 3, 0, 0, 1, 1, 1, 1, 2, 2, 2], [2, 2, 2, 3, 3, 3, 1, 1, 1, 0, 0, 0]]
    for graph in map(torch.tensor, moved):
        outputs = BOTH[1](POOLING[name](torch.tanh(BOTH[0](x)), graph))
        criterion(outputs, y)
        expected = loop(torch.nn.functional.cross_entropy(outputs, y, reduction="none")[:, None])
        torch.testing.assert_close(criterion.last.kernel, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_sparse_inputs_are_as_dense_ones(sparse):
    layer, x = nn.Linear(5, 2, dtype=torch.float64), (torch.randn(4, 5, dtype=torch.float64)).relu()
    weight = {name: value.detach() for name, value in layer.named_parameters()}
    model = mgs.FunctionalModel(lambda p, x: sparse(x) @ p["weight"].T + p["bias"], weight)
    torch.testing.assert_close(mgs.kernel(model, x), mgs.kernel(layer, x))


class Routed(nn.Module):
    """Send each sample through one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 5, dtype=torch.float64) for _ in range(2))
        self.gate, self.out = nn.Linear(3, 2, dtype=torch.float64), nn.Linear(5, 2, dtype=torch.float64)

    def forward(self, x):
        gates = self.gate(x).softmax(-1)
        hidden = x.new_zeros(len(x), 5)
        for number, expert in enumerate(self.experts):
            own = (gates.argmax(-1) == number).nonzero()[:, 0]
            hidden = hidden.index_add(0, own, expert(x[own]) * gates[own, number, None])
        return self.out(torch.tanh(hidden))


class Branching(nn.Module):
    """Choose one of two layers by the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 2, dtype=torch.float64) for _ in range(2))

    def forward(self, x):
        return self.layers[int(x.sum() > 0)](x)


class Biased(nn.Module):
    """Add the bias within the product or after it, as the data have it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 40, dtype=torch.float64)

    def forward(self, x):
        weight, bias = self.linear.weight, self.linear.bias
        return nn.functional.linear(x, weight, bias) if x.sum() > 0 else 2 * nn.functional.linear(x, weight) + bias


@pytest.mark.parametrize(("make", "chunk_size"), [(Routed, None), (Routed, 3), (Routed, 1), (Branching, 1), (Biased, 1)])
def test_samples_that_take_other_ways(make, chunk_size):
    model, x = make(), torch.randn(8, 3, dtype=torch.float64)
    rows = []
    for sample in x:
        parts = [
            torch.autograd.grad(value, list(model.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True)
            for value in model(sample[None])[0]
        ]
        rows.append(torch.stack([torch.cat([part.reshape(-1) for part in by_parameter]) for by_parameter in parts]))
    rows = torch.stack(rows)
    torch.testing.assert_close(mgs.kernel(model, x, chunk_size=chunk_size), torch.einsum("akp,bkp->ab", rows, rows))
    full = mgs.kernel(model, x, chunk_size=chunk_size, output="full")
    torch.testing.assert_close(full, torch.einsum("akp,bdp->akbd", rows, rows))


def test_routes_of_each_batch_are_found_anew():
    torch.manual_seed(0)
    model, criterion = Routed(), MGSLoss(nn.CrossEntropyLoss(), weighting="agreement", penalty=mgs.Penalty("trace", 1.0))
    for _ in range(3):
        x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(0, 2, (8,))
        criterion(model(x), y).backward()
        expected = mgs.kernel(model, x, y, output="loss", loss=nn.CrossEntropyLoss(reduction="none"), chunk_size=1)
        torch.testing.assert_close(criterion.last.kernel, expected)
