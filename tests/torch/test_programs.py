"""Random programs of PyTorch operations: kernels, of parts and in chunks too, and their gradients against a loop."""

from __future__ import annotations

import math
import random

import pytest

import mgs_core as mgs

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402, N812  # after the skip; its usual name

_SAMPLES, _WIDTH, _LENGTH = 3, 4, 3

#: Operations on (n, d) and on (n, s, d) with the shapes of their parameters; each gives back the shape that it took.
_FLAT = {
    "affine": (lambda h, w, b: torch.addmm(b, h, w), (_WIDTH, _WIDTH), (_WIDTH,)),
    "linear": (F.linear, (_WIDTH, _WIDTH)),
    "turned": (lambda h, w: (w.t() @ h.t()).t(), (_WIDTH, _WIDTH)),
    "weight on the left twice": (lambda h, w: torch.einsum("oi,ni->no", w @ w, h), (_WIDTH, _WIDTH)),
    "parts of a weight": (lambda h, w: h @ w.chunk(2)[0] + torch.sin(h) @ w.chunk(2)[1], (2 * _WIDTH, _WIDTH)),
    "rows of a weight": (lambda h, w: h + w[(3 * h.detach().sum(1)).long().abs() % 5], (5, _WIDTH)),
    "an element": (lambda h, w: h * w[0] + w[1], (_WIDTH,)),
    "a number": (lambda h, w: h / (1 + w.exp()), ()),
    "reversed": (lambda h, w: h * w.flip(0) + w.roll(1), (_WIDTH,)),
    "cumulative": (lambda h, w: h * w.cumsum(0), (_WIDTH,)),
    "in place": (lambda h, w: h.clone().mul_(w).add_(w), (_WIDTH,)),
    "an entry in place": (lambda h, w: h.clone().index_add_(1, torch.tensor([0]), w[:1].expand(len(h), 1)), (_WIDTH,)),
    "beside": (lambda h, w: torch.cat([h[:, 1:], w.expand(len(h), 1)], 1), (1,)),
    "weight norm": (lambda h, w, g: F.linear(h, g * w / w.norm(dim=1, keepdim=True)), (_WIDTH, _WIDTH), (_WIDTH, 1)),
    "low rank": (lambda h, a, b: h + h @ a @ b + h @ (a @ b), (_WIDTH, 2), (2, _WIDTH)),
    "bilinear": (lambda h, w: F.bilinear(h, h.cos(), w), (_WIDTH, _WIDTH, _WIDTH)),
    "distances": (lambda h, w: (h.unsqueeze(-1) - w).square().sum(1), (_WIDTH, _WIDTH)),
    "power": (lambda h, w: (h.abs() + 0.5) ** w, (_WIDTH,)),
    "chosen": (lambda h, w: torch.where(h > 0, h * w, w), (_WIDTH,)),
    "leaky": (F.prelu, (_WIDTH,)),
    "normalised": (lambda h, w, b: F.layer_norm(h, (_WIDTH,), w, b), (_WIDTH,), (_WIDTH,)),
    "root mean square": (lambda h, w: F.rms_norm(h, (_WIDTH,), w), (_WIDTH,)),
    "orthogonal": (lambda h, w: h @ torch.matrix_exp(w - w.t()), (_WIDTH, _WIDTH)),
    "a product for each sample": (
        lambda h, w: torch.bmm(h.unsqueeze(1), w.expand(len(h), *w.shape)).squeeze(1),
        (_WIDTH, _WIDTH),
    ),
    "tanh": (torch.tanh,),
}
_SEQUENCES = {
    "positions": (lambda h, w: h + w, (_LENGTH, _WIDTH)),
    "sequence first": (
        lambda h, w: (h.transpose(0, 1).reshape(-1, _WIDTH) @ w).view(_LENGTH, -1, _WIDTH).transpose(0, 1),
        (_WIDTH, _WIDTH),
    ),
    "repeated": (lambda h, w, v: h + w.repeat(_LENGTH, 1) * v.expand(_LENGTH, 1), (_WIDTH,), ()),
    "mixed positions": (lambda h, w: torch.einsum("ts,nsd->ntd", w, h), (_LENGTH, _LENGTH)),
    "a weight for each position": (lambda h, w: torch.bmm(h.transpose(0, 1), w).transpose(0, 1), (_LENGTH, _WIDTH, _WIDTH)),
    "packed attention": (lambda h, w: F.scaled_dot_product_attention(*F.linear(h, w).chunk(3, -1)), (3 * _WIDTH, _WIDTH)),
    "convolution": (lambda h, w: F.conv1d(h.mT, w, padding=1).mT, (_WIDTH, _WIDTH, 3)),
    "class token": (lambda h, w: torch.cat([w.expand(len(h), -1, -1), h[:, 1:]], 1), (1, 1, _WIDTH)),
    "group norm": (lambda h, w, b: F.group_norm(h.mT, 2, w, b).mT, (_WIDTH,), (_WIDTH,)),
    "gated": (lambda h, w: torch.lerp(h, h.flip(1).sin(), w.sigmoid()), (_WIDTH,)),
    "recurrence": (
        lambda h, w, u: torch.stack([a := torch.tanh(h[:, 0] @ w), b := torch.tanh(h[:, 1] @ w + a @ u), a * b], 1),
        (_WIDTH, _WIDTH),
        (_WIDTH, _WIDTH),
    ),
}


