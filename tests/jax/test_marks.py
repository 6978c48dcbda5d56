"""Losses and models that ignore marked entries: a mean over what is left of the batch is refused, a sample's own is not."""

from __future__ import annotations

import gc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from mgs_core.adapters.flax import MGSMonitor, linen_model, regularized
from mgs_core.backends.jax import interaction

import mgs_core as mgs

_N, _C = 8, 5
RANDOM = np.random.default_rng(0)
X, W = RANDOM.normal(size=(_N, 4, 3)), RANDOM.normal(size=(3, _C))  # four tokens of each sample
PADDED = np.arange(4) >= np.array([4, 1, 4, 2, 3, 4, 1, 4])[:, None]
LABELS = RANDOM.integers(0, _C, (_N, 4))
TARGETS = RANDOM.normal(size=(_N, 4))


def losses(p, x, y):
    chosen = jnp.take_along_axis(jax.nn.log_softmax(x @ p["w"]), jnp.clip(y, 0, _C - 1)[..., None], -1)
    return -chosen[..., 0]


def squares(p, x, y):
    return jnp.square((x @ p["w"])[..., 0] - y)


def over_batch(values, kept):
    return jnp.sum(jnp.where(kept, values, 0)) / jnp.sum(kept)


def over_sample(values, kept):
    return jnp.mean(jnp.sum(jnp.where(kept, values, 0), 1) / jnp.maximum(jnp.sum(kept, 1), 1))


TABLE = jnp.array([1.0, 1.0, 1.0, 4.0, 1.0])
#: A value for what is ignored, the loss of each entry, and which entries count.
MARKED = {
    "not -100": (-100, losses, lambda y: y != -100),
    "at least 0": (-1, losses, lambda y: y >= 0),
    "not a token": (7, losses, lambda y: y != 7),
    "none of some": (6, losses, lambda y: ~jnp.isin(y, jnp.array([6, 9]))),
    "shifted": (-1, losses, lambda y: y[:, ::-1][:, ::-1].astype(jnp.float32) != -1),
    "in a branch": (-1, losses, lambda y: lax.cond(True, lambda y: y != -1, lambda y: y == y, y)),
    "one of the classes": (3, losses, lambda y: y != 3),
    "weights of classes": (3, losses, lambda y: TABLE[jnp.clip(y, 0, _C - 1)]),
    "weights by comparison": (3, losses, lambda y: (y[..., None] == jnp.arange(_C)) @ TABLE),
    "NaN": (np.nan, squares, lambda y: ~jnp.isnan(y)),
    "finite": (np.nan, squares, jnp.isfinite),
    "far below": (-1000.0, squares, lambda y: y > -999),
    "exactly 0": (0.0, squares, lambda y: y != 0),
    "equal to itself": (np.nan, squares, lambda y: y == y),
    "infinite": (np.inf, squares, lambda y: y != jnp.inf),
    "very far below": (-3e30, squares, lambda y: y >= -1e30),
    "rolled": (-100, losses, lambda y: jnp.roll(jnp.roll(y, -1, 1), 1, 1).at[:, 0].set(y[:, 0]) != -100),
    "behind many thresholds": (255, losses, lambda y: (sum((y > c) * 0 for c in range(12)) == 0) & (y != 255)),
}


def loss_of(name, reduce):
    _, entries, kept = MARKED[name]

    def loss(p, batch):
        counted = kept(batch["y"])
        known = jnp.where(counted > 0, batch["y"], 0) if entries is squares else batch["y"]
        values = entries(p, batch["x"], known)
        if counted.dtype != bool:
            axes = None if reduce is over_batch else 1
            return jnp.mean(jnp.sum(counted * values, axes) / jnp.sum(counted, axes))
        return reduce(values, counted)

    return loss


def batch_of(name, padded=PADDED):
    mark, entries, _ = MARKED[name]
    return {"x": X, "y": np.where(padded, mark, LABELS if entries is losses else TARGETS)}


@pytest.fixture(autouse=True)
def doubled():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("options", [{"penalty": mgs.Penalty("trace", 0.1)}, {"weighting": "agreement"}])
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", MARKED)
def test_a_mean_over_what_is_left_of_the_batch_is_refused(name, jit, options):
    step = regularized(loss_of(name, over_batch), **options)
    with pytest.raises(mgs.SamplesInteractError, match="a mean over a mask"):
        (jax.jit(step) if jit else step)({"w": jnp.asarray(W)}, batch_of(name))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", MARKED)
