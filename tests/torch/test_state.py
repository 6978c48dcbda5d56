"""What the backend keeps and where it works: plans, threads, devices, processes."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import textwrap
import threading
import time

import pytest

import mgs_core as mgs

torch = pytest.importorskip("torch")

from mgs_core.adapters.torch import MGSLoss, MGSMonitor  # noqa: E402  # after the skip
from mgs_core.backends.torch import _backend  # noqa: E402  # after the skip
from torch import nn  # noqa: E402  # after the skip

LENGTHS = range(2, 102)


def test_plans_of_a_hundred_lengths_do_not_all_stay(monkeypatch):
    monkeypatch.setattr("mgs_core._known.KEPT_FINDINGS", 64)
    criterion = MGSLoss(nn.CrossEntropyLoss(), weighting="agreement")
    model, cell = nn.Linear(3, 2), nn.Linear(3, 3)
    for length in LENGTHS:
        criterion(model(cell(torch.randn(2, length, 3)).mean(1)), torch.tensor([0, 1]))
    assert len(criterion._graph["plans"]) == 64


def test_a_bound_method_is_planned_once(monkeypatch):
    made = []
    original = _backend.make_plan
    monkeypatch.setattr(_backend, "make_plan", lambda *given: made.append(given) or original(*given))

    class Network:
        def outputs(self, p, x):
            return torch.tanh(x @ p["w"])

    network, parameters, x = Network(), {"w": torch.randn(3, 2)}, torch.randn(4, 3)
    for _ in range(3):
        mgs.kernel(mgs.FunctionalModel(network.outputs, parameters), x)
    assert len(made) == 2  # and verified at the second use


def test_threads_do_not_nest_in_one_another():
    backend, inside, done, found = mgs.get_backend("torch"), threading.Event(), threading.Event(), []

    def slow(p):
        inside.set()
        assert done.wait(30)
        return (p["w"] ** 2).sum()

    other = threading.Thread(target=lambda: found.append(backend.value_and_gradient(slow)({"w": torch.ones(2)})))
    other.start()
    assert inside.wait(30)
    value, gradient = backend.value_and_gradient(lambda p: (p["w"] ** 3).sum())({"w": torch.ones(2)})
    done.set()
    other.join()
    assert not value.requires_grad
    assert not gradient["w"].requires_grad
    assert len(found) == 1


class Meeting(nn.Module):
    """Be evaluated by two threads at once, if they may, the second of which leaves last."""

    def __init__(self):
        super().__init__()
        self.out, self.both, self.turns = nn.Linear(4, 2), threading.Barrier(2), itertools.count()
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x):
        turn = next(self.turns)
        with contextlib.suppress(threading.BrokenBarrierError):
            self.both.wait(0.5)
        time.sleep(0.1 * turn)
        return self.out(x) - self.mean


def test_threads_leave_a_module_its_buffers():
    model = Meeting()
    mean, threads = model.mean, [threading.Thread(target=mgs.kernel, args=(model, torch.ones(3, 4))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.mean is mean


def test_threads_that_wait_for_one_another_do():
    first, second = Meeting(), Meeting()
    second.both = first.both
    threads = [threading.Thread(target=mgs.kernel, args=(model, torch.ones(3, 4))) for model in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not first.both.broken


class Indexed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(9, 3), nn.Linear(3, 2)

    def forward(self, ids):
        hidden = torch.tanh(self.table(ids)).mean(1)
        return self.out(hidden)[torch.arange(len(ids), device=ids.device)]


def test_another_default_device_changes_nothing():
    torch.manual_seed(0)
    model, ids, y = Indexed(), torch.randint(0, 9, (4, 5)), torch.tensor([0, 1, 1, 0])
    convolution = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(12, 2)))
    images = torch.randn(4, 2, 3, 3)

    def everything():
        criterion = MGSLoss(nn.CrossEntropyLoss(), penalty=mgs.Penalty("log_determinant", 0.1), weighting="agreement")
        found = [criterion(model(ids), y)]
        found.append(MGSLoss(nn.CrossEntropyLoss(), weighting="agreement")(model(ids), y))
        monitor = MGSMonitor(model, ids, labels=y, every=1)
        found.append(torch.tensor(monitor.step().trace, device="cpu"))
        found += [mgs.kernel(convolution, images), mgs.kernel(convolution, images, output="random")]
        found.append(mgs.kernel(model, ids, differentiable=True))
        return [value.detach() for value in found]

    expected = everything()
    with torch.device("meta"):
        again = everything()
    for value, other in zip(again, expected, strict=True):
        torch.testing.assert_close(value, other)


@pytest.mark.parametrize(
    "use",
    [
        "mgs.agreement(kernel)",
        "mgs.agreement_weights(kernel)",
        "mgs.Penalty('trace')(kernel)",
        "mgs.Penalty('log_determinant')(kernel)",
    ],
)
def test_arrays_stay_on_their_device_in_a_fresh_process(use):
    code = f"""
    import torch
    import mgs_core as mgs
    kernel = torch.eye(3, device="meta")
    try:
        found = {use}
    except Exception as error:  # values that cannot be looked at are another matter
        assert "Tensor on device cpu" not in str(error) and "same device" not in str(error), error
    else:
        assert found.device.type == "meta"
    assert "mgs_core.backends.torch" in __import__("sys").modules
    """
    done = subprocess.run([sys.executable, "-P", "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
