"""MGSLoss: the criterion's own value, penalty and weights from loops of ordinary gradients, and what users do around a loss."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import pytest

import mgs_core as mgs

torch = pytest.importorskip("torch")

from mgs_core.adapters.torch import (  # noqa: E402  # after the skip
    Configured,
    LossRecord,
    MGSLoss,
    MGSMonitor,
    twice_differentiable,
)
from mgs_core.backends.torch import fused  # noqa: E402  # after the skip
from torch import nn  # noqa: E402  # after the skip
from torch.nn.functional import cross_entropy  # noqa: E402  # after the skip

TRACE = mgs.Penalty("trace", strength=0.3)


@pytest.fixture
def mlp(of):
    model, x = of("mlp")
    x = torch.cat([x, x.flip(0) + 0.5])
    return model, x, torch.arange(len(x)) % 3


def loss_rows(model, x, losses_of) -> torch.Tensor:
    """Gradient of each sample's loss, by a loop."""
    rows = []
    for loss in losses_of(model(x)):
        parts = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


CRITERIA = {
    "plain": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weights": nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)),
    "ignored": nn.CrossEntropyLoss(ignore_index=1),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.2, weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)),
    "function": cross_entropy,
    "callable": lambda outputs, targets: cross_entropy(outputs, targets, reduction="none"),
}

BARE = ("function", "callable")


@pytest.mark.parametrize("name", CRITERIA)
def test_value_is_the_criterion_plus_the_penalty_on_the_kernel_of_its_losses(mlp, name):
    model, x, y = mlp
    criterion = MGSLoss(CRITERIA[name], penalty=TRACE)
    value = criterion(model(x), y)
    plain = CRITERIA[name](model(x), y).mean()

    def losses(outputs):
        options = {key: getattr(CRITERIA[name], key) for key in ("weight", "ignore_index", "label_smoothing") if name not in BARE}
        each = cross_entropy(outputs, y, reduction="none", **options)
        return each if name == "sum" else each * (len(y) * plain.detach() / each.sum().detach())

    penalty = 0.3 * (loss_rows(model, x, losses) ** 2).sum() / len(x)
    assert isinstance(criterion.last, LossRecord)
    torch.testing.assert_close(criterion.last.criterion, plain.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(criterion.last.penalty, penalty, rtol=1e-11, atol=0)
    torch.testing.assert_close(value, plain + penalty, rtol=1e-12, atol=0)


def test_ignored_samples_are_not_in_the_kernel(mlp):
    model, x, y = mlp
    criterion = MGSLoss(nn.CrossEntropyLoss(ignore_index=1), penalty=TRACE)
    criterion(model(x), y)
    assert not criterion.last.kernel[y == 1].any()
    assert (criterion.last.kernel.diagonal()[y != 1] > 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_agreement_weights_the_losses_and_their_gradient(mlp, reduction):
    model, x, y = mlp
    criterion = MGSLoss(nn.CrossEntropyLoss(reduction=reduction), weighting="agreement")
    value = criterion(model(x), y)
    rows = loss_rows(model, x, lambda outputs: cross_entropy(outputs, y, reduction="none"))
    weights = mgs.agreement_weights(rows @ rows.T)
    losses = cross_entropy(model(x), y, reduction="none")
    expected = getattr(weights * losses, reduction)()
    torch.testing.assert_close(criterion.last.weights, weights, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=0)
    gradient = torch.autograd.grad(value, list(model.parameters()))
    for part, other in zip(gradient, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(part, other, rtol=1e-10, atol=1e-12)


def test_agreement_and_penalty_share_one_kernel(mlp):
    model, x, y = mlp
    both = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, weighting="agreement")
    value = both(model(x), y)
    penalised, weighted = (
        MGSLoss(nn.CrossEntropyLoss(), **options) for options in ({"penalty": TRACE}, {"weighting": "agreement"})
    )
    penalised(model(x), y), weighted(model(x), y)
    torch.testing.assert_close(value, weighted.last.total + penalised.last.penalty)
    assert both.last.summary.trace == pytest.approx(float(penalised.last.kernel.trace()))


def test_sample_weights_weight_losses_and_kernel(mlp):
    model, x, y = mlp
    weights = torch.linspace(0.0, 2.0, len(x), dtype=torch.float64)
    criterion = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE)
    criterion(model(x), y, sample_weight=weights)
    rows = loss_rows(model, x, lambda outputs: weights * cross_entropy(outputs, y, reduction="none"))
    torch.testing.assert_close(criterion.last.kernel, rows @ rows.T, rtol=1e-11, atol=1e-12)
    expected = (weights * cross_entropy(model(x), y, reduction="none")).mean()
    torch.testing.assert_close(criterion.last.criterion, expected.detach())


def test_every_penalises_lazily_and_more_strongly(mlp):
    model, x, y = mlp
    always, lazy = (MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, every=every) for every in (1, 3))
    penalties = []
    for _ in range(4):
        always(model(x), y), lazy(model(x), y)
        penalties.append(lazy.last.penalty)
    assert [penalty is not None for penalty in penalties] == [True, False, False, True]
    torch.testing.assert_close(penalties[0], 3 * always.last.penalty)


