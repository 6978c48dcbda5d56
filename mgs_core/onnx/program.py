"""Compile a graph to a list of ready calls, and run it.

Everything that can be decided before data comes is decided here: the function of each node, where each value lives, and the
values that no data or parameter reaches, which are computed once. A value is

* constant: known when the model is loaded;
* host: a NumPy array that depends on shapes only, computed anew at each run;
* device: an array of the backend, which depends on parameters or inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import Any

import array_api_compat.numpy as host_namespace
import numpy as np
from array_api_compat import is_torch_array
from onnx import TensorProto

from mgs_core._errors import ArgumentError, MgsError
from mgs_core._protocol import Backend
from mgs_core._types import Array
from mgs_core.onnx.errors import unsupported
from mgs_core.onnx.graph import Node
from mgs_core.onnx.operators.refused import why_refused
from mgs_core.onnx.operators.registry import find
from mgs_core.onnx.tensors import dtype_of

_NOTHING = np.zeros(0)
_LACKING = {"numpy": {"bfloat16"}, "torch": {"uint16", "uint32", "uint64"}}


class Place(Enum):
    """Say where a value lives."""

    CONSTANT = "constant"
    HOST = "host"
    DEVICE = "device"


class Program:
    """Hold the calls of a graph.

    Attributes:
        places: where the outputs live.
        constants: the outputs that are known, by position.
    """

    def __init__(
        self,
        template: list[Any],
        inputs: Sequence[int],
        steps: Sequence[tuple[Callable[..., Any], tuple[int, ...], Any, tuple[int, ...], Node]],
        outputs: Sequence[int],
        places: Sequence[Place],
        backend: Backend,
    ) -> None:
        """Keep what `compile_nodes` made."""
        self._backend = backend
        self._elsewhere: dict[Any, list[Any]] = {}  # device → the template with its constants there
        self._template, self._inputs, self._steps, self._outputs = template, list(inputs), list(steps), list(outputs)
        self.places = list(places)
        self.constants = {at: template[slot] for at, slot in enumerate(outputs) if places[at] is Place.CONSTANT}

    def __call__(self, arguments: Sequence[Any]) -> list[Any]:
        """Evaluate the graph.

        Args:
            arguments: values of the inputs, in the order given to `compile_nodes`.

        Returns:
            The outputs.

        Raises:
            ArgumentError: when a node cannot take its inputs; names the node.
        """
        device = self._device(arguments)
        if device is None:
            return self._run(self._template.copy(), arguments)
        if device not in self._elsewhere:
            self._elsewhere[device] = [_moved(value, device) for value in self._template]
        with device:  # what operators make of NumPy arrays goes there too
            return self._run(self._elsewhere[device].copy(), arguments)

    def _device(self, arguments: Sequence[Any]) -> Any:
        """Return the torch.device of the arguments, where torch would put new arrays elsewhere; other frameworks move them."""
        if self._backend.name != "torch":
            return None
        found = next((value.device for value in arguments if is_torch_array(value)), None)
        return None if found is None or found == self._backend.asarray(_NOTHING).device else found

    def _run(self, values: list[Any], arguments: Sequence[Any]) -> list[Any]:
        for slot, value in zip(self._inputs, arguments, strict=True):
            values[slot] = value
        node = None
        try:
            for run, places, result, dead, node in self._steps:  # noqa: B007  # read where an error is reported
                found = run(*[values[place] for place in places])
                if type(result) is int:
                    values[result] = found
                else:
                    for slot, value in zip(result, found, strict=False):
                        values[slot] = value
                for slot in dead:
                    values[slot] = None
        except (MgsError, MemoryError):
            raise
        except Exception as error:  # whatever the framework raises where shapes or types do not fit
            if type(error).__name__ in ("OutOfMemoryError", "ResourceExhaustedError"):
                raise
            raise ArgumentError(f"`inputs` must fit the model; {node} failed: {type(error).__name__}: {error}") from error
        return [values[slot] for slot in self._outputs]


def compile_nodes(
    nodes: Iterable[Node],
    outputs: Sequence[str],
    *,
    inputs: Mapping[str, Place],
    constants: Mapping[str, Array],
    backend: Backend,
) -> Program:
    """Compile nodes that stand in order of evaluation.

    Args:
        nodes: the nodes on which the outputs depend.
        outputs: names of the results.
        inputs: names and places of the values that are given at each run.
        constants: values that are known.
        backend: whose namespace evaluates what lives on the device.

    Returns:
        The program.

    Raises:
        ArgumentError: when a node breaks the rules of ONNX.
        UnsupportedModelError: when an operator is not supported.
    """
    compiler = _Compiler(backend, constants)
    slots = [compiler.add(name, place) for name, place in inputs.items()]
    for node in nodes:
        compiler.node(node)
    return compiler.finish(slots, outputs)


class _Compiler:
    def __init__(self, backend: Backend, constants: Mapping[str, Array]) -> None:
        self.backend = backend
        self._template: list[Any] = [None]  # slot 0: an absent input
        self._slots: dict[str, int] = {"": 0}
        self._places: dict[str, Place] = {"": Place.CONSTANT}
        self._device: dict[str, int] = {"": 0}  # host value → slot of its copy on the device
        self._steps: list[tuple[Callable[..., Any], tuple[int, ...], Any, Node]] = []
        for name, value in constants.items():
            self.add(name, Place.CONSTANT, value)

    def add(self, name: str, place: Place, value: Any = None) -> int:
        """Give a value a slot."""
        slot = len(self._template)
        self._template.append(value)
        if name:
            self._slots[name], self._places[name] = slot, place
        return slot

    def node(self, node: Node) -> None:
        """Compile one node, or evaluate it when all that it takes is known."""
        entry = find(node.domain, node.operator, node.opset)
        if entry is None:
            raise why_refused(node)
        places = [self._places[name] for name in node.inputs]
        on_host = {at for at in range(len(node.inputs)) if entry.host is None or at in entry.host}
        on_device = any(place is Place.DEVICE for at, place in enumerate(places) if at not in on_host)
        node.constants = {
            at: self._template[self._slots[name]] for at, name in enumerate(node.inputs) if name and places[at] is Place.CONSTANT
        }
        if entry.control is not None:
            run, kinds = entry.control(node, places, self.backend)
        else:
            run = entry.build(node, self.backend.namespace if on_device else host_namespace)
            kinds = [Place.DEVICE if on_device and not entry.host_result else Place.HOST] * len(node.outputs)
        if all(place is Place.CONSTANT for place in places):
            self._fold(node, run, entry.many)
            return
        arguments = []
        for at, name in enumerate(node.inputs):
            wanted = places[at] if entry.control else Place.DEVICE if on_device and at not in on_host else Place.HOST
            arguments.append(self._argument(node, name, wanted) if name else 0)
        results = [self.add(name, kind) for name, kind in zip(node.outputs, kinds, strict=True)]
        self._steps.append((run, tuple(arguments), tuple(results) if entry.many else results[0], node))

    def finish(self, inputs: Sequence[int], outputs: Sequence[str]) -> Program:
        """Return the program, which forgets each value after its last use."""
        kept = {self._slots[name] for name in outputs}
        last: dict[int, int] = {}
        for at, (_, arguments, _, _) in enumerate(self._steps):
            last.update(dict.fromkeys(arguments, at))
        made = set(inputs)
        for _, _, result, _ in self._steps:
            made.update((result,) if isinstance(result, int) else result)
        dead: dict[int, list[int]] = {}
        for slot, at in last.items():
            if slot in made and slot not in kept:
                dead.setdefault(at, []).append(slot)
        steps = [(run, taken, result, tuple(dead.get(at, ())), node) for at, (run, taken, result, node) in enumerate(self._steps)]
        places = [self._places[name] for name in outputs]
        return Program(self._template, inputs, steps, [self._slots[name] for name in outputs], places, self.backend)

    def _fold(self, node: Node, run: Callable[..., Any], many: bool) -> None:
        """Compute a value that nothing but constants reaches."""
        try:
            with np.errstate(all="ignore"):
                found = run(*(node.constants.get(at) for at in range(len(node.inputs))))
        except MgsError:
            raise
        except Exception as error:  # whatever NumPy raises where shapes or types do not fit
            raise node.damaged(f"fails on its constants: {type(error).__name__}: {error}") from error
        for name, value in zip(node.outputs, found if many else [found], strict=False):
            self.add(name, Place.CONSTANT, value if isinstance(value, list) else np.asarray(value))

    def _argument(self, node: Node, name: str, wanted: Place) -> int:
        """Return the slot of a value at the wanted place, adding a conversion where it lives elsewhere."""
        slot, place = self._slots[name], self._places[name]
        if wanted is Place.DEVICE and place is not Place.DEVICE:
            if name not in self._device:
                if place is Place.CONSTANT:
                    self._device[name] = self.add("", place, to_device(self.backend, self._template[slot]))
                else:
                    self._device[name] = self.add("", Place.DEVICE)
                    self._steps.append((partial(to_device, self.backend), (slot,), self._device[name], node))
            return self._device[name]
        if wanted is Place.HOST and place is Place.DEVICE:
            copy = self.add("", Place.HOST)
            self._steps.append((partial(to_host, self.backend, node, name), (slot,), copy, node))
            return copy
        return slot


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, list):
        return [_moved(entry, device) for entry in value]
    return value.to(device) if is_torch_array(value) else value


def to_device(backend: Backend, value: Any) -> Any:
    """Return an array of the backend for a NumPy array, or a list of them.

    Args:
        backend: of the device.
        value: array, or list of arrays.

    Returns:
        The same on the device.

    Raises:
        UnsupportedModelError: when the backend's framework lacks the type.
    """
    if isinstance(value, list):
        return [to_device(backend, entry) for entry in value]
    refuse_lacking(backend, value.dtype, "the model")
    if value.dtype.name == "bfloat16":  # not every framework reads NumPy's arrays of it
        xp = backend.namespace
        return xp.astype(backend.asarray(value.astype(np.float32)), xp.bfloat16)
    return backend.asarray(value)


def refuse_lacking(backend: Backend, dtype: Any, where: str) -> None:
    """Raise for a type that ONNX allows and in which the backend's framework lacks most operations.

    Args:
        backend: of the device.
        dtype: NumPy's.
        where: names the value.

    Raises:
        UnsupportedModelError: for bfloat16 on NumPy, and unsigned integers of 16 and more bits on PyTorch.
    """
    if dtype.name in _LACKING.get(backend.name, ()):
        remedy = 'Pass dtype="float32", or use another backend.' if dtype.name == "bfloat16" else "Use another backend."
        raise unsupported(where, f"has values in {dtype.name}, in which the backend {backend.name!r} hardly computes", remedy)


def to_host(backend: Backend, node: Node, name: str, value: Any) -> Any:
    """Return the NumPy array of a value that fixes a shape.

    Args:
        backend: of the device.
        node: that wants it.
        name: of the value.
        value: array of the backend.

    Returns:
        The NumPy array.

    Raises:
        UnsupportedModelError: when it is not known while the computation is traced.
    """
    brain = "bfloat16" in str(value.dtype)  # not every framework hands it out as NumPy's
    try:
        array = np.asarray(backend.to_numpy(backend.namespace.astype(value, backend.namespace.float32) if brain else value))
    except Exception as error:  # each framework has its own error for a value that is not known yet
        raise node.unsupported(
            f"takes {name!r}, which fixes a shape, from data that is not known while {backend.name} traces the model",
            "Export with static shapes, or use another backend.",
        ) from error
    return array.astype(dtype_of(TensorProto.BFLOAT16, name)) if brain else array
