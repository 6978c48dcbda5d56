"""The kernel of every model in the zoo against a per-sample loop of ordinary gradients, and its penalties' gradients."""

from __future__ import annotations

import numpy as np
import pytest

import mgs_core as mgs

torch = pytest.importorskip("torch")

from mgs_core.adapters.torch import twice_differentiable  # noqa: E402  # after the skip
from mgs_core.backends.torch import collect, contraction, convolutions  # noqa: E402  # after the skip
from torch.autograd.gradcheck import GradcheckError  # noqa: E402  # after the skip
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402  # after the skip

PENALTY = mgs.Penalty("log_determinant", strength=1.0, scale=2.0)


def close(actual, expected, tolerance: float = 1e-12) -> None:
    expected = expected.detach().numpy()
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=tolerance * np.max(np.abs(expected)))


def trainable(model):
    return [value for value in model.parameters() if value.requires_grad]


def call(model, x):
    return model(*x) if isinstance(x, tuple) else model(x)


def take(x, samples):
    return tuple(part[samples] for part in x) if isinstance(x, tuple) else x[samples]


def count(x):
    return len(x[0]) if isinstance(x, tuple) else len(x)


def jacobian_rows(model, x, *, create_graph: bool = False):
    """A loop of ordinary gradients, one sample in the batch at a time: (n, c, p)."""
    rows = []
    for a in range(count(x)):
        outputs = call(model, take(x, slice(a, a + 1)))
        for output in outputs[0]:
            gradients = torch.autograd.grad(
                output, trainable(model), retain_graph=True, create_graph=create_graph, materialize_grads=True, allow_unused=True
            )
            rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    return torch.stack(rows).reshape(count(x), -1, rows[0].numel())


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_kernel_is_that_of_a_per_sample_loop(case, chunk_size):
    model, x = case
    rows = jacobian_rows(model, x)
    close(mgs.kernel(model, x, output="full", chunk_size=chunk_size), torch.einsum("acp,bdp->acbd", rows, rows))
    close(mgs.kernel(model, x, chunk_size=chunk_size), torch.einsum("acp,bcp->ab", rows, rows))
    close(mgs.kernel(model, x, output="sum", chunk_size=chunk_size), torch.einsum("acp,bdp->ab", rows, rows))


def test_a_last_chunk_of_one_sample_is_as_the_others(case):
    model, x = case
    rows = jacobian_rows(model, x)
    close(mgs.kernel(model, x, chunk_size=count(x) - 1), torch.einsum("acp,bcp->ab", rows, rows))


def test_kernel_between_two_batches_is_a_block_of_that_of_both(case):
    model, x = case
    found = mgs.kernel(model, take(x, slice(1, None)), others=take(x, slice(0, 1)))
    close(found, mgs.kernel(model, x)[1:, :1])


def test_sum_of_the_kernel_is_the_norm_of_the_batch_gradient(case):
    model, x = case
    gradients = torch.autograd.grad(call(model, x).sum(), trainable(model), allow_unused=True, materialize_grads=True)
    close(mgs.kernel(model, x, output="sum").sum(), sum((gradient**2).sum() for gradient in gradients), 1e-11)


def test_permuting_samples_permutes_the_kernel_and_parameters_add_up(case):
    model, x = case
    kernel, order = mgs.kernel(model, x, output="sum"), torch.randperm(count(x), generator=torch.Generator().manual_seed(1))
    close(mgs.kernel(model, take(x, order), output="sum"), kernel[order][:, order])
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    close(sum(mgs.kernel(model, x, output="sum", parameters=name) for name in names), kernel)
    assert torch.linalg.eigvalsh(kernel).min() >= -1e-10 * kernel.trace()


def penalty_of(model, x, output, **options):
    targets, loss = torch.arange(count(x)), squared if output == "loss" else None
    with twice_differentiable(), sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):  # attention stays fused
        return PENALTY(mgs.kernel(model, x, targets, output=output, transform="softmax", loss=loss, **options))


def squared(outputs, targets):
    return ((outputs - 1.0 / (1.0 + targets[:, None])) ** 2).sum(1)


def along(gradients, direction) -> float:
    return sum(float((a * b).sum()) for a, b in zip(gradients, direction, strict=True))


def central_differences(model, function, direction, step: float = 1e-4) -> float:
    """Of fourth order."""
    values, start = {}, [value.detach().clone() for value in trainable(model)]
    with torch.no_grad():
        for i in (-2, -1, 1, 2):
            for value, at, move in zip(trainable(model), start, direction, strict=True):
                value.copy_(at + i * step * move)
            values[i] = float(function())
        for value, at in zip(trainable(model), start, strict=True):
            value.copy_(at)
    return (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step)


