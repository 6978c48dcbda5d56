"""Kernels through operators that no exporter's network in these tests has, against central differences in float64."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import mgs_core as mgs

RANDOM = np.random.default_rng(0)
BACKENDS = [
    pytest.param(name, marks=[pytest.mark.slow] if name in ("jax", "tensorflow") else [])
    for name, installed in mgs.available_backends().items()
    if installed and name != "keras"
]


def draw(*shape):
    return RANDOM.normal(size=shape)


def node(operator, inputs, outputs, **attributes):
    return helper.make_node(operator, inputs, outputs, **attributes)


def case(shape, nodes, tensors, opset=27):
    return shape, nodes, tensors, opset


LAST = node("Flatten", ["h"], ["y"])
CASES = {
    "GridSample-linear": case(
        (2, 4, 5),
        [node("Conv", ["x", "w"], ["c"]), node("Mul", ["one", "g"], ["p"]), node("GridSample", ["c", "p"], ["h"]), LAST],
        {"w": draw(2, 2, 1, 1), "g": 0.9 * np.tanh(draw(1, 3, 3, 2)), "one": np.ones(())},
    ),
    "GridSample-cubic": case(
        (2, 4, 5),
        [node("Conv", ["x", "w"], ["c"]), node("Mul", ["one", "g"], ["p"]),
         node("GridSample", ["c", "p"], ["h"], mode="cubic", padding_mode="reflection"), LAST],
        {"w": draw(2, 2, 1, 1), "g": 1.3 * np.tanh(draw(1, 3, 3, 2)), "one": np.ones(())},
    ),
    "DeformConv": case(
        (2, 4, 5),
        [node("Conv", ["x", "o", "ob"], ["s"], pads=[1] * 4), node("Conv", ["x", "m"], ["k"], pads=[1] * 4),
         node("Sigmoid", ["k"], ["k1"]),
         node("DeformConv", ["x", "w", "s", "b", "k1"], ["h"], pads=[1] * 4, group=2, offset_group=1), LAST],
        {"o": 0.2 * draw(18, 2, 3, 3), "ob": 0.3 + 0 * draw(18), "m": draw(9, 2, 3, 3), "w": draw(4, 1, 3, 3), "b": draw(4)},
    ),
    "Col2Im": case(
        (2, 3),
        [node("MatMul", ["x", "w"], ["c"]), node("MatMul", ["v", "c"], ["d"]),
         node("Col2Im", ["d", "image", "block"], ["h"], strides=[2, 1], pads=[0, 1, 1, 0]), LAST],
        {"w": draw(3, 6), "v": draw(8, 2), "image": np.array([4, 3]), "block": np.array([2, 2])},
    ),
    "MaxUnpool": case(
        (2, 4, 4),
        [node("Conv", ["x", "w"], ["c"]), node("MaxPool", ["c"], ["m", "i"], kernel_shape=[2, 2], strides=[2, 2]),
         node("Mul", ["m", "v"], ["n"]), node("MaxUnpool", ["n", "i"], ["h"], kernel_shape=[2, 2], strides=[2, 2]), LAST],
        {"w": draw(2, 2, 1, 1), "v": draw(2, 1, 1)},
    ),
    "TensorScatter": case(
        (2, 3),
        [node("MatMul", ["x", "w"], ["u"]), node("MatMul", ["x4", "w"], ["c"]), node("Concat", ["x", "x"], ["x4"], axis=1),
         node("TensorScatter", ["c", "u", "at"], ["h"], mode="circular", axis=1), LAST],
        {"w": draw(3, 3), "at": np.array([3])},
    ),
    "DFT": case(
        (5, 1),
        [node("Mul", ["x", "v"], ["c"]), node("DFT", ["c", "", "axis"], ["f"], onesided=1), node("MatMul", ["f", "w"], ["d"]),
         node("DFT", ["d", "", "axis"], ["h"], inverse=1), LAST],
        {"v": draw(5, 1), "w": draw(2, 2), "axis": np.array(1)},
    ),
    "STFT": case(
        (9, 1),
        [node("MatMul", ["x", "w"], ["c"]), node("Mul", ["one", "window"], ["u"]), node("STFT", ["c", "step", "u"], ["h"]), LAST],
        {"w": draw(1, 1), "window": draw(4), "step": np.array(2), "one": np.ones(())},
    ),
    "LinearAttention": case(
        (3, 4),
        [node("MatMul", ["x", "wq"], ["q"]), node("MatMul", ["x", "wk"], ["k"]), node("MatMul", ["x", "wv"], ["v"]),
         node("MatMul", ["x", "wg"], ["g"]), node("MatMul", ["x", "wb"], ["b"]), node("Sigmoid", ["b"], ["rate"]),
         node("LinearAttention", ["q", "k", "v", "", "g", "rate"], ["h", "state"], q_num_heads=2, kv_num_heads=1), LAST],
        {"wq": draw(4, 4), "wk": 0.5 * draw(4, 2), "wv": draw(4, 3), "wg": 0.3 * draw(4, 1), "wb": draw(4, 1)},
    ),
    "CausalConvWithState": case(
        (2, 5),
        [node("MatMul", ["u", "x"], ["c"]), node("CausalConvWithState", ["c", "w", "b"], ["h", "s"], activation="silu"), LAST],
        {"u": draw(3, 2), "w": draw(3, 1, 3), "b": draw(3)},
    ),
    "CenterCropPad": case(
        (4, 3),
        [node("MatMul", ["x", "w"], ["c"]), node("CenterCropPad", ["c", "size"], ["h"], axes=[1, 2]), LAST],
        {"w": draw(3, 3), "size": np.array([2, 6])},
    ),
}  # fmt: skip


def build(name):
    shape, nodes, tensors, opset = CASES[name]
    if name == "TensorScatter":  # in order of evaluation
        nodes = [nodes[2], *nodes[:2], *nodes[3:]]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["n", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, ["n", "c"])],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in tensors.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), shape


def differences(model, x):
    """Central differences of all outputs of the whole batch: (n, c, p)."""
    columns = []
    for name, value in model.parameters.items():
        for place in np.ndindex(value.shape):
            moved = []
            for step in (1e-6, -1e-6):
                shifted = value.copy()
                shifted[place] += step
                moved.append(model.function({**model.parameters, name: shifted}, x))
            columns.append((moved[0] - moved[1]) / 2e-6)
    return np.stack(columns, axis=-1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of JAX, about its own internals
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_kernel_is_that_of_central_differences(name, backend):
    proto, shape = build(name)
    floats = [key for key, value in CASES[name][2].items() if np.issubdtype(value.dtype, np.floating) and value.ndim]
    n = 1 if name.startswith("GridSample") else 3  # the grid is a parameter, one for the batch
    x = np.random.default_rng(1).normal(size=(n, *shape))
    plain = mgs.onnx.load(proto, parameters=floats)
    rows = differences(plain, x)
    expected = np.einsum("acp,bcp->ab", rows, rows)
    context = contextlib.nullcontext()
    if backend == "jax":
        import jax

        context = jax.experimental.enable_x64() if hasattr(jax.experimental, "enable_x64") else jax.enable_x64(True)
    with context:
        model, get = mgs.onnx.load(proto, backend=backend, parameters=floats), mgs.get_backend(backend)
        found = get.to_numpy(mgs.kernel(model, get.asarray(x)))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7 * expected.max())


@pytest.mark.parametrize("name", CASES)
def test_constants_go_where_the_inputs_are(name):
    torch = pytest.importorskip("torch")
    proto, shape = build(name)
    model = mgs.onnx.load(proto, backend="torch")
    parameters = {key: value.to("meta") for key, value in model.parameters.items()}
    n = 1 if name.startswith("GridSample") else 3
    y = model.function(parameters, torch.zeros((n, *shape), dtype=torch.float64, device="meta"))
    assert y.device.type == "meta"
    assert y.shape == model(torch.zeros((n, *shape), dtype=torch.float64)).shape


@pytest.mark.parametrize(("automatic", "pads"), [("SAME_UPPER", [0, 1]), ("SAME_LOWER", [1, 0])])
def test_the_odd_place_of_automatic_padding(automatic, pads):
    x, w = draw(2, 1, 4), draw(1, 1, 2)

    def correlate(**attributes):
        proto = helper.make_model(
            helper.make_graph(
                [node("Conv", ["x", "w"], ["y"], **attributes)], "g",
                [helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["n", 1, 4])],
                [helper.make_tensor_value_info("y", TensorProto.DOUBLE, ["n", 1, "p"])], [numpy_helper.from_array(w, "w")],
            ),
            opset_imports=[helper.make_opsetid("", 17)],
        )  # fmt: skip
        return mgs.onnx.load(proto)(x)

    padded = np.pad(x[:, 0], ((0, 0), tuple(pads)))
    expected = padded[:, :-1] * w[0, 0, 0] + padded[:, 1:] * w[0, 0, 1]
    np.testing.assert_allclose(correlate(auto_pad=automatic), expected, rtol=1e-12)
    np.testing.assert_allclose(correlate(pads=pads), expected, rtol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of JAX, about its own internals
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("operator", "attributes"),
    [("ReduceL2", {"axes": [1, 2]}), ("LpPool", {"kernel_shape": [2]}), ("GlobalLpPool", {"p": 3}),
     ("MeanVarianceNormalization", {"axes": [1, 2]})],
)  # fmt: skip
def test_norms_of_nothing_have_a_gradient(backend, operator, attributes):
    """As exports of `torch.nn.functional.normalize` have one; the sample of zeros is alone in having none of its own."""
    nodes = [node("Mul", ["x", "w"], ["c"]), node(operator, ["c"], ["h"], **attributes), LAST]
    proto = helper.make_model(
        helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["n", 2, 4])],
            [helper.make_tensor_value_info("y", TensorProto.DOUBLE, ["n", "c"])], [numpy_helper.from_array(draw(2, 1), "w")],
        ),
        opset_imports=[helper.make_opsetid("", 13)],
    )  # fmt: skip
    x = np.concatenate([draw(2, 2, 4), np.zeros((1, 2, 4))])
    model, get = mgs.onnx.load(proto, backend=backend, parameters=["w"]), mgs.get_backend(backend)
    found = get.to_numpy(mgs.kernel(model, get.asarray(x.astype(get.to_numpy(get.asarray(x)).dtype))))
    assert np.all(found[2] == 0)
    rows = differences(mgs.onnx.load(proto, parameters=["w"]), x[:2])
    np.testing.assert_allclose(found[:2, :2], np.einsum("acp,bcp->ab", rows, rows), rtol=1e-5)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_norms_are_those_of_numpy(p):
    x = np.concatenate([draw(2, 2, 4), np.zeros((1, 2, 4))])
    pairs = x.reshape(3, 2, 2, 2)
    for operator, attributes, parts in (
        ("LpPool", {"kernel_shape": [2], "strides": [2], "p": p}, pairs),
        ("GlobalLpPool", {"p": p}, x[:, :, None]),
    ):
        proto = helper.make_model(
            helper.make_graph(
                [node("Mul", ["x", "w"], ["c"]), node(operator, ["c"], ["y"], **attributes)], "g",
                [helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["n", 2, 4])],
                [helper.make_tensor_value_info("y", TensorProto.DOUBLE, ["n", 2, "p"])],
                [numpy_helper.from_array(np.ones(1), "w")],
            ),
            opset_imports=[helper.make_opsetid("", 13)],
        )  # fmt: skip
        np.testing.assert_allclose(
            mgs.onnx.load(proto, parameters=["w"])(x), np.linalg.norm(parts, p, axis=-1).reshape(3, -1), rtol=1e-12
        )