def test_max_samples_takes_the_kernel_of_the_first(mlp):
    model, x, y = mlp
    few, all_of_them = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, max_samples=5), MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE)
    few(model(x), y), all_of_them(model(x), y)
    torch.testing.assert_close(few.last.kernel, all_of_them.last.kernel[:5, :5])


@pytest.mark.parametrize("m", [3, 1])
@pytest.mark.parametrize("name", ["mlp", "rectified", "normalised_frames", "experts"])
def test_max_samples_has_the_gradient_of_the_first(of, name, m):
    model, x = of(name)
    y = torch.arange(len(x)) % 2
    criterion = MGSLoss(nn.CrossEntropyLoss(reduction="sum"), penalty=TRACE, max_samples=m)
    value = criterion(model(x), y)
    expected = cross_entropy(model(x), y, reduction="sum") + TRACE(
        mgs.kernel(model, x[:m], y[:m], output="loss", differentiable=True)
    )
    gradients = (torch.autograd.grad(each, list(model.parameters())) for each in (value, expected))
    for part, other in zip(*gradients, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("output", ["trace", "target", "sum", "random"])
def test_other_heads_are_those_of_kernel(mlp, output):
    model, x, y = mlp
    criterion = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, output=output, transform="softmax")
    criterion(model(x), y)
    torch.testing.assert_close(criterion.last.kernel, mgs.kernel(model, x, y, output=output, transform="softmax"))


def test_random_probes_are_drawn_anew(mlp):
    model, x, y = mlp
    criterion = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, output="random")
    kernels = []
    for _ in range(3):
        criterion(model(x), y)
        kernels.append(criterion.last.kernel)
    assert not torch.allclose(kernels[0], kernels[1]) or not torch.allclose(kernels[0], kernels[2])


def test_evaluation_and_no_grad_give_the_criterion_alone(mlp):
    model, x, y = mlp
    criterion, plain = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE), nn.CrossEntropyLoss()(model(x), y)
    with torch.no_grad():
        torch.testing.assert_close(criterion(model(x), y), plain.detach())
    torch.testing.assert_close(criterion.eval()(model(x), y), plain)
    assert criterion.last.penalty is None
    assert criterion.last.summary is None


def test_gradient_accumulates_over_micro_batches(mlp):
    model, x, y = mlp
    criterion = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE)
    parts = [torch.autograd.grad(criterion(model(x[i : i + 4]), y[i : i + 4]) / 3, list(model.parameters())) for i in (0, 4, 8)]
    for i in (0, 4, 8):
        (criterion(model(x[i : i + 4]), y[i : i + 4]) / 3).backward()
    for number, value in enumerate(model.parameters()):
        torch.testing.assert_close(value.grad, sum(part[number] for part in parts))


def test_gradient_scaler_scales_loss_and_penalty_alike(mlp):
    model, x, y = mlp
    model, x = model.float(), x.float()
    scaled, scaler = copy.deepcopy(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for net, step in (
        (model, lambda loss, o: (loss.backward(), o.step())),
        (scaled, lambda loss, o: (scaler.scale(loss).backward(), scaler.step(o))),
    ):
        groups = [{"params": net[0].parameters(), "lr": 0.1}, {"params": net[2].parameters(), "lr": 0.01}]
        step(MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE)(net(x), y), torch.optim.SGD(groups, lr=0.1))
    for value, other in zip(model.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(value, other)


def test_training_with_automatic_mixed_precision_lowers_the_loss(of):
    model, x = of("cnn")
    model, x, y = model.float(), x.float(), torch.arange(6) % 3
    criterion, optimizer = MGSLoss(nn.CrossEntropyLoss(), penalty=mgs.Penalty("log_determinant", 0.01)), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert criterion.last.kernel.dtype == torch.float32


NORMALISED = {
    "layer": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)),
    "group": lambda: nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.ReLU(), nn.Linear(6, 3)),
    "batch": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NORMALISED)
