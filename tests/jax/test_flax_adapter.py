"""The Flax adapter: penalised and weighted losses against their definitions, in a training loop, and the monitor."""

from __future__ import annotations

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.errors import FlaxError
from flax.training.train_state import TrainState
from jax.flatten_util import ravel_pytree
from mgs_core.adapters.flax import MGSMonitor, Parts, linen_model, regularized

import mgs_core as mgs

PENALTY = mgs.Penalty("log_determinant", strength=0.5)


def close(actual, expected, tolerance: float = 1e-12) -> None:
    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.max(np.abs(b)), 1e-6))  # what is nought is rounding

    jax.tree.map(compare, actual, expected)


def outputs(p, batch):
    return jnp.tanh(batch["x"] @ p["w"] + p["b"]) @ p["v"]


def losses(p, batch):
    return jnp.sum((outputs(p, batch) - batch["y"]) ** 2, axis=1)


def loss_fn(p, batch):
    return jnp.mean(losses(p, batch)), {"size": jnp.sum(outputs(p, batch) ** 2)}


@pytest.fixture
def p():
    draw = np.random.default_rng(0)
    return {k: jnp.asarray(draw.normal(size=s)) for k, s in {"w": (3, 4), "b": (4,), "v": (4, 2)}.items()}


@pytest.fixture
def batch():
    draw = np.random.default_rng(1)
    return {"x": jnp.asarray(draw.normal(size=(6, 3))), "y": jnp.asarray(draw.normal(size=(6, 2)))}


@jax.jit
def kernel(p, batch):
    model = mgs.FunctionalModel(lambda p, b: losses(p, b)[:, None], p)
    return mgs.kernel(model, batch, differentiable=True)


def evaluate(function, *arguments):
    (value, parts), gradient = jax.jit(jax.value_and_grad(function, has_aux=True))(*arguments)
    return value, parts, gradient


def test_penalised_loss(p, batch):
    value, parts, gradient = evaluate(regularized(loss_fn, PENALTY), p, batch)
    expected = jax.jit(jax.value_and_grad(lambda p: loss_fn(p, batch)[0] + PENALTY(kernel(p, batch))))(p)
    close((value, gradient), expected)
    close(parts, Parts(loss_fn(p, batch)[0], PENALTY(kernel(p, batch)), kernel(p, batch), None, loss_fn(p, batch)[1]))


def test_agreement_weighted_loss(p, batch):
    value, parts, gradient = evaluate(regularized(loss_fn, weighting="agreement"), p, batch)
    weights = mgs.agreement_weights(kernel(p, batch))
    close((value, gradient), jax.value_and_grad(lambda p: jnp.mean(weights * losses(p, batch)))(p))
    close(parts.weights, weights)
    close(parts.kernel, kernel(p, batch))
    named = regularized(loss_fn, weighting="agreement", parameters=iter(["w"]))
    some, again = evaluate(named, p, batch), evaluate(named, p, batch)
    close(again[0], some[0])
    model = mgs.FunctionalModel(lambda p, b: losses(p, b)[:, None], p)
    weights = mgs.agreement_weights(mgs.kernel(model, batch, parameters=["w"]))
    close(some[2], jax.grad(lambda p: jnp.mean(weights * losses(p, batch)))(p))


def test_agreement_weights_have_no_second_derivative_and_say_so(p, batch):
    weighted = regularized(loss_fn, weighting="agreement")
    with pytest.raises(mgs.UnsupportedModelError, match=r"no second derivative.*Take that of `mean\(parts.weights"):
        jax.hessian(lambda p: weighted(p, batch)[0])(p)


