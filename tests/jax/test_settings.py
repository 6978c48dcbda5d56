"""JAX's settings: strict promotion, debugging, guards, meshes and checks are those of the user's own functions alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.experimental import checkify
from mgs_core.adapters.flax import MGSMonitor, linen_model, regularized

import mgs_core as mgs

X = np.random.default_rng(0).normal(size=(6, 3))
Y = np.array([0, 1, 1, 0, 1, 0])
PENALTY = mgs.Penalty("trace", 0.1)


def parameters(dtype=float):
    draw = np.random.default_rng(1)
    return {name: jnp.asarray(draw.normal(size=shape), dtype) for name, shape in {"w": (3, 4), "e": (5, 4), "v": (4, 2)}.items()}


def network(p, batch):
    return (jnp.tanh(batch["x"] @ p["w"]) + jnp.take(p["e"], batch["y"], axis=0, mode="clip")) @ p["v"]


def loss(p, batch):
    return jnp.mean(mgs.cross_entropy(network(p, batch), batch["y"]))


STRICT = {"dtype": lambda: jax.numpy_dtype_promotion("strict"), "rank": lambda: jax.numpy_rank_promotion("raise")}


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("setting", STRICT)
def test_strict_promotion(setting, dtype):
    p, batch = parameters(dtype), {"x": jnp.asarray(X, dtype), "y": jnp.asarray(Y)}
    with STRICT[setting]():
        mgs.kernel(mgs.FunctionalModel(network, p), batch, batch["y"], output="loss")
        mgs.check(mgs.FunctionalModel(network, p), batch)
        for step in (regularized(loss, PENALTY, every=2), regularized(loss, weighting="agreement")):
            jax.grad(lambda p, step=step: step(p, batch, *[0][: step.every - 1])[0])(p)


@pytest.mark.parametrize(
    "setting",
    [lambda: jax.debug_nans(True), lambda: jax.debug_infs(True), jax.disable_jit, lambda: jax.transfer_guard("disallow")],
    ids=["nans", "infs", "disable_jit", "transfer_guard"],
)
def test_the_comparison_of_samples_goes_its_own_way(setting):
    def rooted(p, batch):  # made-up values give NaN, those at hand do not
        return jnp.mean(jnp.sum(jnp.log(batch["x"] @ p["w"]) @ p["v"], -1))

    p, batch = jax.tree.map(jnp.abs, (parameters(), {"x": jnp.asarray(X)}))
    with setting():
        jax.jit(jax.value_and_grad(regularized(rooted, PENALTY), has_aux=True))(p, batch)


def test_a_program_serves_one_mesh():
    step = jax.value_and_grad(regularized(loss, PENALTY), has_aux=True)
    spec, mesh = jax.sharding.PartitionSpec, jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    given = parameters(), {"x": jnp.asarray(X), "y": jnp.asarray(Y)}
    mapped = jax.shard_map(lambda p, b: step(p, b)[1], mesh=mesh, in_specs=(spec(), spec("d")), out_specs=spec(), check_vma=False)
    first = jax.jit(mapped)(*given)
    with jax.set_mesh(mesh):
        second = jax.jit(step)(*given)[1]
    jax.tree.map(np.testing.assert_allclose, first, second)
    jax.tree.map(np.testing.assert_allclose, first, step(*given)[1])


def test_checks_are_made_on_the_values_at_hand():
    def checked(p, batch):
        checkify.check(jnp.all(jnp.abs(batch["x"]) < 100), "large")
        return loss(p, batch)

    step = checkify.checkify(jax.jit(jax.grad(lambda p, b: regularized(checked, PENALTY)(p, b)[0])))
    batch = {"x": jnp.asarray(X), "y": jnp.asarray(Y)}
    error, gradient = step(parameters(), batch)
    error.throw()
    expected = jax.grad(lambda p: regularized(loss, PENALTY)(p, batch)[0])(parameters())
    jax.tree.map(np.testing.assert_allclose, gradient, expected)
    assert "large" in step(parameters(), {**batch, "x": 1e3 * batch["x"]})[0].get()


def test_parameters_of_a_checkpoint_are_numpys():
    module, x = linen.Dense(2), jnp.asarray(X)
    variables = module.init(jax.random.key(0), x)
    restored = jax.tree.map(np.asarray, variables)
    expected = mgs.kernel(linen_model(module, variables), x)
    np.testing.assert_allclose(mgs.kernel(linen_model(module, restored), x), expected)
    monitors = (MGSMonitor(module, x), MGSMonitor(module.apply, x))
    for monitor in monitors:
        np.testing.assert_allclose(monitor.step(restored).trace, jnp.trace(expected), rtol=1e-6)


class Dropping(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.dense, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.drop, self.calls = nnx.Dropout(0.3, rngs=rngs), nnx.Variable(jnp.zeros(()))

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        return self.dense(x)


@pytest.mark.parametrize("jit", [lambda f: f, nnx.jit])
def test_losses_that_change_the_state_of_a_module(jit):
    def training(m, batch):
        return jnp.mean(jnp.sum(m.drop(m.norm(m(batch["x"]))) ** 2, -1))

    def inference(m, batch):
        return m.dense(batch["x"])

    batch = {"x": jnp.asarray(X, jnp.float32)}
    for number in (0, 1):
        module = Dropping()
        step = regularized(training, PENALTY, output="trace", outputs=inference, every=2)
        (value, parts), _ = jit(nnx.value_and_grad(step, has_aux=True))(module, batch, jnp.asarray(number))
        once = regularized(training, PENALTY, output="trace", outputs=inference)(Dropping(), batch)[1]
        np.testing.assert_allclose(parts.penalty, 2 * once.penalty if number == 0 else 0, rtol=1e-5)
        np.testing.assert_allclose(value, parts.loss + parts.penalty, rtol=1e-5)
        assert float(module.calls[...]) == 1.0
        assert bool(jnp.any(module.norm.mean[...] != 0))


ONE_PASS = {"every": {"every": 2}, "each": {}, "weights": {"weighting": "agreement"}}


@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("options", ONE_PASS)
@pytest.mark.parametrize("jit", [lambda f: f, nnx.jit])
def test_losses_of_one_pass_may_change_the_state_of_a_module(jit, options, aux):
    def counting(m, batch):
        value = jnp.mean(jnp.sum(m(batch["x"]) ** 2, -1))
        return (value, jnp.zeros(())) if aux else value

    options = ONE_PASS[options]
    penalty = None if "weighting" in options else PENALTY
    step = jit(nnx.value_and_grad(regularized(counting, penalty, **options), has_aux=True))
    module, batch = Dropping(), {"x": jnp.asarray(X, jnp.float32)}
    for number in (0, 1):
        step(module, batch, *[jnp.asarray(number)] * ("every" in options))
        assert float(module.calls[...]) == number + 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "uint8", "uint32", "int32"])
def test_labels_of_any_dtype(dtype):
    """Without a warning, which would be an error here."""
    p, x = parameters(), jnp.asarray(X)
    model = mgs.FunctionalModel(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], p)
    found = mgs.kernel(model, x, jnp.asarray(Y, dtype), output="loss")
    np.testing.assert_array_equal(found, mgs.kernel(model, x, jnp.asarray(Y), output="loss"))


def test_inputs_of_a_layer_may_be_integers():
    quantised, p = jnp.asarray(np.round(4 * X), jnp.int8), {"w": jnp.asarray(np.ones((3, 2)), jnp.float32)}

    def product(p, x):
        return jax.lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    expected = 2 * np.round(4 * X) @ np.round(4 * X).T
    np.testing.assert_allclose(mgs.kernel(mgs.FunctionalModel(product, p), quantised), expected)