def test_penalty_of_normalisations_in_automatic_mixed_precision(name, dtype):
    torch.manual_seed(0)
    model, x, y = NORMALISED[name](), torch.randn(8, 4), torch.arange(8) % 3
    found = []
    for mixed in (False, True):
        criterion = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, batch_norm="frozen")
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=mixed):
            loss = criterion(model(x), y)
        loss.backward()
        found.append((criterion.last.kernel, torch.cat([value.grad.reshape(-1) for value in model.parameters()])))
    for exact, close in zip(*found, strict=True):
        assert (close - exact).abs().max() < 0.1 * exact.abs().max()


def test_dropout_masks_are_those_of_the_outputs(mlp):
    model, x, y = mlp
    model = nn.Sequential(model[0], nn.Dropout(0.5), nn.Tanh(), model[2])
    criterion = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE)
    outputs = model(x)
    criterion(outputs, y)
    rows = loss_rows(model, x, lambda _: cross_entropy(outputs, y, reduction="none"))
    torch.testing.assert_close(criterion.last.kernel, rows @ rows.T, rtol=1e-11, atol=1e-12)


def test_batch_normalisation_is_refused_by_name_or_frozen(of):
    model, x = of("resnet_batch_norm")
    model.train()
    y = torch.arange(len(x)) % 3
    with pytest.raises(mgs.SamplesInteractError, match=r"after parameter '0.weight' \(batch normalisation in training mode, '1'"):
        MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, model=model)(model(x), y)
    criterion = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, batch_norm="frozen")
    criterion(model(x), y)
    rows = loss_rows(frozen_copy(model, x), x, lambda outputs: cross_entropy(outputs, y, reduction="none"))
    torch.testing.assert_close(criterion.last.kernel, rows @ rows.T, rtol=1e-9, atol=1e-12)
    assert torch.allclose(mgs.kernel(Configured(model, batch_norm="frozen"), x, y, output="loss"), criterion.last.kernel)


def frozen_copy(model, x):
    """Return a copy in evaluation mode with the statistics of this batch."""
    fixed = copy.deepcopy(model)
    hooks = [module.register_forward_pre_hook(freeze) for module in fixed.modules() if isinstance(module, nn.BatchNorm2d)]
    fixed(x)
    for hook in hooks:
        hook.remove()
    return fixed.eval()


@pytest.mark.parametrize("n", [1, 3])
def test_statistics_are_frozen_for_a_batch_of_one_too(n):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 2)).double()
    x = torch.randn(n, 1, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(mgs.kernel(Configured(model, batch_norm="frozen"), x), mgs.kernel(frozen_copy(model, x), x))


def test_frozen_statistics_vouch_for_no_others():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), torch.randn(6, 4)
    for _ in range(2):
        mgs.kernel(Configured(model, batch_norm="frozen"), x)
    with pytest.raises(
        mgs.SamplesInteractError, match=r'Use `model.eval\(\)`, MGSLoss\(…, batch_norm="frozen"\), Configured\(model, '
    ):
        mgs.kernel(model, x)


def freeze(module, inputs):
    variance, mean = torch.var_mean(inputs[0].detach(), (0, 2, 3), correction=0)
    module.running_mean.copy_(mean)
    module.running_var.copy_(variance)
    module.eval()


def test_gradient_with_frozen_batch_normalisation_is_that_of_central_differences(of):
    model, x = of("resnet_batch_norm")
    model.train()
    criterion, y = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, batch_norm="frozen"), torch.arange(len(x)) % 3
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(criterion(model(x), y), parameters)
    random = torch.Generator().manual_seed(2)
    direction = [torch.randn(value.shape, generator=random, dtype=value.dtype) for value in parameters]
    start, values = [value.detach().clone() for value in parameters], {}
    for i in (-2, -1, 1, 2):
        with torch.no_grad():
            for value, at, move in zip(parameters, start, direction, strict=True):
                value.copy_(at + i * 1e-4 * move)
        values[i] = float(criterion(model(x), y).detach())
    expected = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / 12e-4
    assert sum(float((a * b).sum()) for a, b in zip(gradient, direction, strict=True)) == pytest.approx(expected, rel=1e-6)


