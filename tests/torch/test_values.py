"""Models in which values decide whether samples interact: a later batch that mixes them is refused, as the first would be."""

from __future__ import annotations

import pytest

import mgs_core as mgs

torch = pytest.importorskip("torch")

from mgs_core.adapters.torch import MGSLoss  # noqa: E402  # after the skip
from torch import nn  # noqa: E402  # after the skip

_N = 6


def attention(h, mask):
    scores = (h @ h.T).masked_fill(mask, -torch.inf)
    return h + scores.softmax(-1) @ h


EYE, ALL = torch.eye(_N, dtype=torch.float64), torch.ones(_N, _N, dtype=torch.float64)
ORDER = torch.tensor([3, 1, 0, 2, 5, 4])
SORTED, UNSORTED = torch.arange(6.0, dtype=torch.float64), torch.tensor([3.0, 1, 0, 2, 5, 4], dtype=torch.float64)
GROUPS = torch.arange(_N), torch.tensor([0, 0, 1, 1, 2, 2])
# how h (n, d) goes on, by what the batch brings along: at first each sample for itself, then not
MIXING = {
    "attention with a mask": (attention, EYE == 0, ALL == 0),
    "attention within groups": (lambda h, g: attention(h, g[:, None] != g), *GROUPS),
    "mask by where": (lambda h, g: torch.where((g[:, None] == g)[..., None], h.tanh(), 0.0).sum(1), *GROUPS),
    "mask by where of pairs": (
        lambda h, g: torch.where((g[:, None] == g)[..., None], h.expand(_N, *h.shape).tanh(), 0.0).sum(1),
        *GROUPS,
    ),
    "factor": (lambda h, s: h + s * h.mean(0), torch.zeros(_N, 1), torch.ones(_N, 1)),
    "number": (lambda h, s: h + s[0] * h.mean(0), torch.zeros(_N, 1), torch.ones(_N, 1)),
    "gate": (lambda h, s: h + torch.relu(h.tanh().mean(0) + s), torch.full((_N, 1), -2.0), torch.full((_N, 1), 2.0)),
    "clamp": (lambda h, s: h + (h.tanh().mean(0) + s).clamp(min=0.0), torch.full((_N, 1), -2.0), torch.full((_N, 1), 2.0)),
    "matrix on the left": (lambda h, a: a @ h, EYE, EYE[ORDER]),
    "matrix on the right": (lambda h, a: (h.T @ a.T).T, EYE, EYE[ORDER]),
    "sparse matrix": (lambda h, a: a.to_sparse() @ h, EYE, EYE[ORDER]),
    "index": (lambda h, i: h[i], torch.arange(_N), ORDER),
    "sort": (lambda h, s: (h.tanh() + s[:, None] * 10).sort(dim=0).values, SORTED, UNSORTED),
    "sort of the transpose": (lambda h, s: (h.tanh() + s[:, None] * 10).T.sort().values.T, SORTED, UNSORTED),
    "topk": (lambda h, s: (h.tanh() - s[:, None] * 10).topk(_N, dim=0).values, SORTED, UNSORTED),
    "cumulative maximum": (lambda h, s: (h.tanh() + s[:, None] * 10).cummax(0).values, SORTED, UNSORTED),
    "gather": (lambda h, i: h.gather(0, i[:, None].expand(-1, h.shape[1])), torch.arange(_N), ORDER),
    "greater neighbour": (lambda h, s: torch.maximum(h.tanh() + s[:, None], h.tanh().roll(1, 0)), 9 + SORTED, -SORTED),
}


def jacobian_kernel(layers, forward):
    """The kernel of the Jacobian of the whole batch, each sample's gradient with all that it depends on."""
    parameters = [value for layer in layers for value in layer.parameters()]
    rows = []
    for value in forward().sum(1):
        parts = torch.autograd.grad(value, parameters, retain_graph=True)
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows) @ torch.stack(rows).T


def network(mix):
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(3, 5, dtype=torch.float64), nn.Linear(5, 2, dtype=torch.float64)])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x, given):
            return layers[1](torch.tanh(mix(layers[0](x), given)))

    return Model(), layers


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("name", MIXING)
def test_a_later_batch_that_mixes_samples_is_refused_or_exact(name, before):
    mix, alone, together = MIXING[name]
    model, layers = network(mix)
    x = torch.randn(_N, 3, dtype=torch.float64)
    for given in [alone] * before + [together]:
        expected = jacobian_kernel(layers, lambda given=given: model(x, given))
        try:
            kernel = mgs.kernel(model, (x, given), output="sum")
        except mgs.SamplesInteractError:
            assert given is together
        else:
            torch.testing.assert_close(kernel, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["factor", "attention with a mask", "attention within groups"])