def test_agreement_weighted_loss_has_its_gradient_in_batch_and_rest_too(p, batch):
    def loss(p, batch, factor):
        return jnp.mean(factor * losses(p, batch))

    weights = mgs.agreement_weights(kernel(p, batch))
    weighted = regularized(loss, weighting="agreement")
    actual = jax.jit(jax.grad(lambda *given: weighted(*given)[0], argnums=(0, 1, 2)))(p, batch, 1.0)
    close(actual, jax.grad(lambda p, b, factor: jnp.mean(factor * weights * losses(p, b)), argnums=(0, 1, 2))(p, batch, 1.0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_losses_may_be_narrower_than_parameters(p, batch, dtype):
    def loss(p, batch):
        return jnp.mean(losses(p, batch).astype(dtype))

    expected, tolerance = jax.grad(lambda p: loss_fn(p, batch)[0])(p), 4.0 * float(jnp.finfo(dtype).eps)
    value, parts, gradient = evaluate(regularized(loss, weighting="agreement", parameters=["idle"]), {**p, "idle": p["b"]}, batch)
    assert value.dtype == dtype
    close({name: gradient[name] for name in p}, expected, tolerance)
    for step in range(2):  # both branches give one type
        _, parts, gradient = evaluate(regularized(loss, mgs.Penalty("trace", 0.0), every=2), p, batch, step)
        assert parts.kernel.dtype == jnp.float32
        close(gradient, expected, tolerance)


@jax.custom_vjp
def rounded(x):
    return jnp.round(x)


rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, gradient: (gradient,))


@jax.custom_jvp
def also_rounded(x):
    return jnp.round(x)


also_rounded.defjvp(lambda primals, tangents: (jnp.round(*primals), *tangents))


@pytest.mark.parametrize("rounding", [rounded, also_rounded, lambda x: jax.lax.map(rounded, x)])
def test_gradient_of_the_loss_minds_rules_of_their_own(p, batch, rounding):
    def losses(p, batch):
        return jnp.sum((rounding(outputs(p, batch)) - batch["y"]) ** 2, axis=1)

    def loss(p, batch):
        return jnp.mean(losses(p, batch))

    nothing = mgs.Penalty("trace", 0.0)
    close(evaluate(regularized(loss, nothing), p, batch)[2], jax.grad(loss)(p, batch))
    _, parts, gradient = evaluate(regularized(loss, nothing, weighting="agreement"), p, batch)
    close(gradient, jax.grad(lambda p: jnp.mean(parts.weights * losses(p, batch)))(p))


def test_chosen_parameters_that_do_not_move_the_loss_leave_the_weights_alone(p, batch):
    value, parts, gradient = evaluate(
        regularized(loss_fn, weighting="agreement", parameters=["idle"]), {**p, "idle": jnp.ones(2)}, batch
    )
    close(parts.weights, jnp.ones(6))
    close((value, {name: gradient[name] for name in p}), jax.value_and_grad(lambda p: loss_fn(p, batch)[0])(p))


@pytest.mark.parametrize(
    "name", ["cnn", "few_positions", "tied", "views", "several_inputs", pytest.param("loops", marks=pytest.mark.slow)]
)
def test_agreement_weighted_gradient_of_every_kind_of_statistics(build, name):
    function, parameters, x = build(name)

    def loss(p, x):
        return jnp.mean(jnp.sum(jnp.sin(function(p, x)), axis=1))

    _, parts, gradient = evaluate(regularized(loss, weighting="agreement"), parameters, x)
    expected = jax.jit(jax.grad(lambda p: jnp.mean(parts.weights * jnp.sum(jnp.sin(function(p, x)), axis=1))))(parameters)
    close(gradient, expected, 1e-10)


def test_penalty_and_weights_together(p, batch):
    value, _, gradient = evaluate(regularized(loss_fn, PENALTY, weighting="agreement"), p, batch)
    weights = mgs.agreement_weights(kernel(p, batch))
    expected = jax.jit(jax.value_and_grad(lambda p: jnp.mean(weights * losses(p, batch)) + PENALTY(kernel(p, batch))))(p)
    close((value, gradient), expected)


def test_other_outputs_and_fewer_samples(p, batch):
    few = jax.tree.map(lambda leaf: leaf[:4], batch)
    function = regularized(loss_fn, PENALTY, output="trace", outputs=outputs, max_samples=4, transform="softmax")
    model = lambda p: mgs.FunctionalModel(outputs, p)  # noqa: E731  # shorter than a function
    expected = PENALTY(mgs.kernel(model(p), few, transform="softmax"))
    close(evaluate(function, p, batch)[1].penalty, expected)
    function = regularized(loss_fn, PENALTY, max_samples=4)
    close(evaluate(function, p, batch)[1].penalty, PENALTY(kernel(p, few)))
    function = regularized(loss_fn, PENALTY, output="target", outputs=outputs, targets=lambda b: jnp.argmax(b["y"], 1))
    expected = PENALTY(mgs.kernel(model(p), batch, jnp.argmax(batch["y"], 1), output="target"))
    close(evaluate(function, p, batch)[1].penalty, expected)


def test_lazy_penalty_counts_for_the_steps_between(p, batch):
    function = regularized(loss_fn, PENALTY, every=3)
    lazy = jax.jit(jax.value_and_grad(function, has_aux=True))
    plain = jax.jit(jax.value_and_grad(lambda p, factor: loss_fn(p, batch)[0] + factor * PENALTY(kernel(p, batch))))
    for step in range(4):
        (value, parts), gradient = lazy(p, batch, jnp.asarray(step))
        factor = 3.0 if step % 3 == 0 else 0.0
        close((value, gradient), plain(p, factor))
        close(parts.penalty, factor * PENALTY(kernel(p, batch)))
    with pytest.raises(mgs.ArgumentError, match="`step` must be an integer when `every` is above 1; got none"):
        function(p, batch)


def test_rest_is_the_same_for_all_samples(p, batch):
    function = regularized(lambda p, batch, factor: factor * loss_fn(p, batch)[0], PENALTY)
    close(evaluate(function, p, batch, 2.0)[1].kernel, 4.0 * kernel(p, batch))


def test_regularized_loss_maps_over_parameters(p, batch):
    step = jax.value_and_grad(regularized(loss_fn, PENALTY), has_aux=True)
    other = jax.tree.map(lambda leaf: 0.5 * leaf, p)
    mapped = jax.jit(jax.vmap(step, in_axes=(0, None)))(jax.tree.map(lambda *leaves: jnp.stack(leaves), p, other), batch)
    for place, one in enumerate((p, other)):
        close(jax.tree.map(lambda leaf, place=place: leaf[place], mapped), jax.jit(step)(one, batch))


def test_loss_function_without_aux_is_evaluated_for_the_losses_alone(p, batch):
    shapes = []

    def loss(p, batch):
        shapes.append(len(batch["x"]))
        return jnp.mean(losses(p, batch))

    parts = evaluate(regularized(loss, PENALTY), p, batch)[1]
    assert (parts.aux, shapes) == (None, [1, 4])  # one sample, and the few on which samples are seen not to interact


def test_training_with_optax_and_train_state(p, batch):
    step = jax.jit(jax.value_and_grad(regularized(loss_fn, PENALTY), has_aux=True))
    state = TrainState.create(apply_fn=outputs, params=p, tx=optax.adam(0.03))
    values = []
    for _ in range(60):
        (value, _), gradient = step(state.params, batch)
        state, values = state.apply_gradients(grads=gradient), [*values, float(value)]
    assert values[-1] < 0.5 * values[0]


def test_loss_that_is_no_mean_or_mixes_samples_is_refused(p, batch):
    def total(p, batch):
        return jnp.sum(losses(p, batch))

    def standardised(p, batch):
        z = outputs(p, batch)
        return jnp.mean(((z - jnp.mean(z, 0)) ** 2) * batch["y"])

    for function in (total, standardised):
        with pytest.raises(mgs.SamplesInteractError, match="treat each sample by itself"):
            jax.jit(regularized(function, PENALTY))(p, batch)


@pytest.mark.parametrize("shape", [(6,), (6, 2)])
@pytest.mark.parametrize("others", range(5))
def test_means_over_what_a_mask_leaves_are_refused_whatever_is_made_up(p, batch, shape, others):
    def masked(p, batch):
        kept = jnp.reshape(batch["mask"], (len(batch["mask"]), -1))
        return jnp.sum((batch["x"] @ p["w"])[:, :2] * kept) / jnp.maximum(jnp.sum(kept), 1)

    p = {"w": p["w"], **{f"other {place}": jnp.ones(3) for place in range(others)}}  # which shift what is drawn
    with pytest.raises(mgs.SamplesInteractError, match="treat each sample by itself"):
        jax.jit(regularized(masked, PENALTY))(p, {**batch, "mask": jnp.ones(shape, bool)})


def test_losses_and_batches_of_other_shapes_are_named(p, batch):
    with pytest.raises(mgs.ArgumentError, match=r"`loss_fn` must return a scalar, .*; got shape"):
        regularized(losses, PENALTY)(p, batch)
    for wrong, got in (((1.0, 2, 3), "3 values"), ([1.0, 2], "list"), (None, "NoneType")):
        for options in ({}, {"output": "sum", "outputs": outputs}):
            with pytest.raises(mgs.ArgumentError, match=rf"`loss_fn` must return a scalar, .*, or \(scalar, aux\); got {got}"):
                regularized(lambda p, b, wrong=wrong: wrong, PENALTY, **options)(p, batch)
    empty = jax.tree.map(lambda leaf: leaf[:0], batch)
    for bad in ({**batch, "temperature": jnp.ones(())}, {**batch, "x": batch["x"][:2]}, empty):
        with pytest.raises(mgs.ArgumentError, match="`batch` must hold arrays of one number of samples, at least 1"):
            regularized(loss_fn, PENALTY)(p, bad)


def test_nnx_model_is_trained_and_not_changed_by_the_kernel(batch):
    batch = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), batch)
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(4, 2, rngs=nnx.Rngs(1)))

    def loss(model, batch):
        return jnp.mean(jnp.sum((model(batch["x"]) - batch["y"]) ** 2, axis=1))

    step = nnx.jit(nnx.value_and_grad(regularized(loss, PENALTY), has_aux=True))
    optimizer = nnx.Optimizer(model, optax.adam(0.03), wrt=nnx.Param)
    (first, parts), gradient = step(model, batch)
    graph, state = nnx.split(model)
    one = mgs.FunctionalModel(lambda p, b: jnp.sum((nnx.merge(graph, p)(b["x"]) - b["y"]) ** 2, axis=1)[:, None], state)
    expected = mgs.kernel(one, batch)
    close(parts.kernel, expected, 1e-5)
    for _ in range(60):
        (value, _), gradient = step(model, batch)
        optimizer.update(model, gradient)
    assert float(value) < 0.6 * float(first)


