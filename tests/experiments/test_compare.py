"""The comparison: records as they come, resuming, interruption, folders that do not fit."""

from __future__ import annotations

import dataclasses
import json
import queue
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import mgs_core as mgs

pytest.importorskip("sklearn")
pytest.importorskip("onnx")

from mgs_core.experiments import RECIPES, Recipe, Settings, compare, provenance
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


def test_a_run_that_diverges_ends_no_other_and_is_tried_again(tmp_path, monkeypatch):
    hot = dataclasses.replace(RECIPES["weight-decay"], name="hot", weight_decay=1e30)
    monkeypatch.setitem(RECIPES, "hot", hot)
    records = compare(SETTINGS, [hot, RECIPES["none"]], tmp_path)
    runs = {(record["regularizer"], record["seed"]): record for record in records if record["event"] in ("run", "failed")}
    assert {key: record["event"] for key, record in runs.items()} == {
        ("hot", 0): "failed", ("none", 0): "run", ("hot", 1): "failed", ("none", 1): "run",
    }  # fmt: skip
    assert runs["hot", 0]["of"] == "run"
    assert "after epoch 1 the largest weight is 1.4" in runs["hot", 0]["error"]
    monkeypatch.setitem(RECIPES, "hot", dataclasses.replace(RECIPES["none"], name="hot"))
    again = []
    records = compare(SETTINGS, [RECIPES["hot"], RECIPES["none"]], tmp_path, on_record=again.append)
    assert {(record["regularizer"], record["event"]) for record in again} == {("hot", "epoch"), ("hot", "run")}
    assert not any(record["event"] == "failed" for record in records)


def test_processes_that_fail_in_their_runs_go_on(tmp_path):
    records = compare(dataclasses.replace(SETTINGS, learning_rate=1e8), TWO, tmp_path, jobs=2)
    failed = [record for record in records if record["event"] == "failed"]
    assert len(failed) == 4
    for record in failed:
        assert record["error"].startswith(
            "`learning_rate` must be one at which training converges; got 100000000.0, and after epoch"
        )
        strength = ", or the strength of dropout" if record["regularizer"] == "dropout" else ""  # "none" has no strength
        assert f". Lower it{strength}." in record["error"]


def test_a_table_in_several_units_is_warned_of(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(60, 5)), np.arange(60) % 2
    np.savez(tmp_path / "data.npz", x_train=x * [1, 1, 1e8, 1, 1], y_train=y, x_test=x, y_test=y)
    settings = dataclasses.replace(SETTINGS, data=str(tmp_path / "data.npz"), samples=None)
    with pytest.warns(UserWarning, match="Column 2 of `inputs` has 100% of their variance and half of the columns"):
        compare(settings, TWO[:1], tmp_path / "run")


def test_errors_of_other_kinds_are_named(tmp_path, monkeypatch):
    def train(recipe, seed, settings, folder):
        yield {"event": "epoch", "regularizer": recipe.name, "seed": seed, "epoch": 1}
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(module, "train", train)
    records = compare(SETTINGS, TWO[:1], tmp_path)
    assert [record["error"] for record in records if record["event"] == "failed"] == ["ZeroDivisionError: by zero"] * 2


def test_trials_that_fail_leave_the_usual_strength(tmp_path, monkeypatch, begun):
    def fail(name, strength, settings):
        raise mgs.ArgumentError("no luck")

    monkeypatch.setattr(module, "try_strength", fail)
    settings = dataclasses.replace(SETTINGS, tuning=2)
    records = compare(settings, [RECIPES["dropout"]], tmp_path)
    assert [(record["of"], record["strength"]) for record in records if record["event"] == "failed"] == [
        ("tuning", 0.5), ("tuning", 0.7),
    ]  # fmt: skip
    assert [record["recipe"] for record in records if record["event"] == "run"] == [{"dropout": 0.5}] * 2


