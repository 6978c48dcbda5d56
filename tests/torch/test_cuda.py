"""On a GPU: what the processor computes, without waiting for the device; skipped where there is none."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest

import mgs_core as mgs

torch = pytest.importorskip("torch")

from mgs_core.adapters.torch import MGSLoss, MGSMonitor, twice_differentiable  # noqa: E402  # after the skip
from torch import nn  # noqa: E402  # after the skip
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402  # after the skip
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402  # after the skip

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # PyTorch says so once where its own thread is the first to multiply
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]

PENALTY = mgs.Penalty("log_determinant", 0.5)


@pytest.fixture(autouse=True)
def _exact_products():
    """Keep TensorFloat-32 out of comparisons with the processor."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@contextmanager
def no_waiting():
    """Raise where the processor waits for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def moved(inputs):
    """Return inputs on the device, but for lengths, which PyTorch wants on the processor."""
    first, *rest = inputs if isinstance(inputs, tuple) else (inputs,)
    rest = [part if part.ndim == 1 else part.cuda() for part in rest]
    return (first.cuda(), *rest) if rest else first.cuda()


def penalty_and_gradient(model, x, output):
    targets = torch.arange(len(x[0] if isinstance(x, tuple) else x)) % 2
    with twice_differentiable():
        value = PENALTY(mgs.kernel(model, x, targets, output=output, transform="softmax", differentiable=True))
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return value, torch.autograd.grad(value, chosen, allow_unused=True, materialize_grads=True)


def close(found, expected, tolerance: float = 1e-9) -> None:
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=tolerance * max(1e-3, float(expected.abs().max())))


def test_kernels_and_gradients_are_those_of_the_processor(case, request):
    model, x = case
    # PyTorch computes weight normalisation of doubles on a GPU about as exactly as that of singles
    tolerance = 1e-5 if "weight_norm" in request.node.name else 1e-9
    expected = [mgs.kernel(model, x), mgs.kernel(model, x, output="full"), mgs.kernel(model, x, chunk_size=4)]
    penalties = [penalty_and_gradient(model, x, output) for output in ("trace", "target")]
    model, x = model.cuda(), moved(x)
    if isinstance(getattr(model, "i", None), torch.Tensor):
        model.i = model.i.cuda()
    with torch.device("cuda"):  # some of the models make tensors
        for kernel, options in zip(expected, ({}, {"output": "full"}, {"chunk_size": 4}), strict=True):
            close(mgs.kernel(model, x, **options), kernel, tolerance)
        for output, (value, gradients) in zip(("trace", "target"), penalties, strict=True):
            own, found = penalty_and_gradient(model, x, output)
            close(own.detach(), value.detach(), tolerance)
            for one, other in zip(found, gradients, strict=True):
                close(one, other, tolerance)


def small() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 12), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(12, 3))


def trained(device, dtype, steps: int = 5, **options):
    model = small().to(device, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = MGSLoss(nn.CrossEntropyLoss(), model=model, **options)
    random, values = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        x = torch.randn(8, 2, 4, 4, generator=random, dtype=torch.float64).to(device, dtype)
        y = torch.randint(0, 3, (8,), generator=random).to(device)
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        values.append(loss.detach().cpu())
    return torch.stack(values), [parameter.detach().cpu() for parameter in model.parameters()]


WAYS = {
    "penalty": {"penalty": PENALTY},
    "trace": {"penalty": mgs.Penalty("trace", 0.1), "output": "trace", "every": 2},
    "target": {"penalty": mgs.Penalty("cosine", 0.1), "output": "target", "max_samples": 5},
    "weighting": {"weighting": "agreement"},
    "both": {"penalty": PENALTY, "weighting": "agreement"},
}


@pytest.mark.parametrize("way", WAYS)
def test_training_is_that_of_the_processor(way):
    values, parameters = trained("cpu", torch.float64, **WAYS[way])
    found, others = trained("cuda", torch.float64, **WAYS[way])
    torch.testing.assert_close(found, values, rtol=1e-9, atol=1e-9)
    for one, other in zip(others, parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_a_step_does_not_wait_for_the_device(way):
    model = small().cuda()
    criterion = MGSLoss(nn.CrossEntropyLoss(), model=model, **WAYS[way])
    x, y = torch.randn(8, 2, 4, 4, device="cuda"), torch.randint(0, 3, (8,), device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    for _ in range(9):  # what is verified at the 1st, 2nd, 4th, 8th use waits
        step()
    with no_waiting():
        step()
        step()


@pytest.mark.parametrize("output", ["trace", "sum", "loss", "target", "full"])  # random probes come from the processor
def test_a_kernel_does_not_wait_for_the_device(output):
    model = small().cuda()
    x, y = torch.randn(8, 2, 4, 4, device="cuda"), torch.randint(0, 3, (8,), device="cuda")
    for _ in range(9):
        mgs.kernel(model, x, y, output=output)  # where the samples are is looked for at the 1st, 2nd, 4th, 8th use
    with no_waiting():
        kernel = mgs.kernel(model, x, y, output=output)
    assert kernel.device.type == "cuda"


@pytest.mark.parametrize("way", ["penalty", "weighting", "trace"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision(way, dtype):
    model = small().cuda()
    x, y = torch.randn(8, 2, 4, 4, device="cuda"), torch.randint(0, 3, (8,), device="cuda")
    criterion = MGSLoss(nn.CrossEntropyLoss(), model=model, **WAYS[way])
    exact = MGSLoss(nn.CrossEntropyLoss(), model=model, **WAYS[way])
    exact(model(x), y).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    with torch.autocast("cuda", dtype=dtype):
        loss = criterion(model(x), y)
    scaler.scale(loss).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler.unscale_(optimizer)
    assert criterion.last.kernel.dtype == torch.float32
    torch.testing.assert_close(criterion.last.kernel, exact.last.kernel, rtol=0.1, atol=0.05 * float(exact.last.kernel.max()))
    found, wanted = (torch.cat([part.flatten() for part in parts]) for parts in ([p.grad for p in model.parameters()], expected))
    assert float((found - wanted).norm()) < 0.1 * float(wanted.norm())
    scaler.step(optimizer)
    scaler.update()


def test_a_scaler_skips_a_step_that_overflows():
    model = small().cuda()
    criterion = MGSLoss(nn.CrossEntropyLoss(), model=model, penalty=PENALTY)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cuda", init_scale=2.0**16)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    x, y = torch.full((8, 2, 4, 4), 1e30, device="cuda"), torch.randint(0, 3, (8,), device="cuda")
    with torch.autocast("cuda", dtype=torch.float16):
        loss = criterion(model(x), y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**15
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


class Attention(nn.Module):
    """Mix eight positions of each sample, in two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v)
        self.name = mixed.grad_fn.name()
        return self.out(mixed.transpose(1, 2).flatten(2)).mean(1)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (SDPBackend.FLASH_ATTENTION, torch.bfloat16),
        (SDPBackend.EFFICIENT_ATTENTION, torch.float32),
        (SDPBackend.CUDNN_ATTENTION, torch.bfloat16),
    ],
)
def test_fused_attention(kind, dtype):
    torch.manual_seed(0)
    model, x = Attention().cuda().to(dtype), torch.randn(6, 8, 16, device="cuda", dtype=dtype)
    exact = mgs.kernel(model.float(), x.float())
    model = model.to(dtype)
    with sdpa_kernel(kind):
        kernel = mgs.kernel(model, x)
        assert "ScaledDotProduct" in model.name
        with pytest.raises(mgs.UnsupportedModelError, match=r"fused attention.*twice_differentiable\(\)"):
            mgs.kernel(model, x, differentiable=True)
    assert float((kernel - exact).norm()) < (1e-5 if dtype == torch.float32 else 0.03) * float(exact.norm())
    with twice_differentiable(recurrent=False):
        penalised = mgs.kernel(model, x, differentiable=True)
    assert float((penalised.detach() - exact).norm()) < (1e-5 if dtype == torch.float32 else 0.03) * float(exact.norm())
    PENALTY(penalised).backward()


