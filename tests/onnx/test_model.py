"""What `load` finds and `save` writes: parameters through exporters' habits, every backend, penalties, other exporters."""

from __future__ import annotations

import contextlib
import copy
import pickle

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import mgs_core as mgs
from mgs_core.experiments.models import build

RANDOM = np.random.default_rng(0)
BACKENDS = [name for name, installed in mgs.available_backends().items() if installed and name != "keras"]


def draw(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def model(nodes, tensors, shape=(4,), outputs=("y",), kind=TensorProto.FLOAT):
    kind_out = TensorProto.FLOAT if kind == TensorProto.INT64 else kind
    inputs = [helper.make_tensor_value_info("x", kind, ["n", *shape])]
    results = [helper.make_tensor_value_info(name, kind_out, ["n", "c"]) for name in outputs]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "g", inputs, results, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def node(operator, inputs, outputs, **attributes):
    return helper.make_node(operator, inputs, outputs, **attributes)


def rows(loaded, x) -> np.ndarray:
    """Per-sample gradients by central differences: (n, c·p)."""
    found = []
    for sample in x:
        columns = []
        for name, value in loaded.parameters.items():
            for place in np.ndindex(value.shape):
                moved = []
                for step in (1e-5, -1e-5):
                    shifted = value.copy()
                    shifted[place] += step
                    moved.append(loaded.function({**loaded.parameters, name: shifted}, sample[None])[0])
                columns.append((moved[0] - moved[1]) / 2e-5)
        found.append(np.stack(columns).T.ravel())
    return np.stack(found)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of JAX, about its own internals
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_kernel_is_the_same_on_every_backend(backend, name):
    proto = build(name, (4, 4), 3, seed=0).plain
    x = RANDOM.normal(size=(5, 4, 4))
    context = contextlib.nullcontext()
    if backend == "jax":
        import jax

        context = jax.experimental.enable_x64() if hasattr(jax.experimental, "enable_x64") else jax.enable_x64(True)
    expected = mgs.kernel(mgs.onnx.load(proto, dtype="float64"), x)
    with context:
        loaded = mgs.onnx.load(proto, backend=backend, dtype="float64")
        get = mgs.get_backend(backend)
        found = get.to_numpy(mgs.kernel(loaded, get.asarray(x)))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * expected.max())


def test_a_parameter_is_found_through_views_and_not_where_constants_stand():
    tensors = {
        "mean": draw(4), "w": draw(3, 4), "gain": draw(1, 3), "shift": draw(3), "half": np.float32(0.5), "eps": draw(1),
        "low": np.float32(-1.0), "high": np.float32(1.0), "mask": np.array([0, -np.inf, 0], np.float32), "v": draw(3, 1),
        "bias": draw(1), "running_mean": draw(3), "shape": np.array([3], np.int64),
    }  # fmt: skip
    nodes = [
        node("Sub", ["x", "mean"], ["x0"]), node("Transpose", ["w"], ["wt"], perm=[1, 0]), node("MatMul", ["x0", "wt"], ["h0"]),
        node("Reshape", ["gain", "shape"], ["g"]), node("Mul", ["h0", "g"], ["h1"]), node("Identity", ["shift"], ["s"]),
        node("Add", ["s", "h1"], ["h2"]), node("Mul", ["h2", "half"], ["h3"]), node("Add", ["h3", "eps"], ["h4"]),
        node("Clip", ["h4", "low", "high"], ["h5"]), node("Sub", ["h5", "running_mean"], ["h6"]),
        node("Add", ["h6", "mask"], ["h7"]),
        node("Softmax", ["h7"], ["h8"]), node("MatMul", ["h8", "v"], ["h9"]), node("Add", ["h9", "bias"], ["y"]),
    ]  # fmt: skip
    proto = model(nodes, tensors)
    assert list(mgs.onnx.load(proto).parameters) == ["w", "gain", "shift", "v", "bias"]
    assert list(mgs.onnx.load(proto, parameters=lambda name: name in ("mean", "eps")).parameters) == ["mean", "eps"]
    loaded = mgs.onnx.load(proto, dtype="float64")
    x = RANDOM.normal(size=(3, 4))
    gradients = rows(loaded, x)
    np.testing.assert_allclose(mgs.kernel(loaded, x), gradients @ gradients.T, rtol=1e-6)


