"""The training step: what a recipe adds to plain cross-entropy, compiled once for each run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mgs_core._namespace import array_namespace
from mgs_core._protocol import Backend
from mgs_core._types import Array
from mgs_core.agreement import agreement_weights
from mgs_core.experiments.optimizer import Moments, Parameters, adam
from mgs_core.experiments.recipes import Recipe
from mgs_core.functional import FunctionalModel
from mgs_core.heads import cross_entropy
from mgs_core.kernel import kernel


def make_step(recipe: Recipe, backend: Backend, function: Callable[[Any, Any], Array]) -> Callable[..., Any]:
    """Make the step of a recipe.

    Args:
        recipe: the regulariser.
        backend: whose arrays the step takes.
        function: the network, `function(parameters, inputs) → (n, c)`; its inputs are a dict with "x" and masks.

    Returns:
        `step(parameters, moments, inputs, targets (n, c), now) → (loss, parameters, moments)`, where `now` is what
        `optimizer.schedule` says.
    """

    def objective(parameters: Parameters, inputs: Any, targets: Array, weights: Array) -> Array:
        losses = cross_entropy(function(parameters, inputs), targets)
        xp = array_namespace(losses)
        value = xp.mean(losses if weights is None else weights * losses)
        if recipe.gradient_penalty:
            value = value + recipe.gradient_penalty * _input_gradient(parameters, inputs, targets)
        if recipe.penalty is not None:
            value = value + recipe.penalty(
                kernel(
                    FunctionalModel(function, parameters), inputs, targets,
                    output=recipe.output, transform=recipe.transform, differentiable=True,
                )
            )  # fmt: skip
        return value

    def _input_gradient(parameters: Parameters, inputs: Any, targets: Array) -> Array:
        masks = {name: array for name, array in inputs.items() if name != "x"}

        def total(given: Any) -> Array:
            losses = cross_entropy(function(parameters, {**given, **masks}), targets)
            return array_namespace(losses).sum(losses)

        gradient = backend.value_and_gradient(total)({"x": inputs["x"]})[1]["x"]
        return array_namespace(gradient).sum(gradient * gradient) / targets.shape[0]

    value_and_gradient = backend.value_and_gradient(objective)

    def step(
        parameters: Parameters, moments: Moments, inputs: Any, targets: Array, now: Array
    ) -> tuple[Array, Parameters, Moments]:
        weights = None
        if recipe.agreement:
            weights = agreement_weights(kernel(FunctionalModel(function, parameters), inputs, targets, output="loss"))
        loss, gradient = value_and_gradient(parameters, inputs, targets, weights)
        return (loss, *adam(parameters, gradient, moments, now, weight_decay=recipe.weight_decay))

    return backend.compile(step)