def test_random_probes_are_drawn_by_the_key(p, batch):
    options = {"outputs": outputs, "probes": 2, "transform": jnp.sin}
    trace = mgs.Penalty("trace", 1.0)
    probed = regularized(loss_fn, trace, output="random", **options)
    penalties = jax.jit(jax.vmap(lambda key: probed(p, batch, key)[1].penalty))(jax.random.split(jax.random.key(0), 300))
    expected = regularized(loss_fn, trace, output="trace", outputs=outputs, transform=jnp.sin)(p, batch)[1].penalty
    error = float(jnp.std(penalties)) / 300**0.5
    assert abs(float(jnp.mean(penalties) - expected)) < 4.0 * error < 0.2 * float(expected)
    key = jax.random.PRNGKey(3)  # of the older kind
    parts = probed(p, batch, key)[1]
    signs = jax.random.rademacher(key, (2, 2), float)
    jacobian = jax.jacrev(lambda p: jnp.sin(outputs(p, batch)) @ signs)(p)
    rows = jnp.concatenate([jnp.reshape(leaf, (6, 2, -1)) for leaf in jax.tree.leaves(jacobian)], -1)
    close(parts.kernel, jnp.einsum("acp,bcp->ab", rows, rows) / 2)
    often = regularized(loss_fn, trace, output="random", every=2, **options)
    close(often(p, batch, np.int64(4), key)[1].penalty, 2.0 * parts.penalty)
    assert float(often(p, batch, 1, jax.random.key(3))[1].penalty) == 0.0
    fixed = regularized(loss_fn, trace, output="random", seed=1, **options)
    close(fixed(p, batch)[1].penalty, fixed(p, batch)[1].penalty)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, *, train: bool):
        x = nn.BatchNorm(use_running_average=not train, param_dtype=float)(nn.Dense(4, param_dtype=float)(x))
        return nn.Dense(2, param_dtype=float)(jnp.tanh(x))