@pytest.mark.parametrize(("gain", "shift"), [("val_9", "val_12"), ("/norm/Constant_output_0", "/norm/Constant_1_output_0")])
def test_the_gain_that_an_exporter_writes_for_a_norm_without_one_is_no_parameter(gain, shift):
    def loaded(gain, shift, factor=1.0):
        tensors = {"w": draw(4, 6), gain: factor * np.ones(2, np.float32), shift: np.zeros(2, np.float32)}
        tensors |= {"groups": np.array([0, 2, 3], np.int64), "flat": np.array([0, 6], np.int64)}
        nodes = [
            node("MatMul", ["x", "w"], ["h"]), node("Reshape", ["h", "groups"], ["g"]),
            node("InstanceNormalization", ["g", gain, shift], ["n"]), node("Reshape", ["n", "flat"], ["y"]),
        ]  # fmt: skip
        return list(mgs.onnx.load(model(nodes, tensors)).parameters)

    assert loaded(gain, shift) == ["w"]
    assert loaded(gain, shift, factor=2.0) == ["w", gain]
    assert loaded("norm.weight", "norm.bias") == ["w", "norm.weight", "norm.bias"]  # as of a model that is not trained yet


def test_named_parameters_that_move_nothing_are_refused():
    proto = model([node("MatMul", ["x", "w"], ["y"]), node("MatMul", ["x", "v"], ["z"])], {"w": draw(4, 2), "v": draw(4, 2)})
    with pytest.raises(
        mgs.ArgumentError, match=r"must name initialisers on which the output depends; got \['v'\], on which it does"
    ):
        mgs.onnx.load(proto, parameters=["w", "v"])
    assert list(mgs.onnx.load(proto, parameters=lambda name: True).parameters) == ["w"]


def tied() -> onnx.ModelProto:
    table = draw(5, 3)
    return model(
        [node("Gather", ["table", "x"], ["h"]), node("Tanh", ["h"], ["t"]), node("MatMul", ["t", "out"], ["y"])],
        {"table": table, "out": table.T.copy()}, shape=(), kind=TensorProto.INT64,
    )  # fmt: skip


def test_a_transposed_copy_of_an_embedding_is_tied(tmp_path):
    loaded = mgs.onnx.load(tied(), dtype="float64")
    assert list(loaded.parameters) == ["table"]
    ids = np.array([0, 3, 3, 1])
    gradients = rows(loaded, ids)
    np.testing.assert_allclose(mgs.kernel(loaded, ids), gradients @ gradients.T, rtol=1e-6)
    changed = {"table": loaded.parameters["table"] + 1}
    mgs.onnx.save(loaded, tmp_path / "tied.onnx", parameters=changed)
    again = mgs.onnx.load(tmp_path / "tied.onnx", dtype="float64")
    np.testing.assert_allclose(again(ids), loaded.function(changed, ids), rtol=1e-6)


def recurrent() -> onnx.ModelProto:
    tensors = {
        "w": draw(1, 20, 3),
        "r": draw(1, 20, 5),
        "b": np.concatenate([draw(1, 20), np.zeros((1, 20), np.float32)], axis=1),
    }
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[1, 0, 2]), node("LSTM", ["t", "w", "r", "b"], ["", "h"], hidden_size=5),
        node("Squeeze", ["h", "first"], ["y"]),
    ]  # fmt: skip
    return model(nodes, {**tensors, "first": np.array([0], np.int64)}, shape=(2, 3))


def test_the_zeros_of_a_second_bias_are_no_parameter(tmp_path):
    loaded = mgs.onnx.load(recurrent(), dtype="float64")
    assert loaded.parameters["b"].shape == (1, 20)
    x = RANDOM.normal(size=(3, 2, 3))
    gradients = rows(loaded, x)
    np.testing.assert_allclose(mgs.kernel(loaded, x), gradients @ gradients.T, rtol=1e-6)
    mgs.onnx.save(loaded, tmp_path / "lstm.onnx")
    assert onnx.load(tmp_path / "lstm.onnx").graph.initializer[2].dims == [1, 40]
    np.testing.assert_allclose(mgs.onnx.load(tmp_path / "lstm.onnx", dtype="float64")(x), loaded(x), rtol=1e-6)


