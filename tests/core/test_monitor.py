"""The monitor: schedule, recorder and sinks; and the registry."""

from __future__ import annotations

import json
import math
import sys
import types

import numpy as np
import pytest

import mgs_core as mgs
from mgs_core import _registry

MODEL = mgs.FunctionalModel(lambda p, x: x @ p["w"], {"w": np.ones((3, 2))})
PROBE = np.random.default_rng(0).normal(size=(5, 3))


def test_recorder_measures_on_schedule_and_writes(tmp_path):
    path = tmp_path / "deep" / "run.jsonl"
    seen = []
    with mgs.JSONLinesSink(path) as sink:
        recorder = mgs.Recorder(
            PROBE,
            labels=np.arange(5) % 2,
            schedule=mgs.Schedule(every=2, start=1, stop=5),
            sinks=[sink, mgs.CallbackSink(lambda numbers, step: seen.append((step, numbers)))],
        )
        measured = [recorder(MODEL, step, loss=0.5) is not None for step in range(8)]
    assert measured == [False, True, False, True, False, True, False, False]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == recorder.history
    assert [line["step"] for line in lines] == [1, 3, 5]
    assert [step for step, _ in seen] == [1, 3, 5]
    expected = mgs.summarize(mgs.kernel(MODEL, PROBE), np.arange(5) % 2).to_dict()
    assert {f"mgs_{name}": value for name, value in expected.items()}.items() <= lines[0].items()
    assert lines[0]["loss"] == 0.5


def test_a_model_that_diverges_or_dies_is_recorded_and_warned_of_once(tmp_path):
    def scaled(scale):
        return mgs.FunctionalModel(lambda p, x: scale * (x @ p["w"]), {"w": np.ones((3, 2))})

    with mgs.JSONLinesSink(tmp_path / "run.jsonl") as sink:
        recorder = mgs.Recorder(PROBE, labels=np.arange(5) % 2, sinks=[sink])
        with pytest.warns(RuntimeWarning, match="NaN is recorded: .* must have a positive trace; got 0.0") as warned:
            summaries = [recorder(scaled(scale), step) for step, scale in enumerate((1.0, 0.0, np.nan, np.inf, 1.0))]
    assert len(warned) == 1
    assert [summary.trace for summary in summaries[:2]] == [np.trace(mgs.kernel(MODEL, PROBE)), 0.0]
    assert summaries[4] == summaries[0]
    assert all(len(record) == len(recorder.history[0]) for record in recorder.history)
    for record in recorder.history[1:4]:
        assert np.isnan([record["mgs_log_determinant"], record["mgs_mean_cosine"], record["mgs_same_class_cosine"]]).all()
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["mgs_alignment"] is None for line in lines] == [False, True, True, True, False]
    with pytest.raises(mgs.ArgumentError, match="at least 2 samples"):  # what the caller gets wrong is refused as before
        mgs.Recorder(PROBE[:1])(MODEL, 0)


def test_numbers_may_be_arrays_of_one_number(tmp_path):
    seen = []
    with mgs.JSONLinesSink(tmp_path / "run.jsonl") as sink:
        recorder = mgs.Recorder(PROBE, sinks=[sink, mgs.CallbackSink(lambda numbers, step: seen.append(numbers))])
        recorder(MODEL, 0, loss=np.float32(0.5), count=np.int64(3), last=np.array([2.0]), note="warm-up", many=np.zeros(2))
    (line,) = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert (line["loss"], line["count"], line["last"], line["note"], line["many"]) == (0.5, 3, 2.0, "warm-up", "[0. 0.]")
    assert {"loss": 0.5, "count": 3.0, "last": 2.0}.items() <= seen[0].items()
    assert not {"note", "many"} & seen[0].keys()


def test_scalars_of_a_framework_and_nested_values_are_written_as_json(tmp_path):
    tf = pytest.importorskip("tensorflow")
    record = {"step": 0, "loss": tf.constant(0.5), "diverged": float("nan"), "settings": {"rate": np.float64(0.1)}}
    with mgs.JSONLinesSink(tmp_path / "run.jsonl") as sink:
        sink.write(record)
    text = (tmp_path / "run.jsonl").read_text()
    assert "NaN" not in text
    assert json.loads(text) == {"step": 0, "loss": 0.5, "diverged": None, "settings": {"rate": 0.1}}
    seen = []
    mgs.CallbackSink(lambda numbers, step: seen.append(numbers)).write(record)
    assert seen[0]["loss"] == 0.5


