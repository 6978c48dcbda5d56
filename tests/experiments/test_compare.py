"""The comparison: records as they come, resuming, interruption, folders that do not fit."""

from __future__ import annotations

import json
import queue
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import mgs_core as mgs

pytest.importorskip("sklearn")
pytest.importorskip("onnx")

from mgs_core.experiments import RECIPES, Recipe, Settings, compare
from mgs_core.experiments.compare import load_records, load_settings

module = __import__("mgs_core.experiments.compare", fromlist=["compare"])
SETTINGS = Settings(samples=60, epochs=2, seeds=2, probe_samples=10)
TWO = [RECIPES["none"], RECIPES["dropout"]]


@pytest.fixture
def begun(monkeypatch):
    """Replace the training by one that only counts, and fails where it is told to."""
    runs: list[tuple[str, int]] = []
    stop: set[tuple[str, int]] = set()

    def train(recipe, seed, settings, folder):
        runs.append((recipe.name, seed))
        for epoch in (1, 2):
            yield {"event": "epoch", "regularizer": recipe.name, "seed": seed, "epoch": epoch, "test_accuracy": 0.5}
            if (recipe.name, seed) in stop:
                raise KeyboardInterrupt
        yield {"event": "run", "regularizer": recipe.name, "seed": seed, "last_test_accuracy": 0.5}

    monkeypatch.setattr(module, "train", train)
    return runs, stop


def test_every_recipe_runs_from_every_seed_and_each_record_is_written(tmp_path, begun):
    seen = []
    records = compare(SETTINGS, TWO, tmp_path, on_record=seen.append)
    assert begun[0] == [("none", 0), ("dropout", 0), ("none", 1), ("dropout", 1)]
    assert records == seen == load_records(tmp_path / "records.jsonl")
    assert [record["event"] for record in records] == ["epoch", "epoch", "run"] * 4
    assert load_settings(tmp_path) == SETTINGS.to_dict() == json.loads((tmp_path / "settings.json").read_text())


def test_an_interrupted_comparison_loses_no_finished_run(tmp_path, begun):
    runs, stop = begun
    stop.add(("none", 1))
    with pytest.raises(KeyboardInterrupt):
        compare(SETTINGS, TWO, tmp_path)
    left = load_records(tmp_path / "records.jsonl")
    assert [(record["regularizer"], record["seed"]) for record in left if record["event"] == "run"] == [
        ("none", 0),
        ("dropout", 0),
    ]
    assert [record["epoch"] for record in left if record["event"] == "epoch" and record["seed"] == 1] == [1]
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"event": "epo')  # cut short in the middle of a line
    stop.clear(), runs.clear()
    records = compare(SETTINGS, TWO, tmp_path)
    assert runs == [("none", 1), ("dropout", 1)]
    assert len(records) == len(load_records(tmp_path / "records.jsonl")) == 12
    runs.clear()
    assert len(compare(SETTINGS, TWO, tmp_path)) == 12
    assert runs == []


def test_more_seeds_may_be_asked_for_but_other_settings_need_another_folder(tmp_path, begun):
    compare(SETTINGS, TWO[:1], tmp_path)
    compare(Settings(**{**SETTINGS.to_dict(), "seeds": 3}), TWO[:1], tmp_path)
    assert begun[0] == [("none", 0), ("none", 1), ("none", 2)]
    with pytest.raises(
        mgs.ArgumentError, match=r"`out` must be a new folder for other settings; .* {'epochs': 2}, now {'epochs': 5}"
    ):
        compare(Settings(**{**SETTINGS.to_dict(), "epochs": 5}), TWO, tmp_path)


def test_data_that_have_changed_need_another_folder(tmp_path, begun):
    settings = Settings(**{**SETTINGS.to_dict(), "data": str(tmp_path / "my.npz")})
    for number in (1, 2):
        np.savez(tmp_path / "my.npz", x_train=np.full(3, number))
        if number == 1:
            compare(settings, TWO, tmp_path / "run")
    with pytest.raises(mgs.ArgumentError, match=r"`out` must be a new folder for other settings; .*data_sha256"):
        compare(settings, TWO, tmp_path / "run")


