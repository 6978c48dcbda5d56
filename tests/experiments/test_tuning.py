"""The strength of a recipe is chosen on noisy validation labels alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("onnx")

from mgs_core.experiments import RECIPES, Settings, compare
from mgs_core.experiments.training import Trainer, draw
from mgs_core.experiments.tuning import best_strength, strengths, try_strength

SETTINGS = Settings(samples=120, epochs=3, seeds=1, probe_samples=10, tuning=2)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_what_a_recipe_tries_are_strengths_of_its_own(recipe):
    assert bool(recipe.tuned) == bool(recipe.tried)
    assert strengths(recipe, 0) == ()
    assert len(strengths(recipe, 4)) in (0, 4)
    for value in recipe.tried:
        changed = recipe.with_strength(value)
        assert changed.strength == value
        assert changed.with_strength(recipe.strength) == recipe


def test_the_score_is_on_held_out_noisy_labels_of_another_draw():
    record = try_strength("dropout", 0.7, SETTINGS)
    data = draw(SETTINGS, record["seed"])
    run = Trainer(replace(RECIPES["dropout"], dropout=0.7, hold_out=0.2), data, SETTINGS, record["seed"])
    for epoch in (1, 2, 3):
        run.epoch(epoch)
    predicted = np.argmax(run._model.function(run._parameters, data.train_inputs[:24]), axis=1)
    assert record["validation_accuracy"] == pytest.approx(np.mean(predicted == data.train_labels[:24]))
    assert data.wrong[:24].any()
    assert record["seed"] not in range(1000)


def test_the_best_is_taken_and_of_equals_the_first():
    trials = [
        {"event": "tuning", "regularizer": "mixup", "strength": strength, "validation_accuracy": accuracy}
        for strength, accuracy in ((1.0, 0.6), (16.0, 0.7), (4.0, 0.7), (123.0, 0.9))  # 123 is of another version
    ]
    others = [{"event": "run", "regularizer": "mixup"}, {**trials[0], "regularizer": "sam", "validation_accuracy": 1.0}]
    assert best_strength([*others, *trials], "mixup") == 4.0


def test_a_comparison_tunes_first_and_goes_on_where_it_was_stopped(tmp_path):
    recipes = [RECIPES["none"], RECIPES["weight-decay"]]
    seen = []

    def stop_after_one_trial(record):
        seen.append(record)
        if len(seen) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(SETTINGS, recipes, tmp_path, on_record=stop_after_one_trial)
    assert [record["event"] for record in seen] == ["tuning"]
    records = compare(SETTINGS, recipes, tmp_path, on_record=seen.append)
    trials = [record for record in records if record["event"] == "tuning"]
    assert [(trial["regularizer"], trial["strength"]) for trial in trials] == [("weight-decay", 3.0), ("weight-decay", 10.0)]
    assert len([record for record in seen if record["event"] == "tuning"]) == 2
    runs = {record["regularizer"]: record for record in records if record["event"] == "run"}
    assert runs["none"]["strength"] is None
    assert runs["weight-decay"]["strength"] == best_strength(records, "weight-decay")
