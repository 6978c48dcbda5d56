"""Criteria and layers of tasks other than plain classification: exact, or refused with what to do."""

from __future__ import annotations

import pytest

import mgs_core as mgs

torch = pytest.importorskip("torch")

from mgs_core.adapters.torch import MGSLoss  # noqa: E402  # after the skip
from torch import nn  # noqa: E402  # after the skip
from torch.nn import functional  # noqa: E402  # after the skip
from torch.utils.checkpoint import checkpoint  # noqa: E402  # after the skip

TRACE = mgs.Penalty("trace", 0.1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def by_hand(losses, parameters, penalty=None, weighted=False):
    """Return value and gradients of the mean loss with a penalty on the trace, from a gradient for each sample."""
    rows = []
    for loss in losses:
        parts = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    kernel = torch.stack(rows) @ torch.stack(rows).T
    value = torch.stack(losses)
    if weighted:
        gains = ((kernel.sum(1) - kernel.diagonal()) / kernel.diagonal().sqrt()).detach().clamp(min=0)
        value = value * gains / gains.mean()
    value = value.mean()
    if penalty is not None:
        value = value + penalty.strength * kernel.trace() / len(losses)
    return value, torch.autograd.grad(value, parameters)


def compare(value, parameters, expected):
    torch.testing.assert_close(value, expected[0])
    for part, other in zip(torch.autograd.grad(value, parameters), expected[1], strict=True):
        torch.testing.assert_close(part, other)


class Distribution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.variance = nn.Linear(4, 5), nn.Linear(5, 1), nn.Linear(5, 1)

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        return self.mean(hidden), functional.softplus(self.variance(hidden)) + 0.1


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("penalty", "weighting"), [(TRACE, None), (None, "agreement"), (TRACE, "agreement")])
def test_outputs_among_the_criterions_other_arguments_have_their_parameters_in_the_kernel(penalty, weighting, named):
    model, x, y = Distribution().double(), draw(6, 4), draw(6, 1)
    parameters = list(model.parameters())
    criterion = MGSLoss(nn.GaussianNLLLoss(), penalty=penalty, weighting=weighting, model=model if named else None)
    mean, variance = model(x)
    losses = [functional.gaussian_nll_loss(mean[a], y[a], variance[a]) for a in range(6)]
    expected = by_hand(losses, parameters, penalty, weighting is not None)
    mean, variance = model(x)
    compare(criterion(mean, y, var=variance), parameters, expected)


def test_labels_of_tokens_by_the_criterion_of_the_guide():
    model, x, y = nn.Linear(4, 3).double(), draw(4, 5, 4), torch.randint(0, 3, (4, 5))
    y[0, 2:] = y[2, 4:] = -100
    parameters, outputs = list(model.parameters()), model(x)
    losses = [functional.cross_entropy(outputs[a], y[a], reduction="sum") * 4 / (y >= 0).sum() for a in range(4)]
    expected = by_hand(losses, parameters, TRACE, weighted=True)
    criterion = MGSLoss(
        lambda o, t, reduction="mean": functional.cross_entropy(o.transpose(1, 2), t, reduction=reduction),
        penalty=TRACE,
        weighting="agreement",
    )
    compare(criterion(model(x), y), parameters, expected)


class Checkpointed(nn.Module):
    def __init__(self, layers) -> None:
        super().__init__()
        self.first, self.layers, self.last, self.saving = nn.Linear(4, 6), layers, nn.Linear(6, 3), True

    def forward(self, x):
        x = self.first(x)
        x = checkpoint(self.layers, x, use_reentrant=False) if self.saving else self.layers(x)
        return self.last(x)


def test_checkpointed_layers_with_second_derivatives_of_this_library():
    model, x, y = (
        Checkpointed(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.ReLU())).double(),
        draw(5, 4),
        torch.arange(5) % 3,
    )
    parameters, criterion = list(model.parameters()), MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE)
    model.saving = False
    outputs = model(x)
    expected = by_hand([functional.cross_entropy(outputs[a], y[a]) for a in range(5)], parameters, TRACE)
    model.saving = True
    compare(criterion(model(x), y), parameters, expected)


def test_checkpointed_fused_attention_is_refused():
    class Attention(nn.Module):
        def forward(self, x):
            x = x.reshape(len(x), 1, 3, 2)
            return functional.scaled_dot_product_attention(x, x, x).reshape(len(x), 6)

    model = Checkpointed(Attention()).double()
    with pytest.raises(mgs.UnsupportedModelError, match="got fused attention that is checkpointed, which is not"):
        MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE)(model(draw(5, 4)), torch.arange(5) % 3)


class Distances(nn.Module):
    def __init__(self, mode) -> None:
        super().__init__()
        self.centres, self.last, self.mode = nn.Parameter(torch.randn(5, 4)), nn.Linear(5, 3), mode

    def forward(self, x):
        return self.last(torch.exp(-torch.cdist(x, self.centres, compute_mode=self.mode)))


