"""Load an ONNX file as a functional model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto

from mgs_core._errors import ArgumentError
from mgs_core._protocol import Backend
from mgs_core._registry import get_backend
from mgs_core._tree import select
from mgs_core._types import Array
from mgs_core.functional import FunctionalModel
from mgs_core.onnx import control as control  # registers If, Loop and Scan
from mgs_core.onnx.errors import damaged, unsupported
from mgs_core.onnx.files import embed_external, read_model
from mgs_core.onnx.graph import Graph, Node, Value, needed
from mgs_core.onnx.habits import halve, tie
from mgs_core.onnx.invariants import capture_invariants
from mgs_core.onnx.lifting import lift
from mgs_core.onnx.operators.common import native_dtype
from mgs_core.onnx.operators.refused import why_refused
from mgs_core.onnx.operators.registry import find
from mgs_core.onnx.parameters import trained
from mgs_core.onnx.parsing import parse
from mgs_core.onnx.program import Place, compile_nodes, refuse_lacking, to_device
from mgs_core.onnx.relocation import relocate
from mgs_core.onnx.tensors import is_float

_PRECISIONS = (None, "float16", "float32", "float64")


@dataclass(frozen=True, eq=False)
class OnnxModel(FunctionalModel):
    """Hold a model that was loaded from ONNX: a `FunctionalModel` that knows its file.

    Attributes:
        function: `function(parameters, inputs) → (n, c)`; inputs are one array, or a dict by input name.
        parameters: the trained initialisers by name.
        proto: the model as read.
        ties: initialisers that are transposed copies of a parameter: name of the copy → name of the parameter.
        cut: biases of recurrent layers of which the file has a second half of zeros.
        uncounted: why other floating-point initialisers are no parameters, by name; empty where `parameters` chose.
    """

    function: OnnxFunction
    proto: ModelProto
    ties: Mapping[str, str]
    cut: frozenset[str]
    uncounted: Mapping[str, str]

    def example_inputs(self, n: int, *, seed: int = 0) -> dict[str, Array]:
        """Draw inputs of the declared shapes: normal numbers, and small integers that index what they look up.

        Args:
            n: number of samples, along the first axis.
            seed: of the draw.

        Returns:
            Arrays of the backend by name; free sizes are 4.
        """
        return self.function.example_inputs(n, seed=seed)


def load(
    model: Any,
    *,
    backend: str = "numpy",
    parameters: str | Iterable[str] | Callable[[str], bool] | None = None,
    output: str | None = None,
    dtype: str | None = None,
) -> OnnxModel:
    """Load an ONNX model as a pure function of its trained parameters and its inputs, on any backend.

    The file is not trusted: sizes are checked before memory is taken, and external data must lie in the model's folder.

    Args:
        model: path of an .onnx file, or an `onnx.ModelProto`, which is left as it is.
        backend: name of the backend whose arrays the parameters are.
        parameters: None for the initialisers (in a file without floating-point ones, the Constant nodes) that are trained, by the
            rule of `mgs_core.onnx.parameters`; or names or a predicate on names, of all floating-point initialisers.
        output: name of the output; None for the first that is floating-point. Outputs of other ranks are brought to (n, c).
        dtype: "float16", "float32" or "float64" to replace every floating-point type of the model; None to keep them.

    Returns:
        The model; its `example_inputs(n)` draws inputs that fit.

    Raises:
        ArgumentError: when the file is missing or damaged, or an argument does not fit; names the node or tensor.
        BackendError: when the backend is unknown or not installed.
        UnsupportedModelError: when the model cannot be evaluated exactly; names the node, its operator and opset.

    Cost:
        Reads the file once; constants are folded. A run costs the operations, and about a microsecond a node.

    Example:
        >>> import numpy as np
        >>> import mgs_core as mgs
        >>> from onnx import helper, numpy_helper
        >>> weight = numpy_helper.from_array(np.ones((3, 2), np.float32), "weight")
        >>> x, y = (helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in (("x", 3), ("y", 2)))
        >>> graph = helper.make_graph([helper.make_node("MatMul", ["x", "weight"], ["y"])], "linear", [x], [y], [weight])
        >>> model = mgs.onnx.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
        >>> list(model.parameters)
        ['weight']
        >>> mgs.kernel(model, np.eye(2, 3, dtype=np.float32))
        array([[2., 0.],
               [0., 2.]], dtype=float32)
    """
    if dtype not in _PRECISIONS:
        raise ArgumentError(f"`dtype` must be one of {', '.join(map(repr, _PRECISIONS))}; got {dtype!r}.")
    found = get_backend(backend)
    proto, folder = read_model(model)
    relocate(proto)
    graph = parse(proto, folder, dtype)
    embed_external(proto, folder)
    lift(graph)
    capture_invariants(graph)
    ties, cut = tie(graph), halve(graph)
    wanted = _output(graph, output)
    nodes = needed(graph.nodes, [wanted])
    for node in nodes:
        if find(node.domain, node.operator, node.opset) is None:
            raise why_refused(node)
    used = {name for node in nodes for name in node.inputs} | {wanted}
    for value in graph.inputs:
        where = f"input {value.name!r}"
        if value.name in used and value.kind != "tensor":
            raise unsupported(where, f"is a {value.kind}", "Only tensors can be inputs.")
        if value.name in used and value.dtype is not None:
            refuse_lacking(found, value.dtype, where)
    uncounted: dict[str, str] = {}
    if parameters is None:
        chosen, uncounted = trained(graph, nodes)
    else:
        floats = [name for name, value in graph.initializers.items() if is_float(value.dtype)]
        picked = select(floats, parameters)
        chosen = [name for name in picked if name in used]
        if chosen != picked and not callable(parameters):
            raise ArgumentError(
                f"`parameters` must name initialisers on which the output depends; got {sorted({*picked} - {*chosen})}, "
                "on which it does not. Leave them out, or choose another `output`."
            )
    if not chosen:
        raise ArgumentError(
            "`model` must have trained parameters: floating-point initialisers on which the output depends; got none. "
            "Name them by `parameters`."
        )
    function = OnnxFunction(graph, nodes, wanted, chosen, found)
    values = {name: to_device(found, graph.initializers[name]) for name in chosen}
    return OnnxModel(function, values, proto, ties, frozenset(cut), uncounted)


class OnnxFunction:
    """Be the function from parameters and inputs to outputs (n, c).

    Attributes:
        inputs: name, dtype and shape of each input that the output depends on.
        output: name of the output.
    """

    def __init__(self, graph: Graph, nodes: list[Node], output: str, chosen: list[str], backend: Backend) -> None:
        self._graph, self._nodes, self._names, self._backend = graph, nodes, chosen, backend
        self.output = output
        used = {name for node in nodes for name in node.inputs} | {output}
        self.inputs = [value for value in graph.inputs if value.name in used]
        self._spare = {value.name for value in graph.inputs} - {value.name for value in self.inputs}
        self._dtypes = {
            value.name: None if value.dtype is None else native_dtype(backend.namespace, value.dtype) for value in self.inputs
        }
        constants = {name: value for name, value in graph.initializers.items() if name in used and name not in chosen}
        places = dict.fromkeys([*chosen, *(value.name for value in self.inputs)], Place.DEVICE)
        self._program = compile_nodes(nodes, [output], inputs=places, constants=constants, backend=backend)
        if self._program.places[0] is not Place.DEVICE:
            raise damaged(f"output {output!r}", "depends on no parameter and no input")

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Be pickled without the compiled calls, which are made anew."""
        return _recompiled, (self._graph, self._nodes, self.output, self._names, self._backend.name)

    def __call__(self, parameters: Any, inputs: Any) -> Array:
        """Return the outputs.

        Args:
            parameters: arrays by name, as in `OnnxModel.parameters`.
            inputs: the array, when the model has one input; else a dict by name.

        Returns:
            Outputs (n, c).

        Raises:
            ArgumentError: when an input is missing, unknown, or has the wrong shape or dtype.
        """
        arguments = [parameters[name] for name in self._names]
        if hasattr(inputs, "keys"):
            self._check_names(inputs)
            arguments += [self._checked(value, inputs[value.name]) for value in self.inputs]
        elif len(self.inputs) == 1:
            arguments.append(self._checked(self.inputs[0], inputs))
        else:
            raise ArgumentError(f"`inputs` must be a dict with {[value.name for value in self.inputs]}; got one array.")
        try:
            y = self._program(arguments)[0]
        except ArgumentError as error:
            given = {value.name: array.shape[0] for value, array in zip(self.inputs, arguments[len(self._names) :], strict=True)}
            fixed = [v.shape[0] for v in self.inputs if v.shape and type(v.shape[0]) is int and v.shape[0] != given[v.name]]
            if not fixed:
                raise
            raise ArgumentError(
                f"{error}. The file was written for batches of {fixed[0]}; export it with a free batch axis."
            ) from error
        if isinstance(y, list):
            raise unsupported(f"output {self.output!r}", "is a sequence", "Choose another `output`.")
        if y.ndim == 2:
            return y
        if y.ndim == 0:
            raise ArgumentError(
                "`model` must have an output with samples along its first axis; got a scalar. Choose another `output`."
            )
        return self._backend.namespace.reshape(y, (y.shape[0], -1) if y.ndim > 1 else (y.shape[0], 1))

    def example_inputs(self, n: int, *, seed: int = 0) -> dict[str, Array]:
        """Draw inputs, as `OnnxModel.example_inputs` says."""
        random = np.random.default_rng(seed)
        drawn = {}
        for value in self.inputs:
            _, *rest = value.shape or (n, 4)
            shape = (n, *(size if isinstance(size, int) and size > 0 else 4 for size in rest))
            dtype = np.dtype(np.float32 if value.dtype is None else value.dtype)
            if is_float(dtype):
                drawn[value.name] = random.normal(size=shape).astype(dtype)
            else:
                drawn[value.name] = random.integers(0, 2 if dtype.kind == "b" else self._rows(value.name), shape).astype(dtype)
        return {name: self._backend.asarray(value) for name, value in drawn.items()}

    def _rows(self, name: str) -> int:
        """Return the length of the shortest table in which an input looks up rows; 2 when it looks up none."""
        names, sizes = {name}, []
        for node in self._nodes:
            if node.operator in ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Identity") and node.inputs[0] in names:
                names.add(node.outputs[0])
            if node.operator == "Gather" and node.inputs[1] in names and node.inputs[0] in self._graph.initializers:
                sizes.append(self._graph.initializers[node.inputs[0]].shape[node.attributes["axis"]])
        return min(sizes, default=2)

    def _check_names(self, inputs: Mapping[str, Array]) -> None:
        known = {value.name for value in self.inputs}
        missing, strange = known - set(inputs), set(inputs) - known - self._spare
        if missing or strange:
            raise ArgumentError(
                f"`inputs` must be the model's, {sorted(known)}; {sorted(missing)} lack, {sorted(strange)} are unknown."
            )

    def _checked(self, value: Value, array: Array) -> Array:
        dtype, shape = getattr(array, "dtype", None), value.shape
        if dtype is None:
            raise ArgumentError(f"`inputs` must be arrays; got {type(array).__name__} for {value.name!r}. Convert it.")
        if shape is not None and (
            len(shape) != array.ndim
            or any(type(size) is int and size != got for size, got in zip(shape[1:], array.shape[1:], strict=True))
        ):
            raise ArgumentError(f"`inputs` must have the shape {('n', *shape[1:])} for {value.name!r}; got {tuple(array.shape)}.")
        wanted = self._dtypes[value.name]
        if wanted is None or dtype == wanted:
            return array
        xp = self._backend.namespace
        for kind in ("real floating", "integral", "bool"):
            if xp.isdtype(dtype, kind) and xp.isdtype(wanted, kind):
                return xp.astype(array, wanted)
        raise ArgumentError(f"`inputs` must have the dtype {wanted} for {value.name!r}; got {dtype}. Convert it.")


def _recompiled(graph: Graph, nodes: list[Node], output: str, chosen: list[str], backend: str) -> OnnxFunction:
    return OnnxFunction(graph, nodes, output, chosen, get_backend(backend))


def _output(graph: Graph, output: str | None) -> str:
    names = [value.name for value in graph.outputs]
    if output is not None:
        if output not in names:
            raise ArgumentError(f"`output` must be one of {names}; got {output!r}.")
        dtype = next(value.dtype for value in graph.outputs if value.name == output)
        if dtype is not None and not is_float(dtype):
            raise ArgumentError(f"`output` must be of floating-point numbers, which have gradients; got {output!r} of {dtype}.")
        return output
    floats = [value.name for value in graph.outputs if value.dtype is not None and is_float(value.dtype)]
    unknown = [value.name for value in graph.outputs if value.dtype is None and value.kind != "strings"]
    if not floats and not unknown:
        raise unsupported("the graph", "has no floating-point output", "Name one by `output`.")
    return (floats or unknown)[0]
