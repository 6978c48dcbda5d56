"""What is done on a GPU, as far as a processor can run it: made to by the question whether arrays are on the host."""

import pytest

import mgs_core as mgs

torch = pytest.importorskip("torch")
from mgs_core.adapters import _torch_criterion  # noqa: E402  # after the skip
from mgs_core.backends.torch import _backend, contraction, convolutions, determinant, graph, products, run  # noqa: E402  # after the skip
from torch import nn  # noqa: E402  # after the skip


@pytest.fixture
def elsewhere(monkeypatch):
    """Take every array for one of a device."""
    for module in (_backend, contraction, convolutions, determinant, graph, products):
        monkeypatch.setattr(module, "on_host", lambda array: False)


@pytest.mark.parametrize(
    "name", ["mlp", "cnn", "grouped", "depthwise", "transposed", "three_dimensions", "resnet_group_norm", "embedding"]
)
@pytest.mark.parametrize("output", ["trace", "full", "sum"])
def test_kernels_are_those_of_the_host(of, name, output, request):
    model, x = of(name)
    weights = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def found():
        kernel = mgs.kernel(model, x, output=output, differentiable=True)
        part = kernel.flatten()[:36]
        return kernel.detach(), torch.autograd.grad(
            (part * weights.flatten()[: len(part)]).sum(), list(model.parameters()), materialize_grads=True
        )

    expected = found()
    request.getfixturevalue("elsewhere")
    for one, other in zip(found()[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mgs.kernel(model, x, output=output), expected[0], rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("elsewhere")
def test_what_has_no_factor_makes_value_and_gradient_nan():
    kernel = (-100.0 * torch.eye(4)).requires_grad_()
    value = mgs.Penalty("log_determinant", 1.0)(kernel)
    value.backward()
    assert value.isnan()
    assert kernel.grad.isnan().any()


class Indexed(nn.Module):
    """Take one output of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x)[torch.arange(len(x)), torch.arange(len(x)) % 3, None]


@pytest.mark.usefixtures("elsewhere")
def test_what_cannot_be_captured_is_refused_in_words(monkeypatch):
    for module in (_backend, graph, run):
        monkeypatch.setattr(module, "is_capturing", lambda: True)
    x = torch.randn(5, 4)
    with pytest.raises(
        mgs.ArgumentError, match=r"`model` must have been used.*before a graph of the device is captured.*Take ten"
    ):
        mgs.kernel(nn.Linear(4, 3), x)
    with pytest.raises(mgs.UnsupportedModelError, match=r"`model` must not be indexed by a tensor.*Use `gather`"):
        mgs.kernel(Indexed(), x)


class Dropping(nn.LSTM):
    """Read the mode for a purpose of its own."""


def test_recurrent_layers_are_lent_another_mode_and_get_theirs_back():
    hooked = nn.GRU(3, 4)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.ModuleList(
        [nn.LSTM(3, 4, 2, dropout=0.5), Dropping(3, 4, 2, dropout=0.5), hooked, nn.RNN(3, 4, 2, dropout=0.2)]
    ).eval()
    model[3].train()

    def state():
        return [(layer.training, layer.dropout) for layer in model]

    before = state()

    def interrupted():
        with run._recurrent_gradients(model):
            assert state() == [(True, 0.0), *before[1:]]
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert state() == before


@pytest.mark.parametrize(
    "criterion", [nn.NLLLoss(), nn.KLDivLoss(reduction="batchmean"), nn.CrossEntropyLoss(label_smoothing=0.1), nn.MSELoss()]
)
def test_criteria_do_not_look_at_values_while_captured(criterion, monkeypatch):
    def look(tensor):
        raise AssertionError("a tensor was asked for its value")

    outputs = torch.randn(6, 3).log_softmax(1).requires_grad_()
    labels = isinstance(criterion, nn.NLLLoss | nn.CrossEntropyLoss)
    targets = torch.randint(0, 3, (6,)) if labels else torch.rand(6, 3)
    monkeypatch.setattr(_torch_criterion, "_is_captured", lambda value: True)
    monkeypatch.setattr(torch.Tensor, "__bool__", look)
    found = _torch_criterion.Parts().evaluate(criterion, outputs, (targets,), {}, each=True, whole=True)
    assert found.losses.shape == (6,)


@pytest.mark.parametrize("device", ["host", "elsewhere"])
def test_the_log_determinant_can_be_differentiated_twice(device, request):
    if device == "elsewhere":
        request.getfixturevalue("elsewhere")
    rows = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    penalty = mgs.Penalty("log_determinant", 1.0)
    assert torch.autograd.gradcheck(lambda rows: penalty(rows @ rows.T), rows)
    assert torch.autograd.gradgradcheck(lambda rows: penalty(rows @ rows.T), rows)