@pytest.mark.parametrize("output", ["loss", "trace"])
def test_gradient_of_a_penalty_is_that_of_central_differences(case, output, request):
    model, x = case
    kinked = any(name in request.node.name for name in ("rectified", "channels"))
    step = 1e-6 if kinked else 1e-4  # so small that no rectifier switches
    gradients = torch.autograd.grad(
        penalty_of(model, x, output, differentiable=True), trainable(model), allow_unused=True, materialize_grads=True
    )
    random = torch.Generator().manual_seed(2)
    direction = [torch.randn(value.shape, generator=random, dtype=value.dtype) for value in trainable(model)]
    expected = central_differences(model, lambda: penalty_of(model, x, output), direction, step)
    assert along(gradients, direction) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_gradient_of_a_penalty_is_that_of_a_loop(case, request):
    if "weight_norm" in request.node.name:
        pytest.skip("PyTorch's own second derivative of weight normalisation is wrong")
    if "bag" in request.node.name:
        pytest.skip("PyTorch has no second derivative of embedding bags")
    model, x = case
    gradients = torch.autograd.grad(
        penalty_of(model, x, "loss", differentiable=True), trainable(model), allow_unused=True, materialize_grads=True
    )
    with twice_differentiable():
        rows, targets = [], torch.arange(count(x))
        for a in range(count(x)):
            outputs = call(model, take(x, slice(a, a + 1))).softmax(-1)
            loss = squared(outputs, targets[a : a + 1]).sum()
            parts = torch.autograd.grad(loss, trainable(model), create_graph=True, materialize_grads=True, allow_unused=True)
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
        rows = torch.stack(rows)
        loop = torch.autograd.grad(PENALTY(rows @ rows.T), trainable(model), allow_unused=True, materialize_grads=True)
    close(torch.cat([part.reshape(-1) for part in gradients]), torch.cat([part.reshape(-1) for part in loop]), 1e-10)


@pytest.mark.parametrize("name", ["mlp", "cnn", "grouped", "resnet_group_norm", "frames", "embedding", "tied", "transformer"])
@pytest.mark.parametrize("output", ["loss", "trace"])
@pytest.mark.parametrize("constants", [{"_SLICE": 1, "_LEAST": 1, "_GROUPED": 0, "_UNFOLDED": 0}, {"_UNFOLDED": 0}])
def test_slices_and_other_ways_of_large_layers_change_nothing(of, name, output, constants, monkeypatch):
    model, x = of(name)
    expected = torch.autograd.grad(penalty_of(model, x, output, differentiable=True), trainable(model), materialize_grads=True)
    monkeypatch.setattr("mgs_core.contraction.prefers_pairwise", lambda left, right: False)
    monkeypatch.setattr(contraction, "_equal_pairs", lambda use: None)
    for constant, value in constants.items():
        monkeypatch.setattr(convolutions if hasattr(convolutions, constant) else contraction, constant, value)
    found = torch.autograd.grad(penalty_of(model, x, output, differentiable=True), trainable(model), materialize_grads=True)
    for part, other in zip(found, expected, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["cnn", "grouped", "depthwise", "transposed", "frames", "resnet_group_norm"])
def test_the_order_of_channels_in_memory_changes_nothing(of, name):
    def found(order):
        model, x = of(name)
        x = x.to(memory_format=order) if x.ndim == 4 else x
        kernel = mgs.kernel(model.to(memory_format=order), x, output="full")
        gradients = torch.autograd.grad(
            penalty_of(model, x, "loss", differentiable=True), trainable(model), materialize_grads=True
        )
        return kernel, *gradients

    for part, other in zip(found(torch.channels_last), found(torch.contiguous_format), strict=True):
        torch.testing.assert_close(part, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "cnn", "grouped", "lstm", "embedding", "tied", "transformer", "weight_norm"])
def test_outputs_taken_one_after_the_other_change_nothing(of, name, monkeypatch):
    model, x = of(name)
    expected = mgs.kernel(model, x)
    monkeypatch.setattr(collect, "_TOGETHER", 1)
    close(mgs.kernel(model, x), expected)
    close(mgs.kernel(model, x, output="random", probes=3), mgs.kernel(model, x, output="random", probes=3, chunk_size=3))


