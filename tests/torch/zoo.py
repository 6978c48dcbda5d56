"""A zoo of models as users write them, in float64, small enough for loops of ordinary gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune


class Model(nn.Module):
    """Hold modules and parameters by name, and a forward function of them."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.5 * torch.randn(shape))


def constant(model: nn.Module, **values: Any) -> nn.Module:
    for name, value in values.items():
        model.register_buffer(name, value)
    return model


def lazily(model: nn.Module, x: Any) -> tuple[nn.Module, Any]:
    model(x)
    return model, x


X = torch.randn


def block(c: int, norm: Callable[[int], nn.Module]) -> nn.Module:
    return Model(
        lambda s, x: torch.tanh(s.norm2(s.conv2(torch.tanh(s.norm1(s.conv1(x))))) + s.skip(x)),
        conv1=nn.Conv2d(c, 2 * c, 3, 2, 1, bias=False),
        norm1=norm(2 * c),
        conv2=nn.Conv2d(2 * c, 2 * c, 3, 1, 1, bias=False),
        norm2=norm(2 * c),
        skip=nn.Sequential(nn.Conv2d(c, 2 * c, 1, 2, bias=False), norm(2 * c)),
    )


def resnet(norm: Callable[[int], nn.Module]) -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(nn.Conv2d(3, 2, 3, 1, 1, bias=False), norm(2), nn.Tanh(), block(2, norm), block(4, norm), *head)


def transformer(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation="gelu", **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def attention(s: Any, x: Any, bias: Any) -> Any:
    return ((x @ s.q) @ (x @ s.k).mT + bias).softmax(-1) @ x @ s.o


def vision(s: Any, x: Any) -> Any:
    patches = s.patch(x).flatten(2).transpose(1, 2)
    return s.encoder(torch.cat([s.token.expand(len(x), -1, -1), patches], 1) + s.position)[:, 0]


def unrolled(s: Any, x: Any) -> Any:
    state = (x.new_zeros(len(x), 4), x.new_zeros(len(x), 4))
    for step in x.unbind(1):
        state = s.cell(step, state)
    return state[0]


def packed(s: Any, x: Any, lengths: Any) -> Any:
    sequences = nn.utils.rnn.pack_padded_sequence(s.table(x), lengths, batch_first=True, enforce_sorted=False)
    outputs, state = s.r(sequences)
    outputs, _ = nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True)
    return outputs.sum(1)[:, :4] + (state[0] if isinstance(state, tuple) else state)[-1]


def experts(*activation: nn.Module) -> dict[str, nn.Module]:
    each = (nn.Sequential(nn.Linear(4, 3), *activation, nn.Linear(3, 4)) for _ in range(3))
    return {"first": nn.Linear(4, 4), "gate": nn.Linear(4, 3), "experts": nn.ModuleList(each), "out": nn.Linear(4, 2)}


def mixture(s: Any, x: Any) -> Any:
    """Send each position of each sample to two of the experts."""
    tokens = torch.tanh(s.first(x)).flatten(0, 1)
    shares, chosen = s.gate(tokens).softmax(-1).topk(2, -1)
    total = torch.zeros_like(tokens)
    for number, expert in enumerate(s.experts):
        rows, place = torch.where(chosen == number)
        total = total.index_add(0, rows, expert(tokens[rows]) * shares[rows, place, None])
    return s.out(torch.tanh(tokens + total)).unflatten(0, x.shape[:2]).mean(1)


def masked_mixture(s: Any, x: Any) -> Any:
    """Send each sample to one of the experts, and write what they return into place."""
    hidden = torch.tanh(s.first(x))
    shares = (s.gate(hidden) + torch.tensor([1.0, 1.0, -9.0]) * x[:, :3]).softmax(-1)
    total = torch.zeros_like(hidden)
    for number, expert in enumerate(s.experts):
        own = shares.argmax(-1) == number
        total[own] = expert(hidden[own]) * shares[own, number, None]
    return s.out(torch.tanh(hidden + total))