@pytest.mark.wrong_types
def test_a_schedule_of_another_type_is_refused():
    with pytest.raises(mgs.ArgumentError, match=r"`every` must be an integer of at least 1; got 2\.5"):
        mgs.Recorder(PROBE, schedule=2.5)


@pytest.mark.parametrize("arguments", [{"every": 0}, {"every": True}, {"start": -1}, {"stop": 1.5}])
@pytest.mark.wrong_types
def test_bad_schedules_are_refused(arguments):
    with pytest.raises(mgs.ArgumentError, match=f"`{next(iter(arguments))}` must be an integer"):
        mgs.Schedule(**arguments)


@pytest.mark.wrong_types
def test_integers_may_be_those_of_numpy(tmp_path):
    two = np.int64(2)
    schedule = mgs.Schedule(every=two, start=two, stop=np.int8(4))
    assert [step for step in range(8) if schedule(step)] == [2, 4]
    options = {"output": "random", "probes": two, "seed": np.uint8(3), "chunk_size": two}
    expected = mgs.kernel(MODEL, PROBE, output="random", probes=2, seed=3)
    assert np.allclose(mgs.kernel(MODEL, PROBE, **options), expected)
    recorder = mgs.Recorder(PROBE, schedule=two, **options)
    assert recorder(MODEL, 0).trace == pytest.approx(np.trace(expected))
    assert mgs.suspicion(np.kron(np.eye(2), np.ones((4, 4))), np.repeat([0, 1], 4), classes=two, rounds=two).scores.shape == (8,)
    for wrong in (np.bool_(True), 2.0, "2"):
        with pytest.raises(mgs.ArgumentError, match="`chunk_size` must be an integer of at least 1"):
            mgs.kernel(MODEL, PROBE, chunk_size=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ouput": "trace"}, "`kernel_options` must be among output, transform, loss, .*; got ouput"),
        ({"output": "trase"}, "`output` must be one of trace"),
        ({"transform": "sofmax"}, "`transform` must be one of identity"),
        ({"output": "loss"}, "`targets` must be given"),
        ({"output": "random", "probes": 0}, "`probes` must be an integer of at least 1"),
        ({"chunk_size": 0}, "`chunk_size` must be an integer of at least 1"),
    ],
)
@pytest.mark.wrong_types
def test_options_are_refused_before_the_first_measurement(options, message):
    with pytest.raises(mgs.ArgumentError, match=message):
        mgs.Recorder(PROBE, **options)


def test_unwritable_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(mgs.ArgumentError, match="`path` must be a file that can be written"):
        mgs.JSONLinesSink(tmp_path / "file" / "run.jsonl")


def test_tracker_sinks_call_the_tracker(monkeypatch):
    calls = []
    wandb = types.ModuleType("wandb")
    wandb.log = lambda numbers, step: calls.append((numbers, step))
    mlflow = types.ModuleType("mlflow")
    mlflow.log_metrics = lambda numbers, step: calls.append((numbers, step))
    board = types.ModuleType("tensorboardX")

    class SummaryWriter:
        def __init__(self, **options):
            calls.append(options)

        def add_scalar(self, key, value, step):
            calls.append(({key: value}, step))

        def close(self):
            calls.append("closed")

    board.SummaryWriter = SummaryWriter
    for module in (wandb, mlflow, board):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("wandb", "mlflow"):
        mgs.tracker_sink(name).write({"step": 2, "mgs_trace": 1.0})
    sink = mgs.tracker_sink("tensorboard", log_dir="x")
    sink.write({"step": 2, "mgs_trace": 1.0})
    sink.close()
    assert calls == [({"mgs_trace": 1.0}, 2)] * 2 + [{"log_dir": "x"}, ({"mgs_trace": 1.0}, 2), "closed"]


