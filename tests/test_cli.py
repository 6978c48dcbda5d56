"""The command `mgs`, as a user calls it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import mgs_core as mgs

onnx = pytest.importorskip("onnx")
pytest.importorskip("typer")
cli = pytest.importorskip("mgs_core.cli")
SMALL = ("--samples", "80", "--epochs", "2", "--probe-samples", "20", "--seeds", "1")


@pytest.fixture
def mgs_command(monkeypatch, capsys):
    def call(*arguments, status=0):
        monkeypatch.setattr(sys, "argv", ["mgs", *map(str, arguments)])
        with pytest.raises(SystemExit) as ending:
            cli.main()
        printed = capsys.readouterr()
        assert ending.value.code in ((0, None) if status == 0 else (status,)), printed
        return printed.out if status == 0 else printed.err

    return call


@pytest.fixture
def linear(tmp_path):
    weight = np.random.default_rng(0).normal(size=(3, 2))
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "linear",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.DOUBLE, ["n", 3])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.DOUBLE, ["n", 2])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path / "linear.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_compare_trains_shows_and_writes(mgs_command, tmp_path):
    out = tmp_path / "run"
    printed = mgs_command("compare", *SMALL, "--regularizers", "none,mgs-trace", "--jobs", "1", "--out", out)
    for expected in ("none", "mgs-trace", "report.html", "records.jsonl"):
        assert expected in printed
    records = cli.load_records(out / "records.jsonl")
    assert [record["regularizer"] for record in records if record["event"] == "run"] == ["none", "mgs-trace"]
    assert {"report.html", "figure.png", "records.jsonl", "settings.json"} <= {path.name for path in out.iterdir()}
    (out / "report.html").unlink()
    assert "mgs-trace" in mgs_command("report", out)
    assert (out / "report.html").exists()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_a_terminal_cannot_show_stops_nothing(encoding, tmp_path):
    command = ("compare", *SMALL, "--regularizers", "none", "--jobs", "1", "--out", str(tmp_path))
    found = subprocess.run(
        [sys.executable, "-P", "-c", "from mgs_core.cli import main; main()", *command],
        capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert b"Page: " in found.stdout
    assert re.search(rb"\|\s*-[\d.]+\|", found.stdout), "a number keeps its sign"
    assert (tmp_path / "report.html").exists()


def test_the_page_does_not_wait_for_the_table(mgs_command, tmp_path, monkeypatch):
    mgs_command("compare", *SMALL, "--regularizers", "none", "--jobs", "1", "--out", tmp_path)
    (tmp_path / "report.html").unlink()
    monkeypatch.setattr(cli, "console", None)
    with pytest.raises(AttributeError, match="print"):
        cli._show(tmp_path)
    assert (tmp_path / "report.html").exists()


@pytest.mark.filterwarnings("ignore:The samples predict")
def test_narrow_terminals_cut_no_number(mgs_command, linear, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "console", cli.Console(width=40))
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(30, 3)), y=np.arange(30) % 2)
    for command in (
        ("compare", *SMALL, "--regularizers", "none", "--jobs", "1", "--out", tmp_path),
        ("audit", tmp_path / "data.npz", "--epochs", "1", "--out", tmp_path),
        ("measure", linear, tmp_path / "data.npz"),
        ("check", linear),
        ("backends",),
    ):
        assert "…" not in mgs_command(*command)


def test_failed_runs_are_shown_and_set_the_status(mgs_command, tmp_path, capsys):
    command = ("compare", *SMALL, "--regularizers", "none,dropout", "--learning-rate", "1e8", "--jobs", "2", "--out", tmp_path)
    mgs_command(*command, status=1)
    with pytest.raises(SystemExit) as ending:
        cli.main()
    printed = capsys.readouterr().out
    assert ending.value.code == 1
    assert "none, seed 0: failed. `learning_rate` must be one at which training converges" in printed
    assert "1 run with dropout failed (seed 0) and is left out: `learning_rate`" in printed
    assert "1 failed" in printed
    assert "tries failed runs again" in printed
    assert "Every run failed." in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_two_processes_do_what_one_does(mgs_command, tmp_path):
    for jobs in (1, 2):
        mgs_command("compare", *SMALL, "--regularizers", "none,dropout", "--jobs", jobs, "--out", tmp_path / str(jobs))
    one, two = (cli.load_records(tmp_path / str(jobs) / "records.jsonl") for jobs in (1, 2))

    def figures(records):
        ordered = sorted(records, key=lambda record: (record["regularizer"], record["event"], record.get("epoch", 0)))
        return [(name, value) for record in ordered for name, value in record.items() if "seconds" not in name]

    names = [name for name, _ in figures(one)]
    assert names == [name for name, _ in figures(two)]
    for (name, a), (_, b) in zip(figures(one), figures(two), strict=True):
        assert a == (pytest.approx(b, rel=1e-4) if isinstance(b, float) else b), name


def test_measure_is_the_kernel_of_the_model(mgs_command, linear, tmp_path):
    x, y = np.random.default_rng(1).normal(size=(6, 3)), np.arange(6) % 2
    np.savez(tmp_path / "data.npz", x=x, y=y)
    found = json.loads(mgs_command("measure", linear, tmp_path / "data.npz", "--json"))
    assert found == pytest.approx(mgs.summarize(2 * x @ x.T, y).to_dict(), rel=1e-6)
    assert "effective_rank" in mgs_command("measure", linear, tmp_path / "data.npz", "--output", "sum", "--samples", "4")


def test_measure_takes_the_scores_of_a_classifier_for_its_loss(mgs_command, linear, tmp_path):
    """Of probabilities the cross-entropy would be another."""
    ending = onnx.load(linear)
    ending.graph.node[0].output[0] = "scores"
    ending.graph.node.append(onnx.helper.make_node("Softmax", ["scores"], ["y"]))
    onnx.save(ending, tmp_path / "softmax.onnx")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(1).normal(size=(6, 3)), y=np.arange(6) % 2)
    plain, soft = (
        json.loads(mgs_command("measure", path, tmp_path / "data.npz", "--output", "loss", "--json"))
        for path in (linear, tmp_path / "softmax.onnx")
    )
    assert soft == pytest.approx(plain)


@pytest.mark.parametrize("ending", ["probabilities", "Identity", "Clip", "Flatten"])
def test_measure_takes_what_classifiers_return_for_its_loss(mgs_command, tmp_path, ending):
    """As scikit-learn's and Keras' do: probabilities of one operator, or the score of the second class."""
    random = np.random.default_rng(0)
    x, y, w = random.normal(size=(6, 3)).astype(np.float32), np.arange(6) % 2, random.normal(size=(3, 2)).astype(np.float32)
    make, flat = onnx.helper.make_node, np.ravel(w.T).tolist()
    if ending == "probabilities":
        options = {"coefficients": flat, "intercepts": [0.1, 0.2], "post_transform": "SOFTMAX", "classlabels_ints": [0, 1]}
        nodes, scores = [make("LinearClassifier", ["x"], ["label", "y"], domain="ai.onnx.ml", **options)], x @ w + [0.1, 0.2]
        shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True) - np.eye(2)[y]
        expected = (shares @ shares.T) * (x @ x.T + 1)
    else:
        nodes = [make("Gemm", ["x", "w"], ["score"]), make("Sigmoid", ["score"], ["share"]), make(ending, ["share"], ["y"])]
        shares = 1 / (1 + np.exp(-x @ w[:, 0])) - y
        expected = np.outer(shares, shares) * (x @ x.T)
    graph = onnx.helper.make_graph(
        nodes, "classifier", [onnx.helper.make_tensor_value_info("x", 1, ["n", 3])],
        [onnx.helper.make_tensor_value_info("y", 1, ["n", 2 if ending == "probabilities" else 1])],
        [] if ending == "probabilities" else [onnx.numpy_helper.from_array(w[:, :1], "w")],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in (("", 17), ("ai.onnx.ml", 3))]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=x, y=y)
    found = json.loads(mgs_command("measure", tmp_path / "model.onnx", tmp_path / "data.npz", "--output", "loss", "--json"))
    assert found == pytest.approx(mgs.summarize(expected, y).to_dict(), rel=1e-3)


def test_measure_says_where_there_are_no_classes(mgs_command, linear, tmp_path):
    x, y = np.random.default_rng(1).normal(size=(6, 3)), np.arange(6) % 2

    def found(y):
        np.savez(tmp_path / "data.npz", x=x, y=y)
        return json.loads(mgs_command("measure", linear, tmp_path / "data.npz", "--json"))

    assert found(y.astype(float)) == found(y)
    for values in (y + 0.5, np.eye(2)[y]):
        with pytest.warns(UserWarning, match="`y` names no classes"):
            assert found(values).keys() < found(y).keys()


def test_measure_takes_the_inputs_of_a_model_of_several_by_name(mgs_command, tmp_path):
    values = [onnx.numpy_helper.from_array(np.ones((size, 2), np.float32), f"weight {size}") for size in (3, 4)]
    inputs = [onnx.helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in (("left", 3), ("y", 4))]
    nodes = [
        onnx.helper.make_node("MatMul", ["left", "weight 3"], ["a"]),
        onnx.helper.make_node("MatMul", ["y", "weight 4"], ["b"]),
        onnx.helper.make_node("Add", ["a", "b"], ["out"]),
    ]
    graph = onnx.helper.make_graph(nodes, "two", inputs, [onnx.helper.make_tensor_value_info("out", 1, ["n", 2])], values)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), tmp_path / "two.onnx"
    )
    random = np.random.default_rng(1)
    left, right = random.normal(size=(6, 3)), random.normal(size=(6, 4))
    np.savez(tmp_path / "data.npz", left=left, y=right)
    found = json.loads(mgs_command("measure", tmp_path / "two.onnx", tmp_path / "data.npz", "--json"))
    assert found == pytest.approx(mgs.summarize(2 * (left @ left.T + right @ right.T)).to_dict(), rel=1e-5)
    np.savez(tmp_path / "data.npz", x=left)
    assert "`data` must hold left, y;" in mgs_command("measure", tmp_path / "two.onnx", tmp_path / "data.npz", status=2)


@pytest.mark.parametrize(
    ("command", "arrays", "message"),
    [
        (("audit",), {"x": np.eye(3), "y": np.eye(3)}, ": y.argmax(axis=1)."),
        (("audit",), {"x": np.eye(3), "y": np.arange(2)}, "Give each sample one label."),
        (("audit",), {"x": np.eye(3), "y": np.arange(3)[:, None]}, "Drop the second axis: y.ravel()."),
        (("audit",), {"x": np.eye(3), "y": np.array([0.5, 1, 2])}, "what is measured has none: this is for classifiers."),
        (("audit",), {"x": np.eye(3), "y": np.zeros(3, int)}, "samples of several classes"),
        (("measure", "--output", "loss"), {"x": np.eye(2, 3), "y": np.array(["cat", "dog"])}, "`y` must hold real numbers"),
        (("measure",), {"x": np.eye(3), "y": np.arange(2)}, "`y` must hold a label for each of the 3 samples of `x`; got 2"),
        (("measure",), {"x": np.array([["a"] * 3] * 2)}, "`x` must hold real numbers"),
        (("measure",), {"x": np.float64(3.0)}, "`data` must hold samples along the first axis of 'x'"),
        (("measure",), {"x": np.eye(2, 3), "y": np.int64(3)}, "`data` must hold samples along the first axis of 'y'"),
        (("audit",), {"x": np.float64(3.0), "y": np.int64(3)}, "`data` must hold samples along the first axis of 'x'"),
        (("audit",), {"images": np.eye(2), "labels": np.arange(2)}, "`data` must hold x, y;"),
        (("audit",), {"x": np.eye(3), "y": np.arange(3) - 1}, "numpy.unique(y, return_inverse=True)[1]"),
        (("audit",), {"x": np.eye(3), "y": np.array(["a", "b"])}, "Give each sample one label."),
        (("audit",), {"x": np.eye(3), "y": np.arange(3), "names": np.array(["a", "b"])}, "each of the 3 classes of `y`; got"),
    ],
)
def test_data_that_do_not_fit_are_named(mgs_command, linear, tmp_path, command, arrays, message):
    np.savez(tmp_path / "data.npz", **arrays)
    name, *options = command
    place = (linear, tmp_path / "data.npz") if name == "measure" else (tmp_path / "data.npz", "--out", tmp_path / "out")
    printed = mgs_command(name, *place, *options, status=2)
    assert printed.startswith("error: ")
    assert message in printed


def test_labels_of_text_are_measured_by(mgs_command, linear, tmp_path):
    np.savez(tmp_path / "data.npz", x=np.eye(4, 3), y=np.array(["a", "b", "a", "b"]))
    for backend in ("numpy", *(name for name in ("torch", "jax") if mgs.available_backends()[name])):
        found = json.loads(mgs_command("measure", linear, tmp_path / "data.npz", "--json", "--backend", backend))
        assert {"same_class_cosine", "other_class_cosine"} <= set(found)


def test_measuring_needs_neither_a_framework_nor_the_packages_of_the_report(linear, tmp_path):
    np.savez(tmp_path / "data.npz", x=np.eye(4, 3))
    absent = ("matplotlib", "jinja2", "sklearn", "scipy", "torch", "jax", "tensorflow", "keras")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent!r}))  # None makes their import fail
sys.argv = ["mgs", "measure", {str(linear)!r}, {str(tmp_path / "data.npz")!r}, "--json"]
from mgs_core.cli import main
main()
"""
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["trace"] == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("absent", "command", "message"),
    [
        (("typer",), "backends", "The command mgs needs the package 'typer'"),
        (("onnx",), "backends", "mgs_core.onnx needs the package 'onnx'"),
        (("matplotlib",), "compare", "The report needs the package 'matplotlib'"),
        (("jinja2",), "compare", "The report needs the package 'jinja2'"),
        (("sklearn", "sklearn.datasets"), "compare", "The data set 'digits' needs the package 'sklearn"),
        (("matplotlib",), "audit digits", "The report needs the package 'matplotlib'"),
    ],
)
def test_missing_packages_are_named_before_anything_is_trained(absent, command, message, tmp_path):
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent!r}))
sys.argv = ["mgs", *{command.split()!r}, *(["--out", {str(tmp_path / "run")!r}] if {command!r} != "backends" else [])]
from mgs_core._command import main
main()
"""
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert found.returncode == 2
    assert f"error: {message}" in found.stderr
    assert 'pip install ".[' in found.stderr
    assert found.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "records.jsonl").exists()


def test_warnings_are_one_line(mgs_command, tmp_path, recwarn):
    import warnings

    command = ("compare", *SMALL, "--regularizers", "none", "--jobs", "1", "--out", tmp_path)
    mgs_command(*command)
    assert warnings.formatwarning("text", UserWarning, "file.py", 3) == "warning: text\n"


def test_check_and_backends_print_tables(mgs_command, linear):
    printed = mgs_command("check", linear)
    assert "outer" in printed
    assert "statistics" in printed
    assert "numpy" in mgs_command("backends")


def test_audit_lists_and_writes(mgs_command, tmp_path):
    printed = mgs_command("audit", "digits", "--samples", "150", "--epochs", "1", "--out", tmp_path / "audit")
    assert "audit.html" in printed
    assert {path.name for path in (tmp_path / "audit").iterdir()} == {"audit.html", "suspects.csv", "weights.npy"}
    y = np.arange(30) % 3
    np.savez(tmp_path / "data.npz", x_train=np.eye(4)[y] + 0.1 * np.random.default_rng(0).normal(size=(30, 4)), y_train=y)
    options = ("--epochs", "1", "--out", tmp_path / "other")
    assert "of 30 samples better" in mgs_command("audit", tmp_path / "data.npz", *options)
    printed = mgs_command("audit", tmp_path / "data.npz", *options, "--block", "10")
    assert "Judged in 3 random blocks" in printed


@pytest.mark.parametrize("written", ["labels", "names"])
def test_audit_calls_classes_by_their_names(mgs_command, tmp_path, written):
    random, names = np.random.default_rng(0), np.array(["[cat]", "dog", "owl"])
    y = np.arange(60) % 3
    x = np.eye(4)[y] + 0.1 * random.normal(size=(60, 4))
    y[0] = 1
    arrays = {"y": names[y]} if written == "labels" else {"y": y, "names": names}
    np.savez(tmp_path / "data.npz", x=x, **arrays)
    printed = mgs_command("audit", tmp_path / "data.npz", "--out", tmp_path)
    first = (tmp_path / "suspects.csv").read_text(encoding="utf-8").splitlines()[1]
    assert first.startswith("0,dog,[cat],")
    assert re.search(r"0 +dog +\[cat\] +\+", printed)
    assert "<bdi>[cat]</bdi>" in (tmp_path / "audit.html").read_text(encoding="utf-8")


def test_audit_numbers_classes_that_only_the_model_knows(mgs_command, tmp_path, monkeypatch):
    np.savez(tmp_path / "data.npz", x=np.eye(4), y=np.array(["a", "b", "a", "b"]))
    zero, given = np.zeros(4), np.array([0, 1, 0, 1])
    found = mgs.Audit(zero, given, np.array([2, 1, 0, 1]), zero > 0, zero, zero, zero + 1)
    monkeypatch.setattr(mgs, "audit", lambda *_, **__: found)
    mgs_command("audit", tmp_path / "data.npz", "--out", tmp_path)
    assert (tmp_path / "suspects.csv").read_text(encoding="utf-8").splitlines()[1].startswith("0,a,2,")


def test_audit_refuses_a_folder_before_it_trains(mgs_command, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(mgs, "audit", None)
    command = ("audit", "digits", "--out")
    assert "`out` must be a folder that can be written" in mgs_command(*command, tmp_path / "file", status=2)
    (tmp_path / "old" / "suspects.csv").mkdir(parents=True)
    assert "suspects.csv is a folder). Choose another." in mgs_command(*command, tmp_path / "old", status=2)
    monkeypatch.setattr("secrets.token_hex", lambda size: "x" * 300)  # no name of a file; root may write everywhere
    assert "`out` must be a folder that can be written" in mgs_command(*command, tmp_path / "new", status=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "--regularizers", "prayer"), "`regularizers` must be among"),
        (("compare", "--backend", "theano"), "`backend` must be one of numpy"),
        (("compare", "--data", "none.npz"), "`data` must be a file that exists; got 'none.npz'"),
        (("compare", "--noise", "2"), "`noise` must be a probability"),
        (("compare", "--model", "oracle"), "`model` must be one of mlp, cnn, or the path of an .onnx file; got 'oracle'"),
        (("compare", "--epochs", "0"), "`epochs` must be an integer of at least 1; got 0"),
        (("compare", "--tuning", "9"), "`tuning` must be at most 4"),
        (("compare", "--noise-kind", "worst"), "`noise_kind` must be one of symmetric, pair; got 'worst'"),
        (("compare", "--out", "file"), "`out` must be a folder that can be written"),
        (("report", "nowhere"), "`run` must be a folder"),
        (("audit", "none.npz"), "`data` must be a file that exists"),
        (("audit", "digits", "--model", "resnet"), "`model` must be one of mlp, cnn, or the path of an .onnx file; got 'resnet'"),
        (("audit", "nan.npz"), "`x` must be finite"),
        (("audit", "text.npz"), "is no archive such as numpy.savez writes"),
        (("audit", "halves.npz"), "`y` must be integers from 0"),
        (("measure", "linear.onnx", "letters.npz", "--output", "target"), "`y` must"),
        (("measure", "none.onnx", "none.npz"), "`data` must be a file that exists"),
        (("check", "none.onnx"), "none.onnx"),
    ],
)
def test_errors_are_one_line_and_status_2(mgs_command, arguments, message, tmp_path, monkeypatch, linear):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "nan.npz", x=np.full((4, 3), np.nan), y=np.arange(4))
    np.savez(tmp_path / "letters.npz", x=np.eye(4, 3), y=np.array(list("abab")))
    np.savez(tmp_path / "halves.npz", x=np.eye(4, 3), y=np.arange(4) / 2)
    extra = ("--jobs", "1", *(() if "--out" in arguments else ("--out", "run"))) if arguments[0] == "compare" else ()
    printed = mgs_command(*arguments, *extra, status=2)
    assert printed.startswith("error: ")
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [("audit", "digits", "--samples", "-5"), ("audit", "digits", "--shown", "-1"), ("measure", "m", "d", "--samples", "-3")],
)
def test_negative_numbers_do_not_count_from_the_end(mgs_command, arguments):
    assert f"Invalid value for '{arguments[-2]}'" in mgs_command(*arguments, status=2)


def test_a_missing_framework_says_which_extra_to_install(mgs_command, monkeypatch):
    from mgs_core import _registry

    monkeypatch.setitem(_registry._BACKENDS, "absent", ("no_such_package", frozenset()))
    assert 'pip install ".[absent]" -c constraints.txt' in mgs_command("compare", "--backend", "absent", status=2)


def test_an_interrupt_names_what_was_not_begun(tmp_path, mgs_command, monkeypatch, capsys):
    whole = cli.run_comparison

    def interrupted(settings, recipes, folder, **options):
        whole(settings, recipes[:1], folder, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_comparison", interrupted)
    monkeypatch.setattr(
        sys, "argv", ["mgs", "compare", *SMALL, "--regularizers", "none,dropout,mixup", "--jobs", "1", "--out", str(tmp_path)]
    )
    with pytest.raises(SystemExit):
        cli.main()
    assert "Not begun: dropout, mixup." in capsys.readouterr().out


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupt_leaves_what_was_done_readable_and_resumable(tmp_path, jobs, mgs_command):
    out = tmp_path / "run"
    command = ["compare", "--samples", "200", "--epochs", "4", "--probe-samples", "20", "--seeds", "40", "--regularizers", "none"]
    # what a job in the background starts ignores interrupts
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from mgs_core.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command, "--jobs", str(jobs), "--out", str(out)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    until = time.monotonic() + 60
    while time.monotonic() < until and not any(r["event"] == "run" for r in cli.load_records(out / "records.jsonl")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "Interrupted" in printed
    assert (out / "report.html").exists()
    done = {r["seed"] for r in cli.load_records(out / "records.jsonl") if r["event"] == "run"}
    assert 0 < len(done) < 40
    assert "Not begun" not in printed
    mgs_command(*command[:8], str(max(done) + 1), *command[9:], "--jobs", "1", "--out", out)
    after = [r["seed"] for r in cli.load_records(out / "records.jsonl") if r["event"] == "run"]
    assert sorted(after) == list(range(max(done) + 1))