def test_weights_that_a_loop_hands_on_are_parameters():
    inside = [helper.make_tensor_value_info(name, kind, None) for name, kind in (("i", 7), ("c", 9), ("h", 1), ("w", 1))]
    body = helper.make_graph(
        [node("MatMul", ["h", "w"], ["m"]), node("Tanh", ["m"], ["h1"]), node("Identity", ["w"], ["w1"]),
         node("Identity", ["c"], ["c1"])],
        "body", inside, [helper.make_tensor_value_info(name, kind, None) for name, kind in (("c1", 9), ("h1", 1), ("w1", 1))],
    )  # fmt: skip
    nodes = [node("Loop", ["trips", "", "x", "weight"], ["y", "unused"], body=body)]
    loaded = mgs.onnx.load(model(nodes, {"trips": np.array(3), "weight": draw(4, 4)}), dtype="float64")
    assert list(loaded.parameters) == ["weight"]
    x, w = RANDOM.normal(size=(3, 4)), loaded.parameters["weight"]
    np.testing.assert_allclose(loaded(x), np.tanh(np.tanh(np.tanh(x @ w) @ w) @ w))
    gradients = rows(loaded, x)
    np.testing.assert_allclose(mgs.kernel(loaded, x), gradients @ gradients.T, rtol=1e-6)


def test_gradient_of_a_penalty_is_that_of_central_differences():
    loaded = mgs.onnx.load(build("cnn", (4, 4), 3, seed=0).plain, dtype="float64")
    x, penalty = RANDOM.normal(size=(4, 4, 4)), mgs.Penalty("log_determinant", strength=1.0)

    def value(parameters):
        return penalty(mgs.kernel(mgs.FunctionalModel(loaded.function, parameters), x, differentiable=True))

    _, gradient = mgs.get_backend("numpy").value_and_gradient(value)(loaded.parameters)
    for name, array in loaded.parameters.items():
        direction = RANDOM.normal(size=array.shape)
        moved = [float(value({**loaded.parameters, name: array + step * direction})) for step in (1e-6, -1e-6)]
        np.testing.assert_allclose(np.sum(gradient[name] * direction), (moved[0] - moved[1]) / 2e-6, rtol=1e-5, atol=1e-9)


