"""Models as users of JAX write them; each is built in float64 when a test asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

if find_spec("jax") is None or find_spec("flax") is None:
    pytest.skip("needs jax and flax", allow_module_level=True)

# models are small and compiled once: optimising the machine code takes longer than running it
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

MODELS: dict[str, Callable[[], Any]] = {}


def model(build: Callable[[], Any]) -> Callable[[], Any]:
    MODELS[build.__name__] = cache(build)
    return build


#: Models whose parts others have too, and that take long to compile: a test with `light_case` leaves them to the slow tests.
HEAVY = {"resnet", "transformer", "rematerialised", "lstm", "derived"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", MODELS, indirect=True)
    if "light_case" in metafunc.fixturenames:
        slow = pytest.mark.slow
        cases = [pytest.param(name, marks=slow) if name in HEAVY else name for name in MODELS]
        metafunc.parametrize("light_case", cases, indirect=True)


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def case(request: pytest.FixtureRequest):
    return MODELS[request.param]()


light_case = pytest.fixture(lambda request: MODELS[request.param](), name="light_case")


@pytest.fixture
def build():
    return lambda name: MODELS[name]()


def draw(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng((*shape, seed)).normal(size=shape))


def ids(*shape: int, below: int) -> Any:
    return jnp.asarray(np.random.default_rng(shape).integers(0, below, shape))


def flax(module: Any, x: Any, **apply: Any) -> Any:
    """Return (function, parameters, inputs) of a linen module, with all parameters drawn anew: none is zero or one."""
    variables = jax.jit(module.init)(jax.random.key(0), x)
    leaves, tree = jax.tree.flatten(variables["params"])
    drawn = [0.5 * draw(*leaf.shape, seed=number) + 0.1 for number, leaf in enumerate(leaves)]
    others = {name: value for name, value in variables.items() if name != "params"}
    return lambda p, x: module.apply({"params": p, **others}, x, **apply), jax.tree.unflatten(tree, drawn), x


@model
def mlp():
    def function(p, x):
        return jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]

    return function, {"w1": draw(5, 7), "b1": draw(7), "w2": draw(7, 3), "b2": draw(3)}, draw(6, 5)


@model
def cnn():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.gelu(nn.Conv(16, (3, 3), strides=2, param_dtype=float)(x))
            x = nn.max_pool(nn.relu(nn.Conv(4, (3, 2), padding="VALID", param_dtype=float)(x)), (2, 1))
            return nn.Dense(3, param_dtype=float)(x.reshape(x.shape[0], -1))

    return flax(Network(), draw(5, 7, 6, 2))


@model
def convolutions():
    """Grouped, depthwise, dilated, transposed, circular, with channels first, and one kernel used twice and as a matrix."""

    def function(p, x):
        h = lax.conv_general_dilated(x, p["first"], (2, 1), [(1, 2), (0, 1)], rhs_dilation=(1, 2))
        h = jnp.tanh(lax.conv_general_dilated(h, p["grouped"], (1, 1), "SAME", feature_group_count=2))
        h = jnp.tanh(lax.conv_general_dilated(h, p["depthwise"], (1, 1), "SAME", feature_group_count=4))
        h = lax.conv_general_dilated(h, p["transposed"], (1, 1), [(1, 1), (0, -1)], lhs_dilation=(2, 2))
        h = jnp.pad(jnp.tanh(h), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="wrap")
        h = lax.conv_general_dilated(h, p["twice"], (1, 1), "VALID")
        h = lax.conv_general_dilated(jnp.tanh(h), p["twice"], (2, 2), "SAME")
        h = jnp.mean(jnp.sin(h), (2, 3))
        return h + 0.1 * h @ p["twice"][:, :, 1, 0]

    shapes = {"first": (4, 2, 3, 2), "grouped": (4, 2, 2, 2), "depthwise": (4, 1, 3, 3), "transposed": (16, 4, 2, 2)}
    return function, {k: draw(*s) for k, s in shapes.items()} | {"twice": draw(16, 16, 2, 2)}, draw(4, 2, 6, 5)


@model
def along_lines_and_volumes():
    """Strided convolutions of three axes and of one, in groups, with enough channels for products of each row of the window."""

    def function(p, x):
        h = jnp.tanh(lax.conv_general_dilated(x, p["volume"], (2, 1, 2), [(1, 1), (0, 1), (1, 0)], rhs_dilation=(1, 2, 1)))
        h = jnp.reshape(jnp.moveaxis(h, 1, -1), (len(h), -1, 32))
        numbers = ("NWC", "WIO", "NWC")
        h = lax.conv_general_dilated(h, p["line"], (2,), "SAME", dimension_numbers=numbers, feature_group_count=2)
        return jnp.mean(jnp.sin(h), 1) @ p["out"]

    return function, {"volume": draw(32, 16, 2, 2, 3), "line": draw(3, 16, 6), "out": draw(6, 3)}, draw(3, 16, 3, 3, 4)


@model
def few_positions():  # of which pairs cost less than rows
    def function(p, x):
        h = jnp.tanh(lax.conv_general_dilated(x, p["w"], (1, 2), [(0, 1), (0, 0)], feature_group_count=2))
        return jnp.mean(h * p["gain"], (2, 3)) @ p["out"]

    return function, {"w": draw(32, 16, 3, 3), "gain": draw(32, 1, 1), "out": draw(32, 3)}, draw(5, 32, 3, 4)


@model
def resnet():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.relu(nn.GroupNorm(num_groups=2, param_dtype=float)(nn.Conv(4, (3, 3), use_bias=False, param_dtype=float)(x)))
            h = nn.GroupNorm(num_groups=1, param_dtype=float)(nn.Conv(4, (3, 3), use_bias=False, param_dtype=float)(h))
            return nn.relu(h + nn.Conv(4, (1, 1), param_dtype=float)(x))

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True, param_dtype=float)(Block()(Block()(x)))
            return nn.Dense(2, param_dtype=float)(jnp.mean(x, (1, 2)))

    return flax(Network(), draw(4, 5, 5, 3))


class Layer(nn.Module):
    """A layer of a transformer."""

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm(param_dtype=float)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, param_dtype=float)(h)
        h = nn.Dense(6, param_dtype=float)(nn.LayerNorm(param_dtype=float)(x))
        return x + nn.Dense(4, param_dtype=float)(nn.gelu(h)), None


def _transformer(layer: Any, *, stacked: bool) -> Any:
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Embed(9, 4, param_dtype=float)(x) + self.param("position", nn.initializers.normal(), (x.shape[1], 4), float)
            if stacked:
                h, _ = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()(h, None)
            else:
                h, _ = layer()(h)
            return nn.Dense(2, param_dtype=float)(jnp.mean(nn.LayerNorm(param_dtype=float)(h), 1))

    return flax(Network(), ids(5, 3, below=9))


@model
def transformer():
    return _transformer(Layer, stacked=False)


@model
def rematerialised():
    return _transformer(nn.remat(Layer), stacked=False)


@model
def scanned():
    return _transformer(nn.remat(Layer), stacked=True)


@model
def tied():
    """A language model whose embedding and output weight are one."""

    def function(p, x):
        h = jnp.tanh(jnp.take(p["table"], x, axis=0) @ p["w"] * p["gain"] + p["position"][: x.shape[1]])
        logits = h @ p["table"].T / jnp.exp(p["temperature"])
        return jnp.stack([jnp.mean(jax.nn.logsumexp(logits, -1), -1), logits[:, -1, 0]], -1)

    p = {"table": draw(9, 4), "w": draw(4, 4), "gain": draw(4), "position": draw(5, 4), "temperature": draw(1)}
    return function, p, ids(6, 3, below=9)


@model
def lstm():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, param_dtype=float)(nn.RNN(nn.OptimizedLSTMCell(3, param_dtype=float), reverse=True)(x)[:, 0])

    return flax(Network(), draw(5, 4, 3))


@model
def loops():
    """A weight inside a scan and outside, a learnt start, nested scans over stacked weights, a convolution in a scan."""

    def function(p, x):
        def step(h, value):
            return jnp.tanh(h @ p["w"] + value), h @ p["w"].T

        start = jnp.broadcast_to(p["start"], (x.shape[0], 4))
        h, seen = lax.scan(step, start, jnp.swapaxes(x, 0, 1), reverse=True)

        def outer(h, w):
            return lax.scan(lambda h, w: (jnp.sin(h @ w["a"] + w["b"]) @ p["shared"], None), h, w)[0], None

        h, _ = lax.scan(outer, h @ p["w"], p["stacked"])
        image = h[:, None, :, None] * jnp.ones((1, 1, 1, 16))
        numbers = ("NHWC", "HWIO", "NHWC")

        def convolve(z, _):
            return jnp.tanh(lax.conv_general_dilated(z, p["kernel"], (1, 1), "SAME", dimension_numbers=numbers)), None

        image, _ = lax.scan(convolve, image, None, length=2)
        h = lax.fori_loop(0, 3, lambda i, h: h + jnp.tanh(h * p["rows"][i]), h + image[:, 0, :, 0])
        return h + jnp.mean(seen, 0)

    stacked = {"a": 0.4 * draw(2, 3, 4, 4), "b": draw(2, 3, 4)}
    p = {"w": 0.4 * draw(4, 4), "start": draw(4), "stacked": stacked, "shared": 0.4 * draw(4, 4), "rows": 0.4 * draw(3, 4)}
    return function, {**p, "kernel": 0.1 * draw(1, 3, 16, 16)}, draw(5, 3, 4)


@model
def views():
    """Weights that are transposed, reshaped, sliced, split, on either side, with batch axes, cast and reversed."""

    def function(p, x):
        h = jnp.tanh(x @ p["w"].T) @ p["w"] + (p["w"] @ x.T)[:4].T @ p["packed"][:, 1:5]
        h = h + jnp.sum(jnp.sin(p["w"] @ jnp.stack([x, x**2], -1)), (1, 2))[:, None]  # on the left, at two positions
        a, b = jnp.split(p["packed"].reshape(4, 8), 2, axis=1)
        h = jnp.sin(h @ a) * (h @ b) + h @ a[::-1]
        h = h + jnp.einsum("nij,kji->nk", h.reshape(-1, 2, 2), p["cube"])
        h = h + jnp.einsum("ngi,gio->ngo", h.reshape(-1, 2, 2), p["experts"]).reshape(-1, 4)
        return h @ p["cube"][:, 0, :] + jnp.where(h > 0, p["slope"], 0.0)[:, :2] + jnp.mean(jnp.sin(p["w"]))

    p = {"w": draw(6, 4), "packed": draw(4, 8), "cube": draw(4, 2, 2), "experts": draw(2, 2, 2)}
    return function, {**p, "slope": draw(4)}, draw(5, 4)


@model
def derived():
    """Weights that are functions of parameters: normalised, of low rank, masked, concatenated; and a parameter as an output."""

    def function(p, x):
        w = p["v"] / jnp.linalg.norm(p["v"], axis=0) * p["g"] + p["a"] @ p["c"]
        h = jnp.tanh(x @ w) @ jnp.concatenate([p["left"], 2.0 * p["right"]], 1)
        return h + jnp.triu(p["square"])[0] + jnp.sum(p["square"] ** 2)

    p = {"v": draw(5, 4), "g": draw(4), "a": draw(5, 2), "c": draw(2, 4), "left": draw(4, 1), "right": draw(4, 2)}
    return function, {**p, "square": draw(3, 3)}, draw(6, 5)


@model
def rules_of_their_own():
    """Parameters and data inside custom_vjp, custom_jvp, cond and a nested jit."""

    @jax.custom_vjp
    def straight(w, x):
        return jnp.tanh(x @ w)

    # a rule that is not the derivative: what counts is the rule
    straight.defvjp(lambda w, x: (jnp.tanh(x @ w), (w, x)), lambda r, g: (2.0 * r[1].T @ g, g @ r[0].T))

    @jax.custom_jvp
    def clipped(x, limit):
        return jnp.minimum(x, limit)

    clipped.defjvp(lambda p, t: (jnp.minimum(*p), t[0] * (p[0] < p[1]) + 3.0 * t[1] * (p[0] >= p[1])))

    def function(p, x):
        h = jax.jit(lambda x: straight(p["w"], x) * p["g"])(x)
        h = clipped(h @ p["u"], p["limit"])
        return h + jax.vmap(lambda r: lax.cond(r[0] > 0, lambda r: r * p["up"], lambda r: r - p["down"], r))(h)

    p = {"w": draw(5, 4), "g": draw(4), "u": draw(4, 3), "limit": 0.3 * draw(3), "up": draw(3), "down": draw(3)}
    return function, p, draw(6, 5)


@model
def several_inputs():
    """A siamese network on a dict of inputs, some of them integers; a table is looked up along both axes and beyond its end."""

    def function(p, x):
        left, right = (jnp.tanh(x[side] @ p["w"] + p["b"]) for side in ("left", "right"))
        rows = p["table"].at[x["id"] + 2].get(mode="fill", fill_value=0.0) + p["table"].at[x["id"] + 3].get(mode="clip")
        columns = p["other"][:, x["id"][:, 1]].T
        return jnp.stack([jnp.sum(left * right, -1), jnp.sum(left * rows[:, 0] * rows[:, 1] * columns, -1)], -1)

    x = {"left": draw(6, 4), "right": draw(6, 4, seed=1), "id": ids(6, 2, below=5)}
    return function, {"w": draw(4, 3), "b": draw(3), "table": draw(4, 3), "other": draw(3, 5)}, x


@model
def split_over_devices():
    """A layer whose columns are on several devices, if there are any."""
    mesh, spec = jax.sharding.Mesh(np.array(jax.devices()[:1]), "d"), jax.sharding.PartitionSpec
    columns = {"mesh": mesh, "in_specs": (spec(None, "d"), spec()), "out_specs": spec(None, "d")}

    def function(p, x):
        return jnp.tanh(jax.shard_map(lambda w, x: x @ w, **columns)(p["w"], x)) @ p["v"]

    return function, {"w": draw(5, 4), "v": draw(4, 3)}, draw(6, 5)