def test_a_command_that_failed_before_it_began_does_not_bar_its_folder(tmp_path):
    with pytest.raises(mgs.ArgumentError, match="`noise` must be a probability"):
        compare(Settings(**{**SETTINGS.to_dict(), "noise": 1.5}), TWO[:1], tmp_path)
    assert compare(SETTINGS, TWO[:1], tmp_path)
    assert load_settings(tmp_path) == SETTINGS.to_dict()


def test_a_second_comparison_in_the_folder_at_the_time_is_refused(tmp_path, monkeypatch):
    """Before the first record a folder may still be given other settings, which would take over the first comparison's runs."""
    pytest.importorskip("fcntl")

    def train(recipe, seed, settings, folder):
        with pytest.raises(mgs.ArgumentError, match="that no other comparison writes at the time"):
            compare(replace(SETTINGS, noise=0.1), TWO, tmp_path)
        yield {"event": "run", "regularizer": recipe.name, "seed": seed, "last_test_accuracy": 0.5}

    monkeypatch.setattr(module, "train", train)
    compare(SETTINGS, TWO[:1], tmp_path)
    assert load_settings(tmp_path) == SETTINGS.to_dict()
    compare(SETTINGS, TWO[:1], tmp_path)  # the folder is free again


@pytest.mark.parametrize("alive", [True, False])
def test_a_worker_whose_parent_was_killed_ends(tmp_path, monkeypatch, begun, alive):
    tasks, records = queue.Queue(), queue.Queue()
    for seed in range(3):
        tasks.put(("none", None, seed))
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    monkeypatch.setattr(module.multiprocessing, "parent_process", lambda: SimpleNamespace(is_alive=lambda: alive))
    module._work(tasks, records, SETTINGS, tmp_path)
    assert (len(begun[0]), records.qsize()) == ((3, 9) if alive else (1, 0))


def test_folders_that_do_not_fit_are_refused(tmp_path, begun):
    (tmp_path / "file").write_text("")
    with pytest.raises(mgs.ArgumentError, match="`out` must be a folder that can be written"):
        compare(SETTINGS, TWO, tmp_path / "file" / "run")
    with pytest.raises(mgs.ArgumentError, match="`run` must be a folder that mgs compare wrote"):
        load_settings(tmp_path)
    (tmp_path / "settings.json").write_text("3")
    with pytest.raises(mgs.ArgumentError, match=r"the settings in .* are no object"):
        load_settings(tmp_path)
    (tmp_path / "records.jsonl").write_text("3\n")
    with pytest.raises(mgs.ArgumentError, match=r"line 1 of .* is none"):
        load_records(tmp_path / "records.jsonl")


@pytest.mark.wrong_types
def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(mgs.ArgumentError, match=r"`recipes` must be registered in RECIPES.*\['mine'\]"):
        compare(SETTINGS, [Recipe("mine")], tmp_path)
    for jobs in (0, True, 1.5):
        with pytest.raises(mgs.ArgumentError, match="`jobs` must be an integer of at least 1"):
            compare(SETTINGS, TWO, tmp_path, jobs=jobs)
    for name in ("epochs", "batch_size", "seeds", "probe_samples"):
        with pytest.raises(mgs.ArgumentError, match=f"`{name}` must be an integer of at least"):
            Settings(**{name: 0})
    for rate in (0.0, -1.0, float("inf"), "fast", True):
        with pytest.raises(mgs.ArgumentError, match="`learning_rate` must be a finite number above 0"):
            Settings(learning_rate=rate)


@pytest.mark.wrong_types
def test_settings_may_be_integers_of_numpy():
    names = ("epochs", "batch_size", "seeds", "probe_samples", "samples")
    assert json.loads(json.dumps(Settings(**dict.fromkeys(names, np.int64(5))).to_dict()))["samples"] == 5
