"""The training step: what a recipe adds to plain cross-entropy, compiled once for each run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mgs_core._namespace import array_namespace
from mgs_core._protocol import Backend
from mgs_core._types import Array
from mgs_core.agreement import agreement_weights
from mgs_core.experiments.losses import generalised_cross_entropy, singular_vector, spectral_gradient
from mgs_core.experiments.optimizer import Moments, Parameters, adam, start
from mgs_core.experiments.recipes import Recipe
from mgs_core.functional import FunctionalModel
from mgs_core.heads import cross_entropy
from mgs_core.kernel import kernel

#: Prefix of the parameters of the second network of co-teaching, and name of the input that holds the Jacobian's projection.
PEER, PROBE = "peer:", "probe"
_ROUNDS_BEFORE = 128  # towards the first singular vectors, from drawn ones; each step adds some


def begin(recipe: Recipe, backend: Backend, parameters: Parameters) -> Moments:
    """Return what a step carries beside the parameters, before the first step.

    Args:
        recipe: the regulariser.
        backend: whose arrays the parameters are.
        parameters: by name.

    Returns:
        The moments of Adam; behind them, where the recipe penalises spectral norms, a singular vector of each weight by name.
    """
    if not recipe.spectral_penalty:
        return start(parameters)
    random = np.random.default_rng(0)
    vectors = {}
    for name, value in parameters.items():
        if value.ndim > 1:
            weight, drawn = np.asarray(backend.to_numpy(value)), random.normal(size=(value.shape[0], 1))
            drawn = (drawn / np.linalg.norm(drawn)).astype(weight.dtype)
            vectors[name] = backend.asarray(singular_vector(weight, drawn, _ROUNDS_BEFORE))
    return *start(parameters), vectors


def make_step(recipe: Recipe, backend: Backend, function: Callable[[Any, Any], Array]) -> Callable[..., Any]:
    """Make the step of a recipe.

    Args:
        recipe: the regulariser.
        backend: whose arrays the step takes.
        function: the network, `function(parameters, inputs) → (n, c)`; its inputs are a dict with "x" and masks.

    Returns:
        `step(parameters, moments, inputs, targets (n, c), now, kept=None) → (loss, parameters, moments)`. `moments` is what
        `begin` or the step before gave, `now` what `optimizer.schedule` says. A recipe with a Jacobian penalty takes unit
        vectors (n, c) as `inputs["probe"]`; one of two networks takes the second's parameters too, their names after "peer:",
        and `kept`, how many samples each learns from.
    """

    def loss_of(outputs: Array, targets: Array) -> Array:
        if recipe.truncation:
            return generalised_cross_entropy(outputs, targets, recipe.truncation)
        return cross_entropy(outputs, targets)

    def losses(parameters: Parameters, inputs: Any, targets: Array) -> Array:
        return loss_of(function(parameters, inputs), targets)

    def kernel_of(parameters: Parameters, inputs: Any, targets: Array, output: Any, **options: Any) -> Array:
        """Return the kernel; that of the losses is of those that are trained."""
        loss = loss_of if output == "loss" else None
        return kernel(FunctionalModel(function, parameters), inputs, targets, output=output, loss=loss, **options)

    def objective(parameters: Parameters, inputs: Any, targets: Array, weights: Array) -> Array:
        found = losses(parameters, inputs, targets)
        xp = array_namespace(found)
        value = xp.mean(found if weights is None else weights * found)
        if recipe.gradient_penalty:
            slope = input_slope(lambda x: losses(parameters, x, targets), inputs)
            value = value + recipe.gradient_penalty * slope
        if recipe.penalty is not None:
            options = {"transform": recipe.transform, "differentiable": True}
            value = value + recipe.penalty(kernel_of(parameters, inputs, targets, recipe.output, **options))
        return value

    def with_jacobian(parameters: Parameters, inputs: Any, targets: Array, weights: Array) -> Array:
        probe, inputs = inputs[PROBE], _of_network(inputs)
        xp = array_namespace(probe)
        slope = input_slope(lambda x: xp.sum(probe * function(parameters, x), axis=1), inputs)
        return objective(parameters, inputs, targets, weights) + recipe.jacobian_penalty * probe.shape[1] * slope

    def input_slope(scalars: Callable[[Any], Array], inputs: Any) -> Array:
        """Return the mean squared norm of the gradient of each sample's scalar in its input."""
        masks = {name: array for name, array in inputs.items() if name != "x"}

        def total(given: Any) -> Array:
            found = scalars({**given, **masks})
            return array_namespace(found).sum(found)

        gradient = backend.value_and_gradient(total)({"x": inputs["x"]})[1]["x"]
        return array_namespace(gradient).sum(gradient * gradient) / gradient.shape[0]

    def of_two(parameters: Parameters, inputs: Any, targets: Array, weights: Any) -> Array:
        own, peer = _networks(parameters)
        return of_one(own, inputs, targets, weights[0]) + of_one(peer, inputs, targets, weights[1])

    of_one = with_jacobian if recipe.jacobian_penalty else objective
    value_and_gradient = backend.value_and_gradient(of_two if recipe.forgotten else of_one)

    def step(
        parameters: Parameters, moments: Moments, inputs: Any, targets: Array, now: Array, kept: Array = None
    ) -> tuple[Array, Parameters, Moments]:
        weights: Any = None
        more: tuple[Parameters, ...] = ()
        given = _of_network(inputs)
        if recipe.agreement:
            weights = agreement_weights(kernel_of(parameters, given, targets, "loss"))
        if recipe.forgotten:
            own, peer = (_least(losses(network, given, targets), kept) for network in _networks(parameters))
            weights = peer, own
        loss, gradient = value_and_gradient(parameters, inputs, targets, weights)
        if recipe.sharpness:
            gradient = value_and_gradient(_ascended(parameters, gradient, recipe.sharpness), inputs, targets, weights)[1]
        if recipe.spectral_penalty:
            vectors = {name: singular_vector(parameters[name], vector) for name, vector in moments[2].items()}
            slopes = {name: spectral_gradient(parameters[name], vector) for name, vector in vectors.items()}
            gradient = {name: g + recipe.spectral_penalty * slopes[name] if name in slopes else g for name, g in gradient.items()}
            more = (vectors,)
        parameters, moments = adam(parameters, gradient, moments, now, weight_decay=recipe.weight_decay)
        return loss, parameters, (*moments, *more)

    return backend.compile(step)


