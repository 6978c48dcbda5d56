"""The training step of each recipe against its definition, by autograd and explicit per-sample gradients in float64."""

from __future__ import annotations

import autograd
import autograd.numpy as anp
import numpy as np
import pytest

import mgs_core as mgs

pytest.importorskip("sklearn")
pytest.importorskip("onnx")

from mgs_core.experiments import RECIPES, Recipe
from mgs_core.experiments.losses import singular_vector, spectral_gradient
from mgs_core.experiments.optimizer import adam, schedule, start
from mgs_core.experiments.recipes import choose
from mgs_core.experiments.step import begin, make_step

RANDOM = np.random.default_rng(0)
PARAMETERS = {
    "w1": RANDOM.normal(size=(4, 6)) + 1.5,
    "b1": RANDOM.normal(size=6),
    "w2": RANDOM.normal(size=(6, 3)) + 1.5,
    "b2": RANDOM.normal(size=3),
}
X, LABELS = RANDOM.normal(size=(7, 4)), np.arange(7) % 3
TARGETS = 0.8 * np.eye(3)[LABELS] + 0.2 / 3
PROBES = RANDOM.normal(size=(7, 3))
NOW = np.array([1e-2, 10.0, 1000.0])


def network(p, inputs):
    assert set(inputs) <= {"x", "mask"}  # as an ONNX model is strict
    hidden = anp.tanh(inputs["x"] @ p["w1"] + p["b1"])
    return (hidden * inputs["mask"] if "mask" in inputs else hidden) @ p["w2"] + p["b2"]


def losses(p, x=X, targets=TARGETS, truncation=0.0):
    outputs = network(p, {"x": x})
    logarithms = outputs - anp.log(anp.sum(anp.exp(outputs), axis=1, keepdims=True))
    if truncation:
        return anp.sum(targets * (1 - anp.exp(logarithms) ** truncation), axis=1) / truncation
    return -anp.sum(targets * logarithms, axis=1)


def probability(p, x, signs):
    outputs = network(p, {"x": x})
    return (anp.exp(outputs) / anp.sum(anp.exp(outputs), axis=1, keepdims=True)) @ signs


def rows(scalar, p):
    """Per-sample gradients of `scalar(p, x (1, 4), a) → (1,)`, by a loop."""
    found = []
    for a in range(7):
        gradient = autograd.grad(lambda p, a=a: scalar(p, X[a : a + 1], a)[0])(p)
        found.append(anp.concatenate([anp.ravel(gradient[name]) for name in p]))
    return anp.stack(found)


def cosine(gram):
    root = anp.sqrt(anp.diag(gram))
    return gram / root[:, None] / root[None, :]


def objective(recipe):
    def value(p):
        plain = losses(p, truncation=recipe.truncation)
        total = anp.mean(plain)
        if recipe.agreement:
            gram = (lambda g: g @ g.T)(rows(lambda p, x, a: losses(p, x, TARGETS[a : a + 1], recipe.truncation), PARAMETERS))
            r = (gram.sum(1) - np.diag(gram)) / np.sqrt(np.diag(gram))
            total = anp.mean(np.maximum(r, 0) / np.maximum(r, 0).mean() * plain)
        if recipe.gradient_penalty:
            slope = autograd.grad(lambda x: anp.sum(losses(p, x)))(X)
            total = total + recipe.gradient_penalty * anp.mean(anp.sum(slope**2, axis=1))
        if recipe.jacobian_penalty:
            slope = autograd.grad(lambda x: anp.sum(PROBES * network(p, {"x": x})))(X)
            total = total + recipe.jacobian_penalty * 3 * anp.mean(anp.sum(slope**2, axis=1))
        if recipe.penalty is not None:
            if recipe.output == "target":
                g = rows(lambda p, x, a: anp.sum(TARGETS[a] * network(p, {"x": x}), axis=1), p)
            elif recipe.output == "loss":
                g = rows(lambda p, x, a: losses(p, x, TARGETS[a : a + 1], recipe.truncation), p)
            else:
                signs = mgs.heads._probe(np.eye(3), 1, 0)[:, 0]
                g = rows(lambda p, x, a: probability(p, x, signs), p)
            gram, scale = g @ g.T, recipe.penalty.scale
            value = {
                "trace": lambda: anp.trace(gram) / 7,
                "cosine": lambda: 1 - (anp.sum(cosine(gram)) - 7) / 42,
                "log_determinant": lambda: anp.linalg.slogdet(anp.eye(7) + gram / scale)[1] / 7,
            }[recipe.penalty.name]()
            total = total + recipe.penalty.strength * value
        return total

    return value


