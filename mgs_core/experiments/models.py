"""The built-in networks as ONNX graphs with weights drawn in NumPy: every backend trains the same model from the same start."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mgs_core._errors import ArgumentError
from mgs_core._types import Array

MODELS = ("mlp", "cnn")
_OPSET = 17


@dataclass(frozen=True, eq=False)
class Network:
    """Hold one network twice: with the same parameters, once as it is used and once with places for dropout masks.

    Attributes:
        plain: the graph with one input, "x".
        masked: the graph with further inputs "mask_0", …, each multiplied to a hidden layer.
        masks: names and sizes of these inputs, without the sample axis.
    """

    plain: onnx.ModelProto
    masked: onnx.ModelProto
    masks: dict[str, int]


def build(model: str, shape: tuple[int, ...], classes: int, *, seed: int | list[int]) -> Network:
    """Build a network.

    Args:
        model: "mlp" (two hidden layers of 256) or "cnn" (two 3×3 convolutions of 16 and 32 channels with max pooling, one hidden
            layer of 64).
        shape: of one sample; (height, width) or (channels, height, width) for "cnn".
        classes: number of outputs.
        seed: seed of the weights, He-normal; biases are 0.

    Returns:
        The network.

    Raises:
        ArgumentError: when the model is unknown or the shape is no image's.
    """
    if model == "mlp":
        layers, width = [("Flatten", {"axis": 1})], prod(shape)
        weights = _dense(["hidden_0", "hidden_1", "output"], [width, 256, 256, classes], np.random.default_rng(seed))
        steps = [*layers, "hidden_0", "hidden_1", "output"]
        return _network(steps, weights, shape, classes)
    if model == "cnn":
        if len(shape) not in (2, 3) or min(shape[-2:]) < 4:
            raise ArgumentError(f"`model` must be mlp for samples that are no images of at least 4×4; got cnn for {shape}.")
        channels = 1 if len(shape) == 2 else shape[0]
        random = np.random.default_rng(seed)
        weights = {}
        for name, before, after in (("convolution_0", channels, 16), ("convolution_1", 16, 32)):
            weights[f"{name}.weight"] = _he(random, (after, before, 3, 3), before * 9)
            weights[f"{name}.bias"] = np.zeros(after, np.float32)
        rest = 32 * (shape[-2] // 4) * (shape[-1] // 4)
        weights |= _dense(["hidden_0", "output"], [rest, 64, classes], random)
        first: list[Any] = [("Unsqueeze", {"axes": [1]})] if len(shape) == 2 else []
        steps = [*first, "convolution_0", "convolution_1", ("Flatten", {"axis": 1}), "hidden_0", "output"]
        return _network(steps, weights, shape, classes)
    raise ArgumentError(f"`model` must be one of {', '.join(MODELS)}, or the path of an .onnx file; got {model!r}.")


def _he(random: np.random.Generator, shape: tuple[int, ...], fan_in: int) -> Array:
    return (random.normal(size=shape) * np.sqrt(2.0 / fan_in)).astype(np.float32)


def _dense(names: list[str], widths: list[int], random: np.random.Generator) -> dict[str, Array]:
    weights: dict[str, Array] = {}
    for name, before, after in zip(names, widths[:-1], widths[1:], strict=True):
        weights[f"{name}.weight"] = _he(random, (before, after), before)
        weights[f"{name}.bias"] = np.zeros(after, np.float32)
    return weights


def _network(steps: list[Any], weights: dict[str, Array], shape: tuple[int, ...], classes: int) -> Network:
    hidden = [step for step in steps if isinstance(step, str) and step.startswith("hidden")]
    masks = {f"mask_{number}": weights[f"{name}.bias"].shape[0] for number, name in enumerate(hidden)}
    plain, masked = (_graph(steps, weights, shape, classes, inputs) for inputs in ({}, masks))
    return Network(plain, masked, masks)


def _graph(
    steps: list[Any], weights: dict[str, Array], shape: tuple[int, ...], classes: int, masks: dict[str, int]
) -> onnx.ModelProto:
    nodes: list[onnx.NodeProto] = []
    value = "x"
    constants: dict[str, Array] = {}

    def add(operator: str, inputs: list[str], **attributes: Any) -> str:
        name = f"value_{len(nodes)}"
        nodes.append(helper.make_node(operator, inputs, [name], name=f"{operator}_{len(nodes)}", **attributes))
        return name

    places = iter(masks)
    for step in steps:
        if isinstance(step, str) and step.startswith("convolution"):
            value = add("Conv", [value, f"{step}.weight", f"{step}.bias"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
            value = add("MaxPool", [add("Relu", [value])], kernel_shape=[2, 2], strides=[2, 2])
        elif isinstance(step, str):
            value = add("Add", [add("MatMul", [value, f"{step}.weight"]), f"{step}.bias"])
            value = add("Relu", [value]) if step != "output" else value
            if masks and step != "output":
                value = add("Mul", [value, next(places)])
        elif step[0] == "Unsqueeze":
            constants["axes"] = np.array(step[1]["axes"], np.int64)
            value = add("Unsqueeze", [value, "axes"])
        else:
            value = add(step[0], [value], **step[1])
    nodes[-1].output[0] = "logits"
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name, width in masks.items()]
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", classes])
    tensors = [numpy_helper.from_array(array, name) for name, array in {**weights, **constants}.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "network", inputs, [output], tensors),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=9,
    )
    onnx.checker.check_model(model, full_check=True)
    return model
