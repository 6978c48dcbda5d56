"""Time and memory of kernels and regularised steps in PyTorch, as ratios to the plain training step, beside its peers.

Run with `python -P benchmarks/torch.py` (without -P this file would be imported as torch); `--help` lists the choices. Methods
are interleaved, and each ratio is one of medians from the same run. Times are those of the processor, on one thread, so that
other work on the machine disturbs them little; on a GPU they are those of the clock, and steps are also captured as graphs of the
device and replayed. Memory is the peak above what was held
before, as PyTorch's allocator saw it. BackPACK (`pip install --no-deps -r benchmarks/torch.txt`) is measured where it is
installed and knows the model. What takes more than ten plain steps is measured once.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from mgs_core.adapters.torch import MGSLoss, MGSMonitor
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

import mgs_core as mgs

PENALTY = mgs.Penalty("log_determinant", strength=0.1)
Step = Callable[[], Any]


class Transformer(nn.Module):
    """Classify sequences of tokens by four encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.embedding = nn.Embedding(1000, 128)
        self.position = nn.Parameter(0.02 * torch.randn(1, 64, 128))
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.head(self.encoder(self.embedding(x) + self.position).mean(1))


class Block(nn.Module):
    """Be the basic block of a residual network, with group normalisation."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(32, after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(32, after)
        same = stride == 1 and before == after
        self.skip = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.GroupNorm(32, after))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return activations."""
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.skip(x))


def resnet() -> nn.Module:
    """Return an 18-layer residual network for small images."""
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [Block(a, b, 2 if b > a else 1) for a, b in pairwise(widths)]
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(32, 64), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def cnn() -> nn.Module:
    """Return a plain convolutional network."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if before == after else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 8 * 8, 10))


def mlp() -> nn.Module:
    """Return a multilayer perceptron."""
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (mlp, (784,), 128),
    "cnn": (cnn, (3, 32, 32), 64),
    "transformer": (Transformer, (64,), 32),
    "resnet18": (resnet, (3, 32, 32), 32),
}


class Case:
    """Hold one model and batch, and the steps to be measured on them."""

    def __init__(self, name: str, n: int | None, device: torch.device) -> None:
        make, shape, usual = MODELS[name]
        torch.manual_seed(0)
        n = n or usual
        self.model = make().to(device)
        tokens = name == "transformer"
        self.x = torch.randint(0, 1000, (n, *shape), device=device) if tokens else torch.randn(n, *shape, device=device)
        self.y = torch.randint(0, 10, (n,), device=device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6)
        self.plain = nn.CrossEntropyLoss()

    def train(self, criterion: Any) -> Step:
        """Return a training step; attention that is twice differentiable where a penalty needs it, which on CPU is every."""

        def step() -> None:
            self.optimizer.zero_grad()
            if getattr(criterion, "penalty", None) is None or self.x.device.type == "cpu":
                outputs = self.model(self.x)
            else:
                with sdpa_kernel(SDPBackend.MATH):
                    outputs = self.model(self.x)
            criterion(outputs, self.y).backward()
            self.optimizer.step()

        return step

    def kernel(self) -> Any:
        """Return the kernel of the per-sample losses."""
        return mgs.kernel(self.model, self.x, self.y, output="loss", loss=unreduced)

    def loop(self) -> Any:
        """Return the kernel from a loop of ordinary gradients."""
        rows = []
        for a in range(len(self.x)):
            loss = cross_entropy(self.model(self.x[a : a + 1]), self.y[a : a + 1])
            rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(self.model.parameters()))]))
        rows = torch.stack(rows)
        return rows @ rows.T

    def vmap(self, parameters: dict[str, torch.Tensor] | None = None) -> Any:
        """Return the kernel from `torch.func`: vmap of grad, and a matrix product."""

        def loss(values: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return cross_entropy(torch.func.functional_call(self.model, values, (x[None],)), y[None])

        values = parameters or {name: value.detach() for name, value in self.model.named_parameters()}
        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(values, self.x, self.y)
        rows = torch.cat([gradient.flatten(1) for gradient in gradients.values()], 1)
        return rows @ rows.T

    def vmap_penalised(self) -> None:
        """Take a training step with the penalty on that kernel."""
        self.optimizer.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):
            loss = self.plain(self.model(self.x), self.y) + PENALTY(self.vmap(dict(self.model.named_parameters())))
        loss.backward()
        self.optimizer.step()

    def backpack(self) -> Step | None:
        """Return the kernel from BackPACK's BatchGrad; None where it is not installed or does not know the model."""
        if importlib.util.find_spec("backpack") is None:
            return None
        from backpack import backpack, extend
        from backpack.extensions import BatchGrad

        model, criterion = extend(make_copy(self.model), use_converter=False), extend(nn.CrossEntropyLoss(reduction="sum"))

        def step() -> Any:
            model.zero_grad()
            with backpack(BatchGrad()):
                criterion(model(self.x), self.y).backward()
            rows = torch.cat([value.grad_batch.flatten(1) for value in model.parameters()], 1)
            return rows @ rows.T

        try:
            kernel = step()
        except Exception:  # BackPACK refuses unknown layers in many ways
            return None
        return step if torch.allclose(kernel, self.kernel(), rtol=1e-3, atol=1e-4 * float(kernel.abs().max())) else None

    def methods(self, peers: bool) -> dict[str, Step]:
        """Return what is measured, by name; the first is the plain step."""
        lazy = MGSLoss(self.plain, penalty=PENALTY, every=8)
        steps: dict[str, Step] = {
            "plain step": self.train(self.plain),
            "kernel": self.kernel,
            "penalised step": self.train(MGSLoss(self.plain, penalty=PENALTY)),
            "penalised, every=8": repeated(self.train(lazy), 8),
            "agreement-weighted step": self.train(MGSLoss(self.plain, weighting="agreement")),
            "measurement of the monitor": MGSMonitor(self.model, self.x, labels=self.y, every=1).step,
        }
        if self.x.device.type == "cuda":  # without the processor's share, which is most of it in small networks
            steps |= {
                "plain step, captured": captured(self.train(nn.CrossEntropyLoss())),
                "kernel, captured": captured(self.kernel),
                "penalised step, captured": captured(self.train(MGSLoss(self.plain, penalty=PENALTY))),
                "agreement-weighted step, captured": captured(self.train(MGSLoss(self.plain, weighting="agreement"))),
            }
        if peers:
            steps |= {
                "kernel, torch.func": self.vmap,
                "penalised step, torch.func": self.vmap_penalised,
                "kernel, loop": self.loop,
            }
            backpack = self.backpack()
            steps |= {} if backpack is None else {"kernel, BackPACK": backpack}
        return steps


