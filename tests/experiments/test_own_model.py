"""The user's own classifier in a comparison: where it starts, what it is trained on, what is written, and what does not fit."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest

import mgs_core as mgs

pytest.importorskip("onnx")
pytest.importorskip("sklearn")

import onnx
from onnx import TensorProto, helper, numpy_helper

from mgs_core.experiments import RECIPES, Settings, compare, load_dataset
from mgs_core.experiments.compare import best_model
from mgs_core.experiments.models import build
from mgs_core.experiments.networks import make_network

SETTINGS = Settings(samples=120, epochs=1, seeds=1, probe_samples=16, batch_size=32)
BACKENDS = [name for name, installed in mgs.available_backends().items() if installed and name not in ("numpy", "keras")]
DIGITS = load_dataset("digits", samples=120)


def raw(inputs):
    """The pixels as they are in the data file, 0 to 16."""
    return (inputs * DIGITS.deviation + DIGITS.mean).astype(np.float32)


def accuracy(path, shape, test=DIGITS):
    """Share of the test samples that onnxruntime classifies right, from pixels as the data file has them."""
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: raw(test.test_inputs).reshape(-1, *shape)})
    labels = outputs[0] if outputs[0].ndim == 1 else outputs[0].argmax(axis=1)
    return float(np.mean(labels == test.test_labels))


def perceptron(path, last="Softmax", classes=10):
    """A file of the built-in network under other names, on pixels divided by 16, with a last activation or without."""
    proto = build("mlp", (64,), classes, seed=3).plain
    graph = proto.graph
    graph.input[0].name = "flat"
    graph.initializer.append(numpy_helper.from_array(np.float32(16), "pixel"))
    graph.node.insert(0, helper.make_node("Div", ["flat", "pixel"], ["x"]))
    if last:
        graph.node.append(helper.make_node(last, ["logits"], ["shares"]))
        graph.output[0].CopyFrom(helper.make_tensor_value_info("shares", TensorProto.FLOAT, ["n", classes]))
    onnx.save(proto, path)
    return str(path)


def from_torch(path, *, dynamo=False):
    torch = pytest.importorskip("torch")
    nn = torch.nn
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(144, 12), nn.ReLU(), nn.Linear(12, 10)
    )
    if dynamo:
        pytest.importorskip("onnxscript")
        batch = torch.export.Dim("batch", min=1, max=1024)
        torch.onnx.export(
            net.eval(), (torch.randn(2, 1, 8, 8),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False, optimize=False
        ).save(path)
        return (1, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net.eval(), (torch.randn(2, 1, 8, 8),), path, dynamo=False, input_names=["image"], dynamic_axes={"image": {0: "n"}},
            do_constant_folding=False, training=torch.onnx.TrainingMode.PRESERVE,
        )  # fmt: skip
    return (1, 8, 8)


def from_dynamo(path):
    return from_torch(path, dynamo=True)


def from_keras(path):
    keras = pytest.importorskip("keras")
    pytest.importorskip("tf2onnx")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("Keras runs on another backend")
    layers = keras.layers
    keras.utils.set_random_seed(0)
    net = keras.Sequential([
        keras.Input((8, 8, 1)), layers.Conv2D(4, 3, activation="relu"), layers.Flatten(), layers.Dense(12, activation="tanh"),
        layers.Dense(10, activation="softmax"),
    ])  # fmt: skip
    net(np.zeros((1, 8, 8, 1), np.float32))
    net.export(str(path), format="onnx", verbose=False)
    return (8, 8, 1)


def from_sklearn(path):
    skl2onnx = pytest.importorskip("skl2onnx")
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    net = make_pipeline(StandardScaler(), MLPClassifier((12,), random_state=0, solver="lbfgs", max_iter=30, tol=1e9))
    pixels = raw(DIGITS.train_inputs).reshape(-1, 64)
    net.fit(pixels, DIGITS.train_labels)
    path.write_bytes(skl2onnx.to_onnx(net, pixels[:1]).SerializeToString())
    return (64,)


EXPORTERS = (from_torch, from_dynamo, from_sklearn, from_keras)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("export", "names"),
    [
        (from_sklearn, ("none", "dropout", "early-stopping", "mgs-trace", "co-teaching", "mgs-relabel")),
        *(
            pytest.param(export, tuple(RECIPES), marks=pytest.mark.slow)
            for export in (from_torch, from_dynamo, from_sklearn, from_keras)
        ),
    ],
)
def test_a_users_file_is_trained_under_each_recipe_and_written(export, names, tmp_path):
    path, out = tmp_path / "my.onnx", tmp_path / "run"
    shape = export(path)
    before = path.read_bytes()
    records = compare(replace(SETTINGS, model=str(path)), [RECIPES[name] for name in names], out)
    runs = {record["regularizer"]: record["last_test_accuracy"] for record in records if record["event"] == "run"}
    assert tuple(runs) == names
    for name, found in runs.items():
        written = out / "models" / f"{name}.onnx"
        onnx.checker.check_model(str(written), full_check=True)
        assert accuracy(written, shape) == pytest.approx(found, abs=2 / len(DIGITS.test_labels)), name
    assert runs[best_model(records, out).stem] == max(runs.values())
    assert len({(out / "models" / f"{name}.onnx").read_bytes() for name in runs}) == len(runs)  # each is trained in its own way
    assert path.read_bytes() == before


def test_every_seed_starts_from_the_weights_of_the_file(tmp_path):
    path, out = perceptron(tmp_path / "my.onnx"), tmp_path / "run"
    records = compare(replace(SETTINGS, model=path, learning_rate=1e-12, seeds=2), [RECIPES["none"]], out)
    for seed in (0, 1):
        (run,) = (record for record in records if record["event"] == "run" and record["seed"] == seed)
        expected = accuracy(path, (64,), load_dataset("digits", samples=120, seed=seed))
        assert run["last_test_accuracy"] == pytest.approx(expected, abs=2 / len(DIGITS.test_labels))
    start, end = (mgs.onnx.load(file).parameters for file in (path, out / "models" / "none.onnx"))
    for name, value in start.items():
        np.testing.assert_allclose(end[name], value, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_train_a_file_alike(backend, tmp_path):
    settings = replace(SETTINGS, model=perceptron(tmp_path / "my.onnx"))
    recipes = [RECIPES[name] for name in ("dropout", "mgs-trace")]
    one = compare(settings, recipes, tmp_path / "numpy")
    two = compare(replace(settings, backend=backend), recipes, tmp_path / backend)
    for a, b in zip(one, two, strict=True):
        if a["event"] == "epoch":
            assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-3)
            assert b["mgs_trace"] == pytest.approx(a["mgs_trace"], rel=1e-2)


@pytest.mark.parametrize("last", ["", "Softmax", "LogSoftmax"])
def test_scores_are_logits_whatever_comes_last(last, tmp_path):
    data = load_dataset("digits", samples=120)
    network = make_network(perceptron(tmp_path / "my.onnx", last), data, backend="numpy", seed=0).plain
    plain = mgs.onnx.load(build("mlp", (64,), 10, seed=3).plain)
    expected = plain(raw(data.train_inputs).reshape(-1, 64) / np.float32(16))
    found = network(data.train_inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def binary(tmp_path):
    pixels, labels = raw(DIGITS.train_inputs), DIGITS.train_labels % 2
    np.savez(tmp_path / "two.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    return load_dataset(str(tmp_path / "two.npz"))


def test_one_sigmoid_is_the_second_of_two_classes(tmp_path):
    data = binary(tmp_path)
    path = perceptron(tmp_path / "my.onnx", "Sigmoid", classes=1)
    logits = make_network(path, data, backend="numpy", seed=0).plain(data.train_inputs)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shares[:, 1:], mgs.onnx.load(path)(raw(data.train_inputs).reshape(-1, 64)), rtol=1e-4)


def test_probabilities_without_a_softmax_become_logits(tmp_path):
    data = binary(tmp_path)
    path = perceptron(tmp_path / "my.onnx", "Sigmoid", classes=1)
    proto = onnx.load(path)
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "unity"))
    proto.graph.node.extend([
        helper.make_node("Sub", ["unity", "shares"], ["rest"]), helper.make_node("Concat", ["rest", "shares"], ["both"], axis=1)
    ])  # fmt: skip
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("both", TensorProto.FLOAT, ["n", 2]))
    onnx.save(proto, path)
    logits = make_network(path, data, backend="numpy", seed=0).plain(data.train_inputs)
    np.testing.assert_allclose(np.exp(logits), mgs.onnx.load(path)(raw(data.train_inputs).reshape(-1, 64)), rtol=1e-4, atol=1e-6)


def test_masks_multiply_what_dense_layers_take_from_layers(tmp_path):
    network = make_network(perceptron(tmp_path / "my.onnx"), DIGITS, backend="numpy", seed=0)
    model, masks = network.masked()
    assert list(masks.values()) == [256, 256]
    assert list(model.parameters) == list(network.plain.parameters)
    x = DIGITS.train_inputs[:5]
    ones = {name: np.ones((5, size), np.float32) for name, size in masks.items()}
    np.testing.assert_allclose(model({"x": x, **ones}), network.plain(x), rtol=1e-5, atol=1e-6)
    first, last = masks
    np.testing.assert_allclose(model({"x": x, **ones, last: 0 * ones[last]}), 0, atol=1e-7)  # nothing passes, and biases are 0
    half = ones[first].copy()
    half[0] = 0  # the mask of one sample is no other's
    changed = np.any(np.abs(model({"x": x, **ones, first: half}) - network.plain(x)) > 1e-3, axis=1)
    assert changed.tolist() == [True, False, False, False, False]


def linear(path, shape, kind=TensorProto.FLOAT, classes=10, inputs=1, batch="n"):
    weight = numpy_helper.from_array(np.ones((64, classes), helper.tensor_dtype_to_np_dtype(kind)), "w")
    nodes = [helper.make_node("Reshape", ["x", "flat"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    infos = [helper.make_tensor_value_info("x", kind, [batch, *shape])]
    for at in range(1, inputs):
        infos.append(helper.make_tensor_value_info(f"x{at}", kind, ["n", 64]))
        nodes[0].input[0] = "all"
        nodes.insert(0, helper.make_node("Add", ["x", f"x{at}"], ["all"]))
    flat = numpy_helper.from_array(np.array([-1 if batch == "n" else batch, 64]), "flat")
    graph = helper.make_graph(nodes, "g", infos, [helper.make_tensor_value_info("y", kind, None)], [weight, flat])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"shape": (32, 2)},
            r"`model` must take samples of the data's shape \(8, 8\), flat or .*; got \(32, 2\) for",
        ),
        ({"shape": (3, 8, 8)}, r"got \(3, 8, 8\) for its input 'x'"),
        ({"shape": (64,), "classes": 12}, "`model` must return a score for each of the 10 classes of the data; got 12 outputs"),
        ({"shape": (64,), "inputs": 2}, r"`model` must have one floating-point input.*; got 'x' \(float32\), 'x1' \(float32\)"),
        ({"shape": (), "batch": 64}, r"`model` must take a batch of samples, shape \(n, …\); got \(64,\) for 'x'"),
        ({"shape": (64,), "batch": 1}, r"Samples have the shape \(8, 8\); their number must be free"),
        ({"shape": (64,)}, "`model` must have a dense layer behind another layer for dropout; got none. Leave dropout out"),
    ],
)
def test_files_that_do_not_fit_are_refused_before_anything_is_trained(given, message, tmp_path):
    linear(tmp_path / "my.onnx", **given)
    with pytest.raises(mgs.ArgumentError, match=message):
        compare(replace(SETTINGS, model=str(tmp_path / "my.onnx")), [RECIPES["none"], RECIPES["dropout"]], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_refusals(tmp_path):
    counts = perceptron(tmp_path / "counts.onnx")
    proto = onnx.load(counts)
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    proto.graph.node[0].input[0] = "float"
    proto.graph.node.insert(0, helper.make_node("Cast", ["flat"], ["float"], to=1))
    onnx.save(proto, counts)
    with pytest.raises(mgs.ArgumentError, match=r"must have one floating-point input, which takes .*; got 'flat' \(int64\)"):
        make_network(counts, DIGITS, backend="numpy", seed=0)
    swapped = perceptron(tmp_path / "swapped.onnx", "")
    proto = onnx.load(swapped)
    proto.graph.node.append(helper.make_node("Transpose", ["logits"], ["turned"], perm=[1, 0]))
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("turned", TensorProto.FLOAT, [10, "n"]))
    onnx.save(proto, swapped)
    with pytest.raises(mgs.ArgumentError, match=r"`model` must take any number of samples; got 10 outputs for 4"):
        make_network(swapped, DIGITS, backend="numpy", seed=0)
    with pytest.raises(mgs.ArgumentError, match="`model` must be a file that exists"):
        make_network("none.onnx", DIGITS, backend="numpy", seed=0)


def test_a_file_that_has_changed_needs_another_folder(tmp_path):
    path = perceptron(tmp_path / "my.onnx")
    settings = replace(SETTINGS, model=path)
    compare(settings, [RECIPES["none"]], tmp_path / "run")
    perceptron(tmp_path / "my.onnx", "LogSoftmax")
    with pytest.raises(mgs.ArgumentError, match=r"`folder` must be a new one for other settings; .*model_sha256"):
        compare(settings, [RECIPES["none"]], tmp_path / "run")