def test_linen_model_holds_batch_statistics_fixed(batch):
    module = Normalised()
    variables = module.init(jax.random.key(0), batch["x"], train=False)
    trained = mgs.kernel(linen_model(module, variables, train=False), batch["x"])
    fixed = {"batch_stats": variables["batch_stats"]}
    model = mgs.FunctionalModel(lambda p, x: module.apply({"params": p, **fixed}, x, train=False), variables["params"])
    close(trained, mgs.kernel(model, batch["x"]))

    def training(p, x):
        return module.apply({"params": p, **fixed}, x, train=True, mutable=["batch_stats"])[0]

    with pytest.raises(mgs.SamplesInteractError, match="treat each sample by itself"):
        mgs.kernel(mgs.FunctionalModel(training, variables["params"]), batch["x"])
    with pytest.raises(mgs.ArgumentError, match=r'`variables` must hold "params"; got \[\'batch_stats\'\]'):
        linen_model(module, fixed)


def test_monitor_measures_linen_nnx_and_functions(p, batch):
    records = []
    sink = mgs.CallbackSink(lambda numbers, step: records.append((step, numbers["mgs_trace"])))
    monitor = MGSMonitor(lambda p, x: x @ p["w"], batch["x"], every=2, sinks=[sink])
    assert [monitor.step(p) is None for _ in range(4)] == [False, True, False, True]
    assert [step for step, _ in records] == [0, 2]
    close(records[0][1], float(4 * jnp.sum(batch["x"] ** 2)))
    module = nn.Dense(2, use_bias=False, param_dtype=float)
    monitor = MGSMonitor(module, batch["x"], every=mgs.Schedule(1))
    close(monitor.step(module.init(jax.random.key(0), batch["x"]), loss=1.0).trace, float(2 * jnp.sum(batch["x"] ** 2)))
    assert monitor.history[0]["loss"] == 1.0
    monitor = MGSMonitor(nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0)), batch["x"].astype(jnp.float32))
    close(monitor.step().trace, float(2 * jnp.sum(batch["x"] ** 2)), 1e-6)