def unreduced(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss of each sample."""
    return cross_entropy(outputs, targets, reduction="none")


def make_copy(model: nn.Module) -> nn.Module:
    """Return a copy, for what leaves marks on a model."""
    import copy

    return copy.deepcopy(model)


def captured(step: Step) -> Step:
    """Return the step as a graph of the device, which is replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(10):  # until after a use at which the samples are looked for
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def repeated(step: Step, times: int) -> Step:
    """Return the step taken several times; `repeats` says how often."""

    def steps() -> None:
        for _ in range(times):
            step()

    steps.repeats = times  # type: ignore[attr-defined]
    return steps


def seconds(step: Step, device: torch.device) -> float:
    """Return what one step takes."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) / getattr(step, "repeats", 1)


def peak(step: Step, case: Case, device: torch.device) -> float:
    """Return the peak of memory during a step above that before it, in MiB; gradients of earlier steps are gone by then."""
    case.optimizer.zero_grad()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest / 2**20


def measure(case: Case, device: torch.device, budget: float, peers: bool) -> dict[str, tuple[float, float]]:
    """Return the median seconds and the peak MiB of each method."""
    steps = case.methods(peers)
    found: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    start = time.perf_counter()
    while len(found["plain step"]) < 5 or time.perf_counter() - start < budget:
        for name, step in steps.items():
            slow = found[name] and median(found[name]) > 10 * median(found["plain step"])
            if not slow:
                found[name].append(seconds(step, device))
        if time.perf_counter() - start > 10 * budget:
            break
    return {name: (median(values), peak(steps[name], case, device)) for name, values in found.items()}


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--samples", type=int, nargs="*", default=[None], help="sizes of the batch; by default that of the model")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each model")
    parser.add_argument("--no-peers", action="store_true", help="measure this library alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread"
    for name in options.models:
        for n in options.samples:
            case = Case(name, n, device)
            table = Table(title=f"{name}, n = {len(case.x)}, {where}, torch {torch.__version__}")
            for column in ("", "ms", "× plain step", "peak MiB", "× plain step"):
                table.add_column(column, justify="right" if column else "left")
            results = measure(case, device, options.seconds, not options.no_peers)
            plain = results["plain step"]
            for method, (time_taken, memory) in results.items():
                cells = (1e3 * time_taken, time_taken / plain[0], memory, memory / plain[1])
                table.add_row(method, *(f"{cell:.4g}" if cell >= 100 else f"{cell:.2f}" for cell in cells))
            Console().print(table)


if __name__ == "__main__":
    main()
