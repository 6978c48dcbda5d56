"""Calls that go wrong say at once what is wrong and what to do; what goes well in plain training goes well here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mgs_core as mgs

torch = pytest.importorskip("torch")

from mgs_core.adapters.torch import Configured, MGSLoss, MGSMonitor  # noqa: E402  # after the skip
from torch import nn  # noqa: E402  # after the skip
from torch.autograd.function import once_differentiable  # noqa: E402  # after the skip
from torch.nn.functional import cross_entropy  # noqa: E402  # after the skip

X, Y = torch.eye(6).double(), torch.arange(6) % 4
TRACE = mgs.Penalty("trace", 0.1)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, 4).double()


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linear",), r"`model` must be a torch.nn.Module; got str"),
        ((nn.Linear(2, 2), None, "freeze"), '`batch_norm` must be "refuse" or "frozen"; got \'freeze\''),
        ((nn.Linear(2, 2), "logits"), "`select` must be a function of what the model returns; got 'logits'"),
    ],
)
def test_configurations_that_there_are_not_are_refused_at_once(arguments, message):
    with pytest.raises(mgs.ArgumentError, match=message):
        Configured(*arguments)


def test_names_of_parameters_may_come_from_an_iterator():
    model, y = linear(), Y
    criterion = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, model=model, parameters=iter(["weight"]))
    first, second = (float(criterion(model(X), y).detach()) for _ in range(2))
    assert first == second
    monitor = MGSMonitor(model, X, every=1, parameters=(name for name in ["weight"]))
    assert monitor.step().trace == monitor.step().trace == float(mgs.kernel(model, X, parameters="weight").trace())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_reduction_may_be_given_with_the_call(reduction):
    model, y = linear(), Y
    called, made = MGSLoss(cross_entropy, penalty=TRACE), MGSLoss(nn.CrossEntropyLoss(reduction=reduction), penalty=TRACE)
    torch.testing.assert_close(called(model(X), y, reduction=reduction), made(model(X), y))


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("criterion", [nn.MSELoss(), torch.nn.functional.l1_loss])
def test_targets_that_are_compared_with_all_outputs_are_refused(criterion):
    with pytest.raises(
        mgs.ArgumentError, match=r"of the targets for \w+; got \(6, 1\), and losses of \(6, 6\).*Use outputs\.squeeze"
    ):
        MGSLoss(criterion, penalty=TRACE)(linear()(X)[:, :1], torch.zeros(6).double())


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_outputs_may_be_compared_with_several_targets_each():
    outputs, targets = linear()(X)[:, :1], torch.arange(18.0).reshape(6, 3).double()
    criterion = MGSLoss(nn.MSELoss(), penalty=TRACE)
    criterion(outputs, targets)
    same = MGSLoss(lambda outputs, targets: (outputs - targets).square().mean(1), penalty=TRACE)
    same(outputs, targets)
    torch.testing.assert_close(criterion.last.kernel, same.last.kernel)


def test_a_criterion_shows_its_options():
    assert "penalty=Penalty(name='trace'" in repr(MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, every=4))
    assert "every=4" in repr(MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, every=4))


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "targt"}, "`output` must be one of trace, .* got 'targt'"),
        ({"output": "random", "probes": 0}, "`probes` must be an integer of at least 1; got 0"),
        ({"output": "trace", "transform": "sofmax"}, "`transform` must be one of identity, .* got 'sofmax'"),
        ({"batch_norm": "freeze"}, '`batch_norm` must be "refuse" or "frozen"; got \'freeze\''),
        ({"select": "logits"}, "`select` must be a function of what the model returns; got 'logits'"),
        ({"parameters": "weight"}, r"`model` must be given for parameters to have names; got None and 'weight'"),
        ({"output": "full"}, '`output` must be a head with one kernel for a penalty; got "full". Use "trace"'),
    ],
)
def test_a_head_that_there_is_not_is_refused_at_once(options, message):
    with pytest.raises(mgs.ArgumentError, match=message):
        MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, **options)


@pytest.mark.wrong_types
@pytest.mark.parametrize("sinks", ["run.jsonl", Path("run.jsonl"), mgs.CallbackSink(print), [print]])
def test_sinks_are_a_list_of_sinks(sinks):
    with pytest.raises(
        mgs.ArgumentError, match=r"`sinks` must be a list of objects with `write` and `close`; got .*JSONLinesSink"
    ):
        MGSMonitor(linear(), X, sinks=sinks)


@pytest.mark.wrong_types
def test_steps_have_whole_numbers():
    monitor = MGSMonitor(linear(), X, every=3)
    for number in ("a", 1.5):
        with pytest.raises(mgs.ArgumentError, match=f"`number` must be an integer; got {number!r}. Count steps or epochs"):
            monitor.step(number)
    for number in (3, np.int64(6), torch.tensor(9)):
        assert monitor.step(number) is not None
    assert [record["step"] for record in monitor.history] == [3, 6, 9]


@pytest.mark.parametrize("output", ["loss", "target", "random", "trace", "sum"])
def test_outputs_without_an_axis_are_refused_by_every_head(output):
    model = mgs.FunctionalModel(lambda p, x: (x @ p["w"]).sum(), {"w": torch.ones(6, 2).double()})
    with pytest.raises(mgs.ArgumentError, match=r"`model` must return outputs of shape \(n, c\) with n = 6, .* of shape \(\)"):
        mgs.kernel(model, X, Y, output=output)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_inputs_may_be_sparse(layout):
    model, x = linear(), X + X.roll(2, 0)
    torch.testing.assert_close(mgs.kernel(model, x.to_sparse(layout=layout)), mgs.kernel(model, x))
    with pytest.raises(mgs.ArgumentError, match="`inputs` must be finite; got NaN"):
        mgs.kernel(model, (x * torch.nan).to_sparse(layout=layout))


def test_the_head_of_targets_leaves_out_what_the_criterion_ignores():
    model, criterion = linear(), nn.CrossEntropyLoss(ignore_index=255)
    targets = torch.where(Y == 2, 255, Y)
    ours = MGSLoss(criterion, penalty=TRACE, output="target")
    ours(model(X), targets)
    torch.testing.assert_close(ours.last.criterion, criterion(model(X), targets).detach())
    whole = mgs.kernel(model, X, Y, output="target")
    torch.testing.assert_close(ours.last.kernel, whole * torch.outer(Y != 2, Y != 2))
    one = MGSLoss(nn.CrossEntropyLoss(ignore_index=1), penalty=TRACE, output="target")
    one(model(X), Y)
    assert ((one.last.kernel.diagonal() == 0) == (Y == 1)).all()
    seen = []
    own = MGSLoss(criterion, penalty=TRACE, output=lambda outputs, labels: seen.append(labels) or outputs[:, 0])
    own(model(X), torch.where(Y == 2, 255, Y))
    assert seen[0].max() == 255


@pytest.mark.parametrize("options", [{"penalty": TRACE}, {"weighting": "agreement"}, {"penalty": TRACE, "output": "trace"}])
def test_a_step_that_overflows_is_skipped_by_the_scaler(options):
    model, plain = nn.Linear(6, 4), nn.Linear(6, 4)
    plain.load_state_dict(model.state_dict())
    for net, criterion in ((model, MGSLoss(nn.CrossEntropyLoss(), **options)), (plain, nn.CrossEntropyLoss())):
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=16.0), torch.optim.SGD(net.parameters(), 0.1)
        before = net.weight.clone()
        with torch.autocast("cpu", torch.float16):
            loss = criterion(net(X.float() * 1e6), Y)
        assert not loss.isfinite()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (net.weight == before).all()
        assert scaler.get_scale() == 8.0


def test_finite_losses_with_gradients_that_are_not_are_refused():
    model = linear()
    with pytest.raises(mgs.ArgumentError, match="`model` must have finite gradients"):
        MGSLoss(nn.L1Loss(), penalty=TRACE)((model(X) - model(X)).square().sum(1).sqrt(), torch.zeros(6).double())


def test_plain_tensors_are_not_taken_for_parameters():
    weight = torch.ones(6, 4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(
        mgs.ArgumentError, match=r"`outputs` must depend on torch.nn.Parameters; got plain tensors .*nn.Parameter\("
    ):
        MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE)(X @ weight, Y)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh() ** 2)


def test_functions_that_are_differentiated_once_are_refused_under_a_penalty_alone():
    first, last = linear(), nn.Linear(4, 4).double()
    with pytest.raises(mgs.UnsupportedModelError, match=r"got a function marked with once_differentiable \(Python Once\). Write"):
        MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE)(last(Once.apply(first(X))), Y)
    once, plain = (MGSLoss(nn.CrossEntropyLoss(), weighting="agreement") for _ in range(2))
    once(last(Once.apply(first(X))), Y)
    plain(last(first(X).tanh()), Y)
    torch.testing.assert_close(once.last.kernel, plain.last.kernel)


@pytest.mark.parametrize("options", [{}, {"reuse": False}])
def test_hooks_of_tensors_see_the_gradient_of_the_weighted_loss(options):
    first, last, seen = linear(), nn.Linear(4, 4).double(), []

    def hook(gradient):
        seen.append(gradient)
        return 2 * gradient

    hidden = first(X).tanh()
    hidden.register_hook(hook)
    criterion = MGSLoss(nn.CrossEntropyLoss(), weighting="agreement", **options)
    loss = criterion(last(hidden), Y)
    seen.clear()
    loss.backward()
    expected = first(X).tanh()
    value = (criterion.last.weights * cross_entropy(last(expected), Y, reduction="none")).mean()
    (gradient,) = torch.autograd.grad(value, expected, retain_graph=True)
    torch.testing.assert_close(seen, [gradient])
    (weight,) = torch.autograd.grad(value, first.weight)
    torch.testing.assert_close(first.weight.grad, 2 * weight)


@pytest.mark.wrong_types
def test_the_audit_says_what_to_make_of_a_module():
    with pytest.raises(
        mgs.ArgumentError, match=r"`model` must be .*FunctionalModel; got Linear. .* FunctionalModel\(function, par"
    ):
        mgs.audit(X.numpy().repeat(4, 0), Y.numpy().repeat(4), model=linear())