def test_outputs_in_objects(mlp):
    model, x, y = mlp

    class Outputs:
        logits = None

    wrapped = Outputs()
    wrapped.logits = model(x)
    plain = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE)
    torch.testing.assert_close(plain(wrapped, y), plain(model(x), y))
    selecting = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, select=lambda outputs: outputs["out"])
    torch.testing.assert_close(selecting({"out": model(x)}, y), plain(model(x), y))


def test_parameters_by_name(mlp):
    model, x, y = mlp
    criterion = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, model=model, parameters=lambda name: name.startswith("2"))
    criterion(model(x), y)
    expected = mgs.kernel(model, x, y, output="loss", parameters=["2.weight", "2.bias"])
    torch.testing.assert_close(criterion.last.kernel, expected)
    assert len(list(criterion.parameters())) == 0


def test_inputs_that_need_gradients_are_data(mlp):
    model, x, y = mlp
    criterion = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE)
    criterion(model(x), y)
    expected = criterion.last.kernel
    criterion(model(x.clone().requires_grad_()), y)
    torch.testing.assert_close(criterion.last.kernel, expected)


def test_fused_attention_without_second_derivative_is_refused_with_its_remedy(mlp, monkeypatch):
    model, x, y = mlp
    criterion = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE)
    monkeypatch.setitem(fused._ONCE, "Tanh", fused._ONCE["ScaledDotProduct"])  # which only GPUs have without a second derivative
    with pytest.raises(mgs.UnsupportedModelError, match=r"fused attention .*twice_differentiable"):
        criterion(model(x), y)


def test_fused_attention_on_cpu_is_penalised_as_plain_attention(of):
    model, x = of("transformer")
    criterion, y = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE), torch.arange(len(x)) % 3
    gradients = []
    for context in (nullcontext(), twice_differentiable(recurrent=False)):
        model.zero_grad()
        with context:
            criterion(model(x), y).backward()
        gradients.append(torch.cat([value.grad.reshape(-1) for value in model.parameters()]))
    torch.testing.assert_close(*gradients)
    weighted = MGSLoss(nn.CrossEntropyLoss(), weighting="agreement")
    weighted(model(x), y).backward()
    torch.testing.assert_close(weighted.last.kernel, criterion.last.kernel)


def test_fused_recurrent_layers_are_refused_with_their_remedy():
    model, x, y = nn.LSTM(3, 4, batch_first=True), torch.randn(5, 6, 3), torch.arange(5) % 4
    criterion = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, select=lambda outputs: outputs[0][:, -1])
    if torch.backends.mkldnn.is_available():
        with pytest.raises(mgs.UnsupportedModelError, match=r"fused recurrent layer .*twice_differentiable"):
            criterion(model(x), y)
    fused = mgs.kernel(Configured(model, select=lambda outputs: outputs[0][:, -1]), x, output="sum")
    before = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    with twice_differentiable():
        criterion(model(x), y).backward()
        plain = mgs.kernel(Configured(model, select=lambda outputs: outputs[0][:, -1]), x, output="sum")
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
    assert before == (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled)


GOOD = nn.CrossEntropyLoss()


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "`every` must be an integer of at least 1; got 0"),
        ({"every": True}, "`every` must be an integer"),
        ({"max_samples": 0}, "`max_samples` must be an integer of at least 1; got 0"),
        ({"weighting": "nonsense"}, '`weighting` must be "agreement" or None'),
        ({"batch_norm": "nonsense"}, '`batch_norm` must be "refuse" or "frozen"'),
        ({"transform": "softmax"}, '`transform` must be "identity" for output="loss"'),
        ({"criterion": 3}, "`criterion` must be callable"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(mgs.ArgumentError, match=message):
        MGSLoss(**{"criterion": GOOD, **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, x, y: MGSLoss(lambda o, t: GOOD(o, t), penalty=TRACE)(m(x), y),
            "`criterion` must be able to give a loss for each",
        ),
        (
            lambda m, x, y: MGSLoss(GOOD, penalty=TRACE)(m(x).detach(), y),
            "`outputs` must be a tensor that the model made with gradients",
        ),
        (
            lambda m, x, y: MGSLoss(GOOD, penalty=TRACE, model=nn.Linear(1, 1))(m(x), y),
            "`outputs` must depend on trainable parameters",
        ),
        (
            lambda m, x, y: MGSLoss(GOOD, penalty=TRACE)(m(x[:0]), y[:0]),
            "`outputs` must hold at least one sample; got 0",
        ),
        (
            lambda m, x, y: MGSLoss(GOOD, penalty=TRACE)((m(x),), y),
            "`model` must return a tensor, or an object with a tensor `logits`",
        ),
        (
            lambda m, x, y: mgs.kernel(mgs.get_backend("torch").evaluated(m(x)), m(x).detach(), chunk_size=2),
            "`chunk_size` must be None for outputs that are there already",
        ),
    ],
)
def test_bad_calls_are_named(mlp, call, message):
    with pytest.raises(mgs.ArgumentError, match=message):
        call(*mlp)