def test_central_differences_find_the_weight_norm_of_pytorch_wrong(of):
    """The reason for our own: when this fails, PyTorch is repaired."""
    v, g = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (4, 1)))
    with pytest.raises(GradcheckError):
        torch.autograd.gradgradcheck(lambda v, g: torch._weight_norm(v, g, 0), (v, g))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mlp", "cnn", "normalised", "square_transformer", "tied"])
def test_lower_precision_is_close(of, name, dtype):
    model, x = of(name)
    exact = mgs.kernel(model, x, output="sum")
    model, x = model.to(dtype), x.to(dtype) if x.is_floating_point() else x
    kernel = mgs.kernel(model, x, output="sum")
    assert kernel.dtype == torch.float32
    close(kernel.double(), exact, 1e-5 if dtype == torch.float32 else 0.1)


def test_automatic_mixed_precision_sums_in_float32(of):
    model, x = of("cnn")
    model, x = model.float(), x.float()
    exact = mgs.kernel(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kernel = mgs.kernel(model, x)
        penalised = mgs.kernel(model, x, differentiable=True)
    assert kernel.dtype == penalised.dtype == torch.float32
    close(kernel, exact, 0.05)
    close(penalised, kernel, 1e-6)
    penalised.trace().backward()
    assert all(torch.isfinite(value.grad).all() for value in model.parameters() if value.ndim > 1)


def test_linear_model_has_the_gram_matrix_of_its_inputs():
    x = torch.randn(7, 4, dtype=torch.float64)
    model = torch.nn.Linear(4, 1, dtype=torch.float64)
    close(mgs.kernel(model, x), x @ x.T + 1.0, 1e-14)
    close(mgs.kernel(model, x, parameters="weight"), x @ x.T, 1e-14)


def test_the_padding_of_an_embedding_has_no_gradient():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 2, padding_idx=2), torch.nn.Flatten(), torch.nn.Linear(6, 2)).double()
    x = torch.tensor([[0, 2, 2], [2, 2, 4], [1, 2, 3]])
    rows = jacobian_rows(model, x)
    close(mgs.kernel(model, x), torch.einsum("acp,bcp->ab", rows, rows))


def test_one_sample_duplicates_and_fewer_parameters_than_samples(of):
    model, x = of("mlp")
    whole = mgs.kernel(model, x)
    close(mgs.kernel(model, x[:1]), whole[:1, :1])
    close(mgs.kernel(model, x[[0, 0, 1]]), whole[[0, 0, 1]][:, [0, 0, 1]])
    model, x = of("wide")
    assert torch.linalg.matrix_rank(mgs.kernel(model, x, output="sum", parameters="2.bias")) == 1


def test_frozen_parameters_and_a_choice_by_predicate(of):
    model, x = of("mlp")
    parts = {name: mgs.kernel(model, x, parameters=name) for name, _ in model.named_parameters()}
    close(mgs.kernel(model, x, parameters=lambda name: name.startswith("2")), parts["2.weight"] + parts["2.bias"])
    model[0].requires_grad_(False)
    close(mgs.kernel(model, x), parts["2.weight"] + parts["2.bias"])


def test_functional_models_agree_with_modules(of):
    model, x = of("mlp")
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    function = mgs.FunctionalModel(lambda p, x: torch.func.functional_call(model, p, (x,)), parameters)
    close(mgs.kernel(function, x), mgs.kernel(model, x), 1e-14)

    def objective(p):
        return PENALTY(mgs.kernel(mgs.FunctionalModel(function.function, p), x, differentiable=True))

    value, gradient = mgs.get_backend("torch").value_and_gradient(objective)(parameters)
    penalty = PENALTY(mgs.kernel(model, x, differentiable=True))
    expected = torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True, materialize_grads=True)
    assert not value.requires_grad
    for part, name in zip(expected, parameters, strict=True):
        close(gradient[name], part, 1e-13)
        assert not parameters[name].requires_grad


def test_kernel_is_that_of_the_numpy_backend():
    numpy = pytest.importorskip("autograd.numpy")
    random = np.random.default_rng(0)
    values = {"w1": random.normal(size=(5, 7)), "b1": random.normal(size=7), "w2": random.normal(size=(7, 3))}
    x = random.normal(size=(6, 5))
    expected = mgs.kernel(mgs.FunctionalModel(lambda p, x: numpy.tanh(x @ p["w1"] + p["b1"]) @ p["w2"], values), x)
    tensors = {name: torch.from_numpy(value) for name, value in values.items()}
    model = mgs.FunctionalModel(lambda p, x: torch.tanh(x @ p["w1"] + p["b1"]) @ p["w2"], tensors)
    close(mgs.kernel(model, torch.from_numpy(x)), torch.from_numpy(expected), 1e-14)