ZOO: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "mlp": lambda: (nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), X(6, 5)),
    "wide": lambda: (nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), X(20, 2)),
    "cnn": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(4, 6, 3, stride=2, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(6, 3),
        ),
        X(6, 3, 8, 8),
    ),
    "grouped": lambda: (
        nn.Sequential(
            nn.Conv2d(4, 6, 3, padding=1, groups=2, dilation=2),
            nn.Tanh(),
            nn.Conv2d(6, 6, 3, groups=6),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(96, 3),
        ),
        X(6, 4, 8, 8),
    ),
    "depthwise": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 6, (1, 3), groups=3, padding=(0, 1)), nn.Tanh(), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(64, 2)
        ),
        X(5, 3, 4, 4),
    ),
    "transposed": lambda: (
        nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.Tanh(),
            nn.Conv2d(6, 2, 3),
            nn.Flatten(),
            nn.Linear(72, 3),
        ),
        X(6, 4, 4, 4),
    ),
    "transposed_unevenly": lambda: lazily(
        nn.Sequential(
            nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), output_padding=(0, 1), dilation=(1, 2)),
            nn.Tanh(),
            nn.Flatten(),
            nn.LazyLinear(3),
        ),
        X(5, 2, 3, 4),
    ),
    "one_dimension": lambda: lazily(
        nn.Sequential(
            nn.Conv1d(3, 4, 3, padding="same"),
            nn.Tanh(),
            nn.ConvTranspose1d(4, 2, 4, stride=3, dilation=2),
            nn.Flatten(),
            nn.LazyLinear(3),
        ),
        X(6, 3, 7),
    ),
    "three_dimensions": lambda: lazily(
        nn.Sequential(nn.Conv3d(2, 3, 3, padding=1, padding_mode="circular"), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)),
        X(5, 2, 4, 4, 4),
    ),
    "frames": lambda: (  # a convolution over frames, samples merged with time
        Model(
            lambda s, x: s.out(torch.tanh(s.conv(x.flatten(0, 1))).reshape(len(x), -1)),
            conv=nn.Conv2d(2, 3, 3),
            out=nn.Linear(36, 2),
        ),
        X(5, 3, 2, 4, 4),
    ),
    "normalised": lambda: (nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.RMSNorm(7), nn.Linear(7, 3)), X(6, 5)),
    "channels": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.InstanceNorm2d(4, affine=True),
            nn.PReLU(4),
            nn.Flatten(),
            nn.Linear(144, 3),
        ),
        X(6, 3, 8, 8),
    ),
    "rectified": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 3, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.LayerNorm(12),
            nn.Linear(12, 3),
        ),
        X(5, 2, 8, 8),
    ),
    "normalised_frames": lambda: (  # group normalisation of frames merged with samples, layer normalisation of frames first
        Model(
            lambda s, x: s.out(
                s.layer(torch.tanh(s.group(s.conv(x.flatten(0, 1)))).unflatten(0, x.shape[:2]).transpose(0, 1).flatten(2))
            ).mean(0),
            conv=nn.Conv2d(2, 4, 3),
            group=nn.GroupNorm(2, 4),
            layer=nn.LayerNorm(16),
            out=nn.Linear(16, 2),
        ),
        X(5, 3, 2, 4, 4),
    ),
    "plain_norms": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.GroupNorm(2, 4, affine=False),
            nn.Tanh(),
            nn.LayerNorm((4, 4, 4)),
            nn.Tanh(),
            nn.LayerNorm(4, elementwise_affine=False),
            nn.Flatten(),
            nn.Linear(64, 2),
        ),
        X(5, 2, 6, 6),
    ),
    "resnet_group_norm": lambda: (resnet(lambda c: nn.GroupNorm(2, c)), X(4, 3, 8, 8)),
    "resnet_batch_norm": lambda: (resnet(nn.BatchNorm2d).eval(), X(4, 3, 8, 8)),
    "weight_norm": lambda: (
        nn.Sequential(
            parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
            nn.Tanh(),
            nn.Flatten(),
            parametrizations.weight_norm(nn.Linear(64, 3)),
        ),
        X(6, 3, 6, 6),
    ),
    "twice_through_weight_norm": lambda: (
        Model(
            lambda s, x: torch.tanh(x @ (torch._weight_norm(s.v, s.g, 0) + s.v * s.g).T) @ s.o,
            v=weight(6, 5),
            g=weight(6, 1),
            o=weight(6, 2),
        ),
        X(6, 5),
    ),
    "parametrised": lambda: (
        nn.Sequential(
            parametrizations.spectral_norm(nn.Linear(5, 6)),
            nn.Tanh(),
            parametrizations.orthogonal(nn.Linear(6, 6)),
            nn.Tanh(),
            prune.random_unstructured(nn.Linear(6, 3), "weight", 0.5),
        ).eval(),
        X(6, 5),
    ),
    "adapted": lambda: (  # low-rank adaptation
        constant(
            Model(lambda s, x: torch.tanh(x @ (s.frozen + s.b @ s.a).T) @ s.o, b=weight(6, 2), a=weight(2, 5), o=weight(6, 2)),
            frozen=X(6, 5),
        ),
        X(6, 5),
    ),
    "embedding": lambda: (nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3)), torch.randint(0, 9, (6, 3))),
    "rare_words": lambda: (nn.Sequential(nn.Embedding(60, 4), nn.Flatten(), nn.Linear(16, 3)), torch.randint(0, 60, (6, 4))),
    "bag": lambda: (
        Model(
            lambda s, x: torch.tanh(torch.cat([s.mean(x), s.sum(x)], 1)) @ s.o,
            mean=nn.EmbeddingBag(9, 4),
            sum=nn.EmbeddingBag(9, 3, mode="sum"),
            o=weight(7, 3),
        ),
        torch.randint(0, 9, (6, 3)),
    ),
    "padded_bag": lambda: (
        Model(
            lambda s, x: torch.tanh(torch.cat([s.mean(x), s.sum(x, per_sample_weights=0.1 * x.double() + 0.5)], 1)) @ s.o,
            mean=nn.EmbeddingBag(5, 3, padding_idx=2),
            sum=nn.EmbeddingBag(5, 3, mode="sum"),
            o=weight(6, 2),
        ),
        torch.randint(0, 5, (6, 3)),
    ),
    "negative": lambda: (
        Model(
            lambda s, x: torch.tanh(s.t[x - 9]).mean(1) @ s.o + s.u.index_select(1, x[:, 0]).T.sin(),
            **{"t": weight(9, 4), "o": weight(4, 2), "u": weight(2, 9)},
        ),
        torch.randint(0, 9, (6, 3)),
    ),
    "arithmetic": lambda: (
        Model(
            lambda s, x: (
                torch.sub(torch.add(torch.tanh(x @ s.w), s.b, alpha=2.0), s.c, alpha=3.0)
                + s.d / (1.0 + x[:, :3] ** 2)
                + s.e.expand(len(x), 3).index_select(1, torch.tensor([2, 0, 2])) * x[:, 2:]
            ).sin(),
            **{"w": weight(5, 3), "b": weight(3), "c": weight(3), "d": weight(3), "e": weight(3)},
        ),
        X(6, 5),
    ),
    "tied": lambda: (  # a language model whose embedding is its output layer, sequences first
        Model(lambda s, x: (torch.tanh(s.table(x.T)) @ s.w @ s.table.weight.T).mean(0), table=nn.Embedding(9, 4), w=weight(4, 4)),
        torch.randint(0, 9, (6, 3)),
    ),
    "indexed": lambda: (Model(lambda s, x: torch.tanh(s.t[x]).mean(1) @ s.t.T, t=weight(9, 4)), torch.randint(0, 9, (6, 3))),
    "packed_attention": lambda: (
        Model(lambda s, x: s.a(x, x, x)[0].mean(1), a=nn.MultiheadAttention(4, 2, batch_first=True)),
        X(6, 3, 4),
    ),
    "separate_attention": lambda: (
        Model(
            lambda s, x, y: s.a(x, y, y)[0].mean(1),
            a=nn.MultiheadAttention(4, 2, kdim=5, vdim=5, add_bias_kv=True, batch_first=True),
        ),
        (X(6, 3, 4), X(6, 2, 5)),
    ),
    "sequence_first_attention": lambda: (
        Model(
            lambda s, x, y: s.a(x.transpose(0, 1), y.transpose(0, 1), y.transpose(0, 1))[0].mean(0), a=nn.MultiheadAttention(4, 2)
        ),
        (X(6, 3, 4), X(6, 2, 4)),
    ),
    "transformer": lambda: (Model(lambda s, x: s.t(x).mean(1), t=transformer(batch_first=True)), X(6, 3, 4)),
    "square_transformer": lambda: (  # as many positions as samples, positions first
        Model(lambda s, x: s.t(x.transpose(0, 1)).mean(0), t=transformer(norm_first=True)),
        X(6, 6, 4),
    ),
    "vision_transformer": lambda: (
        Model(
            vision,
            patch=nn.Conv2d(3, 4, 2, 2),
            token=weight(1, 1, 4),
            position=weight(1, 10, 4),
            encoder=transformer(batch_first=True),
        ),
        X(7, 3, 6, 6),
    ),
    "relative_positions": lambda: (
        constant(
            Model(
                lambda s, x: attention(s, x, s.t[s.i].view(4, 4)).mean(1),
                q=weight(4, 4),
                k=weight(4, 4),
                o=weight(4, 2),
                t=weight(7),
            ),
            i=torch.randint(0, 7, (16,)),
        ),
        X(8, 4, 4),
    ),
    "lstm": lambda: (Model(lambda s, x: s.r(x)[0][:, -1], r=nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True)), X(6, 5, 3)),
    "sequence_first_lstm": lambda: (
        Model(lambda s, x: s.r(x.transpose(0, 1))[0][-1], r=nn.LSTM(3, 4, proj_size=2)),
        X(6, 5, 3),
    ),
    "gru": lambda: (Model(lambda s, x: s.r(x.transpose(0, 1))[1].mean(0), r=nn.GRU(3, 4, bidirectional=True)), X(6, 5, 3)),
    "packed_lstm": lambda: (
        Model(packed, table=nn.Embedding(9, 3), r=nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True)),
        (torch.randint(0, 9, (6, 5)), torch.tensor([3, 5, 1, 4, 5, 2])),
    ),
    "packed_gru": lambda: (
        Model(packed, table=nn.Embedding(9, 3), r=nn.GRU(3, 4, batch_first=True)),
        (torch.randint(0, 9, (6, 5)), torch.tensor([3, 5, 1, 4, 5, 2])),
    ),
    "experts": lambda: (Model(mixture, **experts(nn.LayerNorm(3), nn.Tanh())), X(6, 5, 4)),
    "rectified_experts": lambda: (Model(mixture, **experts(nn.ReLU())), X(6, 5, 4)),  # rows without any gradient
    "masked_experts": lambda: (Model(masked_mixture, **experts(nn.LayerNorm(3), nn.Tanh())), X(6, 4)),  # one has no sample
    "cell": lambda: (Model(unrolled, cell=nn.LSTMCell(3, 4)), X(6, 3, 3)),
    "bilinear": lambda: (
        Model(lambda s, x, y: torch.tanh(s.b(x, y)) @ s.w, b=nn.Bilinear(3, 4, 5), w=weight(5, 2)),
        (X(6, 3), X(6, 4)),
    ),
    "scalars": lambda: (
        Model(lambda s, x: torch.tanh(x @ s.w * s.t.exp()) / s.u - s.b, w=weight(5, 3), t=weight(), u=weight(1), b=weight(3)),
        X(6, 5),
    ),
    "einsum": lambda: (Model(lambda s, x: torch.einsum("nsi,hio->nho", x, s.w).flatten(1), w=weight(2, 4, 3)), X(6, 3, 4)),
    "batched": lambda: (
        Model(
            lambda s, x: torch.tanh(torch.matmul(x.view(-1, 2, 1, 3), s.w)).flatten(1) @ s.o, w=weight(2, 3, 4), o=weight(8, 3)
        ),
        X(6, 6),
    ),
    "left": lambda: (Model(lambda s, x: torch.tanh(s.w @ x.T + s.b[:, None]).T, w=weight(3, 5), b=weight(3)), X(6, 5)),
    "vector": lambda: (Model(lambda s, x: torch.tanh(x @ s.w)[:, None] * s.g, w=weight(5), g=weight(2)), X(6, 5)),
    "sliced": lambda: (
        Model(lambda s, x: torch.tanh(x @ s.w[:, :3]) * (x @ s.w[:, 3:]) + s.b[0], w=weight(5, 6), b=weight(2, 3)),
        X(6, 5),
    ),
    "sliced_wide": lambda: (  # more elements than a byte can number
        Model(lambda s, x: torch.tanh(x @ s.w[:, 30:]) @ s.o + (x @ s.w[:, :30]).sin()[:, ::15], w=weight(9, 36), o=weight(6, 2)),
        X(4, 9),
    ),
    "recurrent": lambda: (
        Model(lambda s, x: s.l(torch.tanh(s.l(torch.tanh(s.l(x))))) @ s.l.weight.T, l=nn.Linear(4, 4)),
        X(6, 4),
    ),
    "baddbmm": lambda: (
        Model(
            lambda s, x: (
                torch.baddbmm(s.b, x.view(-1, 2, 3).transpose(0, 1), s.w, beta=0.5, alpha=2.0).transpose(0, 1).flatten(1)
            ),
            b=weight(2, 1, 4),
            w=weight(2, 3, 4),
        ),
        X(6, 6),
    ),
    "addmm": lambda: (Model(lambda s, x: torch.addmm(s.b, x, s.w, beta=0.5, alpha=2.0), b=weight(3), w=weight(5, 3)), X(6, 5)),
    "tiled": lambda: (
        Model(
            lambda s, x: (x.reshape(len(x), -1) - s.r.repeat(1, 2)) * s.g.index_select(0, s.i),
            r=weight(1, 3),
            g=weight(4),
            i=None,
        ),
        X(6, 6),
    ),
}


def build(name: str) -> tuple[nn.Module, Any]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, x = ZOO[name]()
            if name == "tiled":
                model.i = torch.randint(0, 4, (6,))
            for module in model.modules():  # a gain of one would hide its absence
                if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
                    nn.init.uniform_(module.weight, 0.5, 1.5)
            return model, x
    finally:
        torch.set_default_dtype(before)
