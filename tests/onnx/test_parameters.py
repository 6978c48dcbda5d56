"""Which initialisers are parameters, and what is said of the others: graphs as exporters write them, part by part."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import mgs_core as mgs

RANDOM = np.random.default_rng(0)


def drawn(*shape):
    return RANDOM.normal(size=shape)


def tensor(name, value):
    return numpy_helper.from_array(np.asarray(value), name)


def node(operator, inputs, outputs, **attributes):
    return helper.make_node(operator, inputs.split(), outputs.split(), **attributes)


def load(nodes, initializers, *, shape=None, **options):
    x = helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["n", 3])
    y = helper.make_tensor_value_info("y", TensorProto.DOUBLE, shape)
    tensors = [tensor(name, value) for name, value in initializers.items()]
    graph = helper.make_graph(nodes, "graph", [x], [y], tensors)
    return mgs.onnx.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), **options)


BIASES = {
    "MatMul, column": ([node("MatMul", "x w", "h"), node("Add", "h b", "y")], {"w": drawn(3, 1), "b": drawn(1)}),
    "MatMul, vector": ([node("MatMul", "x w", "h"), node("Add", "h b", "y")], {"w": drawn(3), "b": drawn(1)}),
    "MatMul, number": ([node("MatMul", "x w", "h"), node("Add", "b h", "y")], {"w": drawn(3), "b": drawn()}),
    "MatMul, transposed": (
        [node("Transpose", "w", "t", perm=[1, 0]), node("MatMul", "x t", "h"), node("Add", "h b", "y")],
        {"w": drawn(1, 3), "b": drawn(1)},
    ),
    "Gemm": ([node("Gemm", "x w", "h", transB=1), node("Add", "h b", "y")], {"w": drawn(1, 3), "b": drawn(1)}),
    "Gemm with a zero": (
        [node("Gemm", "x w z", "h"), node("Add", "h b", "y")],
        {"w": drawn(3, 1), "z": np.zeros(()), "b": drawn(1)},
    ),
    "far below zero": ([node("MatMul", "x w", "h"), node("Add", "h b", "y")], {"w": drawn(3, 1), "b": np.array([-12.5])}),
    "Einsum": ([node("Einsum", "x w", "h", equation="ni,i->n"), node("Add", "h b", "y")], {"w": drawn(3), "b": drawn()}),
    "behind views": (
        [node("MatMul", "x w", "h"), node("Squeeze", "h axis", "s"), node("Add", "s b", "y")],
        {"w": drawn(3, 1), "axis": np.array([1]), "b": drawn(1)},
    ),
    "of a sum": (
        [node("MatMul", "x w", "h"), node("MatMul", "x v", "g"), node("Add", "h g", "s"), node("Add", "s b", "y")],
        {"w": drawn(3, 1), "v": drawn(3, 1), "b": drawn(1)},
    ),
}


@pytest.mark.parametrize("name", BIASES)
def test_the_bias_of_one_unit_is_a_parameter(name):
    nodes, initializers = BIASES[name]
    model = load(nodes, initializers)
    assert set(model.parameters) == {key for key in initializers if key in ("w", "v", "b")}
    x = drawn(4, 3)
    products = x @ x.T * sum(key in initializers for key in ("w", "v"))
    np.testing.assert_allclose(mgs.kernel(model, x), products + 1, atol=1e-12)


@pytest.mark.parametrize(
    ("nodes", "initializers"),
    [
        ([node("MatMul", "x w", "h"), node("Add", "h b", "y")], {"w": drawn(3, 2), "b": drawn(1)}),  # two units
        ([node("MatMul", "x w", "h"), node("Mul", "h b", "y")], {"w": drawn(3, 1), "b": drawn(1)}),  # a scale
        ([node("MatMul", "x w", "h"), node("Exp", "h", "e"), node("Add", "e b", "y")], {"w": drawn(3, 1), "b": drawn(1)}),
        (
            [node("MatMul", "x w", "h"), node("Add", "h c", "g"), node("Add", "g b", "y")],
            {"w": drawn(3, 1), "c": drawn(1), "b": np.array(1e-6)},
        ),
        ([node("Gemm", "x w c", "h"), node("Add", "h b", "y")], {"w": drawn(3, 1), "c": drawn(1), "b": np.array(2.0)}),
    ],
)
def test_other_single_numbers_are_none(nodes, initializers):
    model = load(nodes, initializers)
    assert set(model.parameters) == set(initializers) - {"b"}
    assert model.uncounted == {"b": "a single number"}


COS = np.cos(np.arange(12.0)).reshape(4, 3)
SIN = np.sin(np.arange(12.0)).reshape(4, 3)
FIRST = [node("MatMul", "x w", "h")]
#: Nodes behind `h = x @ w`, tables, and what is said of those that are no parameters.
TABLES = {
    "mask that is added": ([node("Add", "h t", "y")], {"t": np.array([0.0, -1e9, 0.0])}, {"t": "a mask: 0 and one number"}),
    "mask of Swin": ([node("Add", "h t", "y")], {"t": np.array([[0.0, -100.0, 0.0]])}, {"t": "a mask: 0 and one number"}),
    "a bias of two values": ([node("Add", "h t", "y")], {"t": np.array([0.0, -20.0, 0.0])}, {}),
    "gains that match by chance": (
        [node("Mul", "h c", "a"), node("Mul", "a s", "y")], {"c": np.array([1.0, 0.0, 1.0]), "s": np.array([0.0, 1.0, 0.0])}, {},
    ),
    "no mask but a bias": ([node("Add", "h t", "y")], {"t": np.full(3, -12.5)}, {}),
    "fill that is a bias too": (
        [node("Add", "h t", "b"), node("Where", "m t b", "y")], {"m": np.array([True, False, True]), "t": np.zeros(3)}, {},
    ),
    "bias of two values": ([node("Add", "h t", "y")], {"t": np.array([0.0, -1.0, 0.0])}, {}),
    "cosine and sine": (
        [node("Unsqueeze", "h one", "u"), node("Mul", "u c", "a"), node("Mul", "u s", "b"), node("Add", "a b", "y")],
        {"one": np.array([1]), "c": COS, "s": SIN},
        {"c": "cosine and sine", "s": "cosine and sine"},
    ),
    "two scales": (
        [node("Mul", "h c", "a"), node("Mul", "h s", "b"), node("Add", "a b", "y")], {"c": drawn(3), "s": drawn(3)}, {},
    ),
    "vectors of spectral norm": (
        [node("Mul", "h parametrizations.w.0._u", "y")],
        {"parametrizations.w.0._u": drawn(3)},
        {"parametrizations.w.0._u": "statistics"},
    ),
    "divided by what is made of a weight": (
        [node("ReduceL2", "w", "l", axes=[0], keepdims=0), node("Div", "h l", "y")], {}, {},
    ),
    "multiplied with and divided by": ([node("Mul", "h t", "m"), node("Div", "m t", "y")], {"t": 1 + drawn(3) ** 2}, {}),
    "chosen in place of data": ([node("Where", "m t h", "y")], {"m": np.array([True, False, True]), "t": drawn(3)}, {}),
    "a fill": (
        [node("Where", "m t h", "y")], {"m": np.array([True, False, True]), "t": np.full(3, -1e4)}, {"t": "one number, which"},
    ),
    "looked up by GatherND": (
        [
            node("Cast", "h", "i", to=TensorProto.INT64), node("Mul", "i zero", "j"), node("GatherND", "t j", "g"),
            node("Add", "h g", "y"),
        ],
        {"zero": np.array(0), "t": drawn(2, 2, 2)},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_told_from_weights(name):
    nodes, tables, reasons = TABLES[name]
    model = load([*FIRST, *nodes], {"w": drawn(3, 3), **tables})
    floats = {key for key, value in tables.items() if value.dtype == np.float64}
    assert set(model.parameters) == {"w"} | floats - set(reasons)
    assert set(model.uncounted) == set(reasons)
    for key, reason in reasons.items():
        assert reason in model.uncounted[key]


@pytest.mark.parametrize("first", ["Sub", "Div", "Mul"])
def test_the_scale_of_the_inputs_is_none_where_outputs_are_scaled_back(first):
    made = [node("Reciprocal", "s", "r"), node("Mul", "x r", "z")] if first == "Mul" else [node(first, "x s", "z")]
    model = load([*made, node("MatMul", "z w", "h"), node("Mul", "h s", "y")], {"s": 1 + drawn(3) ** 2, "w": drawn(3, 3)})
    assert list(model.parameters) == ["w"]
    assert model.uncounted == {"s": f"stands where {first} takes no weight"}


@pytest.mark.parametrize("operator", ["LSTM", "GRU", "RNN"])
def test_initial_states_are_parameters_unless_they_are_zeros(operator):
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[operator]
    states = {"h0": drawn(1, 1, 2), "c0": np.zeros((1, 1, 2))} if operator == "LSTM" else {"h0": drawn(1, 1, 2)}
    nodes = [
        node("Unsqueeze", "x zero", "u"),
        node("Shape", "x", "all"),
        node("Slice", "all zero one", "n"),
        node("Concat", "one n two", "size", axis=0),
        *[node("Expand", f"{name} size", f"{name}n") for name in states],
        helper.make_node(
            operator, ["u", "w", "r", "", "", *(f"{name}n" for name in states)], ["", "last"], hidden_size=2,
        ),
        node("Squeeze", "last zero", "y"),
    ]  # fmt: skip
    sizes = {"zero": np.array([0]), "one": np.array([1]), "two": np.array([2])}
    weights = {"w": drawn(1, gates * 2, 3), "r": drawn(1, gates * 2, 2)}
    model = load(nodes, {**sizes, **weights, **states})
    assert set(model.parameters) == {"w", "r", "h0"}
    assert model.uncounted == ({"c0": "an initial state of zeros"} if operator == "LSTM" else {})


def test_weights_in_the_body_of_a_loop_are_parameters_and_are_saved(tmp_path):
    inner = {"stack": drawn(2, 3, 3), "shift": drawn(3)}
    given = {"i": (TensorProto.INT64, []), "going": (TensorProto.BOOL, []), "h": (TensorProto.DOUBLE, ["n", 3])}
    taken = {"on": (TensorProto.BOOL, []), "out": (TensorProto.DOUBLE, ["n", 3])}
    nodes = [
        node("Identity", "going", "on"),
        node("Gather", "stack i", "layer"),
        node("MatMul", "h layer", "p"),
        node("Add", "p shift", "q"),
        node("Tanh", "q", "out"),
    ]
    ends = [[helper.make_tensor_value_info(name, *kind) for name, kind in side.items()] for side in (given, taken)]
    body = helper.make_graph(nodes, "body", *ends, [tensor(name, value) for name, value in inner.items()])
    outer = {"two": np.array(2), "true": np.array(True), "v": drawn(3, 2)}
    model = load([node("Loop", "two true x", "z", body=body), node("MatMul", "z v", "y")], outer, shape=["n", 2])
    assert set(model.parameters) == {"stack", "shift", "v"}
    theta = np.concatenate([inner["stack"].ravel(), inner["shift"], outer["v"].ravel()])

    def function(theta, x):
        (first, second), shift, v = theta[:18].reshape(2, 3, 3), theta[18:21], theta[21:].reshape(3, 2)
        return np.tanh(np.tanh(x @ first + shift) @ second + shift) @ v

    x = drawn(4, 3)
    rows = np.stack([(function(theta + d, x) - function(theta - d, x)) / 2e-6 for d in 1e-6 * np.eye(len(theta))], -1)
    np.testing.assert_allclose(mgs.kernel(model, x), np.einsum("acp,bcp->ab", rows, rows), rtol=1e-7)
    halved = {name: value / 2 for name, value in model.parameters.items()}
    mgs.onnx.save(model, tmp_path / "halved.onnx", parameters=halved)
    again = mgs.onnx.load(tmp_path / "halved.onnx")
    for name, value in halved.items():
        np.testing.assert_array_equal(again.parameters[name], value)


def test_slices_that_scan_goes_through_are_parameters():
    values = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in ("h", "layer")]
    out = [helper.make_tensor_value_info("out", TensorProto.DOUBLE, None)]
    body = helper.make_graph([node("MatMul", "h layer", "p"), node("Tanh", "p", "out")], "body", values, out)
    model = load([node("Scan", "x stack", "y", body=body, num_scan_inputs=1)], {"stack": drawn(2, 3, 3)})
    assert list(model.parameters) == ["stack"]


def test_statistics_that_were_merged_with_equal_weights_are_parted(tmp_path):
    """As exporters write fresh layers: one tensor of ones is the gain and the variance, one of zeros the shift and the mean."""
    nodes = [node("MatMul", "x w", "h"), node("BatchNormalization", "h n.weight n.bias n.bias n.weight", "y", epsilon=0.0)]
    model = load(nodes, {"w": drawn(3, 2), "n.weight": np.ones(2), "n.bias": np.zeros(2)}, shape=["n", 2])
    assert set(model.parameters) == {"w", "n.weight", "n.bias"}
    x = drawn(4, 3)
    h = x @ model.parameters["w"]
    expected = 2 * x @ x.T + h @ h.T + 2  # ∂y/∂w = x, ∂y/∂gain = h, ∂y/∂shift = 1
    np.testing.assert_allclose(mgs.kernel(model, x), expected, rtol=1e-12)
    mgs.onnx.save(model, tmp_path / "n.onnx", parameters={**model.parameters, "n.weight": np.full(2, 3.0)})
    np.testing.assert_allclose(mgs.onnx.load(tmp_path / "n.onnx")(x), 3 * h, rtol=1e-12)


def test_what_a_body_gives_stays_in_it_and_old_files_are_saved(tmp_path):
    ends = [helper.make_tensor_value_info("out", TensorProto.DOUBLE, ["n", 3])]
    bodies = [
        helper.make_graph([node("Identity", "h", "out")], "then", [], ends),
        helper.make_graph(
            [], "else", [], [helper.make_tensor_value_info("fixed", TensorProto.DOUBLE, [1, 3])], [tensor("fixed", drawn(1, 3))]
        ),
    ]
    nodes = [*FIRST, node("If", "true", "y", then_branch=bodies[0], else_branch=bodies[1])]
    model = load(nodes, {"w": drawn(3, 3), "true": np.array(True)}, shape=["n", 3])
    assert list(model.parameters) == ["w"]
    mgs.onnx.save(model, tmp_path / "if.onnx")
    assert list(mgs.onnx.load(tmp_path / "if.onnx").parameters) == ["w"]


@pytest.mark.parametrize("behind", ["", "Identity"])
def test_statistics_are_parted_behind_an_identity(behind):
    ones, zeros = ("one", "zero") if behind else ("n.weight", "n.bias")
    made = [node("Identity", "n.weight", "one"), node("Identity", "n.bias", "zero")] if behind else []
    last = node("BatchNormalization", f"h n.weight n.bias {zeros} {ones}", "y", epsilon=0.0)
    model = load([*made, *FIRST, last], {"w": drawn(3, 2), "n.weight": np.ones(2), "n.bias": np.zeros(2)})
    assert set(model.parameters) == {"w", "n.weight", "n.bias"}


def test_outputs_without_gradients_are_refused():
    x, h = (helper.make_tensor_value_info(name, TensorProto.DOUBLE, ["n", 3]) for name in "xh")
    y = helper.make_tensor_value_info("y", TensorProto.INT64, None)
    graph = helper.make_graph([*FIRST, node("ArgMax", "h", "y", axis=1)], "graph", [x], [h, y], [tensor("w", drawn(3, 3))])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    with pytest.raises(
        mgs.ArgumentError, match=r"`output` must be of floating-point numbers, which have gradients; got 'y' of int64"
    ):
        mgs.onnx.load(proto, output="y")
    assert mgs.onnx.load(SimpleNamespace(model_proto=proto)).function.output == "h"  # as torch.onnx.export returns it
    with pytest.raises(mgs.ArgumentError, match=r"got bytes\. Of bytes make one by onnx\.load_from_string"):
        mgs.onnx.load(proto.SerializeToString())


@pytest.mark.parametrize("backend", [name for name in ("numpy", "torch", "jax", "tensorflow") if mgs.available_backends()[name]])
def test_integers_are_reduced_alike(backend):
    nodes = [
        *FIRST,
        node("Cast", "x", "i", to=TensorProto.INT64),
        node("ReduceSum", "i one", "s", keepdims=1),
        node("ReduceMean", "i", "m", axes=[1], keepdims=1),
        node("Add", "s m", "t"),
        node("Cast", "t", "f", to=TensorProto.DOUBLE),
        node("Mul", "h f", "y"),
    ]
    x = np.array([[1.2, -3.7, -2.1], [4.0, 2.0, 1.0]])
    model = load(nodes, {"w": drawn(3, 2), "one": np.array([1])}, backend=backend, dtype="float32")
    whole = x.astype(int)
    factor = whole.sum(1) + np.trunc(whole.mean(1))
    for kind in ("uint32", "int32"):
        whole_numbers = load(
            [node("Cast", "x", "i", to=getattr(TensorProto, kind.upper())), node("ReduceMean", "i", "m", axes=[1], keepdims=1),
             node("Cast", "m", "f", to=TensorProto.DOUBLE), node("MatMul", "f w", "y")],
            {"w": np.ones((1, 1))}, backend=backend, dtype="float32",
        )  # fmt: skip
        means = mgs.get_backend(backend).to_numpy(whole_numbers(mgs.get_backend(backend).asarray(np.abs(x).astype(np.float32))))
        np.testing.assert_array_equal(means[:, 0], np.abs(x).astype(int).mean(1) // 1)
    found = mgs.get_backend(backend).to_numpy(mgs.kernel(model, mgs.get_backend(backend).asarray(x.astype(np.float32))))
    np.testing.assert_allclose(found, 2 * (x @ x.T) * factor[:, None] * factor, rtol=1e-5)
