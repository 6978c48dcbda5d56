"""Nodes whose attributes or inputs break the rules: each is refused by name, before or while it runs."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import mgs_core as mgs

W = np.ones((1, 1, 3), np.float32)
X = np.arange(10, dtype=np.float32).reshape(2, 1, 5)


def case(message, operator, *constants, x=X, kind=mgs.ArgumentError, outputs=1, domain="", opset=17, first="x", **attributes):
    return pytest.param(
        message, operator, constants, x, kind, outputs, domain, opset, first, attributes, id=f"{operator}-{message[:28]}"
    )


def sub(output="o", nodes=(), inputs=()):
    return helper.make_graph(
        list(nodes) or [helper.make_node("Identity", ["x"], [output])], "body",
        [helper.make_tensor_value_info(name, 1, None) for name in inputs], [helper.make_tensor_value_info(output, 1, None)],
    )  # fmt: skip


CASES = [
    case("has 0 groups", "Conv", W, group=0),
    case(r"cannot correlate \(2, 1, 5\)", "Conv", np.ones((1, 2, 3), np.float32)),
    case(r"declares the window \(2,\)", "Conv", W, kernel_shape=[2]),
    case(r"has strides \[0\]; 1 integers of at least 1", "Conv", W, strides=[0]),
    case(r"has pads \[-1, 0\]; 2 integers of at least 0", "Conv", W, pads=[-1, 0]),
    case("has auto_pad 'WIDE'", "Conv", W, auto_pad="WIDE"),
    case(r"has a window \(9,\) that is larger than its input", "Conv", np.ones((1, 1, 9), np.float32)),
    case("samples, channels and space are needed", "MaxPool", x=np.ones((2, 3), np.float32), kernel_shape=[2]),
    case("has 0 groups", "ConvTranspose", W, group=0),
    case(r"cannot spread \(2, 1, 5\)", "ConvTranspose", np.ones((2, 1, 3), np.float32)),
    case(r"has output_shape \[1, 1, 4\] for \[2, 1, 10\] numbers", "MaxUnpool",
         np.zeros((2, 1, 5), np.int64), np.array([1, 1, 4]), kernel_shape=[2], strides=[2]),
    case(r"cannot add \(2, 1, 5\) up to images \[9\] by windows \[2\]", "Col2Im", np.array([9]), np.array([2]), opset=18),
    case(r"has a shape \[1, 2\] for 3 axes", "CenterCropPad", np.array([1, 2]), opset=18),
    case(r"has mode 'odd'", "TensorScatter", X, mode="odd", opset=24),
    case(r"writes \(2, 1, 5\) along the axis 0 of \(2, 1, 5\)", "TensorScatter", X, axis=0, opset=24),
    case(r"writes \(2, 1, 0\) along the axis 2", "TensorScatter", X[:, :, :0], axis=2, opset=24),
    case("has mode 'odd' and padding_mode 'zeros'", "GridSample", X, mode="odd", opset=20),
    case("has mode 'linear' and padding_mode 'odd'", "GridSample", X, padding_mode="odd", opset=20),
    case(r"cannot sample \(2, 1, 5\) at a grid \(2, 1, 5\)", "GridSample", X, opset=20),
    case("has 0 groups and 1 groups of offsets", "DeformConv", W, X, group=0, opset=19),
    case("is not two-dimensional", "DeformConv", W, X, kind=mgs.UnsupportedModelError, opset=19),
    case(r"cannot correlate \(1, 1, 3, 3\) with \(1, 1, 2, 2\) at offsets \(1, 2, 2, 2\)", "DeformConv",
         np.ones((1, 1, 2, 2), np.float32), np.ones((1, 2, 2, 2), np.float32), x=np.ones((1, 1, 3, 3), np.float32), opset=19),
    case(r"transforms the axis -1 of \(2, 1, 5\)", "DFT", np.array(5), np.array(-1), opset=20),
    case(r"transforms the axis -2 of \(2, 1, 5\), whose last axis holds real and imaginary parts", "DFT", opset=20),
    case("transforms a signal of length 0", "DFT", np.array(0), x=np.ones((2, 5, 1), np.float32), opset=20),
    case(r"cuts \(2, 5, 1\) into windows of 9 in steps of 1", "STFT", np.array(1), np.ones(9, np.float32),
         x=np.ones((2, 5, 1), np.float32)),
    case("has 0 heads of queries, 1 of keys and update_rule 'linear'", "LinearAttention", X, X, outputs=2, q_num_heads=0,
         kv_num_heads=1, update_rule="linear", opset=27),
    case("has update_rule 'gated', and decay or beta do not fit it", "LinearAttention", X, X, outputs=2, q_num_heads=1,
         kv_num_heads=1, update_rule="gated", opset=27),
    case("has the activation 'odd'", "CausalConvWithState", W, outputs=2, activation="odd", opset=27),
    case(r"cannot correlate \(2, 1, 5\) with a weight \(2, 1, 3\)", "CausalConvWithState",
         np.ones((2, 1, 3), np.float32), outputs=2, opset=27),
    case("is in training mode, where samples interact", "BatchNormalization", *[np.ones(1, np.float32)] * 4,
         kind=mgs.UnsupportedModelError, training_mode=1),
    case("cannot divide 1 channels into 2 groups", "GroupNormalization", *[np.ones(2, np.float32)] * 2, num_groups=2, opset=18),
    case("has p = 3", "LpNormalization", p=3),
    case("has size 0", "LRN", size=0),
    case("copies an axis that its input", "Reshape", np.array([0, 0, 0, 0, 5])),
    case(r"drops the axes \[2\]", "Squeeze", np.array([2])),
    case("names the axis 7 of a tensor with 3 axes", "Softmax", axis=7),
    case("names the same axis twice", "Transpose", perm=[0, 0, 1]),
    case("cuts the axis 2 .* into", "Split", np.array([2, 2]), axis=2),
    case("repeats a tensor", "Tile", np.array([1, 1])),
    case("has blocksize 0", "DepthToSpace", x=np.ones((1, 4, 2, 2), np.float32), blocksize=0),
    case("has blocksize 0", "SpaceToDepth", x=np.ones((1, 4, 2, 2), np.float32), blocksize=0),
    case("looks up 9 to 9 on an axis of length 5", "Gather", np.array([9]), axis=2),
    case("cuts from .* in steps of", "Slice", np.array([0]), np.array([3]), np.array([2]), np.array([0])),
    case("takes 9 of 5 elements", "TopK", np.array([9]), outputs=2, axis=2),
    case("has 2 pads for 3 axes", "Pad", np.array([0, 1])),
    case("has mode 'odd'", "Pad", np.array([0, 0, 1, 0, 0, 0]), mode="odd"),
    case("takes tuples of 5", "GatherND", np.zeros((1, 5), np.int64)),
    case("has scales", "Resize", np.zeros(0, np.float32), np.array([1, 1, -1], np.float32)),
    case(r"resizes the axes of lengths", "Resize", np.zeros(0, np.float32), np.zeros(0, np.float32), np.array([1, 1])),
    case("has mode 'odd'", "Resize", np.zeros(0, np.float32), np.array([1, 1, 2], np.float32), mode="odd"),
    case("has nearest_mode 'odd'", "Resize", np.zeros(0, np.float32), np.array([1, 1, 2], np.float32), nearest_mode="odd"),
    case("has coordinate_transformation_mode 'odd'", "Resize", np.zeros(0, np.float32), np.array([1, 1, 2], np.float32),
         coordinate_transformation_mode="odd"),
    case("that does not fit its 1 inputs", "Einsum", equation="ab,bc->ac"),
    case("that does not fit an input with 3 axes", "Einsum", equation="ab->a"),
    case("has unknown or repeated letters", "Einsum", equation="abc->z"),
    case("has direction .up.", "GRU", np.ones((1, 6, 5), np.float32), np.ones((1, 6, 2), np.float32),
         direction="up", hidden_size=2),
    case("has weights .* for 2 steps", "GRU", np.ones((1, 5, 5), np.float32), np.ones((1, 6, 2), np.float32), hidden_size=2),
    case("names 1 activation functions; 2 are needed", "GRU", np.ones((1, 6, 5), np.float32), np.ones((1, 6, 2), np.float32),
         hidden_size=2, activations=["Tanh"]),
    case("names the activation function 'Odd'", "RNN", np.ones((1, 2, 5), np.float32), np.ones((1, 2, 2), np.float32),
         hidden_size=2, activations=["Odd"]),
    case("is in training mode, which is random", "Dropout", np.float32(0.5), np.array(True), kind=mgs.UnsupportedModelError),
    case("lacks q_num_heads or kv_num_heads", "Attention", X, X, opset=23),
    case("cannot divide 5 features among 2 heads", "Attention", X, X, opset=23, q_num_heads=2, kv_num_heads=2),
    case("has 3 heads of queries for 2 of keys", "Attention", *[np.ones((2, 2, 4, 5), np.float32)] * 2, opset=23,
         x=np.ones((2, 3, 4, 5), np.float32)),
    case("has a value of 2 elements; 1 is needed", "ConstantOfShape", first="three",
         value=helper.make_tensor("v", TensorProto.FLOAT, [2], [1.0, 2.0])),
    case("counts in steps of 0", "Range", np.array(3), np.array(0), first="three"),
    case("lacks num_heads", "RotaryEmbedding", X, X, opset=23),
    case("takes place 3 of a sequence of 1", "SequenceAt", np.array(3), first="sequence"),
    case("joins an empty sequence", "ConcatFromSequence", first="empty", axis=0),
    case("cuts into parts of 0", "SplitToSequence", np.array(0), axis=2),
    case("cuts an axis of length 5 at", "SplitToSequence", np.array([2, 2]), axis=2),
    case("has a condition of 2 elements", "If", first="two", then_branch=sub("a"), else_branch=sub("b")),
    case("has a body with 1 inputs and 1 outputs for 1 states", "Loop", np.array(True), X, first="three",
         body=sub("a", inputs=["i"])),
    case("has a body with 0 inputs", "Scan", num_scan_inputs=1, body=sub("a")),
    case("has norm 'L9'", "Normalizer", domain="ai.onnx.ml", norm="L9"),
    case("has no value to put in", "Imputer", domain="ai.onnx.ml"),
    case("has 3 coefficients for 2 rows", "LinearRegressor", domain="ai.onnx.ml", coefficients=[1.0, 2.0, 3.0], targets=2),
    case("has the post_transform 'PROBIT'", "LinearRegressor", domain="ai.onnx.ml", coefficients=[1.0] * 5,
         post_transform="PROBIT", kind=mgs.UnsupportedModelError),
]  # fmt: skip


@pytest.mark.parametrize(
    ("message", "operator", "constants", "x", "kind", "outputs", "domain", "opset", "first", "attributes"), CASES
)
def test_node_is_refused_by_name(message, operator, constants, x, kind, outputs, domain, opset, first, attributes):
    stored = {f"c{at}": value for at, value in enumerate(constants)}
    stored |= {"w": np.ones(x.shape[-1:], np.float32), "two": np.array([True, False]), "three": np.array(3)}
    names = [f"o{at}" for at in range(outputs)]
    tail = ["out"] if operator not in ("SplitToSequence",) else []
    nodes = [
        helper.make_node("SequenceConstruct", ["x"], ["sequence"]),
        helper.make_node("SequenceEmpty", [], ["empty"]),
        helper.make_node(
            operator, [first, *(f"c{at}" for at in range(len(constants)))], names, "odd one", domain=domain, **attributes
        ),
        helper.make_node("SequenceAt" if not tail else "Identity", [names[0], *(() if tail else ("zero",))], ["out"]),
        *(helper.make_node("Cast", [name], [f"{name} real"], to=TensorProto.FLOAT) for name in ("out", *names[1:])),
        helper.make_node("Sum", [f"{name} real" for name in ("out", *names[1:])], ["late"]),
        helper.make_node("Mul", ["late", "w"], ["y"]),
    ]
    stored |= {"zero": np.array(0)}
    kind_in = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", kind_in, [None] * x.ndim)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 3)])

    def load_and_run():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return mgs.onnx.load(proto, parameters="w")(x)

    with pytest.raises(kind, match=rf"node 'odd one' .*{message}"):
        load_and_run()