class Last(nn.Module):
    """Return what a recurrent layer says at the end."""

    def __init__(self, kind) -> None:
        super().__init__()
        self.layer = kind(3, 4, 2, batch_first=True)

    def forward(self, x):
        return self.layer(x)[0][:, -1]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("training", [True, False])
def test_recurrent_layers_of_cudnn(kind, training):
    torch.manual_seed(0)
    model, x = Last(kind).train(training), torch.randn(6, 5, 3)
    expected = mgs.kernel(model, x)
    model, x = model.cuda(), x.cuda()
    close(mgs.kernel(model, x), expected, 1e-5)
    with pytest.raises(mgs.UnsupportedModelError, match=r"fused recurrent.*twice_differentiable\(\)"):
        mgs.kernel(model, x, differentiable=True)
    with twice_differentiable():
        close(mgs.kernel(model, x, differentiable=True).detach(), expected, 1e-5)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_monitor_measures_recurrent_layers_of_cudnn(kind):
    model, x = Last(kind).cuda().train(), torch.randn(6, 5, 3, device="cuda")
    expected = mgs.kernel(model, x)
    assert MGSMonitor(model, x, every=1).step().trace == pytest.approx(float(expected.trace()), rel=1e-4)
    assert model.training


def test_the_monitor_leaves_the_random_state_of_the_device():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).cuda()
    x = torch.randn(6, 4, device="cuda")
    monitor = MGSMonitor(model, x, every=1, output="random")
    before = torch.cuda.get_rng_state()
    monitor.step()
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert model.training