def program(seed):
    """Return a function of parameters and inputs, its parameters, and inputs."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    parameters, steps = {}, []

    def parameter(shape):
        alike = [name for name, value in parameters.items() if tuple(value.shape) == shape]
        if alike and choose.random() < 0.3:
            return choose.choice(alike)
        name = f"parameter {len(parameters)}"
        spread = 1 / math.sqrt(shape[0] if shape else 1)
        parameters[name] = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
        return name

    def add(table, count):
        for _ in range(count):
            operation, *shapes = table[choose.choice(list(table))]
            steps.append((operation, [parameter(shape) for shape in shapes]))

    sequence = choose.random() < 0.4
    if sequence:
        add(_SEQUENCES, choose.randint(1, 4))
        steps.append((lambda h: h.mean(1), []))
    add(_FLAT, choose.randint(1, 5))
    steps.append((torch.matmul, [parameter((_WIDTH, 2))]))

    def run(values, x):
        for operation, names in steps:
            x = operation(x, *(values[name] for name in names))
        return x

    shape = (_SAMPLES, _LENGTH, _WIDTH) if sequence else (_SAMPLES, _WIDTH)
    return run, parameters, torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("seed", range(40))
def test_kernels_of_random_programs_and_their_gradients_are_those_of_a_loop(seed, chunk_size, by_loop, fresh):
    run, parameters, x = program(seed)
    choose = random.Random(seed)
    chosen = choose.sample(list(parameters), choose.randint(1, len(parameters)))
    values = fresh(parameters)
    output = ("trace", "sum")[seed % 2]  # one head of one sample goes ways of its own
    heads = run if output == "trace" else lambda values, x: run(values, x).sum(1, keepdim=True)
    expected = by_loop(heads, values, x, chosen)
    ours = fresh(parameters)
    kernel = mgs.kernel(
        mgs.FunctionalModel(run, ours), x, output=output, parameters=chosen, chunk_size=chunk_size, differentiable=True
    )
    torch.testing.assert_close(kernel, expected, rtol=0, atol=1e-11 * float(expected.detach().abs().max()))
    weights = torch.arange(1.0, 10.0, dtype=torch.float64).reshape(3, 3)  # not symmetric
    pairs = [
        torch.autograd.grad((weights * matrix).sum(), list(of.values()), allow_unused=True, materialize_grads=True)
        for matrix, of in ((kernel, ours), (expected, values))
    ]
    largest = max(float(gradient.abs().max()) for gradient in pairs[1])
    for actual, truth in zip(*pairs, strict=True):
        torch.testing.assert_close(actual, truth, rtol=0, atol=1e-9 * largest)
