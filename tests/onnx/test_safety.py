"""Files are untrusted: each kind of damage gets a typed error that names the node or tensor."""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import mgs_core as mgs


def info(name, shape=("n", 3), kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes, tensors=None, *, inputs=None, outputs=None, opset=17, functions=(), domains=()):
    tensors = [numpy_helper.from_array(np.ones((3, 2), np.float32), "w")] if tensors is None else tensors
    inputs, outputs = inputs or [info("x")], outputs or [info("y", ("n", 2))]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=8)


def node(operator, inputs, outputs, name="", **attributes):
    return helper.make_node(operator, inputs, outputs, name=name, **attributes)


MATMUL = node("MatMul", ["x", "w"], ["y"], "multiply")


def refused(proto, message, kind=mgs.ArgumentError, run=None):
    def load_and_run():
        return mgs.onnx.load(proto)(np.ones((2, 3), np.float32) if run is None else run)

    with pytest.raises(kind, match=message):
        load_and_run()


def test_damaged_files(tmp_path, monkeypatch):
    refused(tmp_path / "none.onnx", "`model` must be a file that exists")
    refused(3, "`model` must be a path or an onnx.ModelProto; got int")
    path = tmp_path / "damaged.onnx"
    path.write_bytes(b"")
    refused(path, "has no graph with outputs")
    path.write_bytes(b"\xff" * 50)
    refused(path, "is no protobuf message of a model")
    path.write_bytes(model([MATMUL]).SerializeToString()[:-30])
    with pytest.raises(mgs.MgsError):
        mgs.onnx.load(path)
    refused("a\0b", "`model` must be a file that")
    path.write_bytes(model([MATMUL]).SerializeToString())
    monkeypatch.setattr("mgs_core.onnx.files._LIMIT", 10)
    refused(path, "is larger than protobuf allows. Save the weights as external data")
    monkeypatch.undo()
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda self: (_ for _ in ()).throw(PermissionError("locked")))
    refused(path, r"`model` must be a file that can be read; got .* \(locked\). Check its permissions")
    monkeypatch.undo()
    path.write_bytes(model([MATMUL]).SerializeToString().replace(b"multiply", b"mult\xffply"))
    refused(path, "has a name that is no text: b'mult")


def test_names_and_order():
    other = node("Relu", ["x"], ["y"], "again")
    refused(model([MATMUL, other]), "output 'y' of node 'again' has a name that is empty or taken")
    refused(
        model([MATMUL], [numpy_helper.from_array(np.ones((3, 2), np.float32), "w")] * 2), "initialiser 'w' has a name that is"
    )
    refused(model([node("MatMul", ["x", "u"], ["y"], "multiply")]), "node 'multiply' .* takes 'u', which no node, input or")
    circle = [
        node("Add", ["x", "b"], ["a"], "first"),
        node("Add", ["a", "x"], ["b"], "second"),
        node("MatMul", ["a", "w"], ["y"]),
    ]
    refused(model(circle), "node 'first' .* is part of a cycle")
    refused(model([MATMUL], outputs=[info("z")]), "output 'z' is given by no node")
    refused(model([MATMUL], [TensorProto(data_type=1)]), "an initialiser has no name")


def test_nodes_in_any_order():
    nodes = [node("Relu", ["h"], ["y"]), node("MatMul", ["x", "w"], ["h"])]
    assert mgs.onnx.load(model(nodes))(np.ones((2, 3), np.float32)).shape == (2, 2)