def test_gradient_comes_from_a_backward_pass_where_the_statistics_lack_something(mlp):
    model, x, y = mlp
    x.requires_grad_()
    MGSLoss(nn.CrossEntropyLoss(), weighting="agreement")(model(x), y).backward()
    assert x.grad.any()
    reusing = MGSLoss(nn.CrossEntropyLoss(), weighting="agreement")(model(x.detach()), y)
    with pytest.raises(mgs.ArgumentError, match="`reuse` must be False for a loss that is differentiated twice"):
        torch.autograd.grad(reusing, model[0].weight, create_graph=True)


def test_backward_hooks_and_sparse_tables_get_their_gradients(mlp):
    _, _, y = mlp
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3)).double()
    x = torch.randint(0, 9, (len(y), 3))
    MGSLoss(nn.CrossEntropyLoss(), weighting="agreement")(model(x), y).backward()
    assert model[0].weight.grad.is_sparse
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    seen = []
    model[2].register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    loss = MGSLoss(nn.CrossEntropyLoss(), weighting="agreement")(model(x.double()), y)
    seen.clear()  # the hook is called by the kernel's passes too
    loss.backward()
    assert len(seen) == 1
    assert seen[0].any()


@pytest.mark.parametrize("name", ["log_determinant", "log_determinant_cosine", "trace"])
def test_a_loss_that_is_not_finite_stays_so(mlp, name):
    model, x, y = mlp
    criterion = MGSLoss(nn.CrossEntropyLoss(), penalty=mgs.Penalty(name, 0.1))
    assert torch.isfinite(criterion(model(x), y))
    assert torch.isnan(criterion(model(x * torch.nan), y))


def test_a_factorisation_that_fails_on_finite_numbers_is_an_error(mlp, monkeypatch):
    model, x, y = mlp

    def fail(*_):
        raise torch.linalg.LinAlgError

    monkeypatch.setattr(mgs.Penalty, "__call__", fail)
    with pytest.raises(torch.linalg.LinAlgError):
        MGSLoss(nn.CrossEntropyLoss(), penalty=mgs.Penalty("log_determinant"))(model(x), y)


def test_compiled_models_are_refused_for_a_penalty_and_weighted_by_rows(mlp):
    model, x, y = mlp
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(mgs.UnsupportedModelError, match=r"compiled by torch.compile .*_orig_mod"):
        MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, model=compiled)(compiled(x), y)
    criteria = [MGSLoss(nn.CrossEntropyLoss(), weighting="agreement") for _ in range(2)]
    torch.compiler.reset()
    with torch._functorch.config.patch(donated_buffer=False):  # else whether its backward runs again depends on what ran before
        criteria[0](compiled(x), y).backward()
    gradients = [value.grad.clone() for value in model.parameters()]
    model.zero_grad()
    criteria[1](model(x), y).backward()
    torch.testing.assert_close(criteria[0].last.kernel, criteria[1].last.kernel)
    for value, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(value.grad, gradient)


@pytest.mark.wrong_types
def test_options_may_be_integers_of_numpy(mlp):
    model, x, y = mlp
    values = []
    for two in (2, np.int64(2)):
        criterion = MGSLoss(nn.CrossEntropyLoss(), penalty=mgs.Penalty("trace", type(two)(1)), every=two, max_samples=two)
        values.append(criterion(model(x), y))
        values[-1].backward()
    torch.testing.assert_close(*values)
    assert MGSMonitor(model, x, every=np.int64(1)).step() is not None