class Frozen(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(3, 2, rngs=nnx.Rngs(0), param_dtype=float)
        self.norm = nnx.BatchNorm(2, use_running_average=True, rngs=nnx.Rngs(0), param_dtype=float)

    def __call__(self, x):
        return self.norm(self.dense(x))


class Training(nnx.Module):
    def __init__(self):
        self.dense, self.norm = nnx.Linear(3, 2, rngs=nnx.Rngs(0), param_dtype=float), nnx.BatchNorm(2, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.dropout(self.norm(self.dense(x)))


@pytest.mark.wrong_types
def test_nnx_modules_are_measured_in_evaluation_mode_and_stay_in_theirs(batch):
    module = Training()
    monitor = MGSMonitor(module, batch["x"], every=1)
    measured = monitor.step(number=7)
    assert (module.dropout.deterministic, module.norm.use_running_average) == (False, False)
    module.eval()
    close(measured.trace, float(jnp.trace(mgs.kernel(module, batch["x"]))))
    monitor.step()
    assert [record["step"] for record in monitor.history] == [7, 8]
    with pytest.raises(mgs.ArgumentError, match=r"`number` must be an integer of at least 0; got 1\.5\. Count"):
        monitor.step(number=1.5)


def test_functions_of_nnx_modules_have_the_parameters_of_the_module_alone(batch):
    module = Frozen()
    expected = mgs.kernel(module, batch["x"])
    close(mgs.kernel(mgs.FunctionalModel(lambda module, x: module(x), module), batch["x"]), expected)
    monitor = MGSMonitor(lambda module, x: module(x), batch["x"])
    close(monitor.step(module).trace, float(jnp.trace(expected)))
    with pytest.raises(mgs.ArgumentError, match=r"`variables` must be None for an nnx module.*got Frozen. Update the module"):
        MGSMonitor(module, batch["x"]).step(Frozen())


def test_maps_over_devices_that_reach_into_the_loss_or_check_it_are_refused(p, batch):
    def mapped(loss, check):
        spec, mesh = jax.sharding.PartitionSpec, jax.sharding.Mesh(np.array(jax.devices()[:1]), "devices")

        def step(p, batch):
            return jax.lax.pmean(regularized(loss, PENALTY)(p, batch)[0], "devices")

        return jax.shard_map(step, mesh=mesh, in_specs=(spec(), spec("devices")), out_specs=spec(), check_vma=check)

    def reduced(p, batch):
        return jax.lax.pmean(loss_fn(p, batch)[0], "devices")

    for check in (False, True):
        with pytest.raises(
            mgs.UnsupportedModelError, match=r"must not use the axis of a map around it.*over devices. Take `pmean`"
        ):
            mapped(reduced, check)(p, batch)
    with pytest.raises(mgs.UnsupportedModelError, match=r"check_vma=False.*got a check of axis devices. Or leave it out"):
        mapped(loss_fn, True)(p, batch)


@pytest.mark.filterwarnings("ignore:The kernel of the probe batch:RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_monitor_goes_on_with_a_model_that_diverges(p, batch, value):
    factor = 2.0 if np.isinf(value) else 3.0  # another program for each value, or the verdict on one would serve the other
    function = lambda p, x: jnp.tanh(factor * x @ p["w"]) @ p["w"].T  # noqa: E731
    for parameters in ([value, 1.0], [1.0, value, 1.0]):  # nothing is known of the model, or all
        monitor = MGSMonitor(function, batch["x"], every=1)
        found = [monitor.step({"w": jnp.full_like(p["w"], entry)}).mean_cosine for entry in parameters]
        assert [bool(np.isfinite(cosine)) for cosine in found] == [entry == 1.0 for entry in parameters]


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`penalty` must be given without `weighting`"),
        ({"weighting": "loss"}, '`weighting` must be "agreement" or None'),
        ({"penalty": PENALTY, "every": 0}, "`every` must be an integer of at least 1; got 0"),
        ({"penalty": PENALTY, "max_samples": 1.5}, "`max_samples` must be an integer of at least 1; got 1.5"),
        ({"penalty": PENALTY, "output": "full", "outputs": outputs}, "`output` must give one scalar a pair"),
        ({"penalty": PENALTY, "output": "sum"}, "`outputs` must be given for output='sum'"),
        ({"weighting": "agreement", "every": 2}, "`weighting` must go with the losses of all samples"),
        ({"penalty": PENALTY, "max_samples": 4, "paramters": "w"}, "must be `parameters` alone for the losses.*got paramters"),
        ({"penalty": PENALTY, "output": "sum", "outputs": outputs, "loss": jnp.sin}, "must be among transform, .*; got loss"),
        ({"penalty": PENALTY, "output": "some", "outputs": outputs}, "`output` must be one of trace"),
        ({"penalty": PENALTY, "output": "sum", "outputs": 3}, "`outputs` must be a function; got int"),
        ({"penalty": "trace"}, "`penalty` must be a Penalty; got str"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(mgs.ArgumentError, match=message):
        regularized(loss_fn, **options)


@pytest.mark.wrong_types
def test_options_may_be_integers_of_numpy():
    regularized(lambda params, batch: jnp.mean((batch @ params) ** 2), PENALTY, every=np.int64(1), max_samples=np.int64(2))(
        jnp.ones(2), jnp.ones((3, 2))
    )


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, b: regularized(loss_fn, PENALTY, every=2)(p, b, 0.5), "`step` must be an integer.*got 0.5"),
        (lambda p, b: regularized(loss_fn, PENALTY, every=2)(p, b, "first"), "`step` must be an integer.*got 'first'"),
        (
            lambda p, b: regularized(loss_fn, PENALTY, output="random", outputs=outputs)(p, b),
            "`key` must be a key of jax.random.*got none. Call the function with",
        ),
        (lambda p, b: regularized(loss_fn, PENALTY, output="random", outputs=outputs)(p, b, 1), "`key` must be a key.*got 1"),
        (lambda p, b: regularized(lambda p, b: None, PENALTY)(p, b), "`loss_fn` must return a scalar.*got None"),
        (lambda p, b: linen_model(3, p), "`module` must be a linen module; got int"),
        (lambda p, b: MGSMonitor(nn.Dense(2), b["x"]).step(), '`variables` must hold "params"; got NoneType'),
    ],
)
def test_mistakes_are_named_in_the_call(p, batch, call, message):
    with pytest.raises(mgs.ArgumentError, match=message):
        call(p, batch)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda p, b: regularized(loss_fn, PENALTY)(p, {**b, "y": b["y"][:, :1] @ jnp.ones((1, 5))}),
            TypeError,
            r"called `loss_fn` on arrays of shapes \[\(1, 3\), \(1, 5\)\]",
        ),
        (lambda p, b: mgs.kernel(mgs.FunctionalModel(nn.Dense(2), p), b["x"]), FlaxError, "called `model` .*linen_model"),
    ],
)
def test_errors_of_functions_go_on_with_a_note(p, batch, call, error, message):
    with pytest.raises(error) as raised:
        call(p, batch)
    (note,) = [note for note in raised.value.__notes__ if "mgs_core" in note]
    assert re.search(message, note)


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        h = nn.relu(nn.Dense(8, param_dtype=jnp.float64)(x))
        return nn.Dense(3, param_dtype=jnp.float64)(nn.Dropout(0.4, deterministic=not train)(h))


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.parametrize("weighting", [None, "agreement"])
@pytest.mark.parametrize("jit", [False, True])
def test_dropout_with_a_key_for_each_sample(make_key, weighting, jit):
    draw = np.random.default_rng(0)
    x, y = jnp.asarray(draw.normal(size=(6, 5))), jnp.asarray(draw.integers(0, 3, 6))
    network, penalty = Dropping(), mgs.Penalty("log_determinant", strength=0.5)
    parameters = network.init(jax.random.key(0), x)["params"]
    batch = {"x": x, "y": y, "key": jax.random.split(make_key(1), 6)}

    def losses(parameters, batch):
        outputs = jax.vmap(lambda x, key: network.apply({"params": parameters}, x[None], train=True, rngs={"dropout": key})[0])
        return mgs.cross_entropy(outputs(batch["x"], batch["key"]), batch["y"])

    def by_loop(parameters):
        alone = [jax.tree.map(lambda leaf, a=a: leaf[a : a + 1], batch) for a in range(6)]
        rows = jnp.stack([ravel_pytree(jax.grad(lambda p, b=b: losses(p, b)[0])(parameters))[0] for b in alone])
        kernel = rows @ rows.T
        weights = 1.0 if weighting is None else jax.lax.stop_gradient(mgs.agreement_weights(kernel))
        return jnp.mean(weights * losses(parameters, batch)) + penalty(kernel)

    loss = regularized(lambda p, batch: jnp.mean(losses(p, batch)), penalty, weighting=weighting)
    gradient = jax.grad(lambda p, batch: loss(p, batch)[0])
    found, expected = (jax.jit(gradient) if jit else gradient)(parameters, batch), jax.grad(by_loop)(parameters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, expected)


def test_a_mean_over_a_mask_by_weights_in_the_batch():
    draw = np.random.default_rng(0)
    x, y, mask = jnp.asarray(draw.normal(size=(6, 5))), jnp.asarray(draw.integers(0, 3, 6)), jnp.array([1.0, 0, 1, 1, 0, 1])
    parameters = {"w": jnp.asarray(draw.normal(size=(5, 3)))}

    def losses(p, batch):
        return mgs.cross_entropy(batch["x"] @ p["w"], batch["y"])

    batch = {"x": x, "y": y, "weight": mask * mask.size / mask.sum()}
    loss = regularized(lambda p, batch: jnp.mean(losses(p, batch) * batch["weight"]), mgs.Penalty("trace", strength=0.5))
    value, parts = loss(parameters, batch)
    np.testing.assert_allclose(value - parts.penalty, jnp.sum(losses(parameters, batch) * mask) / jnp.sum(mask))
    rows = jax.vmap(lambda x, y, w: jax.grad(lambda p: w * losses(p, {"x": x[None], "y": y[None]})[0])(parameters)["w"].ravel())(
        x, y, batch["weight"]
    )
    np.testing.assert_allclose(parts.kernel, rows @ rows.T, rtol=1e-9, atol=1e-12)