def test_operators_domains_and_versions():
    refused(model([node("Mystery", ["x", "w"], ["y"], "odd")]), "node 'odd' .*is no operator of ai.onnx at opset 17")
    refused(
        model([helper.make_node("A", ["x"], ["y"], domain="com.x")]), "domain 'com.x', whose version the model does not import"
    )
    unknown = model([helper.make_node("A", ["x"], ["y"], domain="com.x")], domains=["com.x"])
    refused(unknown, "is of the domain 'com.x'. Export with operators of ai.onnx", mgs.UnsupportedModelError)
    refused(model([MATMUL], opset=99), "imported at version 99; known are 1 to 28", mgs.UnsupportedModelError)
    twice = model([MATMUL])
    twice.opset_import.extend([helper.make_opsetid("", 13)])
    refused(twice, "domain 'ai.onnx' is imported in two versions")
    random = model([node("RandomNormalLike", ["x"], ["r"], "noise"), node("MatMul", ["r", "w"], ["y"])])
    refused(random, r"node 'noise' \(RandomNormalLike, opset 17\) is random", mgs.UnsupportedModelError)
    dynamic = model([node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"], "small")])
    refused(dynamic, "node 'small' .* is quantised", mgs.UnsupportedModelError)
    boxes = model([node("MaxRoiPool", ["x", "x"], ["y"], "boxes", pooled_shape=[1, 1])])
    refused(boxes, "node 'boxes' .* has no implementation here", mgs.UnsupportedModelError)
    trees = helper.make_node("TreeEnsembleRegressor", ["x"], ["y"], "trees", domain="ai.onnx.ml")
    refused(model([trees], domains=["ai.onnx.ml"]), "node 'trees' .* is a tree ensemble", mgs.UnsupportedModelError)
    old = model([node("Add", ["x", "w"], ["y"], "old", broadcast=1)], opset=6)
    refused(old, "node 'old' .* is older than the supported version 7", mgs.UnsupportedModelError)


def test_attributes_and_counts():
    wrong = node("MatMul", ["x", "w"], ["y"], "multiply")
    wrong.attribute.extend([helper.make_attribute("odd", 1)])
    refused(model([wrong]), "node 'multiply' .* has the attribute 'odd' that its operator does not know")
    double = node("Gemm", ["x", "w"], ["y"], "gemm", alpha=1.0)
    double.attribute.extend([helper.make_attribute("alpha", 2.0)])
    refused(model([double]), "has the attribute 'alpha' twice")
    refused(model([node("Gemm", ["x", "w"], ["y"], "gemm", alpha=1)]), "has the attribute 'alpha' of the wrong type")
    refused(model([node("Concat", ["x", "x"], ["y"], "join")]), "node 'join' .* lacks the attribute 'axis'")
    refused(model([node("MatMul", ["x"], ["y"], "multiply")]), "has 1 inputs; from 2 to 2 are allowed")
    text = node("Conv", ["x", "w"], ["y"], "conv")
    text.attribute.extend([onnx.AttributeProto(name="auto_pad", type=3, s=b"\xff\xfe")])
    refused(model([text]), "attribute 'auto_pad' of node 'conv' .* cannot be read")
    sparse = node("Constant", [], ["c"], "sparse")
    sparse.attribute.extend([onnx.AttributeProto(name="sparse_value", type=11)])
    refused(model([sparse, MATMUL]), "'sparse_value' of node 'sparse' .* is a sparse tensor", mgs.UnsupportedModelError)
    text = node("Constant", [], ["c"], "text", value_string="a")
    refused(model([text, node("Add", ["x", "c"], ["h"]), node("MatMul", ["h", "w"], ["y"])]), "node 'text' .* is a string",
            mgs.UnsupportedModelError)  # fmt: skip
    several = node("Constant", [], ["c"], "several", value_int=1, value_float=1.0)
    refused(model([several, node("Add", ["x", "c"], ["h"]), node("MatMul", ["h", "w"], ["y"])]), "has 2 values; 1 is needed")


def test_types():
    w = numpy_helper.from_array(np.ones((3, 2), np.float32), "w")
    whole = numpy_helper.from_array(np.ones(3, np.int64), "c")
    mixed = [node("Relu", ["x"], ["r"]), node("Add", ["r", "c"], ["h"], "mix"), node("MatMul", ["h", "w"], ["y"])]
    refused(model(mixed, [w, whole]), "node 'mix' .* takes 'c' of the type int64, and another input of the type float32; they")
    negated = [node("MatMul", ["x", "w"], ["h"]), node("Not", ["h"], ["y"], "negate")]
    refused(model(negated), "node 'negate' .* takes 'h' of the type float32; bool are allowed")
    branches = {name: helper.make_graph([node("Add", ["x", "c"], [name], "inside")], name, [], [info(name)])
                for name in ("then_branch", "else_branch")}  # fmt: skip
    truth = numpy_helper.from_array(np.array(True), "t")
    within = [node("If", ["t"], ["h"], **branches), node("MatMul", ["h", "w"], ["y"])]
    refused(model(within, [w, whole, truth]), "inside' .* takes 'c' of the type int64")
    assert mgs.onnx.load(model([MATMUL]), dtype="float64")(np.ones((2, 3))).dtype == np.float64


def test_tensors():
    short = numpy_helper.from_array(np.ones((3, 2), np.float32), "w")
    short.raw_data = b"1234"
    refused(model([MATMUL], [short]), "initialiser 'w' holds 4 bytes; its shape .* need 24")
    huge = TensorProto(name="w", data_type=1, dims=[1 << 20, 1 << 20])
    assert model([MATMUL], [huge]).ByteSize() < 1024
    refused(model([MATMUL], [huge]), "initialiser 'w' asks for 1099511627776 elements")
    refused(model([MATMUL], [TensorProto(name="w", data_type=1, dims=[-3, 2])]), "initialiser 'w' has a negative size")
    missing = TensorProto(name="w", data_type=1, dims=[3, 2], float_data=[1.0])
    refused(model([MATMUL], [missing]), "initialiser 'w' cannot be read")
    strings = helper.make_tensor("w", TensorProto.STRING, [1], [b"a"])
    refused(model([MATMUL], [strings]), "initialiser 'w' has the element type STRING", mgs.UnsupportedModelError)
    refused(model([MATMUL], [TensorProto(name="w", data_type=77, dims=[1])]), "element type 77", mgs.UnsupportedModelError)
    with_sparse = model([MATMUL])
    with_sparse.graph.sparse_initializer.add()
    refused(with_sparse, "has sparse initialisers", mgs.UnsupportedModelError)
    sequence = model([MATMUL], inputs=[helper.make_tensor_sequence_value_info("x", 1, None)])
    refused(sequence, "input 'x' is a sequence", mgs.UnsupportedModelError)
    listed = model([node("MatMul", ["x", "w"], ["h"]), node("SequenceConstruct", ["h"], ["y"])],
                   outputs=[helper.make_tensor_sequence_value_info("y", 1, None)])  # fmt: skip
    refused(listed, "output 'y' is a sequence. Choose another `output`", mgs.UnsupportedModelError)


def test_sizes_that_a_file_only_declares():
    size = numpy_helper.from_array(np.array([1 << 20, 1 << 20], np.int64), "size")
    w = numpy_helper.from_array(np.ones((3, 2), np.float32), "w")
    for first in (
        node("ConstantOfShape", ["size"], ["c"], "big"),
        node("Expand", ["one", "size"], ["c"], "big"),
        node("Tile", ["one", "size"], ["c"], "big"),
    ):
        one = numpy_helper.from_array(np.ones((1, 1), np.float32), "one")
        add = [first, node("Add", ["x", "c"], ["h"]), node("MatMul", ["h", "w"], ["y"])]
        refused(model(add, [w, size, one]), "node 'big' .* asks for .* elements")
    limit = numpy_helper.from_array(np.array(1 << 50, np.int64), "limit")
    ends = [numpy_helper.from_array(np.array(value, np.int64), name) for value, name in ((0, "start"), (1, "step"))]
    count = [node("Range", ["start", "limit", "step"], ["c"], "big"), node("Gather", ["x", "c"], ["h"]), MATMUL]
    refused(model([*count[:2], node("MatMul", ["h", "w"], ["y"])], [w, limit, *ends]), "node 'big' .* asks for")
    pads = numpy_helper.from_array(np.array([0, 1 << 40, 0, 0], np.int64), "pads")
    refused(
        model([node("Pad", ["x", "pads"], ["h"], "big"), node("MatMul", ["h", "w"], ["y"])], [w, pads]), "node 'big' .* asks for"
    )
    kernel = numpy_helper.from_array(np.ones((1, 1, 1), np.float32), "w")
    wide = node("Conv", ["x", "w"], ["y"], "big", pads=[1 << 40, 0])
    wide = model([wide], [kernel], inputs=[info("x", ("n", 1, 3))], outputs=[info("y", None)])
    refused(wide, "node 'big' .* asks for", run=np.ones((2, 1, 3), np.float32))


def external(folder, location, *, offset=None, length=None, data=b"\0" * 24):
    tensor = TensorProto(name="w", data_type=1, dims=[3, 2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    if data is not None:
        (folder / "weights.bin").write_bytes(data)
    path = folder / "model.onnx"
    path.write_bytes(model([MATMUL], [tensor]).SerializeToString())
    return path


def test_external_data(tmp_path):
    folder = tmp_path / "inside"
    folder.mkdir()
    loaded = mgs.onnx.load(external(folder, "weights.bin", data=np.arange(6, dtype=np.float32).tobytes()))
    np.testing.assert_array_equal(loaded.parameters["w"], np.arange(6).reshape(3, 2))
    (tmp_path / "elsewhere").mkdir()
    mgs.onnx.save(mgs.onnx.load(folder / "model.onnx", parameters="w"), tmp_path / "elsewhere" / "model.onnx")
    again = mgs.onnx.load(tmp_path / "elsewhere" / "model.onnx")
    np.testing.assert_array_equal(again.parameters["w"], np.arange(6).reshape(3, 2))
    frozen = onnx.load(folder / "model.onnx", load_external_data=False)
    frozen.graph.initializer.append(numpy_helper.from_array(np.ones((2, 2), np.float32), "v"))
    frozen.graph.node[0].output[0] = "h"
    frozen.graph.node.append(node("MatMul", ["h", "v"], ["y"]))
    (folder / "frozen.onnx").write_bytes(frozen.SerializeToString())
    mgs.onnx.save(mgs.onnx.load(folder / "frozen.onnx", parameters="v"), tmp_path / "elsewhere" / "frozen.onnx")
    assert mgs.onnx.load(tmp_path / "elsewhere" / "frozen.onnx")(np.ones((1, 3), np.float32)).tolist() == [[15, 15]]
    (tmp_path / "outside.bin").write_bytes(b"\0" * 24)
    for location in (
        "../outside.bin",
        str(tmp_path / "outside.bin"),
        "a/../../outside.bin",
        "C:\\x.bin",
        "..\\outside.bin",
        "",
        "a\0b",
    ):
        refused(external(folder, location), "initialiser 'w' has external data at .* it must be a relative path without '..'")
    refused(external(folder, "missing.bin"), "initialiser 'w' has external data at 'missing.bin', which cannot be opened")
    os.symlink(tmp_path / "outside.bin", folder / "link.bin")
    refused(external(folder, "link.bin"), "a link out of the model's folder")
    os.symlink(tmp_path, folder / "up")
    refused(external(folder, "up/outside.bin"), "a link out of the model's folder")
    os.symlink("loop.bin", folder / "loop.bin")
    refused(external(folder, "loop.bin"), "cannot be opened")
    (folder / "sub").mkdir()
    refused(external(folder, "sub"), "which is no file")
    refused(external(folder, "weights.bin", offset="x"), "offset or length that is no number")
    refused(external(folder, "weights.bin", offset=8), "needs 24 bytes")
    refused(external(folder, "weights.bin", offset=-8), "needs 24 bytes")
    refused(external(folder, "weights.bin", length=1 << 40), "needs 24 bytes")
    refused(onnx.load(folder / "model.onnx", load_external_data=False), "came as an object. Load the model by its path")


def test_functions(monkeypatch):
    def function(name, nodes, inputs=("a",), outputs=("b",)):
        return helper.make_function("local", name, list(inputs), list(outputs), nodes, [helper.make_opsetid("", 17)])

    def call(name, inputs=("h",)):
        return [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node(name, list(inputs), ["y"], "call", domain="local"),
        ]

    def local(name, *functions, inputs=("h",)):
        return model(call(name, inputs), functions=functions, domains=["local"])

    square = function("Square", [node("Mul", ["a", "a"], ["b"])])
    assert mgs.onnx.load(local("Square", square))(np.ones((2, 3), np.float32)).max() == 9
    refused(local("Square", square, square), "function 'Square' is defined twice")
    itself = function("Again", [helper.make_node("Again", ["a"], ["b"], domain="local")])
    itself.opset_import.extend([helper.make_opsetid("local", 1)])
    refused(local("Again", itself), "calls a function that calls itself")
    refused(local("Lost", function("Lost", [node("Mul", ["a", "z"], ["b"])])), "which nothing in function 'Lost' gives")
    refused(local("Empty", function("Empty", [])), "has no value for output 'b' of its function")
    refused(local("Square", square, inputs=("h", "h")), "has more inputs or outputs than its function")
    chain = [function("D0", [node("Relu", ["a"], ["b"])])]
    for level in range(1, 20):
        chain.append(function(f"D{level}", [helper.make_node(f"D{level - 1}", ["a"], ["b"], domain="local")]))
        chain[-1].opset_import.extend([helper.make_opsetid("local", 1)])
    refused(local("D19", *chain), "is nested more than 16 deep")
    # each calls the one before twice: 2^40 nodes
    bombs = [function("F0", [node("Relu", ["a"], ["b"])])]
    monkeypatch.setattr("mgs_core.onnx.parsing.MAX_NODES", 2000)
    for level in range(1, 13):
        body = [helper.make_node(f"F{level - 1}", [x], [y], domain="local") for x, y in (("a", "c"), ("c", "b"))]
        bombs.append(function(f"F{level}", body))
        bombs[-1].opset_import.extend([helper.make_opsetid("local", 1)])
    refused(local("F12", *bombs), "is beyond the limit of 2000 nodes")


def test_deep_subgraphs():
    graph = helper.make_graph([node("Identity", ["x"], ["o20"])], "inner", [], [info("o20")])
    for depth in range(19, -1, -1):
        branches = {
            "then_branch": graph,
            "else_branch": helper.make_graph([node("Identity", ["x"], ["e"])], "e", [], [info("e")]),
        }
        graph = helper.make_graph([node("If", ["c"], [f"o{depth}"], **branches)], "g", [], [info(f"o{depth}")])
    truth = numpy_helper.from_array(np.array(True), "c")
    w = numpy_helper.from_array(np.ones((3, 2), np.float32), "w")
    deep = model([*graph.node, node("MatMul", ["o0", "w"], ["y"])], [truth, w])
    refused(deep, "is nested more than 16 deep")


def test_inputs_and_choices():
    loaded = mgs.onnx.load(model([MATMUL]))
    for given, message in (
        (np.ones((2, 4), np.float32), r"must have the shape \('n', 3\) for 'x'; got \(2, 4\)"),
        (np.ones(3, np.float32), "must have the shape"),
        (np.ones((2, 3), np.int64), "must have the dtype float32 for 'x'; got int64"),
        ({"z": np.ones((2, 3), np.float32)}, r"\['x'\] lack, \['z'\] are unknown"),
        ([1.0], "`inputs` must be arrays; got list"),
    ):
        with pytest.raises(mgs.ArgumentError, match=message):
            loaded(given)
    assert loaded(np.ones((2, 3))).dtype == np.float32  # doubles are data, not a wish for double precision
    two = model([node("Add", ["x", "z"], ["h"]), node("MatMul", ["h", "w"], ["y"])], inputs=[info("x"), info("z")])
    with pytest.raises(mgs.ArgumentError, match=r"`inputs` must be a dict with \['x', 'z'\]; got one array"):
        mgs.onnx.load(two)(np.ones((2, 3), np.float32))
    with pytest.raises(mgs.ArgumentError, match="`dtype` must be one of"):
        mgs.onnx.load(model([MATMUL]), dtype="int8")
    with pytest.raises(mgs.ArgumentError, match=r"`output` must be one of \['y'\]"):
        mgs.onnx.load(model([MATMUL]), output="z")
    with pytest.raises(mgs.ArgumentError, match="`parameters` must name parameters"):
        mgs.onnx.load(model([MATMUL]), parameters="v")
    with pytest.raises(mgs.ArgumentError, match="must have trained parameters"):
        mgs.onnx.load(model([node("Relu", ["x"], ["y"])]))
    with pytest.raises(mgs.BackendError, match="`backend` must be one of"):
        mgs.onnx.load(model([MATMUL]), backend="mxnet")
    scalar = model([node("MatMul", ["x", "w"], ["h"]), node("ReduceSum", ["h"], ["y"], keepdims=0)], outputs=[info("y", ())])
    refused(scalar, "got a scalar. Choose another `output`")
    size = [node("MatMul", ["x", "w"], ["h"]), node("Shape", ["h"], ["s"]), node("Cast", ["s"], ["y"], to=1)]
    refused(model(size), "output 'y' depends on no parameter and no input")
    labels = model([node("ArgMax", ["x"], ["y"])], outputs=[info("y", None, TensorProto.INT64)])
    refused(labels, "has no floating-point output. Name one by `output`", mgs.UnsupportedModelError)
    misfit = model([MATMUL], [numpy_helper.from_array(np.ones((4, 2), np.float32), "w")])
    refused(misfit, r"`inputs` must fit the model; node 'multiply' \(MatMul, opset 17\) failed")
    reshaped = [node("Reshape", ["x", "shape"], ["h"]), node("MatMul", ["h", "w"], ["y"])]
    tensors = [numpy_helper.from_array(np.ones((3, 2), np.float32), "w"), numpy_helper.from_array(np.array([1, 3]), "shape")]
    fixed = mgs.onnx.load(model(reshaped, tensors, inputs=[info("x", (1, 3))]))
    assert fixed(np.ones((1, 3), np.float32)).shape == (1, 2)
    with pytest.raises(mgs.ArgumentError, match="written for batches of 1; export it with a free batch axis"):
        fixed(np.ones((2, 3), np.float32))
    constant = [node("MatMul", ["w", "w"], ["c"], "fold"), node("Add", ["x", "c"], ["h"]), node("MatMul", ["h", "v"], ["y"])]
    tensors = [numpy_helper.from_array(np.ones((3, 2), np.float32), name) for name in ("w", "v")]
    with pytest.raises(mgs.ArgumentError, match=r"node 'fold' .* fails on its constants"):
        mgs.onnx.load(model(constant, tensors), parameters="v")


def test_nothing_of_the_users_is_changed():
    proto = model([MATMUL])
    before = proto.SerializeToString()
    loaded = mgs.onnx.load(proto)
    x = np.ones((2, 3), np.float32)
    mgs.kernel(loaded, x)
    assert proto.SerializeToString() == before
    assert np.all(x == 1)
    assert np.all(loaded.parameters["w"] == 1)