class Contrastive(nn.Module):
    def forward(self, outputs, targets, reduction="mean"):
        return cross_entropy(outputs @ outputs.T, targets % len(targets), reduction=reduction)


class Whole(nn.Module):
    def forward(self, outputs, targets):
        return Contrastive()(outputs, targets)


@pytest.mark.parametrize("criterion", [Contrastive(), Whole()])
def test_a_loss_that_compares_samples_goes_with_a_penalty_on_another_head(mlp, criterion):
    model, x, y = mlp
    ours = MGSLoss(criterion, penalty=TRACE, output="trace")
    ours(model(x), y).backward()
    torch.testing.assert_close(ours.last.criterion, criterion(model(x), y).detach())
    torch.testing.assert_close(ours.last.penalty, TRACE(mgs.kernel(model, x)))
    torch.testing.assert_close(MGSLoss(criterion)(model(x), y), criterion(model(x), y))
    with pytest.raises((mgs.ArgumentError, mgs.SamplesInteractError), match=r"penalise another head|Penalise another head"):
        MGSLoss(criterion, penalty=TRACE)(model(x), y)


def test_layers_without_a_name_are_not_listed():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), torch.randn(5, 3)
    with pytest.raises(mgs.SamplesInteractError, match=r"\(batch normalisation in training mode\)\."):
        MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, output="trace")(model(x), torch.arange(5) % 2)


@pytest.mark.parametrize("options", [{}, {"penalty": TRACE, "output": "trace"}, {"weighting": "agreement"}, {"penalty": TRACE}])
def test_a_batch_of_which_nothing_counts_has_the_loss_0_whatever_the_options(mlp, options):
    model, x, y = mlp
    criterion = MGSLoss(nn.CrossEntropyLoss(ignore_index=1), **options)
    criterion(model(x), torch.ones_like(y)).backward()
    assert criterion.last.criterion == 0
    assert all(value.grad is None or bool(value.grad.isfinite().all()) for value in model.parameters())


@pytest.mark.parametrize("options", [{}, {"penalty": TRACE, "output": "trace"}, {"weighting": "agreement"}])
def test_a_criterion_without_reduction_is_called_once(mlp, options):
    model, x, y = mlp
    calls = []

    def losses(outputs, targets):
        calls.append(1)
        return cross_entropy(outputs, targets, reduction="none")

    MGSLoss(losses, **options)(model(x), y)
    assert len(calls) == 1


@pytest.mark.parametrize("form", ["module", "block"])
def test_what_is_compiled_within_a_module_is_seen(form):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    model(x)  # in training mode, so that the statistics are not the first ones
    truth = mgs.kernel(model.eval(), x)
    if form == "module":
        model.compile(backend="aot_eager")
    else:
        model[1] = torch.compile(model[1], backend="aot_eager")
    torch.testing.assert_close(mgs.kernel(model, x), truth)
    with pytest.raises(mgs.SamplesInteractError, match="batch normalisation in training mode"):
        mgs.kernel(model.train(), x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        return 2.0 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2.0 * gradient  # None fails


def test_functions_in_python_see_the_gradient_of_a_weighted_step(mlp):
    model, x, y = mlp
    own = nn.Sequential(model[0], model[1])
    gradients = []
    for reuse in (True, False):
        model.zero_grad()
        criterion = MGSLoss(nn.CrossEntropyLoss(), weighting="agreement", reuse=reuse)
        criterion(model[2](Doubled.apply(own(x))), y).backward()
        gradients.append([value.grad.clone() for value in (*model[0].parameters(), *model[2].parameters())])
    torch.testing.assert_close(*gradients)


class Redistribute(torch.autograd.Function):
    """Have the name of one of PyTorch's own."""

    @staticmethod
    def forward(ctx, x):
        return 2.0 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2.0 * gradient


def test_functions_are_not_known_by_their_names(mlp):
    model, x, y = mlp
    losses = [
        MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE)(model[2](double(model[1](model[0](x)))), y)
        for double in (Redistribute.apply, lambda h: 2.0 * h)
    ]
    torch.testing.assert_close(*losses)


class Doubling(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return 2.0 * self.layer(x)


def test_compiled_models_are_compiled_after_a_measurement():
    model, x, compiled = Doubling(), torch.randn(4, 3), []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    model.compile(backend=backend)
    mgs.kernel(model, x)
    assert not compiled
    model(x)
    assert len(compiled) == 1