def test_saved_models_run_elsewhere(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    loaded = mgs.onnx.load(build("cnn", (8, 8), 10, seed=0).plain)
    changed = {name: value + 0.1 for name, value in loaded.parameters.items()}
    mgs.onnx.save(loaded, tmp_path / "saved.onnx", parameters=changed)
    onnx.checker.check_model(onnx.load(tmp_path / "saved.onnx"), full_check=True)
    x = draw(3, 8, 8)
    (found,) = runtime.InferenceSession(tmp_path / "saved.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x})
    np.testing.assert_allclose(found, loaded.function(changed, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pickle_computes_the_same(backend):
    loaded = mgs.onnx.load(build("cnn", (8, 8), 10, seed=0).plain, backend=backend)
    again = pickle.loads(pickle.dumps(loaded))
    x = loaded.example_inputs(4)
    np.testing.assert_array_equal(np.asarray(mgs.kernel(again, x)), np.asarray(mgs.kernel(loaded, x)))
    assert (again.ties, again.cut, again.uncounted) == (loaded.ties, loaded.cut, loaded.uncounted)


def test_what_cannot_be_saved_is_refused(tmp_path):
    loaded = mgs.onnx.load(build("mlp", (2, 2), 3, seed=0).plain)
    path, values = tmp_path / "m.onnx", loaded.parameters
    with pytest.raises(mgs.ArgumentError, match=r"`model` must come from mgs_core.onnx.load; got FunctionalModel"):
        mgs.onnx.save(mgs.FunctionalModel(loaded.function, values), path)
    with pytest.raises(mgs.ArgumentError, match="`parameters` must have the names"):
        mgs.onnx.save(loaded, path, parameters={})
    with pytest.raises(mgs.ArgumentError, match=r"`parameters` must keep their shapes; got .* for 'output.bias'"):
        mgs.onnx.save(loaded, path, parameters={**values, "output.bias": np.zeros(4, np.float32)})
    with pytest.raises(mgs.ArgumentError, match=r"`parameters` must be finite; got NaN or infinity in 'output.bias'"):
        mgs.onnx.save(loaded, path, parameters={**values, "output.bias": np.full(3, np.nan, np.float32)})
    unclear = copy.deepcopy(loaded.proto)
    unclear.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(mgs.ArgumentError, match="Field 'shape' of 'type' is required but missing"):
        mgs.onnx.save(mgs.onnx.load(unclear), path)
    with pytest.raises(mgs.ArgumentError, match="`path` must be a place where a valid model can be written"):
        mgs.onnx.save(loaded, tmp_path / "none" / "m.onnx")


def test_half_precision_is_kept_and_bfloat16_is_refused_on_numpy():
    nodes, weight = [node("MatMul", ["x", "w"], ["y"])], draw(4, 2)
    half = model(nodes, {"w": weight.astype(np.float16)}, kind=TensorProto.FLOAT16)
    assert mgs.onnx.load(half).parameters["w"].dtype == np.float16
    assert mgs.onnx.load(half, dtype="float32").parameters["w"].dtype == np.float32
    brain = model(nodes, {}, kind=TensorProto.BFLOAT16)
    brain.graph.initializer.append(helper.make_tensor("w", TensorProto.BFLOAT16, [4, 2], weight.ravel()))
    with pytest.raises(mgs.UnsupportedModelError, match=r'values in bfloat16.*numpy.*Pass dtype="float32"'):
        mgs.onnx.load(brain)
    assert mgs.onnx.load(brain, dtype="float32").parameters["w"].dtype == np.float32


def test_examples_fit_what_they_index():
    ids = mgs.onnx.load(tied()).function.example_inputs(50)["x"]
    assert ids.shape == (50,)
    assert ids.min() >= 0
    assert ids.max() == 4


@pytest.mark.parametrize("kind", ["classifier", "binary", "logistic", "pipeline", "regressor", "ridge"])
def test_scikit_learn(kind, tmp_path):
    skl2onnx = pytest.importorskip("skl2onnx")
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = draw(60, 4), RANDOM.integers(0, 3, 60)
    perceptron = {"hidden_layer_sizes": (5,), "solver": "lbfgs", "max_iter": 200, "tol": 1e9}
    estimator, labels, count = {
        "classifier": (MLPClassifier(**perceptron), y, 4 * 5 + 5 + 5 * 3 + 3),
        "binary": (MLPClassifier(**perceptron), y % 2, 4 * 5 + 5 + 5 + 1),
        "logistic": (LogisticRegression(), y, 15),
        "pipeline": (make_pipeline(StandardScaler(), MLPClassifier(**perceptron)), y, 4 * 5 + 5 + 5 * 3 + 3),
        "regressor": (MLPRegressor(**perceptron), y * 1.0, 4 * 5 + 5 + 5 + 1),
        "ridge": (Ridge(), y * 1.0, 5),
    }[kind]
    estimator.fit(x, labels)
    loaded = mgs.onnx.load(skl2onnx.to_onnx(estimator, x[:1]))
    expected = estimator.predict_proba(x) if hasattr(estimator, "predict_proba") else estimator.predict(x)[:, None]
    np.testing.assert_allclose(loaded(x), expected, rtol=1e-4, atol=1e-5)
    assert sum(value.size for value in loaded.parameters.values()) == count
    changed = {name: value * 1.5 for name, value in loaded.parameters.items()}
    mgs.onnx.save(loaded, tmp_path / "saved.onnx", parameters=changed)
    np.testing.assert_allclose(mgs.onnx.load(tmp_path / "saved.onnx")(x), loaded.function(changed, x), rtol=1e-5)


def test_loading_changes_no_module_state():
    proto = build("mlp", (2, 2), 3, seed=0).plain
    first, second = mgs.onnx.load(proto), mgs.onnx.load(copy.deepcopy(proto))
    x = draw(3, 2, 2)
    np.testing.assert_array_equal(first(x), second(x))


def test_weights_in_constant_nodes_are_parameters_where_there_are_no_initialisers(tmp_path):
    weight, bias, x = draw(4, 3), draw(3), draw(5, 4)
    nodes = [
        node("Constant", [], ["w"], value=numpy_helper.from_array(weight)),
        node("Constant", [], ["b"], value=numpy_helper.from_array(bias)),
        node("Constant", [], ["half"], value=numpy_helper.from_array(np.float32(0.5))),
        node("MatMul", ["x", "w"], ["h"]),
        node("Add", ["h", "b"], ["z"]),
        node("Mul", ["z", "half"], ["y"]),
    ]
    loaded = mgs.onnx.load(model(nodes, {}))
    assert set(loaded.parameters) == {"w", "b"}
    np.testing.assert_allclose(mgs.kernel(loaded, x), 0.75 * (x @ x.T + 1), rtol=1e-5)
    mgs.onnx.save(loaded, tmp_path / "twice.onnx", parameters={name: 2 * value for name, value in loaded.parameters.items()})
    np.testing.assert_array_equal(mgs.onnx.load(tmp_path / "twice.onnx").parameters["w"], 2 * weight)
    mixed = mgs.onnx.load(model([*nodes[1:3], node("MatMul", ["x", "w"], ["h"]), *nodes[4:]], {"w": weight}))
    assert set(mixed.parameters) == {"w"}  # there a constant is one
