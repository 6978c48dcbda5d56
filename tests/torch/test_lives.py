"""What users do with models and criteria besides training: copy, save, script and export them, differentiate again."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest

import mgs_core as mgs

torch = pytest.importorskip("torch")

from mgs_core.adapters.torch import MGSLoss, MGSMonitor  # noqa: E402  # after the skip
from torch import nn  # noqa: E402  # after the skip

TRACE = mgs.Penalty("trace", strength=0.3)


@pytest.fixture
def mlp(of):
    model, x = of("mlp")
    return model, x, torch.arange(len(x)) % 3


EXACT_AGAIN = ("mlp", "left", "rare_words")


@pytest.mark.parametrize("name", [*EXACT_AGAIN, "cnn", "channels", "normalised", "rectified", "tied"])
def test_the_gradient_of_a_penalty_is_differentiated_right_or_refused(of, name):
    model, x = of(name)
    parameters, direction = list(model.parameters()), [torch.randn_like(value) for value in model.parameters()]

    def gradient(**options):
        outputs = model(x).flatten(1)
        criterion = MGSLoss(lambda outputs, _: (outputs**2).sum(1), penalty=mgs.Penalty("trace", 1.0), output="sum")
        return torch.autograd.grad(criterion(outputs, None), parameters, **options)

    moved = []
    for step in (1e-6, -2e-6):
        torch._foreach_add_([value.data for value in parameters], direction, alpha=step)
        moved.append(gradient())
    torch._foreach_add_([value.data for value in parameters], direction, alpha=1e-6)
    along = torch.autograd.grad
    if name not in EXACT_AGAIN:
        # PyTorch 2.14 itself refuses the third derivative of batch normalisation
        refusal = "`create_graph` must be False for the gradient of a penalty on the kernel|not support 3rd"
        with pytest.raises((mgs.ArgumentError, RuntimeError), match=refusal):
            along(gradient(create_graph=True), parameters, direction)
        return
    for found, one, other in zip(along(gradient(create_graph=True), parameters, direction), *moved, strict=True):
        torch.testing.assert_close(found, (one - other) / 2e-6, rtol=1e-5, atol=1e-6)


class Trained(nn.Module):
    """Hold a model and its criterion, as modules of Lightning do."""

    def __init__(self, criterion_first: bool) -> None:
        super().__init__()
        net = nn.Linear(5, 3)
        for name in ("criterion", "net") if criterion_first else ("net", "criterion"):
            setattr(self, name, net if name == "net" else MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, model=net))

    def loss(self):
        return self.criterion(self.net(torch.ones(2, 5)), torch.tensor([0, 2]))


@pytest.mark.parametrize("criterion_first", [True, False])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copies_of_the_criterion_go_with_the_copy_of_the_model(criterion_first, duplicate):
    trained = Trained(criterion_first)
    trained.loss().backward()
    twin = duplicate(trained)
    twin.zero_grad()
    twin.loss().backward()
    torch.testing.assert_close(twin.net.weight.grad, trained.net.weight.grad)
    assert set(twin.criterion.last.__dict__) == set(trained.criterion.last.__dict__)


def test_a_copy_of_the_criterion_alone_goes_with_the_model(mlp):
    model, x, y = mlp
    criterion = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, model=model, parameters=["0.weight"])
    twin = copy.deepcopy(copy.deepcopy(criterion))
    torch.testing.assert_close(twin(model(x), y), criterion(model(x), y))
    with pytest.raises(mgs.ArgumentError, match="Check freezing, and that `model` is the one that made them"):
        pickle.loads(pickle.dumps(criterion))(model(x), y)


def test_two_copies_of_the_model_in_one_graph_both_count():
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    criterion, twin = copy.deepcopy((MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, output="trace", model=model), model))
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    criterion(model(x) + twin(x).square(), y)
    both = nn.ModuleList([model, twin])
    summed = mgs.FunctionalModel(
        lambda p, x: x @ p["0.weight"].T + p["0.bias"] + (x @ p["1.weight"].T + p["1.bias"]).square(),
        {name: value.detach() for name, value in both.named_parameters()},
    )
    torch.testing.assert_close(criterion.last.kernel, mgs.kernel(summed, x))


@pytest.mark.wrong_types
def test_the_model_of_a_criterion_is_a_module():
    with pytest.raises(mgs.ArgumentError, match=r"`model` must be a torch\.nn\.Module; got dict"):
        MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, model={})


def test_the_criterion_does_not_keep_the_model_alive():
    model = nn.Linear(5, 3)
    criterion, seen = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, model=model), weakref.ref(model)
    criterion(model(torch.ones(2, 5)), torch.tensor([0, 2])).backward()
    del model
    gc.collect()
    assert seen() is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_parameters_of_a_loaded_script_are_those_of_its_model(mlp):
    model, x, y = mlp
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    found = MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE, model=loaded)(loaded(x), y)
    torch.testing.assert_close(found, MGSLoss(nn.CrossEntropyLoss(), penalty=TRACE)(model(x), y))


def fourier(p, x):
    """Real parameters within complex products, filters and convolutions."""
    f = torch.fft.rfft(x, dim=1)
    mixed = torch.tanh((f @ torch.complex(p["w"], p["w"].flip(0)) + p["w"][0].to(f.dtype) * 1j).abs())
    filtered = torch.fft.irfft(f * torch.view_as_complex(p["v"]), n=5, dim=1)
    patches = torch.nn.functional.conv1d(torch.complex(x, x.cos())[:, None], torch.view_as_complex(p["c"]))
    return torch.stack(
        [mixed @ p["u"] * p["b"], filtered.square().sum(1), patches.abs().sum((1, 2)), (f * p["s"] + 1j).abs().sum(1)], 1
    )


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_real_parameters_within_complex_numbers(by_loop, fresh, chunk_size):
    torch.manual_seed(0)
    sizes = {"w": (3, 4), "v": (3, 2), "c": (2, 1, 2, 2), "u": (4,), "s": (3,), "b": (1,)}  # even in all, or the loop fails
    parameters, x = {name: torch.randn(*size, dtype=torch.float64) for name, size in sizes.items()}, torch.randn(4, 5).double()
    values, others = fresh(parameters), fresh(parameters)
    kernel = mgs.kernel(mgs.FunctionalModel(fourier, others), x, chunk_size=chunk_size, differentiable=True)
    expected = by_loop(fourier, values, x)
    torch.testing.assert_close(kernel, expected)
    mixing = torch.randn(4, 4, dtype=torch.float64)
    found = torch.autograd.grad((kernel * mixing).sum(), list(others.values()))
    for one, other in zip(found, torch.autograd.grad((expected * mixing).sum(), list(values.values())), strict=True):
        torch.testing.assert_close(one, other)


def test_complex_outputs_need_a_real_head():
    model, x = mgs.FunctionalModel(lambda p, x: torch.complex(x @ p["w"], 2.0 * x), {"w": torch.ones(2, 2)}), torch.randn(3, 2)
    with pytest.raises(mgs.ArgumentError, match=r"`model` must return real outputs, .* got torch\.complex64"):
        mgs.kernel(model, x)
    with pytest.raises(mgs.ArgumentError, match=r"`model` must return real outputs; got torch\.complex64"):
        mgs.check(model, x)
    assert mgs.kernel(model, x, output=lambda outputs, _: outputs.abs().sum(1)).shape == (3, 3)


class Ragged(nn.Linear):
    """Take sequences of all lengths."""

    def forward(self, x):
        return torch.nested.to_padded_tensor(super().forward(x), 0.0).sum(1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout):
    model, x = Ragged(5, 2), torch.nested.nested_tensor([torch.randn(length, 5) for length in (2, 3, 4)], layout=layout)
    with pytest.raises(mgs.ArgumentError, match=r"`inputs` must not be a nested tensor; got one\. Pad"):
        mgs.kernel(model, x)
    with pytest.raises(mgs.UnsupportedModelError, match=r"`model` must not compute with nested tensors; got one\. Pad"):
        MGSLoss(nn.CrossEntropyLoss(), penalty=mgs.Penalty("trace"))(model(x), torch.tensor([0, 1, 1]))


def test_models_without_values_are_refused():
    with torch.device("meta"):
        model, x = nn.Linear(5, 2), torch.randn(4, 5)
    for inputs in (x, torch.randn(4, 5, device="cpu")):
        with pytest.raises(mgs.ArgumentError, match="`model` must have values; got the parameter 'weight' on the device meta"):
            mgs.kernel(model, inputs)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_scripted_modules_are_refused_once_their_operations_are_fused(of):
    model, x = of("mlp")
    torch.testing.assert_close(mgs.kernel(torch.jit.trace(model, x), x), mgs.kernel(model, x))
    scripted = torch.jit.script(model)
    for _ in range(3):
        scripted(x).sum().backward()
    with pytest.raises(mgs.UnsupportedModelError, match=r"fused by torch\.jit\.script; use the module that was scripted"):
        mgs.kernel(scripted, x)


def test_exported_modules_are_measured_but_have_no_evaluation_mode(of):
    model, x = of("mlp")
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(mgs.kernel(exported, x), mgs.kernel(model, x))
    with pytest.raises(mgs.UnsupportedModelError, match="`model` must have an evaluation mode; got GraphModule"):
        MGSMonitor(exported, x).step()


RETAINING = [
    {"penalty": mgs.Penalty("trace", 0.0)},
    {"penalty": mgs.Penalty("trace", 0.0), "output": "trace"},
    {"penalty": mgs.Penalty("log_determinant", 0.3)},
    {"weighting": "agreement"},
    {"weighting": "agreement", "reuse": False},
]


@pytest.mark.parametrize("options", RETAINING)
def test_gradients_that_tensors_retain_are_those_of_the_loss(options):
    torch.manual_seed(0)
    first, last = nn.utils.parametrizations.weight_norm(nn.Linear(3, 5)).double(), nn.Linear(5, 3).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 3
    criterion = MGSLoss(nn.CrossEntropyLoss(), **options)
    for _ in range(3):
        before = first(x)
        hidden = torch.tanh(before)
        outputs = last(hidden)
        seen = [before, hidden, outputs]
        for tensor in seen:
            tensor.retain_grad()
        loss = criterion(outputs, y)
        assert all(tensor.grad is None for tensor in seen)
        expected = torch.autograd.grad(loss, seen, retain_graph=True)
        for tensor in seen:
            tensor.grad = None
        loss.backward(retain_graph=True)
        torch.testing.assert_close([tensor.grad for tensor in seen], list(expected), rtol=1e-12, atol=1e-14)
        if "penalty" in options and not options["penalty"].strength:
            for tensor in seen:
                tensor.grad = None
            torch.nn.functional.cross_entropy(last(hidden), y).backward()
            torch.testing.assert_close(hidden.grad, expected[1], rtol=0, atol=0)


def test_retained_gradients_add_up_as_ever():
    hidden = nn.Linear(3, 2).double()(torch.ones(4, 3, dtype=torch.float64))
    hidden.retain_grad()
    hidden.sum().backward(retain_graph=True)
    MGSLoss(nn.MSELoss(), penalty=mgs.Penalty("trace", 0.0))(hidden, torch.zeros(4, 2).double())
    assert (hidden.grad == 1).all()
    assert hidden.retains_grad