def test_a_mean_over_what_is_left_of_each_sample_is_not(name, jit):
    loss, p, batch = loss_of(name, over_sample), {"w": jnp.asarray(W)}, jax.tree.map(jnp.asarray, batch_of(name))
    step = regularized(loss, mgs.Penalty("trace", 0.1))
    value, parts = (jax.jit(step) if jit else step)(p, batch)
    ones = [jax.tree.map(lambda leaf, a=a: leaf[a : a + 1], batch) for a in range(_N)]
    rows = np.stack([np.ravel(jax.grad(loss)(p, one)["w"]) for one in ones])
    np.testing.assert_allclose(parts.kernel, rows @ rows.T, atol=1e-12)
    np.testing.assert_allclose(value, loss(p, batch) + 0.1 * np.mean(np.sum(rows**2, 1)), rtol=1e-12)


def flat_gather(p, x, y):
    """As BERT gathers positions from a batch laid out in one table."""
    at = y + 4 * jnp.arange(len(y))[:, None]
    return jnp.sum((x @ p["w"]).reshape(-1, _C)[at], 1)


def flat_edges(p, x, y):
    edges = (y + 4 * jnp.arange(len(y))[:, None]).reshape(-1)
    return jnp.sum(jax.ops.segment_sum((x @ p["w"]).reshape(-1, _C), edges, 4 * len(y)).reshape(-1, 4, _C), 1)


def thresholds(p, x, y):
    count = jnp.zeros(y.shape, int)
    for number in range(40):
        count = jnp.where(y > number, count + 1, count)
    return jnp.sum(jnp.tanh(x @ p["w"]) * count[..., None], 1)


def bits(p, x, y):
    """A loop that would not end for −1, which no index of this program is."""
    ones = jax.vmap(jax.vmap(lambda n: lax.while_loop(lambda s: s[0] != 0, lambda s: (s[0] >> 1, s[1] + (s[0] & 1)), (n, 0))[1]))(
        y
    )
    return jnp.sum(jnp.tanh(x @ p["w"]) * ones[..., None] + p["w"].T[y][..., :1], 1)


def half(p, x, y):
    kept = y.astype(jnp.float16).astype(jnp.float32) > -1e9
    return jnp.sum(jnp.where(kept[..., None], x @ p["w"], 0.0), 1)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("function", [flat_gather, flat_edges, thresholds, bits, half], ids=lambda function: function.__name__)
def test_programs_that_compare_and_index_otherwise_are_not_refused(function, jit):
    p, y = {"w": jnp.asarray(W)}, jnp.asarray(RANDOM.integers(0, 4, (_N, 4)))

    def kernel(p, x, y):
        return mgs.kernel(mgs.FunctionalModel(lambda p, b: function(p, b["x"], b["y"]), p), {"x": x, "y": y}, output="sum")

    found = (jax.jit(kernel) if jit else kernel)(p, jnp.asarray(X), y)
    rows = [jax.grad(lambda p, a=a: jnp.sum(function(p, X[a : a + 1], y[a : a + 1])))(p)["w"].ravel() for a in range(_N)]
    np.testing.assert_allclose(found, np.stack(rows) @ np.stack(rows).T, atol=1e-11)


def test_neighbours_that_are_alike_do_not_hide_the_others():
    padded = np.zeros((32, 4), bool)
    padded[4:8, 2:] = True  # each four in a row have as many labels, and those that are compared at first have all
    batch = {"x": RANDOM.normal(size=(32, 4, 3)), "y": np.where(padded, -1, RANDOM.integers(0, _C, (32, 4)))}
    with pytest.raises(mgs.SamplesInteractError, match="a mean over a mask"):
        regularized(loss_of("at least 0", over_batch), mgs.Penalty("trace", 0.1))({"w": jnp.asarray(W)}, batch)


def test_eagerly_no_sample_is_overlooked():
    """The four that are compared at first are complete; others are not."""
    padded = PADDED & ~np.isin(np.arange(_N), np.linspace(0, _N - 1, 4).astype(int))[:, None]
    assert padded.any()
    step = regularized(loss_of("at least 0", over_batch), mgs.Penalty("trace", 0.1))
    with pytest.raises(mgs.SamplesInteractError, match="a mean over a mask"):
        step({"w": jnp.asarray(W)}, batch_of("at least 0", padded))
    step({"w": jnp.asarray(W)}, batch_of("at least 0", padded & False))  # values decide