def test_the_loss_refuses_what_a_fresh_one_refuses(name):
    mix, alone, together = MIXING[name]
    model, _ = network(mix)
    x, y = torch.randn(_N, 3, dtype=torch.float64), torch.arange(_N) % 2
    for options in ({"penalty": mgs.Penalty("trace", 1.0)}, {"weighting": "agreement"}):
        criterion = MGSLoss(nn.CrossEntropyLoss(), **options)
        criterion(model(x, alone), y)
        for given in (together, together):
            with pytest.raises(mgs.SamplesInteractError, match="`model` must"):
                criterion(model(x, given), y)
        criterion(model(x, alone), y)


OPENING = {
    "of the first sample": lambda h, s: h + s * h[:1],
    "of the third sample": lambda h, s: h + s * h[2:3],
    "of the last sample": lambda h, s: h + s * h[-1:],
    "of the second next": lambda h, s: h + s * h.roll(2, 0),
    "of the other view": lambda h, s: h + s * h.roll(len(h) // 2, 0),
    "between two": lambda h, s: h + s * (h[torch.tensor([2, 1, 0, *range(3, len(h))])] - h),
}


@pytest.mark.parametrize("n", [7, 8])
@pytest.mark.parametrize("name", OPENING)
@pytest.mark.parametrize("how", ["kernel", "loss"])
def test_a_way_between_any_samples_that_opens_late_is_refused(name, how, n):
    model, _ = network(OPENING[name])
    x, y = torch.randn(n, 3, dtype=torch.float64), torch.arange(n) % 2
    closed, opened = torch.zeros((), dtype=torch.float64), torch.full((), 0.5, dtype=torch.float64)
    criterion = MGSLoss(nn.CrossEntropyLoss(), penalty=mgs.Penalty("trace", 1.0))

    def step(scale):
        return mgs.kernel(model, x, output="sum") if how == "kernel" else criterion(model(x, scale), y)

    if how == "kernel":
        forward, scale = model.forward, [closed]
        model.forward = lambda x: forward(x, scale[0])
    for _ in range(20):
        step(closed)
    if how == "kernel":
        scale[0] = opened
    with pytest.raises(mgs.SamplesInteractError, match="`model` must treat each sample by itself"):
        step(opened)


def test_sparse_tensors_of_a_parameter_are_refused():
    mask, x = torch.eye(3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64)
    model = mgs.FunctionalModel(
        lambda p, x: torch.sparse.mm((p * mask).to_sparse(), x.T).T, torch.ones(3, 3, dtype=torch.float64)
    )
    with pytest.raises(mgs.UnsupportedModelError, match=r"sparse tensors of its parameters; got one.*Multiply by a mask"):
        mgs.kernel(model, x)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", ["where", "masked_fill", "take"])
def test_values_that_choose_among_parameters_do_not_mix_samples(name):
    p = {name: torch.randn(shape, dtype=torch.float64) for name, shape in (("a", 4), ("b", 4), ("o", (4, 2)))}
    x = torch.randn(_N, 4, dtype=torch.float64)
    chosen = {
        "where": lambda p, x: torch.where(x > 0, p["a"], p["b"]),
        "masked_fill": lambda p, x: torch.masked_fill(p["a"], x > 0, 0.0),
        "take": lambda p, x: p["a"].take((x > 0).long() + 2 * (x > 1).long()),
    }[name]

    def function(p, x):
        return torch.tanh(chosen(p, x)) @ p["o"]

    rows = torch.func.vmap(torch.func.jacrev(lambda p, x: function(p, x[None])[0].sum()), (None, 0))(p, x)
    flat = torch.cat([row.flatten(1) for row in rows.values()], 1)
    torch.testing.assert_close(mgs.kernel(mgs.FunctionalModel(function, p), x, output="sum"), flat @ flat.T)


@pytest.mark.parametrize("layer", ["bag", "quantised"])
def test_layers_without_a_second_derivative_are_refused_for_a_penalty(layer):
    weights, table = nn.Parameter(torch.rand(5)), nn.Embedding(7, 3)
    x = torch.randint(0, 7, (_N, 5))
    if layer == "bag":
        outputs = torch.nn.functional.embedding_bag(x, table.weight, mode="sum", per_sample_weights=weights.expand(_N, 5))
    else:
        scale, zero = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        outputs = torch._fake_quantize_learnable_per_tensor_affine(table(x).sum(1), scale, zero, -128, 127, 1.0)
    criterion = MGSLoss(nn.CrossEntropyLoss(), penalty=mgs.Penalty("trace"))
    with pytest.raises(mgs.UnsupportedModelError, match=r"an embedding bag with learnt weights|a learnable quantisation"):
        criterion(outputs, torch.arange(_N) % 3)