def _of_network(inputs: dict[str, Array]) -> dict[str, Array]:
    """Return the inputs that the network takes."""
    return {name: array for name, array in inputs.items() if name != PROBE}


def _networks(parameters: Parameters) -> tuple[Parameters, Parameters]:
    """Return the parameters of the two networks of co-teaching, each with the names of one."""
    own = {name: value for name, value in parameters.items() if not name.startswith(PEER)}
    return own, {name: parameters[PEER + name] for name in own}


def _least(losses: Array, kept: Array) -> Array:
    """Return weights of mean about 1 that keep the `kept` samples of least loss; equal losses are kept together."""
    xp = array_namespace(losses)
    before = xp.sum(xp.astype(xp.expand_dims(losses, axis=0) < xp.expand_dims(losses, axis=1), losses.dtype), axis=1)
    return xp.astype(before < kept, losses.dtype) * (losses.shape[0] / kept)


def _ascended(parameters: Parameters, gradient: Parameters, radius: float) -> Parameters:
    """Return the parameters moved by `radius` along the gradient."""
    total: Any = 0.0
    for g in gradient.values():
        total = total + array_namespace(g).sum(g * g)
    factor = radius / (total**0.5 + 1e-12)
    return {name: value + factor * gradient[name] for name, value in parameters.items()}
