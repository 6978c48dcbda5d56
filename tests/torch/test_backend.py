"""What the backend refuses, what it leaves alone, and the pieces that the other tests do not reach."""

from __future__ import annotations

import gc
import math
import weakref

import numpy as np
import pytest

import mgs_core as mgs

torch = pytest.importorskip("torch")

from mgs_core.adapters.torch import Configured, MGSMonitor, twice_differentiable  # noqa: E402  # after the skip
from mgs_core.backends.torch.chain import sources  # noqa: E402  # after the skip
from mgs_core.backends.torch.graph import read_graph  # noqa: E402  # after the skip
from torch import nn  # noqa: E402  # after the skip
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402  # after the skip

from mgs_core.heads import make_head  # noqa: E402  # after the skip
from mgs_core.statistics import merge  # noqa: E402  # after the skip

BACKEND = mgs.get_backend("torch")


class Mixing(nn.Module):
    """Mix the samples in one of several ways, after a first use of a parameter."""

    def __init__(self, how) -> None:
        super().__init__()
        self.first, self.out, self.gain, self.how = nn.Linear(5, 6), nn.Linear(6, 3), nn.Parameter(torch.ones(5)), how

    def forward(self, x):
        return self.out(torch.tanh(self.how(self, x)))


MIXING = {
    "batch statistics": lambda s, x: s.first(x) - s.first(x).mean(0),
    "without other data": lambda s, x: torch.nn.functional.linear(x * s.gain - (x * s.gain).mean(0), torch.ones(6, 5)),
    "attention": lambda s, x: (s.first(x) @ s.first(x).T).softmax(-1) @ s.first(x),
    "batch norm": lambda s, x: torch.nn.functional.batch_norm(s.first(x), None, None, training=True),
}


@pytest.mark.parametrize("how", MIXING)
def test_samples_that_interact_are_refused(how):
    model, x = Mixing(MIXING[how]), torch.randn(7, 5)
    with pytest.raises(
        mgs.SamplesInteractError, match="`model` must treat each sample by itself; got samples that interact after"
    ):
        mgs.kernel(model, x)
    assert mgs.kernel(model, x, parameters="out.weight").shape == (7, 7)


@pytest.mark.parametrize("output", ["trace", "sum", "random"])
@pytest.mark.parametrize("mix", [lambda h: h - h.mean(0), lambda h: torch.nn.functional.batch_norm(h, None, None, training=True)])
def test_samples_that_interact_are_refused_where_equal_weights_hide_it(mix, output):
    """Behind a mean over the batch that is subtracted, the gradient of the plain sum of linear outputs is zero."""
    parameters = {name: torch.randn(5, 5) for name in ("first", "last", "gain")}
    for out in (lambda p, h: h, lambda p, h: h + p["gain"][0], lambda p, h: h * p["gain"][0], lambda p, h: h @ p["last"]):
        model = mgs.FunctionalModel(lambda p, x, out=out: out(p, mix(x @ p["first"])), parameters)
        with pytest.raises(mgs.SamplesInteractError, match="`model` must treat each sample by itself"):
            mgs.kernel(model, torch.randn(7, 5), output=output)


def test_check_refuses_by_layer_and_counts():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2)), torch.randn(5, 3, 6, 6)
    routes = {layer.parameter: layer.route for layer in mgs.check(model, x).layers}
    assert routes == dict.fromkeys(["0.weight", "0.bias"], "refused") | dict.fromkeys(
        ["1.weight", "1.bias", "3.weight", "3.bias"], "statistics"
    )
    report = mgs.check(model.eval(), x)
    assert report.ok
    assert {layer.parameter: layer.kind for layer in report.layers}["0.weight"] == "convolution"
    assert all(layer.cost > 0 for layer in report.layers)
    assert "operations" in str(report)
    assert report.penalty == ""


def cosines(p, x):
    """Classify by the cosine of the angle to the weights of a class."""
    return nn.functional.normalize(torch.tanh(x @ p["w"]), dim=1) @ (p["g"] * p["v"] / p["v"].norm(dim=1, keepdim=True)).T