def test_labels_from_the_processor():
    model = small().cuda()
    x, y = torch.randn(8, 2, 4, 4, device="cuda"), torch.randint(0, 3, (8,))
    expected = mgs.kernel(model, x, y.cuda(), output="loss")
    assert torch.equal(mgs.kernel(model, x, y, output="loss"), expected)
    assert torch.equal(mgs.kernel(model, x, y.numpy(), output="loss"), expected)


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
@pytest.mark.parametrize("way", ["penalty", "weighting", "trace"])
def test_a_step_as_a_graph_of_the_device(way):
    model = small().cuda()
    options = {**WAYS[way], "every": 1}
    criterion = MGSLoss(nn.CrossEntropyLoss(), model=model, **options)
    x, y = torch.randn(8, 2, 4, 4, device="cuda"), torch.randint(0, 3, (8,), device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(11):
            model.zero_grad(set_to_none=True)
            criterion(model(x), y).backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = criterion(model(x), y)
        loss.backward()
    x.copy_(torch.randn_like(x))
    graph.replay()
    found = [loss.detach().clone(), *(parameter.grad.clone() for parameter in model.parameters())]
    model.zero_grad(set_to_none=True)
    eager = MGSLoss(nn.CrossEntropyLoss(), model=model, **options)
    value = eager(model(x), y)
    value.backward()
    for one, other in zip(found, [value.detach(), *(parameter.grad for parameter in model.parameters())], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_mean_over_nothing_is_nothing():
    model, x = small().cuda(), torch.randn(8, 2, 4, 4, device="cuda")
    for options in ({}, {"label_smoothing": 0.1}, {"weight": torch.tensor([1.0, 2.0, 0.0], device="cuda")}):
        criterion = MGSLoss(nn.CrossEntropyLoss(**options), model=model, penalty=mgs.Penalty("trace", 1.0))
        label = 2 if "weight" in options else -100
        loss = criterion(model(x), torch.full((8,), label, device="cuda"))
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert all(float(parameter.grad.abs().max()) == 0.0 for parameter in model.parameters())
