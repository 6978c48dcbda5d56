"""The JAX backend besides its numbers: precision, sharding, caching, refusals, and what the user owns."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import textwrap
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mgs_core.backends.jax import interaction, program

import mgs_core as mgs


def close(actual, expected, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.max(np.abs(expected)))


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05), ("float16", 0.01)])
def test_lower_precision_is_close_and_summed_in_single_precision(build, dtype, tolerance):
    function, parameters, x = build("mlp")
    low = mgs.kernel(mgs.FunctionalModel(function, cast(parameters, dtype)), x.astype(dtype))
    assert low.dtype == jnp.float32
    close(low, mgs.kernel(mgs.FunctionalModel(function, parameters), x), tolerance)


def test_single_precision_is_close_at_the_sizes_of_real_networks():
    """Large arrays take other ways through XLA: jaxlib 0.10.2 is wrong by a third here, and right in smaller networks."""
    draw = np.random.default_rng(0)
    parameters = {"w": jnp.asarray(draw.normal(size=(64, 128))), "v": jnp.asarray(draw.normal(size=(128, 10)))}
    x = jnp.asarray(draw.normal(size=(8, 64, 128)))

    def function(p, x):
        z = x + p["w"]
        z = z - z.mean(-1, keepdims=True)
        return (z * jax.lax.rsqrt((z**2).mean(-1, keepdims=True) + 1e-6)).mean(1) @ p["v"]

    low = mgs.kernel(mgs.FunctionalModel(function, cast(parameters, "float32")), x.astype("float32"), output="full")
    close(low, mgs.kernel(mgs.FunctionalModel(function, parameters), x, output="full"), 1e-5)


@pytest.mark.parametrize(("flags", "warned"), [("", True), ("--xla_cpu_experimental_ynn_fusion_type=-reduce", False)])
def test_a_version_that_computes_wrongly_is_named(flags, warned):
    program = "import jax, importlib.metadata as m; m.version = lambda name: '0.10.2'; import mgs_core.backends.jax"
    environment = os.environ | {"XLA_FLAGS": flags}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ("jaxlib 0.10.2 computes some sums wrongly" in found.stderr) == warned


def test_kinds_are_those_that_the_other_backends_name(build):
    function, parameters, x = build("tied")
    report = mgs.check(mgs.FunctionalModel(function, parameters), x)
    assert {layer.parameter: (layer.kind, layer.route) for layer in report.layers} == {
        "table": ("lookup+outer", "statistics"),
        "w": ("outer", "statistics"),
        "gain": ("scale", "statistics"),
        "position": ("sum", "statistics"),
        "temperature": ("scale", "statistics"),
    }
    function, parameters, x = build("derived")
    routes = {layer.parameter: layer.route for layer in mgs.check(mgs.FunctionalModel(function, parameters), x).layers}
    assert {name for name, route in routes.items() if route == "rows"} == {"v", "g", "a", "c", "left", "right"}


def test_each_use_of_a_weight_has_statistics_of_its_own(build):
    for name, parameter, uses in (("few_positions", "w", 1), ("convolutions", "twice", 3)):
        function, parameters, x = build(name)
        model = mgs.FunctionalModel(function, parameters)
        found = mgs.get_backend("jax").statistics(model, x, None, lambda outputs, _: outputs, parameter, differentiable=False)
        assert len(found) == uses  # two convolutions and a matrix


def test_a_convolution_without_space_is_a_dense_layer():
    weight, x = (
        jnp.asarray(np.random.default_rng(0).normal(size=(4, 20))),
        jnp.asarray(np.random.default_rng(1).normal(size=(3, 20))),
    )
    model = mgs.FunctionalModel(lambda p, x: jax.lax.conv_general_dilated(x, p["w"], (), []), {"w": weight})
    close(mgs.kernel(model, x), 4.0 * x @ x.T)


@pytest.mark.filterwarnings("ignore:Casting complex values to real")  # JAX 0.8's, where it differentiates a product
def test_real_parameters_within_complex_numbers():
    draw = np.random.default_rng(0).normal
    p, x = {name: jnp.asarray(draw(size=(4, 4))) for name in "wv"}, jnp.asarray(draw(size=(3, 4)))

    def function(p, x):
        h = jnp.imag(1j * (x @ p["w"])) + jnp.imag(jax.lax.complex(x, jnp.sin(x)) @ p["w"])  # gradients of nothing but i
        return jnp.abs(jnp.fft.fft(h * jnp.exp(1j * x @ p["v"])) @ (p["v"] + 1j * p["w"]))

    def rows(p):
        jacobian = jax.vmap(lambda x: jax.jacrev(lambda p: function(p, x[None])[0])(p))(x)
        return jnp.concatenate([jnp.reshape(jacobian[name], (3, 4, -1)) for name in "wv"], -1)

    def penalty(p):
        return jnp.sum(jnp.sin(mgs.kernel(mgs.FunctionalModel(function, p), x, differentiable=True)))

    close(mgs.kernel(mgs.FunctionalModel(function, p), x), jnp.einsum("akp,bkp->ab", rows(p), rows(p)))
    expected = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(jnp.einsum("akp,bkp->ab", rows(p), rows(p))))))(p)
    actual = jax.jit(jax.grad(penalty))(p)
    for name in p:
        np.testing.assert_allclose(actual[name], expected[name], atol=1e-9 * float(jnp.max(jnp.abs(expected[name]))))


def test_outputs_come_from_the_same_pass(build):
    function, parameters, x = build("mlp")
    model, backend = mgs.FunctionalModel(function, parameters), mgs.get_backend("jax")
    heads, outputs, found = backend.one_pass(
        model, x, None, lambda outputs, _: outputs[:, :1], None, differentiable=False, outputs=True
    )
    close(outputs, function(parameters, x))
    close(heads, outputs[:, :1])
    assert backend.one_pass(model, x, None, lambda o, _: o, None, differentiable=False)[1] is None
    assert {use.parameter for use in found} == set(parameters)


def test_the_same_computation_is_planned_and_compiled_once_and_checked_again_now_and_then(build, monkeypatch):
    function, parameters, x = build("rules_of_their_own")
    counts = collections.Counter()

    def counting(module, name):
        original = getattr(module, name)

        def counted(*given, **options):
            counts[name] += 1
            return original(*given, **options)

        monkeypatch.setattr(module, name, counted)

    counting(program, "_make")
    counting(interaction, "_compiled")
    counting(interaction, "_interact")
    for module, name in ((interaction, "_verdicts"), (interaction, "_comparisons"), (program, "_programs")):
        monkeypatch.setattr(module, name, type(getattr(module, name))())
    checked = []
    for _ in range(9):  # each time another function object
        before = counts["_interact"]
        mgs.kernel(mgs.FunctionalModel(lambda p, x: jax.nn.softmax(function(p, x)), parameters), x, output="sum")
        checked.append(counts["_interact"] > before)
    assert checked == [True, True, False, True, False, False, False, True, False]
    assert (counts["_make"], len(program._programs)) == (1, 1)
    assert counts["_compiled"] == 1
    for factor in (2.0, 3.0):
        other = mgs.FunctionalModel(lambda p, x, factor=factor: jax.nn.softmax(function(p, factor * x)), parameters)
        mgs.kernel(other, x, output="sum")
    assert (counts["_make"], counts["_compiled"], len(interaction._verdicts)) == (3, 3, 3)
    softmax = mgs.FunctionalModel(lambda p, x: jax.nn.softmax(function(p, x)), parameters)
    mgs.kernel(softmax, x, output="sum", parameters=["w"])
    # the same samples, whichever parameters are looked at
    assert (counts["_make"], counts["_compiled"], len(interaction._verdicts)) == (4, 3, 3)


def test_constants_of_a_cached_program_are_not_baked_in():
    def kernel(scale):
        constant = jnp.full(3, scale)
        return mgs.kernel(mgs.FunctionalModel(lambda p, x: (x * constant) @ p, jnp.ones((3, 1))), jnp.eye(3))

    close(kernel(1.0), np.eye(3))
    close(kernel(2.0), 4.0 * np.eye(3))


def test_kernel_maps_over_parameters(build):
    function, parameters, x = build("mlp")
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2.0 * leaf]), parameters)
    kernels = jax.vmap(lambda p: mgs.kernel(mgs.FunctionalModel(function, p), x))(several)
    close(kernels[1], mgs.kernel(mgs.FunctionalModel(function, jax.tree.map(lambda leaf: 2.0 * leaf, parameters)), x))


def test_forward_mode_agrees_with_reverse_mode(build):
    function, parameters, x = build("cnn")

    def trace(p):
        return jnp.trace(mgs.kernel(mgs.FunctionalModel(function, p), x, output="sum", differentiable=True))

    _, change = jax.jit(lambda p: jax.jvp(trace, (p,), (p,)))(parameters)
    gradient = jax.jit(jax.grad(trace))(parameters)
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(parameters), strict=True)
    close(change, sum(jnp.vdot(g, p) for g, p in pairs), 1e-10)


def test_without_differentiable_no_gradient_flows(build):
    function, parameters, x = build("mlp")
    gradient = jax.grad(lambda p: jnp.trace(mgs.kernel(mgs.FunctionalModel(function, p), x)))(parameters)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_outputs_may_be_any_tree_that_the_transform_picks_from():
    model = mgs.FunctionalModel(lambda p, x: {"logits": x @ p, "other": x}, jnp.ones((3, 2)))
    close(mgs.kernel(model, jnp.eye(3), transform=lambda outputs: outputs["logits"]), 2.0 * np.eye(3))
    pair = mgs.FunctionalModel(lambda p, x: (x, x @ p), jnp.ones((3, 2)))
    close(mgs.kernel(pair, jnp.eye(3), transform=lambda outputs: outputs[1]), 2.0 * np.eye(3))
    with pytest.raises(mgs.ArgumentError, match="`transform` must pick outputs of shape"):
        mgs.kernel(model, jnp.eye(3))
    with pytest.raises(mgs.ArgumentError, match="`transform` must pick outputs of shape"):
        mgs.kernel(model, jnp.eye(3), output="sum")


def test_rows_beyond_the_end_of_a_table_have_no_gradient():
    table, at = jnp.ones((50, 2)), jnp.asarray([3, 60, 60, 3])
    model = mgs.FunctionalModel(lambda p, x: p.at[x].get(mode="fill", fill_value=0.0), table)
    close(mgs.kernel(model, at), 2.0 * np.outer(at < 50, at < 50))


@pytest.mark.parametrize("mode", ["clip", "fill", "promise_in_bounds"])
def test_rows_of_a_table_looked_up_one_by_one_have_statistics(mode):
    table = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 3)))
    numbers = jax.lax.GatherDimensionNumbers(offset_dims=(1, 2, 3), collapsed_slice_dims=(), start_index_map=(2, 0))
    starts = jnp.asarray([[[0, 3], [0, 0]], [[0, 3], [0, 4]], [[0, 0], [0, 0]]])
    starts = starts if mode == "promise_in_bounds" else starts.at[0, 0].set(jnp.asarray([1, 3])).at[1, 1].set(jnp.asarray([0, 7]))

    def function(p, x):
        rows = jax.vmap(lambda at: jax.lax.gather(p, at, numbers, slice_sizes=(1, 2, 3), mode=mode, fill_value=0.0))(x)
        return jnp.sum(jnp.sin(rows), (1, 2, 3))

    model = mgs.FunctionalModel(function, table)
    rows = jax.vmap(lambda x: jax.jacrev(lambda p: function(p, x[None])[0])(table))(starts)
    close(mgs.kernel(model, starts), jnp.einsum("akpqr,bkpqr->ab", rows, rows))
    assert [(layer.kind, layer.route) for layer in mgs.check(model, starts).layers] == [("lookup", "statistics")]


def test_a_parameter_without_elements_has_no_gradient(recwarn):
    found = mgs.kernel(mgs.FunctionalModel(lambda p, x: x @ p["w"] + jnp.sum(p["none"]), {"w": EYE, "none": jnp.zeros(0)}), EYE)
    np.testing.assert_array_equal(found, 3.0 * EYE)
    assert not recwarn.list


def test_outputs_may_be_parameters_themselves():
    model = mgs.FunctionalModel(lambda p, x: jnp.broadcast_to(p, (len(x), 2)), jnp.ones(2))
    close(mgs.kernel(model, jnp.eye(3)), np.full((3, 3), 2.0))


def test_any_pytree_may_hold_the_parameters():
    jax.tree_util.register_pytree_with_keys(
        Pair,
        lambda p: (((jax.tree_util.GetAttrKey("w"), p.w), (jax.tree_util.GetAttrKey("b"), p.b)), None),
        lambda _, c: Pair(*c),
    )
    model = mgs.FunctionalModel(lambda p, x: x @ p.w + p.b, Pair(jnp.ones((3, 1)), jnp.zeros(1)))
    close(mgs.kernel(model, jnp.eye(3)), np.eye(3) + 1.0)
    assert list(mgs.get_backend("jax").parameters(model)) == ["w", "b"]
    close(mgs.kernel(model, jnp.eye(3), parameters="b"), np.ones((3, 3)))


class Pair:
    def __init__(self, w, b):
        self.w, self.b = w, b


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(2, 3, (2, 2), rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(jnp.mean(jnp.tanh(self.norm(self.first(x))), (1, 2))))


def test_nnx_module():
    network, x = Network(nnx.Rngs(0)), jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 4, 2)), jnp.float32)
    network.eval()
    before = arrays(network)
    graph, parameters, rest = nnx.split(network, nnx.Param, ...)
    jacobian = jax.jit(jax.jacrev(lambda p: nnx.merge(graph, p, rest)(x)))(parameters)
    rows = np.concatenate([np.reshape(leaf, (5, 2, -1)) for leaf in jax.tree.leaves(jacobian)], -1)
    close(mgs.kernel(network, x), np.einsum("acp,bcp->ab", rows, rows), 1e-5)  # flax normalises in single precision
    assert {layer.parameter for layer in mgs.check(network, x).layers} >= {"first.kernel", "norm.scale", "last.bias"}
    network.train()
    with pytest.raises(mgs.SamplesInteractError, match="treat each sample by itself"):
        mgs.kernel(network, x)
    assert not mgs.check(network, x).ok
    np.testing.assert_equal(arrays(network), before)


def arrays(network):
    """The state as arrays, random state included."""
    leaves = jax.tree.leaves(nnx.split(network)[1])
    return [np.array(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf) for leaf in leaves]


def batch_normalised(p, x):
    h = x @ p["w1"]
    return jnp.tanh((h - jnp.mean(h, 0)) / jnp.sqrt(jnp.var(h, 0) + 1e-5)) @ p["w2"]


def test_interacting_samples_are_refused_with_values_and_without():
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(6, 5)))
    for last in (0.0, 1.0):  # a last layer of zeros hides what is in front of it
        p = {"w1": jnp.asarray(draw.normal(size=(5, 7))), "w2": last * jnp.asarray(draw.normal(size=(7, 3)))}
        with pytest.raises(mgs.SamplesInteractError, match="treat each sample by itself"):
            mgs.kernel(mgs.FunctionalModel(batch_normalised, p), x)
    for transform in (jax.jit, jax.grad, lambda f: jax.jit(jax.grad(f))):
        with pytest.raises(mgs.SamplesInteractError, match="treat each sample by itself"):
            transform(lambda p: jnp.trace(mgs.kernel(mgs.FunctionalModel(batch_normalised, p), x, differentiable=True)))(p)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("jit", [False, True])
def test_an_offset_does_not_hide_samples_that_interact(dtype, jit):
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(6, 5)), dtype)
    p = {name: jnp.asarray(draw.normal(size=shape), dtype) for name, shape in {"w1": (5, 7), "w2": (7, 3)}.items()}

    def offset(p, x):
        return batch_normalised(p, x) + 3e3

    def beside(p, x):
        return jnp.concatenate([3e3 * (x @ p["w1"]), batch_normalised(p, x)], axis=1)

    def alone(p, x):
        return jnp.tanh(x @ p["w1"]) @ p["w2"] + 3e3

    for function, output in ((offset, "trace"), (offset, "sum"), (beside, "trace"), (beside, "full"), (alone, "trace")):

        def kernel(p, function=function, output=output):
            return mgs.kernel(mgs.FunctionalModel(function, p), x, output=output)

        with pytest.raises(mgs.SamplesInteractError) if function is not alone else nullcontext():
            (jax.jit(kernel) if jit else kernel)(p)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_alone_and_together_says_nothing(value):
    scalars, eps = np.random.default_rng(0).normal(size=(4, 3)), 1e-7
    broken, moved, empty = scalars.copy(), scalars + 0.01 * np.ones((1, 3)), np.full((4, 3), value)
    broken[1, 0] = value
    assert interaction._agree(broken, broken.copy(), eps)
    assert interaction._agree(broken, broken * (1 + 5e-5), eps)  # by less than it varies, by more than it is rounded
    assert interaction._agree(empty, empty.copy(), eps)
    assert not interaction._agree(broken, scalars, eps)
    assert not interaction._agree(scalars, moved, eps)
    assert interaction._agree(scalars, scalars.mean(0, keepdims=True), eps)
    assert not interaction._agree(scalars, moved.mean(0, keepdims=True), eps)


def test_what_the_user_owns_is_untouched(build):
    function, parameters, x = build("mlp")
    before = jax.tree.map(np.array, (parameters, x))
    state = np.random.get_state()[1].copy()
    mgs.kernel(mgs.FunctionalModel(function, parameters), x, output="random")
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, (parameters, x)))
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_sharded_inputs_give_the_kernel_of_one_device():
    code = """
    import jax, jax.numpy as jnp, numpy as np, mgs_core as mgs
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    draw = np.random.default_rng(0)
    def f(p, x):
        h = jax.lax.conv_general_dilated(x, p["k"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.mean(jnp.tanh(h), (1, 2)) @ p["w"]
    p = {"k": jnp.asarray(draw.normal(size=(3, 3, 2, 4))), "w": jnp.asarray(draw.normal(size=(4, 3)))}
    x = jnp.asarray(draw.normal(size=(8, 6, 6, 2)))
    def value(p, x):
        K = mgs.kernel(mgs.FunctionalModel(f, p), x, differentiable=True)
        return mgs.Penalty("log_determinant")(K), K
    step = jax.jit(jax.value_and_grad(value, has_aux=True))
    mesh = Mesh(np.array(jax.devices()), "d")
    spread = jax.device_put(x, NamedSharding(mesh, P("d")))
    assert len(spread.sharding.device_set) == 4
    everywhere = jax.device_put(p, NamedSharding(mesh, P()))
    for a, b in zip(jax.tree.leaves(step(p, x)), jax.tree.leaves(step(everywhere, spread)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mgs.kernel(mgs.FunctionalModel(f, everywhere), spread), step(p, x)[0][1], rtol=1e-4)
    from mgs_core.adapters.flax import regularized
    loss = regularized(lambda p, x: jnp.mean(f(p, x) ** 2), mgs.Penalty("trace", 1.0), weighting="agreement")
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for a, b in zip(jax.tree.leaves(step(p, x)), jax.tree.leaves(step(everywhere, spread)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    explicit = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    for array in (jax.device_put(x, NamedSharding(explicit, P("d"))), x):
        try:
            mgs.kernel(mgs.FunctionalModel(f, p), array)
        except mgs.UnsupportedModelError as error:
            assert "explicit axes of a mesh; got d" in str(error) and array is not x
        else:
            assert array is x
    with jax.set_mesh(explicit):
        automatic = jax.jit(jax.sharding.auto_axes(lambda p, x: value(p, x)[1], out_sharding=P()))
        found = automatic(jax.device_put(p, NamedSharding(explicit, P())), jax.device_put(x, NamedSharding(explicit, P("d"))))
    np.testing.assert_allclose(found, value(p, x)[1], rtol=1e-4, atol=1e-5)
    mean = lambda p, x: jax.lax.pmean(value(p, x)[0], "d")
    mapped = jax.shard_map(mean, mesh=mesh, in_specs=(P(), P("d")), out_specs=P(), check_vma=False)
    parts = lambda p: sum(value(p, x[at : at + 2])[0] for at in (0, 2, 4, 6)) / 4
    found, expected = jax.jit(jax.grad(mapped))(p, x), jax.jit(jax.grad(parts))(p)
    for name in p:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
    """
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=flags)
    assert done.returncode == 0, done.stderr


def test_value_and_gradient_and_compile_nest():
    backend = mgs.get_backend("jax")
    both = backend.value_and_gradient(lambda p, x: jnp.sum(backend.value_and_gradient(lambda q: q["w"] ** 3 * x)(p)[1]["w"]))
    value, gradient = backend.compile(both)({"w": jnp.asarray(2.0)}, 5.0)
    assert (float(value), float(gradient["w"])) == (60.0, 60.0)


def while_loop(p, x):
    return jax.lax.while_loop(lambda h: jnp.max(h) < 10.0, lambda h: 2.0 * h, jnp.abs(x @ p))


GOOD = mgs.FunctionalModel(lambda p, x: x @ p, jnp.ones((3, 2), jnp.float32))
EYE = jnp.eye(3, dtype=jnp.float32)


def kernel_of(function):
    return mgs.kernel(mgs.FunctionalModel(function, jnp.ones((3, 2))), EYE)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mgs.kernel(GOOD, EYE.at[0].set(jnp.nan)), mgs.ArgumentError, "`inputs` must be finite"),
        (lambda: mgs.kernel(mgs.FunctionalModel(lambda p, x: x, jnp.arange(3)), EYE), mgs.ArgumentError, "floating-point arrays"),
        (lambda: mgs.kernel(mgs.FunctionalModel(lambda p, x: x[:, 0], EYE), EYE), mgs.ArgumentError, r"shape \(n, c\) with n = "),
        (lambda: kernel_of(lambda p, x: (x @ p).astype(int)), mgs.ArgumentError, "real floating-point numbers; got dtype int"),
        (lambda: kernel_of(lambda p, x: 1j * (x @ p)), mgs.ArgumentError, "real floating-point numbers; got dtype complex"),
        (lambda: kernel_of(lambda p, x: p @ x), TypeError, r"mgs_core called `model` on arrays of shapes \[\(1, 3\)\]"),
        (lambda: kernel_of(lambda p, x: np.tanh(x) @ p), jax.errors.TracerArrayConversionError, "mgs_core called `model`"),
        (lambda: mgs.kernel(GOOD, EYE, EYE, output=lambda o, t: o - t), TypeError, "mgs_core called `output` on"),
        (lambda: mgs.kernel(EYE, EYE), mgs.ArgumentError, "must be a FunctionalModel or a flax.nnx.Module"),
        (lambda: mgs.kernel(mgs.FunctionalModel(while_loop, EYE), EYE), mgs.UnsupportedModelError, "got a while loop"),
        (
            lambda: jax.jit(mgs.get_backend("jax").to_numpy)(EYE),
            mgs.ArgumentError,
            "`array` must have values in this process; got one that is traced",
        ),
        (lambda: jax.jit(lambda p: mgs.summarize(GOOD(p)))(EYE), mgs.ArgumentError, "`kernel` must be square|must have values"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
