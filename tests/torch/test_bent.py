"""Backward passes that are not linear: the kernel has the gradients that a loop over the samples has, or is refused."""

from __future__ import annotations

import pytest

import mgs_core as mgs

torch = pytest.importorskip("torch")

from mgs_core.adapters.torch import MGSLoss  # noqa: E402  # after the skip
from torch import nn  # noqa: E402  # after the skip
from torch.nn import functional  # noqa: E402  # after the skip

BENDS = {
    "normalised": lambda g: functional.normalize(g, dim=1),
    "sign": lambda g: g.sign(),
    "clipped": lambda g: g / (g.norm(dim=1, keepdim=True) / 1e-3).clamp(min=1),
    "clipped by half": lambda g: g / (g.norm(dim=1, keepdim=True) / 0.05).clamp(min=1),
    "shifted": lambda g: g + 0.01,
    "normalised over the batch": lambda g: g / g.norm(),
    "unchanged": lambda g: g.clone(),
    "scaled": lambda g: 0.1 * g,
}


class Bending(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bend):
        ctx.bend = bend
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return ctx.bend(g), None


def hooked(h, bend):
    h.register_hook(bend)
    return h


@pytest.mark.parametrize("output", ["loss", "sum"])
@pytest.mark.parametrize("apply", [Bending.apply, hooked])
@pytest.mark.parametrize("name", BENDS)
@pytest.mark.parametrize("trainable", [True, False])
def test_kernels_are_those_of_a_loop_or_refused(name, apply, output, trainable):
    torch.manual_seed(0)
    first, last = nn.Linear(6, 9).double(), nn.Linear(9, 4).double().requires_grad_(trainable)
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.arange(7) % 4
    parameters = [value for value in (*first.parameters(), *last.parameters()) if value.requires_grad]

    def forward(inputs):
        return last(torch.tanh(apply(first(inputs), BENDS[name])))

    rows = []
    for sample in range(7):
        scores = forward(x[sample : sample + 1])
        head = functional.cross_entropy(scores, y[sample : sample + 1]) if output == "loss" else scores.sum()
        rows.append(torch.cat([part.reshape(-1) for part in torch.autograd.grad(head, parameters)]))
    rows = torch.stack(rows)
    for options in ({"penalty": mgs.Penalty("trace", 1.0), "output": output}, {"weighting": "agreement"}):
        if "weighting" in options and output == "sum":
            continue
        criterion = MGSLoss(nn.CrossEntropyLoss(), **options)
        try:
            criterion(forward(x), y)
        except mgs.UnsupportedModelError:
            assert name not in ("unchanged", "scaled")
        else:
            torch.testing.assert_close(criterion.last.kernel, rows @ rows.T, rtol=1e-10, atol=1e-12)


def test_the_refusal_says_what_is_not_linear():
    first = nn.Linear(6, 9).double()
    with pytest.raises(mgs.UnsupportedModelError, match=r"`model` must have a backward pass that is linear .*a hook of a tensor"):
        MGSLoss(nn.MSELoss(), penalty=mgs.Penalty("trace"))(
            Bending.apply(first(torch.eye(6).double()), torch.sign), torch.zeros(6, 9).double()
        )
