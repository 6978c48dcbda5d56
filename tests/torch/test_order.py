"""What kernels, and derivatives of penalties, hold at once."""

from __future__ import annotations

import pytest

import mgs_core as mgs

torch = pytest.importorskip("torch")

from mgs_core.adapters.torch import MGSLoss  # noqa: E402  # after the skip
from mgs_core.backends.torch import collect  # noqa: E402  # after the skip
from torch import nn  # noqa: E402  # after the skip


def peak(step) -> int:
    """Return the most bytes held during the step above those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def test_layers_are_differentiated_one_after_the_other():
    # activations are large against weights, so that the memory is that of activations and their gradients
    depth, n, s, width = 12, 16, 128, 32
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width, bias=False), nn.ReLU())]
    model, x = nn.Sequential(*layers), torch.randn(n, s, width)
    criterion = MGSLoss(lambda outputs, _: outputs.square().sum((1, 2)), penalty=mgs.Penalty("trace", 0.1))

    def step() -> None:
        model.zero_grad()
        criterion(model(x), None).backward()

    step()
    step()  # what was found at the first is verified at the second, which holds more
    activation = 4 * n * s * width
    # the forward pass keeps one for each layer, the first gradient another; all contractions at once would give two more
    assert peak(step) < 3 * depth * activation


def test_memory_of_a_kernel_does_not_grow_with_the_outputs_of_a_large_model(monkeypatch):
    def peak_of(outputs: int) -> int:
        torch.manual_seed(0)
        head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 64, outputs))
        model, x = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.Tanh(), head), torch.randn(32, 3, 8, 8)
        mgs.kernel(model, x)
        return peak(lambda: mgs.kernel(model, x))

    monkeypatch.setattr(collect, "_TOGETHER", 1)
    assert peak_of(40) < 1.5 * peak_of(4)
    monkeypatch.undo()
    assert peak_of(40) > 2 * peak_of(4)  # a small model takes all outputs at once, which is faster