def test_workers_that_cannot_start_say_what_a_script_needs(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from mgs_core.experiments import RECIPES, Settings, compare\n"
        "settings = Settings(samples=60, epochs=1, seeds=2, probe_samples=10)\n"
        f"compare(settings, [RECIPES['none']], {str(tmp_path / 'run')!r}, jobs=2)\n"
    )
    done = subprocess.run([sys.executable, "-P", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert 'call `compare` under `if __name__ == "__main__":`' in done.stderr.splitlines()[-1]
    assert "AttributeError" not in done.stderr


def test_fewer_seeds_later_leave_the_settings_of_what_is_there(tmp_path, begun):
    compare(SETTINGS, TWO[:1], tmp_path)
    assert len([r for r in compare(dataclasses.replace(SETTINGS, seeds=1), TWO[:1], tmp_path) if r["event"] == "run"]) == 2
    assert load_settings(tmp_path)["seeds"] == 2


def test_runs_of_a_recipe_that_has_changed_are_made_again(tmp_path, begun, monkeypatch):
    runs, _ = begun
    compare(SETTINGS, TWO, tmp_path)
    runs.clear()
    changed = dataclasses.replace(RECIPES["dropout"], dropout=0.6)
    monkeypatch.setitem(RECIPES, "dropout", changed)
    records = compare(SETTINGS, [RECIPES["none"], changed], tmp_path)
    assert runs == [("dropout", 0), ("dropout", 1)]
    made = {record["regularizer"]: record["recipe"] for record in records if record["event"] == "run"}
    assert made == {"none": {}, "dropout": {"dropout": 0.6}}
    monkeypatch.setitem(RECIPES, "dropout", dataclasses.replace(changed, tried=(0.1,)))  # does not change a run
    runs.clear()
    compare(SETTINGS, [RECIPES["dropout"]], tmp_path)
    assert runs == []


def test_definitions_are_what_json_gives_back():
    for recipe in RECIPES.values():
        assert json.loads(json.dumps(provenance.definition(recipe))) == provenance.definition(recipe)
    assert provenance.definition(Recipe("mine", transform=provenance.versions))["transform"].endswith("provenance.versions")


def test_other_versions_are_kept_with_a_warning(tmp_path, begun):
    runs, _ = begun
    records = compare(SETTINGS, TWO[:1], tmp_path)
    assert {record["versions"]["numpy"] for record in records if record["event"] == "run"} == {np.__version__}
    path = tmp_path / "records.jsonl"
    path.write_text(path.read_text().replace(f'"numpy": "{np.__version__}"', '"numpy": "1.0.old"'))
    runs.clear()
    with pytest.warns(UserWarning, match=r"runs that were made with numpy 1\.0\.old, and now .* is installed"):
        compare(SETTINGS, TWO, tmp_path)
    assert runs == [("dropout", 0), ("dropout", 1)]


def test_what_would_fail_every_run_is_refused_at_once(tmp_path, monkeypatch):
    with pytest.raises(mgs.ArgumentError, match="`data` must be a file that exists"):
        compare(dataclasses.replace(SETTINGS, data="none.npz"), TWO, tmp_path)
    np.savez(tmp_path / "d.npz", x_train=np.eye(60, 3), y_train=np.arange(60) % 2, x_test=np.eye(2, 3), y_test=[0, 1])
    with pytest.raises(mgs.ArgumentError, match="`model` must be mlp for samples that are no images"):
        compare(dataclasses.replace(SETTINGS, data=str(tmp_path / "d.npz"), model="cnn"), TWO, tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(mgs.BackendError, match=r"'digits' needs the package 'sklearn.datasets'.*pip install .\.\[app\]"):
        compare(SETTINGS, TWO, tmp_path)
    assert not (tmp_path / "records.jsonl").exists()


def test_more_seeds_may_be_asked_for_but_other_settings_need_another_folder(tmp_path, begun):
    compare(SETTINGS, TWO[:1], tmp_path)
    compare(Settings(**{**SETTINGS.to_dict(), "seeds": 3}), TWO[:1], tmp_path)
    assert begun[0] == [("none", 0), ("none", 1), ("none", 2)]
    with pytest.raises(
        mgs.ArgumentError, match=r"`folder` must be a new one for other settings; .* {'epochs': 2}, now {'epochs': 5}"
    ):
        compare(Settings(**{**SETTINGS.to_dict(), "epochs": 5}), TWO, tmp_path)


def test_data_that_have_changed_need_another_folder(tmp_path, begun):
    settings = Settings(**{**SETTINGS.to_dict(), "data": str(tmp_path / "my.npz")})
    for number in (1, 2):
        labels = np.arange(60) % 2
        np.savez(tmp_path / "my.npz", x_train=np.eye(60, 3) * number, y_train=labels, x_test=np.eye(60, 3), y_test=labels)
        if number == 1:
            compare(settings, TWO, tmp_path / "run")
    with pytest.raises(mgs.ArgumentError, match=r"`folder` must be a new one for other settings; .*data_sha256"):
        compare(settings, TWO, tmp_path / "run")


def test_a_command_that_failed_before_it_began_does_not_bar_its_folder(tmp_path):
    with pytest.raises(mgs.ArgumentError, match=r"`samples` must be an integer between 2 and 1078"):
        compare(Settings(**{**SETTINGS.to_dict(), "samples": 5000}), TWO[:1], tmp_path)
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
    with pytest.raises(mgs.ArgumentError, match="`folder` must be a folder that can be written"):
        compare(SETTINGS, TWO, tmp_path / "file" / "run")
    with pytest.raises(mgs.ArgumentError, match="`folder` must be one that mgs compare wrote"):
        load_settings(tmp_path)
    (tmp_path / "settings.json").write_text("3")
    with pytest.raises(mgs.ArgumentError, match=r"the settings in .* are no object"):
        load_settings(tmp_path)
    (tmp_path / "records.jsonl").write_text("3\n")
    with pytest.raises(mgs.ArgumentError, match=r"`path` must hold records of a comparison; line 1 of .* is none"):
        load_records(tmp_path / "records.jsonl")


@pytest.mark.wrong_types
def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(mgs.ArgumentError, match=r"`recipes` must be registered in RECIPES.*\['mine'\]"):
        compare(SETTINGS, [Recipe("mine")], tmp_path)
    for jobs in (0, True, 1.5):
        with pytest.raises(mgs.ArgumentError, match="`jobs` must be an integer of at least 1"):
            compare(SETTINGS, TWO, tmp_path, jobs=jobs)
    for name in ("samples", "epochs", "batch_size", "seeds", "probe_samples"):
        for value in (0, -3, True, 2.5):
            with pytest.raises(mgs.ArgumentError, match=f"`{name}` must be an integer of at least"):
                Settings(**{name: value})
    for tuning, message in ((-1, "an integer of at least 0; got -1"), (5, "at most 4, the strengths that .* to try; got 5")):
        with pytest.raises(mgs.ArgumentError, match=f"`tuning` must be {message}"):
            Settings(tuning=tuning)
    for rate in (-0.1, 1.5, True, "0.4"):
        with pytest.raises(mgs.ArgumentError, match="`noise` must be a probability between 0 and 1"):
            Settings(noise=rate)
    with pytest.raises(mgs.ArgumentError, match="`noise_kind` must be one of symmetric, pair; got 'worst'"):
        Settings(noise_kind="worst")
    for rate in (0.0, -1.0, float("inf"), "fast", True):
        with pytest.raises(mgs.ArgumentError, match="`learning_rate` must be a finite number above 0"):
            Settings(learning_rate=rate)


@pytest.mark.wrong_types
def test_settings_may_be_integers_of_numpy():
    names = ("epochs", "batch_size", "seeds", "probe_samples", "samples")
    assert json.loads(json.dumps(Settings(**dict.fromkeys(names, np.int64(5))).to_dict()))["samples"] == 5
