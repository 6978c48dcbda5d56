"""Criteria of all kinds: training without a penalty is plain training, and a sample's part is its part or refused."""

from __future__ import annotations

import pytest

import mgs_core as mgs

torch = pytest.importorskip("torch")

from mgs_core.adapters.torch import MGSLoss  # noqa: E402  # after the skip
from torch import nn  # noqa: E402  # after the skip
from torch.nn import functional  # noqa: E402  # after the skip

NOTHING = mgs.Penalty("trace", 0.0)
X = torch.linspace(-1.0, 2.0, 42, dtype=torch.float64).reshape(7, 6).sin()
Y = torch.tensor([0, 1, 2, 3, 1, 2, 0])
TARGETS = torch.linspace(-2.0, 2.0, 28, dtype=torch.float64).reshape(7, 4).cos()


def network(outputs: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, outputs)).double()


def of_classes(reduced):
    """A criterion that makes its value of the cross-entropies in a way of its own."""

    def criterion(outputs, targets, reduction="mean"):
        losses = functional.cross_entropy(outputs, targets, reduction="none")
        return losses if reduction == "none" else reduced(losses, outputs)

    return criterion


class RootMeanSquare(nn.Module):
    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, outputs, targets):
        squares = (outputs - targets).square()
        return squares if self.reduction == "none" else squares.mean().sqrt()


def connectionist(outputs, targets, reduction="mean"):
    scores = outputs.reshape(7, 9, 4).log_softmax(2).transpose(0, 1)
    return functional.ctc_loss(scores, targets, (9,) * 7, tuple(LENGTHS), reduction=reduction, zero_infinity=True)


def self_weighted(losses, outputs):
    weights = 1 - torch.exp(-losses)
    return (weights * losses).sum() / weights.sum()


LENGTHS = torch.tensor([1, 2, 4, 3, 1, 2, 4])
LABELS = torch.tensor([[1, 2, 3, 1]] * 7)
# (criterion, targets, outputs)
UNEVEN = {
    "root of the mean": (RootMeanSquare(), TARGETS, 4),
    "CTC": (connectionist, LABELS, 36),
    "largest losses": (of_classes(lambda losses, _: losses.topk(3).values.mean()), Y, 4),
    "weights of the losses": (of_classes(self_weighted), Y, 4),
    "constant": (of_classes(lambda losses, _: losses.mean() + 1.0), Y, 4),
    "further term": (of_classes(lambda losses, outputs: losses.mean() + 0.1 * outputs.square().mean()), Y, 4),
    "logarithm": (of_classes(lambda losses, _: losses.exp().mean().log()), Y, 4),
}


def trained(model, loss):
    """The value and the gradient of one step of training."""
    model.zero_grad()
    value = loss(model(X))
    value.backward()
    return value.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "options",
    [{}, {"penalty": NOTHING, "output": "sum"}, {"penalty": NOTHING, "output": "target", "transform": lambda f: f[:, :4]}],
)
@pytest.mark.parametrize("name", UNEVEN)
def test_without_a_strength_training_is_plain_training(name, options):
    criterion, targets, outputs = UNEVEN[name]
    model, ours = network(outputs), MGSLoss(criterion, **options)
    if options.get("output") == "target" and targets is not Y:
        pytest.skip("targets that are no labels")
    for _ in range(3):
        value, gradients = trained(model, lambda outputs: ours(outputs, targets))
        expected, plain = trained(model, lambda outputs: criterion(outputs, targets))
        assert value == expected
        torch.testing.assert_close(gradients, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "weight"), [({"penalty": NOTHING}, None), ({"weighting": "agreement"}, None), ({}, torch.arange(7.0).double())]
)
@pytest.mark.parametrize("name", UNEVEN)
def test_parts_are_refused_where_the_value_is_not_made_of_them(name, options, weight):
    criterion, targets, outputs = UNEVEN[name]
    model = network(outputs)
    with pytest.raises(
        mgs.ArgumentError, match=r"`criterion` must have a value .* sum of its unreduced losses .*Pass a function"
    ):
        MGSLoss(criterion, **options)(model(X), targets, sample_weight=weight)


def test_parts_may_be_given_as_the_message_says():
    model = network(36)

    def parts(outputs, targets):
        return connectionist(outputs, targets, "none") / LENGTHS

    value, gradients = trained(model, lambda outputs: MGSLoss(parts, weighting="agreement")(outputs, LABELS))
    rows = []
    for loss in parts(model(X), LABELS):
        slopes = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([slope.reshape(-1) for slope in slopes]))
    weights = mgs.agreement_weights(torch.stack(rows) @ torch.stack(rows).T)
    expected, plain = trained(model, lambda outputs: (weights * parts(outputs, LABELS)).mean())
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients, plain)