@pytest.mark.parametrize("jit", [False, True])
def test_a_model_that_is_centred_where_tokens_pad_is_refused(jit):
    p = {"e": jnp.asarray(RANDOM.normal(size=(9, 4))), "o": jnp.asarray(RANDOM.normal(size=(4, 3)))}
    tokens = np.where(PADDED, 2, 3 + LABELS)

    def model(p, t):
        kept = (t != 2)[..., None]
        h = jnp.where(kept, p["e"][t], 0.0)
        return jnp.sum(jnp.where(kept, h - jnp.where(jnp.all(kept), 0.0, jnp.mean(h, (0, 1))), 0.0), 1) @ p["o"]

    def kernel(p, t):
        return mgs.kernel(mgs.FunctionalModel(model, p), t)

    with pytest.raises(mgs.SamplesInteractError, match="treat each sample by itself"):
        (jax.jit(kernel) if jit else kernel)(p, tokens)


@pytest.mark.parametrize("jit", [False, True])
def test_masks_may_hold_what_is_not_finite(jit):
    mask, p = np.where(PADDED, -np.inf, 0.0), {"w": jnp.asarray(W)}

    def loss(p, batch):
        share = jax.nn.softmax((batch["x"] @ p["w"])[..., 0] + batch["mask"])
        return jnp.mean(jnp.square(jnp.sum(share * batch["y"], 1)))

    batch = {"x": X, "y": TARGETS, "mask": mask}
    step = jax.value_and_grad(regularized(loss, mgs.Penalty("trace", 0.1)), has_aux=True)
    (_, parts), gradient = (jax.jit(step) if jit else step)(p, batch)
    np.testing.assert_allclose(parts.loss, loss(p, batch), rtol=1e-12)
    assert np.isfinite(gradient["w"]).all()


def test_what_nested_functions_close_over_is_not_kept_alive():
    def kernel(teacher):
        inner = jax.jit(lambda x: x @ teacher)
        return mgs.kernel(mgs.FunctionalModel(lambda p, x: x @ p["w"] - inner(x), {"w": jnp.asarray(W)}), X[:, 0])

    def alive():
        gc.collect()
        return sum(array.shape == (3, _C) and array.dtype == np.float64 for array in jax.live_arrays())

    kernel(jnp.asarray(W))
    compiled, before = len(interaction._comparisons), alive()
    for number in range(5):
        kernel(jnp.asarray(W + number))
    assert len(interaction._comparisons) == compiled
    assert alive() <= before + 2


def monitored(model, **options):
    return MGSMonitor(model, jnp.asarray(X[:, 0]), **options)


def test_the_monitor_passes_options_to_a_linen_module():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            x = nn.BatchNorm(use_running_average=not train, param_dtype=jnp.float64)(x)
            return nn.Dense(2, param_dtype=jnp.float64)(x)

    net = Net()
    variables = net.init(jax.random.key(0), X[:, 0])
    found = monitored(net, apply_options={"train": False}).step(variables)
    expected = mgs.summarize(mgs.kernel(linen_model(net, variables, train=False), X[:, 0]))
    assert found.trace == expected.trace
    with pytest.raises(mgs.ArgumentError, match=r"`apply_options` are for linen modules; got function"):
        monitored(lambda p, x: x @ p["w"], apply_options={"train": False})
    with pytest.raises(mgs.ArgumentError, match=r"`model` must be a module or a function .*; got FunctionalModel"):
        monitored(linen_model(net, variables))


def test_operations_that_are_not_mapped_are_named():
    p, groups = {"w": jnp.asarray(RANDOM.normal(size=(2, 3, _C)))}, jnp.array([2, 2])

    def model(p, x):
        return jnp.sum(lax.ragged_dot(x.reshape(-1, 3), p["w"], groups * len(x)).reshape(len(x), 4, _C), 1)

    with pytest.raises(mgs.UnsupportedModelError, match=r"jax\.vmap maps over samples; got one that it does not: .*ragged_dot"):
        mgs.kernel(mgs.FunctionalModel(model, p), X)
