"""Networks of several exporters, each with inputs and an oracle in its own framework."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest


@dataclass(frozen=True)
class Exported:
    proto: onnx.ModelProto
    inputs: np.ndarray
    module: Any


def torch_zoo() -> dict[str, Any]:
    """Modules and shapes of one sample (of integers: a lookup below 7)."""
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(6, 8)
            self.position = nn.Parameter(torch.randn(5, 8))
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.layer(self.embed(x) + self.position).mean(1))

    class Recurrent(nn.Module):
        def __init__(self, kind, **options):
            super().__init__()
            self.inner = kind(4, 5, batch_first=True, **options)
            self.head = nn.Linear(10 if options.get("bidirectional") else 5, 3)

        def forward(self, x):
            return self.head(self.inner(x)[0][:, -1])

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 6)
            self.norm = nn.LayerNorm(6)
            self.bias = nn.Parameter(torch.randn(7))

        def forward(self, x):
            h = self.norm(torch.tanh(self.table(x)).mean(1))
            return h @ self.table.weight.T + self.bias

    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 3)

        def forward(self, x):
            n, t, _ = x.shape
            q, k, v = self.qkv(x).reshape(n, t, 3, 2, 3).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(y.transpose(1, 2).reshape(n, t, 6)[:, -1])

    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(2, 6, 3, stride=3)
            self.token = nn.Parameter(torch.randn(1, 1, 6))
            self.mix = nn.MultiheadAttention(6, 2, batch_first=True)
            self.out = nn.Linear(6, 3)

        def forward(self, x):
            h = self.patch(x).flatten(2).transpose(1, 2)
            h = torch.cat([self.token.expand(h.shape[0], -1, -1), h], dim=1)
            return self.out((h + self.mix(h, h, h)[0])[:, 0])

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.gain = nn.Linear(5, 8), nn.Linear(8, 3), nn.Parameter(torch.randn(8))

        def forward(self, x):
            left, right = self.a(x).chunk(2, dim=-1)
            h = torch.cat([torch.sigmoid(left) * right, left.clamp(-0.5, 0.5)], dim=-1) * self.gain
            return torch.log_softmax(self.b(h), dim=-1)

    conv = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, groups=2, stride=2),
        nn.GroupNorm(2, 6), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1), nn.InstanceNorm2d(3, affine=True), nn.Upsample(scale_factor=2),
        nn.PReLU(3), nn.AvgPool2d(2, ceil_mode=True, padding=1), nn.Flatten(), nn.Linear(3 * 9 * 9, 3),
    )  # fmt: skip
    return {
        "mlp": (nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.ELU(), nn.Linear(7, 3)), (5,)),
        "one_unit": (nn.Sequential(nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 1)), (5,)),
        "conv": (conv, (2, 8, 8)),
        "conv1d": (nn.Sequential(nn.Conv1d(2, 3, 3, dilation=2), nn.Mish(), nn.Flatten(), nn.Linear(3 * 5, 3)), (2, 9)),
        "conv3d": (
            nn.Sequential(nn.Conv3d(1, 2, 2), nn.Softplus(), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(2, 3)),
            (1, 3, 3, 3),
        ),
        "decoder": (decoder, (2, 3, 3)),
        "normalised": (nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Hardswish(), nn.Linear(6, 3)), (5,)),
        "attention": (Attention(), (5, 6)),
        "causal": (Causal(), (5, 6)),
        "vision": (Vision(), (2, 6, 6)),
        "gated": (Gated(), (5,)),
        "tied": (Tied(), "ids"),
        "lstm": (Recurrent(nn.LSTM, bidirectional=True, num_layers=2), (6, 4)),
        "gru": (Recurrent(nn.GRU), (6, 4)),
        "rnn": (Recurrent(nn.RNN), (6, 4)),
    }


TORCH = (
    "mlp", "one_unit", "conv", "conv1d", "conv3d", "decoder", "normalised", "attention", "causal", "vision", "gated", "tied",
    "lstm", "gru", "rnn",
)  # fmt: skip
_cache: dict[tuple[str, str], Exported] = {}


def export_torch(name: str, exporter: str) -> Exported:
    torch = pytest.importorskip("torch")
    if (name, exporter) not in _cache:
        torch.manual_seed(0)
        module, shape = torch_zoo()[name]
        module.eval()
        with torch.no_grad():  # exporters merge weights of equal value, as a fresh model has them
            for parameter in module.parameters():
                parameter.copy_(0.7 * torch.randn(parameter.shape))
        x = torch.randint(0, 7, (4, 3)) if shape == "ids" else torch.randn(4, *shape)
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if exporter == "dynamo":
                pytest.importorskip("onnxscript")
                batch = torch.export.Dim("batch", min=1, max=1024)
                program = torch.onnx.export(
                    module, (x,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False, optimize=name != "conv"
                )
                program.save(buffer)
            else:
                torch.onnx.export(
                    module, (x,), buffer, dynamo=False, input_names=["x"], output_names=["y"],
                    dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}}, do_constant_folding=name != "conv",
                    training=torch.onnx.TrainingMode.PRESERVE if name == "conv" else torch.onnx.TrainingMode.EVAL,
                )  # fmt: skip
        _cache[name, exporter] = Exported(onnx.load_from_string(buffer.getvalue()), x.numpy(), module)
    return _cache[name, exporter]


@pytest.fixture(params=[f"{exporter}-{name}" for exporter in ("trace", "dynamo") for name in TORCH])
def from_torch(request) -> Exported:
    exporter, name = request.param.split("-")
    return export_torch(name, exporter)