@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("options", [{"penalty": NOTHING, "output": "sum"}, {"penalty": mgs.Penalty("trace", 1.0)}])
def test_losses_that_cancel_keep_their_scale(distance, options):
    model, criterion = network(), nn.KLDivLoss(reduction="batchmean")
    teacher = (model(X) + distance * TARGETS).softmax(1).detach()
    ours = MGSLoss(criterion, **options)
    ours(model(X).log_softmax(1), teacher)
    assert ours.last.criterion == criterion(model(X).log_softmax(1), teacher)
    if options["penalty"].strength:
        losses = functional.kl_div(model(X).log_softmax(1), teacher, reduction="none").sum(1)
        parts = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
        trace = sum(part.square().sum() for row in parts for part in row) / len(X)
        torch.testing.assert_close(ours.last.penalty, trace, rtol=1e-6, atol=0)


def masked_policy(mask, advantage):
    """A policy's gradient with ratios of 1: the losses cancel where advantages are centred."""

    def criterion(outputs, actions, reduction="mean"):
        chosen = outputs.log_softmax(1).gather(1, actions[:, None])[:, 0]
        losses = -(chosen - chosen.detach()).exp() * advantage * mask
        return losses if reduction == "none" else losses.sum() / mask.sum()

    return criterion


def test_terms_of_both_signs_weight_and_train_as_they_are():
    mask, advantage = torch.tensor([1.0, 1, 0, 1, 1, 0, 1]).double(), torch.tensor([2.0, -1, 3, -2, 1.5, 1, -0.5]).double()
    criterion, model = masked_policy(mask, advantage), network()
    ours = MGSLoss(criterion, weighting="agreement")
    for _ in range(3):
        value, gradients = trained(model, lambda outputs: ours(outputs, Y))
        scales = ours.last.weights / mask.sum()
        expected, plain = trained(model, lambda outputs, scales=scales: (scales * criterion(outputs, Y, "none")).sum())
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradients, plain, rtol=1e-9, atol=1e-12)


def noisy(outputs, targets, reduction="mean"):
    return functional.mse_loss(outputs + torch.randn_like(outputs), targets, reduction=reduction)


@pytest.mark.parametrize("options", [{}, {"penalty": NOTHING}, {"penalty": NOTHING, "output": "trace"}])
def test_a_criterion_that_draws_draws_once(options):
    model = network()
    torch.manual_seed(3)
    expected, plain = trained(model, lambda outputs: noisy(outputs, TARGETS))
    after = torch.rand(1)
    torch.manual_seed(3)
    value, gradients = trained(model, lambda outputs: MGSLoss(noisy, **options)(outputs, TARGETS))
    assert value == expected
    torch.testing.assert_close(gradients, plain, rtol=0, atol=0)
    assert torch.rand(1) == after