def gradient_of(recipe, p):
    """The gradient that goes to Adam: that of the objective, at the ascended point, with that of the spectral norms."""
    found = autograd.grad(objective(recipe))(p)
    if recipe.sharpness:
        norm = np.sqrt(sum(np.sum(g**2) for g in found.values()))
        found = autograd.grad(objective(recipe))({name: p[name] + recipe.sharpness * g / norm for name, g in found.items()})
    if recipe.spectral_penalty:
        for name in ("w1", "w2"):
            left, sizes, right = np.linalg.svd(p[name])
            found[name] = found[name] + recipe.spectral_penalty * sizes[0] * np.outer(left[:, 0], right[0])
    return found


RANDOM_HEAD = Recipe("random head", penalty=mgs.Penalty("log_determinant", 0.5, 2.0), output="random", transform="softmax")
TOGETHER = Recipe("together", agreement=True, jacobian_penalty=0.1, penalty=mgs.Penalty("trace", 0.5), weight_decay=0.1)
TRUNCATED = Recipe("truncated", truncation=0.7, agreement=True, penalty=mgs.Penalty("log_determinant", 0.5, 2.0))


ONE_NETWORK = [recipe for recipe in RECIPES.values() if not recipe.forgotten]


@pytest.mark.parametrize("recipe", [*ONE_NETWORK, RANDOM_HEAD, TOGETHER, TRUNCATED], ids=lambda recipe: recipe.name)
def test_a_step_follows_the_gradient_of_the_recipe(recipe):
    numpy = mgs.get_backend("numpy")
    step = make_step(recipe, numpy, network)
    before = {name: value.copy() for name, value in PARAMETERS.items()}
    inputs = {"x": X, "probe": PROBES} if recipe.jacobian_penalty else {"x": X}
    loss, moved, (first, second, *_) = step(PARAMETERS, begin(recipe, numpy, PARAMETERS), inputs, TARGETS, NOW)
    expected_loss = objective(recipe)(PARAMETERS)
    assert float(loss) == pytest.approx(expected_loss, rel=1e-10)
    gradient = gradient_of(recipe, PARAMETERS)
    for name, value in PARAMETERS.items():
        np.testing.assert_array_equal(value, before[name])
        size = np.abs(gradient[name]).max()
        np.testing.assert_allclose(first[name], 0.1 * gradient[name], rtol=1e-8, atol=1e-10 * size)
        np.testing.assert_allclose(second[name], 0.001 * gradient[name] ** 2, rtol=2e-8, atol=1e-10 * size**2)
        decay = recipe.weight_decay if value.ndim > 1 else 0.0
        expected = value * (1 - 1e-2 * decay) - 1e-2 * gradient[name] / (np.abs(gradient[name]) + 1e-8)
        np.testing.assert_allclose(moved[name], expected, rtol=1e-7)


@pytest.mark.parametrize("jacobian", [0.0, 0.1])
def test_each_network_of_co_teaching_learns_from_the_samples_that_are_easy_for_the_other(jacobian):
    step = make_step(Recipe("two", forgotten=0.5, jacobian_penalty=jacobian), mgs.get_backend("numpy"), network)
    inputs = {"x": X, "probe": PROBES} if jacobian else {"x": X}
    peer = {name: 0.5 * value + 0.1 for name, value in PARAMETERS.items()}
    both = {**PARAMETERS, **{"peer:" + name: value for name, value in peer.items()}}
    _, _, (first, _) = step(both, start(both), inputs, TARGETS, NOW, np.asarray(3.0))
    easy = np.argsort(losses(peer))[:3], np.argsort(losses(PARAMETERS))[:3]
    assert set(easy[0]) != set(easy[1])
    for prefix, own, kept in (("", PARAMETERS, easy[0]), ("peer:", peer, easy[1])):
        expected = autograd.grad(lambda p, kept=kept: anp.mean(losses(p, X[kept], TARGETS[kept])))(own)
        slope = autograd.grad(objective(Recipe("slope", jacobian_penalty=jacobian)))(own)
        plain = autograd.grad(objective(Recipe("plain")))(own)
        expected = {name: g + slope[name] - plain[name] for name, g in expected.items()}
        for name in own:
            np.testing.assert_allclose(first[prefix + name], 0.1 * expected[name], rtol=1e-9, atol=1e-12)