def test_a_batch_with_one_sample_of_each_class_is_not_taken_for_one_of_normalised_weights():
    torch.manual_seed(0)
    parameters = {name: torch.randn(*size) for name, size in {"w": (5, 4), "v": (3, 4), "g": (3, 1)}.items()}
    model, x = mgs.FunctionalModel(cosines, parameters), torch.randn(6, 5)
    kernel = mgs.kernel(model, x, torch.arange(6) % 3, output="target")
    torch.testing.assert_close(mgs.kernel(model, x[:3], torch.arange(3), output="target"), kernel[:3, :3])


class Last(nn.LSTM):
    """Return the outputs of the last step."""

    def forward(self, x):
        return super().forward(x.transpose(0, 1))[0][-1]


def test_check_says_whether_a_penalty_is_refused(of):
    assert mgs.check(*of("transformer")).penalty == ""
    report = mgs.check(nn.EmbeddingBag(9, 3, mode="max"), torch.randint(0, 9, (6, 3)))
    assert report.ok
    assert "an embedding bag that takes the maximum" in report.penalty
    assert "A penalty is refused" in str(report)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="recurrent layers are not fused")
def test_check_says_which_layers_a_penalty_cannot_have():
    model = nn.Sequential(
        nn.Embedding(9, 3), nn.Flatten(1), nn.Linear(9, 12), nn.Unflatten(1, (3, 4)), Last(4, 5), nn.Linear(5, 2)
    )
    x = torch.randint(0, 9, (6, 3))
    layers = mgs.check(model, x).layers
    behind = [layer for layer in layers if "no penalty" in layer.remedy]
    assert {layer.parameter[0] for layer in behind} == {"0", "2", "4"}
    assert all("twice_differentiable()" in layer.remedy for layer in behind)
    assert {layer.parameter[0] for layer in layers if "exact but slow" in layer.remedy} == {"4"}
    assert mgs.kernel(model, x, parameters=["5.weight"], differentiable=True).requires_grad  # as it says
    with twice_differentiable():
        assert not any("no penalty" in layer.remedy for layer in mgs.check(model, x).layers)


def test_samples_of_instance_normalisation_do_not_interact(of):
    model, x = of("channels")
    assert mgs.kernel(model.train(), x).shape == (6, 6)


def test_nothing_of_the_user_changes(of):
    model, x = of("resnet_batch_norm")
    model[1].train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, inputs, random = [module.training for module in model.modules()], x.clone(), torch.get_rng_state()
    mgs.kernel(model, x, output="sum", parameters=lambda name: name.startswith("7"))
    mgs.kernel(nn.Sequential(nn.Dropout(0.5), nn.Flatten(), model[-1]), torch.ones(4, 8, dtype=x.dtype), output="sum")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(x, inputs)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[1].weight.grad is None
    assert not x.requires_grad