class Centred(nn.Module):
    """Subtract a moving average of the outputs, kept in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(4).double())

    def forward(self, outputs, targets, reduction="mean"):
        losses = functional.cross_entropy(outputs - self.centre, targets, reduction=reduction)
        self.centre = 0.9 * self.centre + 0.1 * outputs.detach().mean(0)
        return losses


@pytest.mark.parametrize("options", [{}, {"penalty": mgs.Penalty("trace", 0.1)}, {"weighting": "agreement"}])
def test_buffers_of_the_criterion_are_updated_once(options):
    model, alone, wrapped = network(), Centred(), Centred()
    ours = MGSLoss(wrapped, **options)
    for _ in range(3):
        alone(model(X), Y)
        ours(model(X), Y)
        torch.testing.assert_close(wrapped.centre, alone.centre, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mean_of_more_elements_than_float16_counts(dtype):
    model, images = nn.Conv2d(3, 4, 1, dtype=dtype), torch.linspace(0, 1, 3 * 2 * 192 * 192).reshape(2, 3, 192, 192).to(dtype)
    labels = (torch.arange(2 * 192 * 192) % 4).reshape(2, 192, 192)
    expected = functional.cross_entropy(model(images).float(), labels)

    def criterion(outputs, targets, reduction="mean"):
        return functional.cross_entropy(outputs.float(), targets, reduction=reduction).to(dtype)

    for weight in (None, torch.ones(2)):
        value = MGSLoss(criterion, penalty=NOTHING)(model(images), labels, sample_weight=weight)
        torch.testing.assert_close(value, expected, rtol=1e-2, atol=0, check_dtype=False)
    unreduced = MGSLoss(lambda outputs, targets: functional.cross_entropy(outputs, targets, reduction="none"))
    torch.testing.assert_close(unreduced(model(images), labels), expected, rtol=2e-2, atol=0, check_dtype=False)


def test_the_scale_is_verified_again():
    """Class weights that come in later are no constant factor of the losses any more."""
    divisor = torch.ones(7, dtype=torch.float64)

    def criterion(outputs, targets, reduction="mean"):
        losses = functional.cross_entropy(outputs, targets, reduction="none")
        return losses if reduction == "none" else (losses / divisor).mean()

    model, ours = network(), MGSLoss(criterion, weighting="agreement")
    for _ in range(3):
        ours(model(X), Y)
    divisor[1] = 2.0
    with pytest.raises(mgs.ArgumentError, match="`criterion` must have a value that is a constant times the sum"):
        ours(model(X), Y)  # the fourth
    divisor[1] = 1.0
    ours(model(X), Y).backward()


def test_outputs_have_an_axis_of_samples():
    with pytest.raises(mgs.ArgumentError, match="`outputs` must hold at least one sample; got none, for they have no axis"):
        MGSLoss(nn.MSELoss(), penalty=NOTHING)(network()(X).sum(), torch.tensor(1.0))


@pytest.mark.parametrize("distance", [0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-2])
@pytest.mark.parametrize("options", [{"penalty": NOTHING}, {"weighting": "agreement"}])
def test_a_student_that_is_its_teacher_is_not_refused(distance, options):
    model, x = network().float(), X.float()
    teacher = (model(x) + distance * TARGETS.float()).detach().softmax(1)

    def distil(outputs, targets, reduction="batchmean"):
        return functional.kl_div(outputs.log_softmax(1), targets, reduction=reduction)

    for _ in range(2):
        assert MGSLoss(distil, **options)(model(x), teacher).isfinite()


@pytest.mark.parametrize("options", [{}, {"penalty": NOTHING}])
def test_a_criterion_returns_a_tensor(options):
    with pytest.raises(mgs.ArgumentError, match=r"`criterion` must be able to give a loss for each of 7 samples; got shape \(\)"):
        MGSLoss(lambda outputs, targets: 1.0, **options)(network()(X), Y)


@pytest.mark.parametrize("options", [{"penalty": NOTHING}, {"weighting": "agreement"}])
def test_a_batch_that_cancels_after_others_that_do_not(options):
    chosen, counted = torch.tensor([0, 1, 2, 3, 1, 2, 0]), torch.tensor([1.0, 1, 0, 1, 1, 0, 0]).double()

    def policy(outputs, advantages, reduction="mean"):
        chances = outputs.log_softmax(1).gather(1, chosen[:, None])[:, 0]
        losses = -(chances - chances.detach()).exp() * advantages * counted
        return losses if reduction == "none" else losses.sum() / counted.sum()

    def third(before):
        model = network()
        criterion = MGSLoss(policy, **options)
        for advantages in before:
            criterion(model(X), advantages)
        criterion(model(X), torch.tensor([1.0, -1, 1, -1, 1, 1, 1]).double()).backward()
        return criterion.last, [parameter.grad for parameter in model.parameters()]

    ones = torch.ones(7).double()
    (found, gradient), (fresh, expected) = third([ones, ones]), third([])
    torch.testing.assert_close(found.kernel, fresh.kernel)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("n", [48, 100])
@pytest.mark.parametrize("options", [{"penalty": mgs.Penalty("trace", 1e-3)}, {"weighting": "agreement"}])
def test_a_criterion_that_computes_in_low_precision_is_not_refused(n, options):
    torch.manual_seed(0)
    body, head = nn.Linear(6, 16), nn.Linear(16, 30)

    def criterion(hidden, targets, reduction="mean"):
        return functional.cross_entropy(head(hidden), targets, reduction=reduction)

    loss = MGSLoss(criterion, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            hidden, targets = functional.layer_norm(body(torch.randn(n, 6)).float(), (16,)), torch.randint(0, 30, (n,))
            loss(hidden, targets)
            weights = 1.0 if loss.last.weights is None else loss.last.weights
            expected = (weights * criterion(hidden, targets, reduction="none").float()).mean()
            torch.testing.assert_close(loss.last.criterion, expected, rtol=1e-4, atol=0.0)


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("options", [{}, {"penalty": mgs.Penalty("trace", 0.1)}, {"weighting": "agreement"}])
def test_a_compiled_criterion_stays_as_it_is(options):
    ignoring = torch.where(Y > 1, -100, Y)
    criterion = torch.compile(nn.CrossEntropyLoss(), backend="eager")
    model = network()
    loss = MGSLoss(criterion, **options)
    loss(model(X), ignoring)
    assert criterion.reduction == "mean"
    if "weighting" not in options:
        torch.testing.assert_close(loss.last.criterion, functional.cross_entropy(model(X), ignoring))


class Proxies(nn.Module):
    def __init__(self, reduction="mean"):
        super().__init__()
        torch.manual_seed(0)
        self.reduction, self.proxies = reduction, nn.Parameter(torch.randn(6, 4).double())

    def forward(self, features, targets):
        return functional.cross_entropy(features @ self.proxies, targets, reduction=self.reduction)


def test_a_criterion_with_parameters_takes_features_without_a_gradient():
    criterion, weights = Proxies(), torch.linspace(0.5, 1.5, 7).double()
    MGSLoss(criterion)(X, Y, sample_weight=weights).backward()
    found, criterion.proxies.grad = criterion.proxies.grad, None
    (weights * functional.cross_entropy(X @ criterion.proxies, Y, reduction="none")).mean().backward()
    torch.testing.assert_close(found, criterion.proxies.grad)


class Uncertain(nn.Module):
    def __init__(self):
        super().__init__()
        self.reduction, self.log = "mean", nn.Parameter(torch.zeros(()).double())

    def forward(self, outputs, targets):
        losses = functional.cross_entropy(outputs, targets, reduction=self.reduction)
        return torch.exp(-self.log) * losses + (0.0 if self.reduction == "none" else self.log)


def test_a_term_of_the_criterions_own_parameters_is_refused():
    with pytest.raises(mgs.ArgumentError, match="a constant times the sum of its unreduced losses"):
        MGSLoss(Uncertain())(network()(X), Y, sample_weight=torch.ones(7).double())


def test_a_value_is_asked_for_no_more_than_is_needed():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.zeros(3))

        @property
        def reduction(self):
            return "mean"

        def forward(self, outputs, targets):
            return functional.cross_entropy(outputs, targets)

    model = network()
    torch.testing.assert_close(MGSLoss(Fixed())(model(X), Y), functional.cross_entropy(model(X), Y))
    with pytest.raises(mgs.ArgumentError, match="`reduction` be set on a copy"):
        MGSLoss(Fixed(), weighting="agreement")(model(X), Y)
    meta = nn.Linear(6, 4, device="meta")
    assert MGSLoss(nn.CrossEntropyLoss())(
        meta(torch.empty(7, 6, device="meta")), torch.empty(7, dtype=torch.long, device="meta")
    ).is_meta


@pytest.mark.parametrize("criterion", [functional.mse_loss, functional.l1_loss])
@pytest.mark.parametrize("options", [{}, {"penalty": mgs.Penalty("trace", 1.0)}, {"weighting": "agreement"}])
def test_a_mean_whose_weights_are_all_zero_is_nothing(criterion, options):
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    loss = MGSLoss(criterion, model=model, **options)(model(x), torch.randn(5, 3), weight=torch.zeros(5, 3))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(float(value.grad.abs().max()) == 0.0 for value in model.parameters())


@pytest.mark.parametrize("criterion", [functional.huber_loss, functional.mse_loss, functional.binary_cross_entropy_with_logits])
def test_weights_of_both_signs_keep_the_scale(criterion):
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.rand(6, 3)
    losses = criterion(model(x), y, reduction="none").detach()
    weight = torch.ones(6, 3)
    weight[::2] = -1.0
    weight[1::2] *= losses[::2].sum() / losses[1::2].sum()
    found = MGSLoss(criterion, weighting="agreement", model=model)
    found(model(x), y, weight=weight)
    constant = 1.0 / weight.sum() if criterion is functional.mse_loss else 1.0 / weight.numel()
    each = 6 * constant * (weight * criterion(model(x), y, reduction="none")).sum(1)
    rows = [
        torch.cat([part.flatten() for part in torch.autograd.grad(one, list(model.parameters()), retain_graph=True)])
        for one in each
    ]
    expected = torch.stack(rows) @ torch.stack(rows).T
    torch.testing.assert_close(found.last.kernel, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