def test_distances_are_refused_under_a_penalty_and_taken_by_what_the_message_says():
    y = torch.arange(6) % 3
    criterion = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE)
    with pytest.raises(mgs.UnsupportedModelError, match=r"got torch.cdist \(Cdist\), which is not. Pass `compute_mode="):
        criterion(Distances("donot_use_mm_for_euclid_dist").double()(draw(6, 4)), y)
    model, x = Distances("use_mm_for_euclid_dist").double(), draw(6, 4)
    parameters, outputs = list(model.parameters()), model(x)
    expected = by_hand([functional.cross_entropy(outputs[a], y[a]) for a in range(6)], parameters, TRACE)
    compare(criterion(model(x), y), parameters, expected)


def test_hard_sigmoid_has_a_second_derivative():
    model, x, y = nn.Sequential(nn.Linear(4, 6), nn.Hardsigmoid(), nn.Linear(6, 3)).double(), 3 * draw(8, 4), torch.arange(8) % 3
    parameters, criterion = list(model.parameters()), MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE)
    outputs = model[2](functional.relu6(model[0](x) + 3) / 6)
    expected = by_hand([functional.cross_entropy(outputs[a], y[a]) for a in range(8)], parameters, TRACE)
    compare(criterion(model(x), y), parameters, expected)


def test_losses_without_a_second_derivative_are_refused_under_a_penalty_alone():
    model, x = nn.Conv1d(2, 4, 1).double(), draw(3, 2, 6)
    targets, ends = torch.randint(1, 4, (3, 2)), (torch.full((3,), 6), torch.full((3,), 2))
    ctc = nn.CTCLoss(reduction="none")

    def losses(outputs, *arguments):
        return ctc(functional.log_softmax(outputs, 1).permute(2, 0, 1), *arguments)

    with pytest.raises(
        mgs.UnsupportedModelError, match=r"got the CTC loss .*Penalise another head than the losses, or use `weighting="
    ):
        MGSLoss(losses, penalty=TRACE)(model(x), targets, *ends)
    outputs, parameters = model(x), list(model.parameters())
    expected = by_hand(list(losses(outputs, targets, *ends)), parameters, weighted=True)
    criterion = MGSLoss(losses, weighting="agreement")
    compare(criterion(model(x), targets, *ends), parameters, expected)
    with pytest.raises(mgs.ArgumentError, match=r"loss for each of 6 samples; got shape \(3,\).*outputs have the samples first"):
        MGSLoss(ctc, penalty=TRACE)(functional.log_softmax(model(x), 1).permute(2, 0, 1), targets, *ends)


def contrast(outputs, reduction="mean"):
    scores = outputs @ outputs.T - 1e3 * torch.eye(len(outputs))
    return functional.cross_entropy(scores, torch.arange(len(outputs)).roll(1), reduction=reduction)


def test_losses_that_compare_samples_are_refused_but_not_beside_another_head():
    model, x = nn.Linear(4, 3).double(), draw(6, 4)
    with pytest.raises(
        mgs.SamplesInteractError, match=r'a loss that compares samples.*another head than such a loss, as `output="trace"`'
    ):
        MGSLoss(contrast, penalty=TRACE)(model(x))
    criterion = MGSLoss(contrast, penalty=TRACE, output="trace")
    torch.testing.assert_close(criterion(model(x)), contrast(model(x)) + 0.1 * 3 * (x.square().sum(1) + 1).mean())


def test_one_output_without_an_axis_takes_the_transform_that_the_message_names():
    model, x = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).double(), draw(6, 4)
    with pytest.raises(
        mgs.ArgumentError, match=r"got outputs of shape \(6,\).*as `transform=lambda f: f.reshape\(len\(f\), -1\)`"
    ):
        mgs.kernel(model, x)
    torch.testing.assert_close(mgs.kernel(model, x, transform=lambda f: f.reshape(len(f), -1)), x @ x.T + 1)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"penalty": "trace"}, "`penalty` must be a mgs_core.Penalty; got 'trace'. Make one"),
        ({"criterion": nn.CrossEntropyLoss}, "`criterion` must be callable as .*; got <class"),
        ({"select": "logits"}, "`select` must be a function of what the model returns; got 'logits'"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused_at_once(arguments, message):
    with pytest.raises(mgs.ArgumentError, match=message):
        MGSLoss(**{"criterion": nn.CrossEntropyLoss(), **arguments})


@pytest.mark.wrong_types
@pytest.mark.parametrize(("weight", "got"), [(torch.ones(3), r"shape \(3,\)"), ([1.0] * 6, "list")])
def test_weights_that_fit_no_sample_are_refused(weight, got):
    model, x = nn.Linear(4, 3).double(), draw(6, 4)
    with pytest.raises(mgs.ArgumentError, match=rf"`sample_weight` must be a tensor of shape \(6,\); got {got}"):
        MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE)(model(x), torch.arange(6) % 3, sample_weight=weight)