def of_svd(weight):
    left, sizes, right = np.linalg.svd(weight)
    return sizes[0] * np.outer(left[:, 0], right[0])


def alike(a, b):
    return float(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b))


SPECTRAL = Recipe("spectral", spectral_penalty=0.3)


def test_the_largest_singular_value_is_found_among_many_that_are_close():
    left, _, right = np.linalg.svd(RANDOM.normal(size=(256, 256)))
    weight = left * np.linspace(2.0, 1.0, 256) @ right  # the second is 0.998 of the first
    vector = begin(SPECTRAL, mgs.get_backend("numpy"), {"w": weight})[2]["w"]
    found, expected = spectral_gradient(weight, vector), of_svd(weight)
    assert alike(found, expected) > 0.999
    assert np.linalg.norm(found) == pytest.approx(2.0, rel=1e-5)


def test_the_singular_vector_follows_the_weight():
    """From random values, where the largest is one of many, to where the penalty has brought it, a third lower."""
    numpy = mgs.get_backend("numpy")
    weight, inputs = RANDOM.normal(size=(256, 256)).astype(np.float32) / 16, RANDOM.normal(size=(16, 256)).astype(np.float32)
    step = make_step(Recipe("spectral", spectral_penalty=10.0), numpy, lambda p, inputs: inputs["x"] @ p["w"])
    parameters, targets = {"w": weight}, np.eye(256, dtype=np.float32)[:16]
    moments = begin(SPECTRAL, numpy, parameters)
    for number in range(200):
        _, parameters, moments = step(parameters, moments, {"x": inputs}, targets, schedule(number, 200, 2e-3))
    now, largest = parameters["w"], np.linalg.norm(parameters["w"], 2)
    assert largest < 0.7 * np.linalg.norm(weight, 2)
    found = np.linalg.norm(spectral_gradient(now, moments[2]["w"]))
    assert 0.99 * largest < found <= 1.0001 * largest


def test_a_weight_that_begins_at_zero_has_a_singular_vector_as_soon_as_it_moves():
    vector = begin(SPECTRAL, mgs.get_backend("numpy"), {"w": np.zeros((3, 4)), "b": np.zeros(3)})[2]
    assert list(vector) == ["w"]
    weight = np.outer([0.0, 2.0, 0.0], [0.0, 0.0, 0.6, 0.8])
    np.testing.assert_allclose(spectral_gradient(weight, singular_vector(weight, vector["w"])), weight, atol=1e-12)


def test_adam_is_that_of_the_paper():
    value, first, second = np.array([[1.0, -2.0]]), 0.0, 0.0
    ours, moments = {"w": value.astype(np.float32)}, None
    for step in range(5):
        gradient = np.array([[0.5 - step, 2.0 + step]])
        rate = 0.1 * 0.5 * (1 + np.cos(np.pi * step / 5))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        stride = (first / (1 - 0.9 ** (step + 1))) / (np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8)
        value = value - rate * 0.3 * value - rate * stride
        moments = moments or start(ours)
        ours, moments = adam(ours, {"w": gradient.astype(np.float32)}, moments, schedule(step, 5, 0.1), weight_decay=0.3)
    np.testing.assert_allclose(ours["w"], value, rtol=1e-5)


def test_fields_that_do_not_combine_are_refused():
    with pytest.raises(mgs.ArgumentError, match=r"`agreement` must be False with `forgotten`.*; got 0\.4\. Choose one"):
        Recipe("both", agreement=True, forgotten=0.4)


def test_recipes_are_chosen_by_name():
    assert [recipe.name for recipe in choose(["mixup", "none", "mixup"])] == ["mixup", "none"]
    with pytest.raises(mgs.ArgumentError, match=r"`names` must be among none, weight-decay, .*; got prayer"):
        choose(["none", "prayer"])
    with pytest.raises(mgs.ArgumentError, match=r"`names` must be among .*; got none"):
        choose([])
    assert Recipe("none") == RECIPES["none"]