def test_works_where_gradients_are_off(of):
    model, x = of("mlp")
    expected = mgs.kernel(model, x)
    with torch.no_grad():
        torch.testing.assert_close(mgs.kernel(model, x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(mgs.kernel(model, x), expected)
    assert not mgs.kernel(model, x).requires_grad
    with torch.inference_mode():
        made_there = x + 0
    torch.testing.assert_close(mgs.kernel(model, made_there), expected)


def test_targets_may_be_arrays_and_ignored():
    model, x, y = nn.Linear(3, 2), Refusing.x, torch.tensor([0, 1, -100, 1])
    kernel = mgs.kernel(model, x, y, output="loss")
    torch.testing.assert_close(mgs.kernel(model, x.numpy(), y.numpy(), output="loss"), kernel)
    torch.testing.assert_close(mgs.kernel(model, x, y.to(torch.float32), output="loss"), kernel)
    assert not kernel[2].any()
    assert not mgs.kernel(model, x, torch.full((4,), -100), output="loss").any()


def test_losses_of_labels_can_be_differentiated_and_mapped():
    outputs, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    gradient = torch.func.vmap(torch.func.grad(lambda o, y: mgs.cross_entropy(o[None], y[None])[0]))(outputs, labels)
    torch.testing.assert_close(gradient, outputs.softmax(1) - torch.nn.functional.one_hot(labels, 3))


def test_plans_are_kept_and_found_again_for_other_shapes(of):
    model, x = of("frames")
    for part in (x, x[:3], x.repeat(1, 2, 1, 1, 1)[:, :3], x):
        torch.testing.assert_close(mgs.kernel(model, part, chunk_size=1), mgs.kernel(model, part))


def test_one_structure_in_two_modes_has_two_plans():
    model, x = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).eval(), torch.randn(7, 5)
    mgs.kernel(model, x)
    with pytest.raises(mgs.SamplesInteractError):
        mgs.kernel(model.train(), x)
    mgs.kernel(model.eval(), x)


def test_a_head_without_gradient_gives_zero():
    model, x = nn.Linear(5, 2), torch.randn(4, 5)
    assert not mgs.kernel(model, x, output=lambda outputs, _: 0.0 * outputs.sum(1)).any()
    constant = mgs.FunctionalModel(lambda p, x: x, {"w": torch.ones(2)})
    assert torch.equal(mgs.kernel(constant, x), torch.zeros(4, 4))


def test_compiled_and_parallel_modules_are_unwrapped(of):
    model, x = of("mlp")
    torch.testing.assert_close(mgs.kernel(torch.compile(model, backend="eager"), x), mgs.kernel(model, x))
    torch.testing.assert_close(mgs.kernel(nn.DataParallel(model), x), mgs.kernel(model, x))


def test_checkpointing_shows_its_parameters_or_is_refused(of):
    model, x = of("mlp")

    class Saving(nn.Module):
        def __init__(self, reentrant) -> None:
            super().__init__()
            self.inner, self.reentrant = model, reentrant

        def forward(self, x):
            hidden = self.inner[0](x)
            hidden = torch.utils.checkpoint.checkpoint(self.inner[1:], hidden, use_reentrant=self.reentrant)
            return hidden

    import torch.utils.checkpoint

    with pytest.raises(mgs.UnsupportedModelError, match=r"checkpointing with `use_reentrant=True`; set `use_reentrant=False`"):
        mgs.kernel(Saving(True), x)
    torch.testing.assert_close(mgs.kernel(Saving(False), x), mgs.kernel(model, x))


def test_custom_functions_get_rows(of):
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w**3

        @staticmethod
        def backward(ctx, gradient):
            x, w = ctx.saved_tensors
            return gradient * w**3, (gradient * x * 3 * w**2).sum(0)

    w, x = nn.Parameter(torch.randn(5, dtype=torch.float64)), torch.randn(4, 5, dtype=torch.float64)
    model = mgs.FunctionalModel(lambda p, x: Cube.apply(x, p["w"]).tanh(), {"w": w})
    plain = mgs.FunctionalModel(lambda p, x: (x * p["w"] ** 3).tanh(), {"w": w})
    torch.testing.assert_close(mgs.kernel(model, x), mgs.kernel(plain, x))
    assert mgs.check(model, x).layers[0].route == "rows"
    kernels = [mgs.kernel(m, x, differentiable=True).log().sum() for m in (model, plain)]
    torch.testing.assert_close(*(torch.autograd.grad(kernel, w)[0] for kernel in kernels))


@pytest.mark.parametrize(
    "name", ["Add", "Mul", "Clone", "Relu", "Linear", "Mm", "T", "Embedding", "NativeLayerNorm", "Convolution"]
)
def test_custom_functions_are_not_taken_for_the_operations_whose_name_they_bear(name, by_loop, fresh):
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return 2 * gradient @ w.mT, 3 * x.mT @ gradient

    function = type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})
    w, x = torch.randn(5, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    parameters = {"v": torch.randn(5, 5, dtype=torch.float64), "w": w}

    def through(apply):
        return lambda p, x: apply(x @ p["v"], p["w"]).tanh()

    def kernel(apply):
        leaves = fresh(parameters)
        value = mgs.kernel(mgs.FunctionalModel(through(apply), leaves), x, differentiable=True)
        return value, torch.autograd.grad(value.square().sum(), list(leaves.values()))

    another = type("Scaled", (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})
    torch.testing.assert_close(kernel(function.apply), kernel(another.apply))
    torch.testing.assert_close(kernel(function.apply)[0], by_loop(through(another.apply), fresh(parameters), x))


_OF_DERIVATIVES = {
    "convolution": (lambda p, x: nn.functional.conv1d(x, p["w"], p["b"], padding=1), {"w": (4, 2, 3), "b": (4,)}),
    "group norm": (
        lambda p, x: nn.functional.group_norm(nn.functional.conv1d(x, p["w"]), 2, p["gain"], p["shift"]),
        {"w": (4, 2, 1), "gain": (4,), "shift": (4,)},
    ),
    "layer norm": (lambda p, x: nn.functional.layer_norm(x, (4,), p["gain"]).tile(2, 1), {"gain": (4,)}),
}


@pytest.mark.parametrize("name", _OF_DERIVATIVES)
def test_outputs_may_be_derivatives_of_a_network(name, by_loop, fresh):
    torch.manual_seed(0)
    hidden, shapes = _OF_DERIVATIVES[name]
    parameters = {name: torch.randn(shape, dtype=torch.float64) for name, shape in {**shapes, "v": (4, 2)}.items()}
    x = torch.randn(3, 2, 4, dtype=torch.float64)

    def outputs(p, x):
        x = x.clone().requires_grad_()
        y = nn.functional.silu(hidden(p, x)).mean(2) @ p["v"]
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.cat([y, slope[:, 0]], 1)

    ours, values = fresh(parameters), fresh(parameters)
    kernels = mgs.kernel(mgs.FunctionalModel(outputs, ours), x, differentiable=True), by_loop(outputs, values, x)
    torch.testing.assert_close(*kernels)
    gradients = [
        torch.autograd.grad(kernel.square().sum(), list(of.values())) for kernel, of in zip(kernels, (ours, values), strict=True)
    ]
    torch.testing.assert_close(*gradients)


def test_nested_gradients_are_differentiated_again():
    def energy(x, w):
        return (torch.tanh(x["x"] @ w) ** 2).sum()

    def objective(w):
        _, slope = BACKEND.value_and_gradient(energy)({"x": x}, w["w"])
        return (slope["x"] ** 2).sum()

    x, w = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    value, gradient = BACKEND.value_and_gradient(objective)({"w": w})
    step, move = 1e-5, torch.randn(3, 2, dtype=torch.float64)
    ends = [float(objective({"w": w.detach() + sign * step * move})) for sign in (1, -1)]
    assert float((gradient["w"] * move).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)
    assert value > 0


def test_a_value_that_the_parameters_do_not_change_has_gradient_zero():
    """As on the other backends; the penalty on a linear model's outputs is one."""
    x, w = torch.randn(4, 3), torch.randn(3, 2)

    def penalty(parameters):
        model = mgs.FunctionalModel(lambda p, x: x @ p["w"], parameters)
        return mgs.Penalty("trace", 1.0)(mgs.kernel(model, x, differentiable=True))

    value, gradient = BACKEND.value_and_gradient(penalty)({"w": w})
    torch.testing.assert_close(value, 2 * (x**2).sum() / 4)
    assert torch.equal(gradient["w"], torch.zeros(3, 2))


@pytest.mark.parametrize("name", ["sequence_first_attention", "lstm"])
def test_parts_of_packed_weights_stay_apart(of, name):
    model, x = of(name)
    with twice_differentiable():
        uses = BACKEND.statistics(model, x, None, lambda outputs, _: outputs.sum(1)[:, None], None, differentiable=False)
    assert "Rows" not in {type(use).__name__ for use in merge(uses)}


def test_select_and_several_inputs(of):
    model, x = of("separate_attention")
    expected = mgs.kernel(model, x)

    class Naming(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, left, right):
            return {"out": self.inner(left, right), "other": None}

    named = {"left": x[0], "right": x[1].numpy()}
    torch.testing.assert_close(mgs.kernel(Configured(Naming(), select=lambda outputs: outputs["out"]), named), expected)
    with pytest.raises(mgs.ArgumentError, match=r"`model` must return a tensor.*got dict.*`select`"):
        mgs.kernel(Naming(), named)

    class Batched(Naming):
        def forward(self, batch):
            return self.inner(batch["left"], batch["right"])

    torch.testing.assert_close(mgs.kernel(Batched(), (named | {"right": x[1]},)), expected)


class Refusing:
    scaled = nn.Sequential(nn.Embedding(5, 3, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(6, 2))
    bag = nn.Sequential(nn.EmbeddingBag(5, 3, scale_grad_by_freq=True), nn.Linear(3, 2))
    complex = mgs.FunctionalModel(lambda p, x: x @ p["w"], {"w": torch.ones(3, 2, dtype=torch.complex64)})
    infinite = mgs.FunctionalModel(lambda p, x: (x @ p["w"]) * torch.inf, {"w": torch.ones(3, 2)})
    x = torch.randn(4, 3)
    ids = torch.randint(0, 5, (4, 2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mgs.kernel(Refusing.scaled, Refusing.ids), mgs.UnsupportedModelError, "got `scale_grad_by_freq=True`"),
        (lambda: mgs.kernel(Refusing.bag, Refusing.ids), mgs.UnsupportedModelError, "got `scale_grad_by_freq=True`"),
        (lambda: mgs.kernel(nn.LazyLinear(2), Refusing.x), mgs.ArgumentError, "got a lazy module. Run it once"),
        (
            lambda: mgs.kernel(Refusing.complex, Refusing.x),
            mgs.ArgumentError,
            "must be floating-point arrays; got dtype torch.complex64",
        ),
        (
            lambda: mgs.kernel(nn.Conv2d(1, 2, 1), torch.ones(3, 1, 4, 4), output="random"),
            mgs.ArgumentError,
            r"got outputs of shape \(3, 2, 4, 4\)",
        ),
        (
            lambda: mgs.kernel(nn.Linear(3, 2), torch.full((4, 3), torch.nan)),
            mgs.ArgumentError,
            "`inputs` must be finite",
        ),
        (
            lambda: mgs.kernel(nn.LSTM(3, 2, batch_first=True), Refusing.x[None]),
            mgs.ArgumentError,
            "must return a tensor, or an object",
        ),
        (lambda: mgs.kernel(nn.Linear(3, 2), Refusing.x[None], output="sum"), mgs.ArgumentError, r"outputs of shape \(n, c\)"),
        (
            lambda: mgs.kernel(nn.Linear(3, 2), Refusing.x, output=lambda o, _: np.ones(len(o))),
            mgs.ArgumentError,
            "or `output` reduce them so; got ndarray",
        ),
        (lambda: mgs.kernel(Refusing.infinite, Refusing.x), mgs.ArgumentError, "`model` must have finite gradients"),
        (
            lambda: mgs.kernel(nn.Linear(3, 2).requires_grad_(False), Refusing.x),
            mgs.ArgumentError,
            "`model` must have trainable parameters, whose kernel it is; got none",
        ),
        *(
            (
                lambda labels=labels, output=output: mgs.kernel(nn.Linear(3, 2), Refusing.x, torch.tensor(labels), output=output),
                mgs.ArgumentError,
                message,
            )
            for output in ("loss", "target")
            for labels, message in (
                ([0, 1, 2, 1], r"`targets` must be labels in 0\.\.1; got 0\.\.2"),
                ([0, 1, -1, 1], r"`targets` must be labels in 0\.\.1; got -1\.\.1"),
                ([0.0, 0.5, 1.0, 1.0], "`targets` must be integers to be labels; got dtype float32"),
            )
        ),
        (lambda: BACKEND.parameters(object()), mgs.ArgumentError, "`model` must be a torch.nn.Module or a FunctionalModel"),
        (
            lambda: mgs.kernel(nn.Linear(3, 2), Refusing.x, parameters="nonsense"),
            mgs.ArgumentError,
            r"must name parameters of the model; got \['nonsense'\]",
        ),
    ],
)
def test_refusals_name_the_remedy(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_arrays_come_and_go():
    array = np.array([[1.0, 2.0]], dtype=np.float32)
    tensor = BACKEND.asarray(array)
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(BACKEND.to_numpy(tensor.bfloat16().requires_grad_()), array)
    assert BACKEND.asarray(tensor.requires_grad_()).requires_grad


def test_graph_without_parameters_is_empty():
    assert read_graph(torch.ones(2, 1), {"w": nn.Parameter(torch.ones(1))}).nodes == []


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))

    def forward(self, x):
        return self.layers(x)


