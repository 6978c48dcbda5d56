"""Time of forward pass and kernel through ONNX: ratios to onnx's ReferenceEvaluator, onnxruntime and the native route.

Run with `python -P benchmarks/onnx_route.py`. Methods are interleaved; each ratio is one of medians from the same run. The
networks are small on purpose: what is measured is the cost of the interpreter besides that of the arithmetic.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import io
import time
import warnings
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx.reference import ReferenceEvaluator
from rich.console import Console
from rich.table import Table

import mgs_core as mgs
from mgs_core.experiments.models import build

SAMPLES = 64


def timed(methods: dict[str, Callable[[], Any]], repeats: int = 15) -> dict[str, float]:
    """Return the median time of each method, in seconds."""
    for run in methods.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, run in methods.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def networks() -> Iterator[tuple[str, onnx.ModelProto, tuple[int, ...]]]:
    """Yield names, graphs and shapes of samples: the built-in networks and, where PyTorch is installed, what it exports."""
    for name, shape in (("mlp", (64,)), ("cnn", (8, 8))):
        yield name, build(name, shape, 10, seed=0).plain, shape
    try:
        import torch
    except ImportError:
        return
    nn = torch.nn

    class Last(nn.Module):
        def __init__(self, inner: nn.Module, width: int) -> None:
            super().__init__()
            self.inner, self.head = inner, nn.Linear(width, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x)
            return self.head((y[0] if isinstance(y, tuple) else y)[:, -1])

    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    modules = {
        "transformer": (Last(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 32), (12, 32)),
        "lstm": (Last(nn.LSTM(16, 32, batch_first=True), 32), (12, 16)),
        "depthwise": (
            nn.Sequential(
                nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 3, groups=16, stride=2),
                nn.GELU(), nn.Conv2d(16, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
            ),
            (3, 16, 16),
        ),
    }  # fmt: skip
    for name, (module, shape) in modules.items():
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module.eval(), (torch.randn(2, *shape),), buffer, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n"}}
            )
        yield name, onnx.load_from_string(buffer.getvalue()), shape


def forward(proto: onnx.ModelProto, shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """Return forward passes of one network: this library on NumPy, and the two evaluators."""
    x = np.random.default_rng(0).normal(size=(SAMPLES, *shape)).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    model, reference = mgs.onnx.load(proto), ReferenceEvaluator(proto)
    return {
        "mgs_core, NumPy": lambda: model(x),
        "onnx ReferenceEvaluator": lambda: reference.run(None, {"x": x}),
        "onnxruntime": lambda: session.run(None, {"x": x}),
    }


def kernels(backend: str) -> dict[str, Callable[[], Any]]:
    """Return the kernel of a multilayer perceptron through ONNX, and of the same function written in the backend."""
    proto = build("mlp", (64,), 10, seed=0).plain
    model, get = mgs.onnx.load(proto, backend=backend), mgs.get_backend(backend)
    xp = get.namespace
    x = get.asarray(np.random.default_rng(0).normal(size=(SAMPLES, 64)).astype(np.float32))
    relu = getattr(xp, "mgs_relu", None) or (lambda value: xp.maximum(value, xp.zeros_like(value)))

    def function(p: Any, inputs: Any) -> Any:
        hidden = inputs
        for layer in ("hidden_0", "hidden_1"):
            hidden = relu(xp.matmul(hidden, p[f"{layer}.weight"]) + p[f"{layer}.bias"])
        return xp.matmul(hidden, p["output.weight"]) + p["output.bias"]

    native = mgs.FunctionalModel(function, dict(model.parameters))
    return {
        "through ONNX": lambda: get.to_numpy(mgs.kernel(model, x, output="sum")),
        "native": lambda: get.to_numpy(mgs.kernel(native, x, output="sum")),
    }


def main() -> None:
    """Print the tables."""
    console = Console()
    shown = Table("network", "method", "ms", "ratio to mgs_core", title=f"Forward pass, {SAMPLES} samples, one thread")
    for name, proto, shape in networks():
        times = timed(forward(proto, shape))
        for method, value in times.items():
            shown.add_row(name, method, f"{1e3 * value:.3f}", f"{value / times['mgs_core, NumPy']:.2f}")
    console.print(shown)
    shown = Table("backend", "through ONNX, ms", "native, ms", "ratio", title="Kernel, output=sum, perceptron 64-256-256-10")
    for backend, installed in mgs.available_backends().items():
        if installed and backend != "keras":
            times = timed(kernels(backend))
            ours, native = times["through ONNX"], times["native"]
            shown.add_row(backend, f"{1e3 * ours:.2f}", f"{1e3 * native:.2f}", f"{ours / native:.2f}")
    console.print(shown)


if __name__ == "__main__":
    main()
