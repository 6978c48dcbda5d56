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

_OPSET = 17


@dataclass(frozen=True, eq=False)
class Graphs:
    """Hold one network twice: with the same parameters, once as it is used and once with places for dropout masks.

    Attributes:
        plain: the graph with one input, "x".
        masked: the graph with further inputs "mask_0", …, each multiplied to a hidden layer.
        masks: names and sizes of these inputs, without the sample axis.
    """

    plain: onnx.ModelProto
    masked: onnx.ModelProto
    masks: dict[str, int]


def build(model: str, shape: tuple[int, ...], classes: int, *, seed: int | list[int]) -> Graphs:
    """Build a network.

    Args:
        model: "mlp" (two hidden layers of 256) or "cnn" (two 3×3 convolutions of 16 and 32 channels with max pooling, one hidden
            layer of 64).
        shape: of one sample; (height, width) or (channels, height, width) for "cnn". A last axis of at most 4 beside two that
            are larger is taken for channels, and refused.
        classes: number of outputs.
        seed: seed of the weights, He-normal; biases are 0.

    Returns:
        Its graphs.

    Raises:
        ArgumentError: when the model is unknown or the shape is no image's.
    """
    if model not in _WIRED:
        raise ArgumentError(f"`model` must be one of {', '.join(MODELS)}, or the path of an .onnx file; got {model!r}.")
    channels_last = len(shape) == 3 and shape[-1] <= 4 and shape[-1] < min(shape[:-1])
    if model == "cnn" and (len(shape) not in (2, 3) or min(shape[-2:]) < 4 or channels_last):
        raise ArgumentError(
            f"`model` must be mlp for samples that are no images of at least 4×4; got cnn for {shape}. "
            "Images are (height, width) or (channels, height, width): numpy.moveaxis(x, -1, 1) puts the channels there."
        )
    plain, masked = (_Graph(np.random.default_rng(seed), with_masks) for with_masks in (False, True))  # of the same weights
    for graph in (plain, masked):
        _WIRED[model](graph, shape, classes)
    return Graphs(plain.made(shape, classes), masked.made(shape, classes), masked.masks)


class _Graph:
    """Collect nodes, and draw the weights that they take."""

    def __init__(self, random: np.random.Generator, with_masks: bool) -> None:
        self._random, self._with_masks = random, with_masks
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, Array] = {}
        self.masks: dict[str, int] = {}

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node and return the name of its value."""
        name = f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=f"{operator}_{len(self.nodes)}", **attributes))
        return name

    def weights(self, layer: str, shape: tuple[int, ...], fan_in: int, outputs: int) -> tuple[str, str]:
        """Draw weight and bias of a layer, and return their names."""
        weight, bias = f"{layer}.weight", f"{layer}.bias"
        self.tensors[weight] = (self._random.normal(size=shape) * np.sqrt(2.0 / fan_in)).astype(np.float32)
        self.tensors[bias] = np.zeros(outputs, np.float32)
        return weight, bias

    def dense(self, layer: str, value: str, before: int, after: int) -> str:
        """Add a dense layer."""
        weight, bias = self.weights(layer, (before, after), before, after)
        return self.add("Add", self.add("MatMul", value, weight), bias)

    def hidden(self, value: str, before: int, after: int) -> str:
        """Add a dense layer, its rectifier and, where the graph has them, its mask."""
        number = len(self.masks)
        value, mask = self.add("Relu", self.dense(f"hidden_{number}", value, before, after)), f"mask_{number}"
        self.masks[mask] = after
        return self.add("Mul", value, mask) if self._with_masks else value

    def made(self, shape: tuple[int, ...], classes: int) -> onnx.ModelProto:
        """Return the model."""
        self.nodes[-1].output[0] = "logits"
        inputs = [("x", shape), *((name, (size,)) for name, size in self.masks.items() if self._with_masks)]
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *sizes]) for name, sizes in inputs],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", classes])],
            [numpy_helper.from_array(array, name) for name, array in self.tensors.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=9)
        onnx.checker.check_model(model, full_check=True)
        return model


def _mlp(graph: _Graph, shape: tuple[int, ...], classes: int) -> None:
    value = graph.hidden(graph.add("Flatten", "x", axis=1), prod(shape), 256)
    graph.dense("output", graph.hidden(value, 256, 256), 256, classes)


def _cnn(graph: _Graph, shape: tuple[int, ...], classes: int) -> None:
    value = "x"
    if len(shape) == 2:
        graph.tensors["axes"] = np.array([1], np.int64)
        value = graph.add("Unsqueeze", value, "axes")
    channels = 1 if len(shape) == 2 else shape[0]
    for layer, before, after in (("convolution_0", channels, 16), ("convolution_1", 16, 32)):
        weight, bias = graph.weights(layer, (after, before, 3, 3), before * 9, after)
        value = graph.add("Relu", graph.add("Conv", value, weight, bias, kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
        value = graph.add("MaxPool", value, kernel_shape=[2, 2], strides=[2, 2])
    size = 32 * (shape[-2] // 4) * (shape[-1] // 4)
    graph.dense("output", graph.hidden(graph.add("Flatten", value, axis=1), size, 64), 64, classes)


_WIRED = {"mlp": _mlp, "cnn": _cnn}
MODELS = tuple(_WIRED)