def test_trackers_that_are_missing_or_unknown(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(mgs.BackendError, match="must be a tracker that is installed"):
        mgs.tracker_sink("wandb")
    with pytest.raises(mgs.ArgumentError, match="`name` must be one of tensorboard"):
        mgs.tracker_sink("paper")
    with pytest.raises(mgs.ArgumentError, match="`options` must be empty for 'wandb'; got project"):
        mgs.tracker_sink("wandb", project="mine")


def test_numbers_within_lists_are_valid_json(tmp_path):
    with mgs.JSONLinesSink(tmp_path / "run.jsonl") as sink:
        sink.write({"step": 0, "list": [math.nan, 1.0], "dict": {"a": math.inf, "b": [2]}})
    written = json.loads((tmp_path / "run.jsonl").read_text(), parse_constant=pytest.fail)
    assert written == {"step": 0, "list": [None, 1.0], "dict": {"a": None, "b": [2]}}


@pytest.mark.parametrize("size", [1e-290, 1e290])
def test_figures_of_any_size_are_recorded(size):
    model = mgs.FunctionalModel(lambda p, x: x @ p["w"], {"w": np.zeros((2, 1))})
    x = np.array([[1.0, 0.5], [0.0, 1.0], [1.0, 1.0]])
    recorder = mgs.Recorder(x * size**0.5, labels=[0, 1, 1])
    large, plain = recorder(model, 0), mgs.summarize(x @ x.T, [0, 1, 1])
    assert large.trace == pytest.approx(plain.trace * size)
    assert large.magnitude == pytest.approx(plain.magnitude + 3 * np.log(size))
    for name in ("similarity", "effective_rank", "mean_cosine", "same_class_cosine", "alignment"):
        assert getattr(large, name) == pytest.approx(getattr(plain, name), rel=1e-6)


class Series:
    """Be labels as those of pandas: with a shape, and made an array of by NumPy alone."""

    shape, dtype = (4,), "int64"

    def __array__(self, dtype=None, copy=None):
        return np.array([0, 1, 0, 1], dtype=dtype)


@pytest.mark.wrong_types
def test_labels_may_be_what_numpy_makes_an_array_of():
    rows = np.array([[1.0, 0.1], [0.1, 1.0], [1.0, 0.0], [0.0, 1.0]])
    for labels in (Series(), [[0], [1], [0], [1]]):
        assert mgs.summarize(rows @ rows.T, labels).same_class_cosine == pytest.approx(
            mgs.summarize(rows @ rows.T, [0, 1, 0, 1]).same_class_cosine
        )
        assert mgs.suspicion(rows @ rows.T, labels).suggested.tolist() == [0, 1, 0, 1]


def test_backends_are_found_or_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "autograd_by_hand", types.ModuleType("autograd_by_hand"))
    monkeypatch.setitem(_registry._BACKENDS, "by_hand", ("autograd_by_hand", frozenset()))
    assert mgs.available_backends()["by_hand"] is False
    assert mgs.get_backend(np.zeros(2)) is mgs.get_backend("numpy") is mgs.get_backend(MODEL)
    assert mgs.available_backends()["numpy"]
    with pytest.raises(mgs.BackendError, match="`backend` must be one of numpy"):
        mgs.get_backend("theano")
    monkeypatch.setitem(_registry._BACKENDS, "absent", ("no_such_package", frozenset()))
    with pytest.raises(mgs.BackendError, match=r'pip install "\.\[absent\]" -c constraints'):
        mgs.get_backend("absent")


def test_arrays_without_namespace_are_refused():
    from mgs_core._namespace import array_namespace

    with pytest.raises(mgs.ArgumentError, match="`arrays` must be arrays of one framework; got none"):
        array_namespace(None, 1.0)


@pytest.mark.parametrize("output", ["target", "loss"])
def test_a_head_that_needs_targets_takes_the_labels(output):
    model = mgs.FunctionalModel(lambda p, x: x @ p["w"], {"w": np.eye(3)})
    labels = np.arange(5) % 3
    found, given = (mgs.Recorder(PROBE, targets, labels=labels, output=output) for targets in (None, labels))
    assert found(model, 0) == given(model, 0) is not None
    listed = mgs.Recorder(PROBE, labels=labels.tolist(), output=output)
    assert listed(model, 0) == found(model, 0)
    for options in ({}, {"labels": ["a", "b", "c", "a", "b"]}, {"labels": labels, "loss": lambda y, t: (y - t) ** 2}):
        if output == "loss" or "loss" not in options:
            with pytest.raises(mgs.ArgumentError, match="`targets` must be given"):
                mgs.Recorder(PROBE, output=output, **options)
