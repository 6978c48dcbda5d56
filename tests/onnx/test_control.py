"""If, Loop and Scan: what they refuse, by the node's name, and what cannot be known while a model is traced."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import mgs_core as mgs

X = np.ones((2, 3), np.float32)


def value(name, kind=TensorProto.FLOAT, shape=None):
    return helper.make_tensor_value_info(name, kind, shape)


def node(operator, inputs, outputs, name="", **attributes):
    return helper.make_node(operator, inputs, outputs, name, **attributes)


def body(nodes, inputs, outputs):
    return helper.make_graph(nodes, "body", inputs, outputs)


def model(nodes, opset=17, **tensors):
    tensors = {"w": np.ones((3, 3), np.float32), **tensors}
    graph = helper.make_graph(
        nodes, "g", [value("x", shape=["n", 3])], [value("y")],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 3)])


def refused(proto, message, backend="numpy"):
    with pytest.raises(mgs.MgsError, match=message):
        mgs.onnx.load(proto, backend=backend, parameters="w")(mgs.get_backend(backend).asarray(X))


def loop(trips):
    """A loop that squares the state and collects it."""
    inner = body(
        [node("Mul", ["h", "h"], ["h1"]), node("Identity", ["c"], ["c1"]), node("Identity", ["h1"], ["out"])],
        [value("i", TensorProto.INT64), value("c", TensorProto.BOOL), value("h")],
        [value("c1", TensorProto.BOOL), value("h1"), value("out")],
    )
    nodes = [
        node("MatMul", ["x", "w"], ["h0"]), node("Loop", ["trips", "", "h0"], ["last", "all"], "around", body=inner),
        node("ReduceSum", ["all", "first"], ["y"], keepdims=0),
    ]  # fmt: skip
    return model(nodes, trips=np.array(trips), first=np.array([0]))


def test_a_loop_collects_and_has_its_limits(monkeypatch):
    loaded = mgs.onnx.load(loop(3), parameters="w")
    np.testing.assert_allclose(loaded(X), np.full((2, 3), 3.0**2 + 3.0**4 + 3.0**8))
    refused(loop(0), "node 'around' .* collects outputs over no step, whose shape nothing tells")
    monkeypatch.setattr("mgs_core.onnx.control.MAX_STEPS", 5)
    refused(loop(9), "node 'around' .* takes more than 5 steps")


def test_scans_walk_along_axes_of_one_length():
    inner = body([node("Add", ["a", "b"], ["s"])], [value("a"), value("b")], [value("s")])
    two = node("Scan", ["x", "h"], ["y"], "walk", body=inner, num_scan_inputs=2, scan_input_axes=[1, 0])
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Concat", ["m", "m", "m"], ["h"], axis=0), two]
    refused(model(nodes), r"node 'walk' .* walks along axes of unequal lengths \[3, 6\]")
    old = node(
        "Scan", ["", "x"], ["o"], "walk", body=body([node("Neg", ["a"], ["b"])], [value("a")], [value("b")]), num_scan_inputs=1
    )
    refused(model([old, node("MatMul", ["o", "w"], ["y"])], opset=8), "node 'walk' .* is of an old form. Convert it with")


def branches(then):
    return {"then_branch": body([then], [], [value("t")]), "else_branch": body([node("Neg", ["x"], ["t"])], [], [value("t")])}


def test_an_operator_that_is_refused_is_refused_in_a_branch_too():
    inside = node("RandomNormalLike", ["x"], ["t"], "noise")
    nodes = [node("If", ["true"], ["h"], "choice", **branches(inside)), node("MatMul", ["h", "w"], ["y"])]
    refused(model(nodes, true=np.array(True)), "node '.*noise' .* is random")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of JAX, about its own internals
def test_what_data_decide_is_not_known_while_jax_traces():
    pytest.importorskip("jax")
    nodes = [
        node("ReduceMax", ["x"], ["top"], keepdims=0), node("Greater", ["top", "zero"], ["c"]),
        node("If", ["c"], ["h"], "choice", **branches(node("Abs", ["x"], ["t"]))), node("MatMul", ["h", "w"], ["y"]),
    ]  # fmt: skip
    proto = model(nodes, zero=np.float32(0))
    np.testing.assert_allclose(mgs.onnx.load(proto, parameters="w")(X), np.full((2, 3), 3.0))
    loaded = mgs.onnx.load(proto, backend="jax", parameters="w")
    with pytest.raises(mgs.UnsupportedModelError, match=r"node 'choice' .* takes 'c', .* not known while jax traces the model"):
        mgs.kernel(loaded, mgs.get_backend("jax").asarray(X))


def test_an_absent_value_and_labels_that_are_strings():
    tail = node("MatMul", ["h", "w"], ["y"])
    typed = node("Optional", [], ["o"], "maybe", type=helper.make_tensor_type_proto(1, [3]))
    refused(model([typed, node("OptionalGetElement", ["o"], ["h"]), tail]), "'type' of node 'maybe'")
    absent = node("OptionalGetElement", [""], ["m"], "maybe")
    refused(model([absent, node("Add", ["x", "m"], ["h"]), tail], opset=18), "node 'maybe' .* is an absent value")
    classes = helper.make_node(
        "LinearClassifier", ["m"], ["label", "y"], "names", domain="ai.onnx.ml", coefficients=[1.0] * 6,
        classlabels_strings=["a", "b"],
    )  # fmt: skip
    proto = model([node("MatMul", ["x", "w"], ["m"]), classes])
    proto.graph.output.insert(0, helper.make_tensor_value_info("label", TensorProto.STRING, None))
    with pytest.raises(mgs.UnsupportedModelError, match=r"node 'names' .* labels its classes by strings"):
        mgs.onnx.load(proto, output="label", parameters="w")(X)
    scores = mgs.onnx.load(proto, parameters="w")(X)
    maps = helper.make_sequence_type_proto(helper.make_map_type_proto(8, helper.make_tensor_type_proto(1, [])))
    proto.graph.output[1].CopyFrom(helper.make_value_info("y", maps))
    np.testing.assert_array_equal(mgs.onnx.load(proto, parameters="w")(X), scores)  # as scikit-learn's classes of strings come
