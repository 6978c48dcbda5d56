"""Choose the strength of a recipe by noisy validation: no clean label, and no test sample, takes part."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from mgs_core.experiments.recipes import RECIPES, Recipe
from mgs_core.experiments.settings import Settings
from mgs_core.experiments.training import Trainer, draw

_HELD = 0.2
#: The seed of every trial.
TRIAL_SEED = 1_000_000  # apart from the seeds of the comparison


def strengths(recipe: Recipe, budget: int) -> tuple[float, ...]:
    """Return the strengths to try: at most `budget`; none where the recipe has nothing to choose or the budget is 0."""
    return recipe.tried[:budget]


def try_strength(name: str, strength: float, settings: Settings) -> dict[str, Any]:
    """Train once with a strength and say how well it does on a held-out fifth of the noisy training samples.

    Args:
        name: of the recipe.
        strength: value of the field that the recipe tunes.
        settings: as for the comparison.

    Returns:
        A record with "event" "tuning", "regularizer", "seed", "strength", "validation_accuracy" of the last epoch, and "seconds".
    """
    begun, seed = time.perf_counter(), TRIAL_SEED
    recipe = replace(RECIPES[name].with_strength(strength), hold_out=_HELD)
    run = Trainer(recipe, draw(settings, seed), settings, seed)
    for epoch in range(1, settings.epochs + 1):
        run.epoch(epoch)
    return {
        "event": "tuning",
        "regularizer": name,
        "seed": seed,
        "strength": strength,
        "validation_accuracy": run.validate(),
        "seconds": time.perf_counter() - begun,
    }


def best_strength(records: list[dict[str, Any]], name: str) -> float | None:
    """Return the strength of the record of "tuning" with the best validation accuracy; of equals the first, of none the usual."""
    order = RECIPES[name].tried
    own = [record for record in records if record["event"] == "tuning" and record["regularizer"] == name]
    best = max(
        (record for record in own if record["strength"] in order),
        key=lambda record: (record["validation_accuracy"], -order.index(record["strength"])),
        default=None,  # all trials have failed
    )
    return RECIPES[name].strength if best is None else float(best["strength"])