def test_monitor_measures_on_schedule_and_restores_everything():
    model, x = Dropping().train(), torch.randn(8, 4)
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    random, written = torch.get_rng_state(), []
    sink = mgs.CallbackSink(lambda numbers, step: written.append((step, numbers["mgs_trace"])))
    y, schedule = torch.arange(8) % 3, mgs.Schedule(2, start=1)
    monitor = MGSMonitor(model, x, y, labels=y, every=schedule, sinks=[sink], output="loss")
    summaries = [monitor.step(loss=0.5) for _ in range(5)]
    assert [summary is not None for summary in summaries] == [False, True, False, True, False]
    assert [record["step"] for record in monitor.history] == [1, 3] == [step for step, _ in written]
    assert monitor.history[0]["loss"] == 0.5
    expected = mgs.kernel(model.eval(), x, y, output="loss").trace()
    assert monitor.history[0]["mgs_trace"] == pytest.approx(float(expected))
    model.train()
    model.layers[1].eval()
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(value.grad is None for value in model.parameters())


@pytest.mark.filterwarnings("ignore:The kernel of the probe batch:RuntimeWarning")
@pytest.mark.parametrize("output", ["trace", "loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_monitor_goes_on_with_a_model_that_diverges(output, value):
    model, x, y = Dropping(), torch.randn(8, 4), torch.arange(8) % 3
    for first in (0, 1):  # nothing is known of the model, or all
        monitor = MGSMonitor(model, x, y, every=1, output=output)
        if first:
            monitor.step()
        kept = model.layers[0].weight.detach().clone()
        with torch.no_grad():
            model.layers[0].weight.fill_(value)
        assert math.isnan(monitor.step().mean_cosine)
        with torch.no_grad():
            model.layers[0].weight.copy_(kept)
        assert math.isfinite(monitor.step().mean_cosine)


def test_monitor_restores_the_mode_after_an_error():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train()
    monitor = MGSMonitor(model, torch.randn(5, 7), every=1)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        monitor.step()
    assert model.training
    assert model[1].training


def test_monitor_takes_epochs_and_selects():
    model = nn.LSTM(3, 4, batch_first=True)
    monitor = MGSMonitor(model, torch.randn(5, 6, 3), every=1, select=lambda outputs: outputs[0][:, -1], chunk_size=2)
    assert monitor.step(7) is not None
    assert monitor.step(number=9) is not None
    assert [record["step"] for record in monitor.history] == [7, 9]


@pytest.mark.parametrize("name", ["trace", "log_trace", "log_determinant", "cosine", "log_determinant_cosine"])
def test_what_the_core_makes_is_where_the_kernel_is(name):
    with FakeTensorMode():  # tensors without values, of a device that need not be there
        kernel, outputs = torch.ones(4, 4, device="cuda"), torch.ones(4, 3, device="cuda")
        labels = torch.zeros(4, dtype=torch.int64, device="cuda")
        made = [mgs.Penalty(name)(kernel), mgs.agreement_weights(kernel), mgs.cross_entropy(outputs, labels)]
        made.append(make_head("random", "identity", None, 2, 0, None).function(outputs, None))
    assert {array.device.type for array in made} == {"cuda"}


class Pairs(nn.Module):
    """Compare each sample of one kind with all of another, as towers of images and texts do."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 8), nn.Linear(6, 8)

    def forward(self, x, z):
        return self.left(x) @ self.right(z).T


def test_samples_that_are_compared_with_all_others_are_refused():
    with pytest.raises(mgs.SamplesInteractError, match=r"after parameter 'right\."):
        mgs.kernel(Pairs(), (torch.randn(7, 5), torch.randn(7, 6)))


def test_one_tensor_under_two_names_is_two_parameters():
    w, x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, 3, dtype=torch.float64)
    model = mgs.FunctionalModel(lambda p, x: torch.tanh(x @ p["a"]) @ p["b"], {"a": w, "b": w})
    for parameters in (None, "a", "b"):
        kernel = mgs.kernel(model, x, parameters=parameters, differentiable=True)
        torch.testing.assert_close(kernel.detach(), mgs.kernel(model, x, parameters=parameters))
    parts = BACKEND.value_and_gradient(lambda p: model.function(p, x).sum())(model.parameters)[1]
    (whole,) = torch.autograd.grad(model.function(model.parameters, x).sum(), w)
    torch.testing.assert_close(parts["a"] + parts["b"], whole)


def test_a_setting_that_was_left_out_at_first_belongs_to_the_structure(monkeypatch):
    monkeypatch.setattr("mgs_core.backends.torch.graph._names", {})  # as in a new process
    w, x = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4)

    def steps(**options):
        return read_graph((x @ w).var(**options), {"w": w}).steps

    assert steps() != steps(dim=1)
    assert steps(dim=0) != steps(dim=1)


def test_long_chains_of_parameters_take_no_longer_than_they_are():
    """Each residual doubles the ways from the end to the parameter."""

    def function(p, x):
        w = p["w"]
        for _ in range(60):
            w = w + 1e-3 * torch.tanh(w)
        return x @ w

    w, x = torch.randn(3, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    rows = torch.func.jacrev(lambda w: function({"w": w}, x))(w).reshape(4, 3, 9)
    kernel = mgs.kernel(mgs.FunctionalModel(function, {"w": w}), x)
    torch.testing.assert_close(kernel, torch.einsum("akp,bkp->ab", rows, rows))


def test_chains_may_be_longer_than_python_recurses():
    leaf = torch.ones(2, 2, requires_grad=True)
    w = leaf
    for _ in range(1500):
        w = w * 1.0
    graph = read_graph(torch.ones(3, 2) @ w, {"w": leaf})
    assert sources(graph, graph.inputs[-1][1]) == ["w"]


def test_inference_mode_is_no_hindrance_but_to_modules_that_are_made_in_it():
    def function(p, x):
        return torch.tanh(x @ p["a"]) @ p["b"]

    with torch.inference_mode():
        parameters, x, y = {"a": torch.randn(3, 3), "b": torch.randn(3, 3)}, torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
        kernel = mgs.kernel(mgs.FunctionalModel(function, parameters), x, y, output="loss")
        module = nn.Linear(3, 2)
    expected = {name: value.clone() for name, value in parameters.items()}
    torch.testing.assert_close(kernel.clone(), mgs.kernel(mgs.FunctionalModel(function, expected), x.clone(), y, output="loss"))
    with pytest.raises(mgs.ArgumentError, match=r"`model` must be made outside of torch.inference_mode\(\)"):
        mgs.kernel(module, x.clone())


def test_check_takes_outputs_of_any_shape():
    flat = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    for model, x in ((nn.Conv2d(3, 2, 3), torch.randn(3, 3, 5, 5)), (flat, torch.randn(3, 4))):
        report = mgs.check(model, x)
        assert [layer.route for layer in report.layers] == ["statistics", "statistics"]
        assert str(report).endswith("to be flattened for a kernel: transform=lambda f: f.reshape(len(f), -1).")
        assert mgs.kernel(model, x, transform=lambda f: f.reshape(len(f), -1)).shape == (3, 3)
    assert not mgs.check(nn.Linear(4, 2), torch.randn(3, 4)).outputs


def test_constants_cut_from_the_array_of_the_inputs_are_none():
    data, w = torch.randn(9, 4, dtype=torch.float64), {"w": torch.randn(4, 3, dtype=torch.float64)}
    for mask in (data[5:9, :3], data[:4, :3]):
        model = mgs.FunctionalModel(lambda p, x, mask=mask: torch.tanh(x.cos() @ (p["w"] * mask)), w)
        assert mgs.kernel(model, data[:5]).shape == (5, 5)


def test_parameters_may_be_read_by_closure_where_they_stay_connected():
    module, x = nn.Linear(3, 2), torch.randn(4, 3)
    model = mgs.FunctionalModel(lambda _, x: module(x), dict(module.named_parameters()))
    torch.testing.assert_close(mgs.kernel(model, x, differentiable=True), mgs.kernel(module, x), check_device=False)


def test_a_measured_module_is_not_kept_alive():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))  # whose class holds it
    seen = weakref.ref(model[0])
    mgs.kernel(model, torch.randn(5, 4))
    del model
    gc.collect()
    assert seen() is None
