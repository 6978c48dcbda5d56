"""Fused attention on CPU is differentiated twice by a function of the library: against PyTorch's unfused attention."""

import pytest

torch = pytest.importorskip("torch")
from mgs_core.adapters.torch import MGSLoss  # noqa: E402  # after the skip
from torch import nn  # noqa: E402  # after the skip
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402  # after the skip
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402  # after the skip

import mgs_core as mgs  # noqa: E402  # after the skip

N, HEADS, QUERIES, KEYS, SIZE = 5, 2, 6, 4, 3


class Attention(nn.Module):
    """Let queries from one input attend to keys and values from another."""

    def __init__(self, trainable: str, shared: int = 1, **options) -> None:
        super().__init__()
        self.heads = HEADS * shared, HEADS, HEADS
        self.q, self.k, self.v = (nn.Linear(SIZE, heads * SIZE) for heads in self.heads)
        self.out = nn.Linear(HEADS * shared * SIZE, 3)
        for name, value in self.named_parameters():
            value.requires_grad_(name[0] in trainable)
        self.options = options

    def forward(self, x, y):
        parts = zip((self.q(x), self.k(y), self.v(y)), self.heads, strict=True)
        split = (part.unflatten(-1, (heads, SIZE)).transpose(1, 2) for part, heads in parts)
        mixed = scaled_dot_product_attention(*split, **self.options)
        self.fused = "FlashAttentionForCpu" in mixed.grad_fn.name()
        return torch.tanh(self.out(mixed.transpose(1, 2).flatten(2))).mean(1)


def gradient(model, inputs, targets):
    criterion = MGSLoss(nn.CrossEntropyLoss(), penalty=mgs.Penalty("log_determinant", 1.0))
    model.zero_grad()
    criterion(model(*inputs), targets).backward()
    return [value.grad for value in model.parameters() if value.grad is not None]


MASK = torch.tensor([[0.0, 1.0, -2.0, 0.5]] * QUERIES, dtype=torch.float64) * torch.arange(QUERIES)[:, None]
NOTHING_SEEN = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril()
NOTHING_SEEN[2] = False


@pytest.mark.parametrize(
    ("trainable", "options"),
    [
        ("qkvo", {}),
        ("qkvo", {"scale": 0.7}),
        ("qkvo", {"is_causal": True}),
        ("qkvo", {"attn_mask": MASK}),
        ("qkvo", {"attn_mask": MASK.expand(N, 1, -1, -1)}),
        ("qkvo", {"attn_mask": MASK[None, None]}),
        ("qkvo", {"attn_mask": torch.linspace(-1, 1, N * HEADS * QUERIES * KEYS).double().view(N, HEADS, QUERIES, KEYS)}),
        ("qkvo", {"attn_mask": NOTHING_SEEN}),
        ("qkvo", {"shared": 2, "enable_gqa": True}),
        ("qkvo", {"shared": 3, "enable_gqa": True, "attn_mask": MASK.expand(N, 1, -1, -1)}),
        ("ko", {}),
        ("q", {}),
        ("v", {}),
    ],
)
@pytest.mark.parametrize("chunk", [1, 48, 1 << 16])
def test_second_derivative_of_fused_attention(trainable, options, chunk, monkeypatch):
    monkeypatch.setattr("mgs_core.backends.torch.attention._CHUNK", chunk)
    torch.manual_seed(0)
    model = Attention(trainable, **options).double()
    inputs = torch.randn(N, QUERIES, SIZE).double(), torch.randn(N, KEYS, SIZE).double()
    targets = torch.arange(N) % 3
    found = gradient(model, inputs, targets)
    assert model.fused
    with sdpa_kernel(SDPBackend.MATH):
        expected = gradient(model, inputs, targets)
    assert not model.fused
    assert len(found) == 2 * len(trainable)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_in_low_precision():
    torch.manual_seed(0)
    model = Attention("qkvo")
    inputs, targets = (torch.randn(N, QUERIES, SIZE), torch.randn(N, KEYS, SIZE)), torch.arange(N) % 3
    expected = gradient(model, inputs, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradient(model, inputs, targets)
    one, other = (torch.cat([part.reshape(-1) for part in parts]) for parts in (found, expected))
    assert float((one - other).norm()) < 0.03 * float(other.norm())  # bfloat16 has eight bits
