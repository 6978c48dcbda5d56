"""Run ONNX's own node tests on a backend, and write the page with the table of coverage, docs/onnx.md.

    python docs/onnx_coverage.py            # writes the table
    python docs/onnx_coverage.py --check    # fails when the table is not up to date

The tests in tests/onnx/test_conformance.py run the same cases. What is skipped is listed here, each with its reason.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, defs, numpy_helper

from mgs_core._errors import UnsupportedModelError
from mgs_core._registry import get_backend
from mgs_core.onnx import control as control  # registers If, Loop and Scan
from mgs_core.onnx.graph import needed
from mgs_core.onnx.operators.registry import supported
from mgs_core.onnx.parsing import parse
from mgs_core.onnx.program import Place, compile_nodes, to_device

_QUANTISED = "quantised weights have no gradient"
_RANDOM = "random, so its outputs have no kernel"
_LOSS = "a loss; the library takes losses apart from the model"
_DETECTION = "for detection; selects boxes by data"
_OPTIMISER = "an optimiser's step, not a part of a model"
_STRINGS = "strings have no gradient"
#: Operators without an implementation.
OPERATORS = {
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"), _QUANTISED),
    **dict.fromkeys(("ConvInteger", "MatMulInteger"), _QUANTISED),
    **dict.fromkeys(
        ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"), _RANDOM
    ),
    **dict.fromkeys(("NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"), _LOSS),
    **dict.fromkeys(("NonMaxSuppression", "RoiAlign", "MaxRoiPool"), _DETECTION),
    **dict.fromkeys(("Adagrad", "Adam", "Gradient", "Momentum"), _OPTIMISER),
    **dict.fromkeys(("StringConcat", "StringNormalizer", "StringSplit", "RegexFullMatch", "TfIdfVectorizer"), _STRINGS),
    **dict.fromkeys(("LabelEncoder", "CategoryMapper", "CastMap", "DictVectorizer"), _STRINGS),
    **dict.fromkeys(("TreeEnsemble", "TreeEnsembleClassifier", "TreeEnsembleRegressor"), "a tree ensemble has no gradient"),
    **dict.fromkeys(("SVMClassifier", "SVMRegressor"), "a support vector machine is not trained by gradients"),
    **dict.fromkeys(("OneHotEncoder", "MelWeightMatrix"), "prepares data, in no exported network met so far"),
    "SequenceMap": "maps over sequences, in no exported network met so far",
    "FlexAttention": "of the domain ai.onnx.preview, whose operators still change",
    "BitCast": "reads the bits of a number as another type, which has no gradient",
    "ImageDecoder": "decodes image files",
}
#: Single cases, by the start of their names.
CASES = {
    "test_training_dropout": "training mode of Dropout is random",
    "test_batchnorm_epsilon_training_mode": "training mode of BatchNormalization lets samples interact",
    "test_batchnorm_example_training_mode": "training mode of BatchNormalization lets samples interact",
    "test_scan_sum": "Scan of opset 8",
    "test_castlike_no_saturate": "8-bit floats",
}
_PLAIN = {
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.UINT8, TensorProto.INT8,
    TensorProto.UINT16, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL, TensorProto.UINT32,
    TensorProto.UINT64,
}  # fmt: skip
_UNSIGNED = {TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64}


def cases() -> list[Any]:
    """Return ONNX's node tests.

    Returns:
        Test cases with a name, a model, data sets and tolerances.
    """
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnx computes some expected results with overflows
        return sorted(collect_testcases(None), key=lambda case: case.name)


def why_skipped(case: Any, backend: str) -> str:
    """Return the reason why a case is not run on a backend; empty when it is.

    Args:
        case: from `cases()`.
        backend: its name.

    Returns:
        The reason.
    """
    for operator in _operators(case.model):
        if operator in OPERATORS:
            return f"{operator}: {OPERATORS[operator]}"
    for start, reason in CASES.items():
        if case.name.startswith(start):
            return reason
    types = set(_types(case.model))
    if not types <= _PLAIN:
        return "strings, sequences, optional values or numbers of 8 and fewer bits as inputs or outputs"
    if backend in ("numpy", "torch") and TensorProto.BFLOAT16 in types:
        return "NumPy computes in no bfloat16, nor does PyTorch exchange it with NumPy"
    if backend == "tensorflow" and case.name.startswith("test_range_bfloat16"):
        return "TensorFlow gives no bfloat16 numbers to NumPy, which counts the steps"
    if backend == "torch" and types & _UNSIGNED:
        return "PyTorch has hardly any arithmetic on unsigned integers of 16 and more bits"
    return ""


def run(case: Any, backend: str) -> None:
    """Run one case.

    Args:
        case: from `cases()`.
        backend: its name.

    Raises:
        AssertionError: when a result differs from the expected one.
    """
    found = get_backend(backend)
    graph = parse(case.model, None)
    outputs = [value.name for value in graph.outputs]
    nodes = needed(graph.nodes, outputs)
    places = dict.fromkeys((value.name for value in graph.inputs), Place.DEVICE)
    program = compile_nodes(nodes, outputs, inputs=places, constants=graph.initializers, backend=found)
    for inputs, expected in case.data_sets:
        results = program([to_device(found, _array(value)) for value in inputs])
        for result, wanted in zip(results, expected, strict=False):
            pairs = zip(result, wanted, strict=True) if isinstance(result, list) else [(result, wanted)]
            for got, right in pairs:
                _compare(got if isinstance(got, np.ndarray) else np.asarray(found.to_numpy(got)), _array(right), case, backend)


def _array(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)


def _compare(got: Any, right: Any, case: Any, backend: str) -> None:
    if backend != "jax":  # without 64-bit types, JAX gives the 32-bit ones
        assert got.dtype == right.dtype, f"{got.dtype} is not {right.dtype}"
    half = right.dtype.name in ("bfloat16", "float16")
    relative, absolute = (1e-2, 5e-3) if half else (case.rtol, max(case.atol, 1e-6))
    if half or right.dtype.name == "bfloat16":
        got, right = got.astype(np.float32), right.astype(np.float32)
    np.testing.assert_allclose(got, right, rtol=relative, atol=absolute)


def _graphs(model: onnx.ModelProto) -> Iterator[Any]:
    waiting: list[Any] = [model.graph, *model.functions]
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting += [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]


def _operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for graph in _graphs(model) for node in graph.node]


def _types(model: onnx.ModelProto) -> Iterator[int]:
    for graph in _graphs(model):
        for value in (*getattr(graph, "input", ()), *getattr(graph, "output", ())):
            if isinstance(value, str):
                continue
            kind = value.type.WhichOneof("value")
            yield value.type.tensor_type.elem_type if kind == "tensor_type" else -1
        for node in graph.node:
            yield from (attribute.i for attribute in node.attribute if attribute.name == "to")


def table() -> str:
    """Return the page: for each operator its versions, the node tests that pass on NumPy, and what is skipped.

    Returns:
        Markdown.
    """
    counts: dict[str, list[int]] = {}
    for case in cases():
        operator = case.model.graph.node[0].op_type if len(case.model.graph.node) == 1 else ""
        row = counts.setdefault(operator, [0, 0])
        row[1] += 1
        if why_skipped(case, "numpy"):
            continue
        try:
            run(case, "numpy")
        except (AssertionError, UnsupportedModelError):
            continue
        row[0] += 1
    known = supported()
    latest: dict[tuple[str, str], int] = {}
    for schema in defs.get_all_schemas_with_history():
        if schema.domain in ("", "ai.onnx.ml") and not schema.deprecated:
            key = (schema.domain, schema.name)
            latest[key] = max(latest.get(key, 0), schema.since_version)
    lines = [
        _HEAD,
        "",
        "| operator | domain | from opset | newest version | node tests that pass on NumPy |",
        "|---|---|---|---|---|",
    ]
    defined = []
    for domain, name in sorted(latest, key=lambda key: (key[0] != "", key[1])):
        passed, total = counts.get(name, [0, 0])
        tests = f"{passed} of {total}" if total else "none exist"
        if (domain, name) in known:
            since = known[domain, name][0]
            lines.append(f"| {name} | {domain or 'ai.onnx'} | {since} | {latest[domain, name]} | {tests} |")
        elif defs.get_schema(name, latest[domain, name], domain).has_function and name not in OPERATORS:
            defined.append(name)
    lines += [
        "",
        "By the definition that ONNX itself gives, from other operators: " + ", ".join(defined) + ".",
        "",
        "## Refused",
        "",
    ]
    lines += ["| operator | reason |", "|---|---|"]
    lines += [f"| {name} | {reason} |" for name, reason in sorted(OPERATORS.items())]
    lines += ["", "Cases of supported operators that are skipped:", ""]
    lines += [f"* `{start}…`: {reason}" for start, reason in CASES.items()]
    passed, total = (sum(row[at] for row in counts.values()) for at in (0, 1))
    lines += [
        "",
        f"In all, {passed} of {total} node tests of onnx {onnx.__version__} pass on NumPy; the others are skipped as above.",
        "",
    ]
    return "\n".join(lines)


_HEAD = """# ONNX models

`mgs_core.onnx.load(path, backend=…)` gives any exported network as a functional model, on every backend;
`mgs_core.onnx.save` writes it back with other parameters. Files are not trusted: sizes are checked before memory is taken,
external data must lie in the model's folder, and whatever is damaged is refused with the name of the node or tensor.

## Which initialisers are parameters

An ONNX file does not say which of its tensors are trained. A floating-point initialiser counts as trained when it reaches,
through views (Transpose, Reshape, Cast, …), an input where networks keep weights, or is added to or multiplied with data
behind the first weights. Single numbers, values that are not finite (attention masks), running statistics, means that are
subtracted and scalers on the raw inputs do not. `load(…, parameters=…)` chooses by names or a predicate instead, among all
floating-point initialisers.

What an exporter has changed cannot always be undone. Undone are: transposed copies of tied embeddings, weights that a loop
hands on as state, the zero half of Keras' recurrent biases, and the coefficients that scikit-learn's linear models keep in
attributes. Not undone are batch normalisation that was folded into a convolution (export without constant folding), that of
Keras, whose export multiplies gains with statistics (the kernel is that of the products), equal
weights that were merged (a freshly initialised model), and a fixed table that is added to data, which looks like a learnt
one.

## Speed

64 samples, one thread of a CPU: a forward pass on NumPy takes 0.3 to 0.5 of the time of ONNX's ReferenceEvaluator (a small
CNN: 0.03), and 1.3 to 10 times that of onnxruntime; for an LSTM it takes 1.6 times that of the ReferenceEvaluator. A kernel
through ONNX takes 0.98 (PyTorch), 1.12 (JAX), 1.02 (TensorFlow) and 0.8 (NumPy) of the time of the same function written in
the framework. `benchmarks/onnx_route.py` measures this; benchmarks/results/onnx.md has the figures.

## Operators

The table is written by `docs/onnx_coverage.py`, which runs the node tests that come with ONNX;
`tests/onnx/test_conformance.py` runs them on each backend that is installed. Strings, sequences and optional values as
inputs, sparse tensors, and floating-point numbers of 8 and fewer bits are refused. A model may be of any opset up to 28;
operators older than "from opset" are refused, and onnx.version_converter brings them up. If, Loop and Scan need conditions
and lengths that are known when the model is traced."""


if __name__ == "__main__":
    page = Path(__file__).with_name("onnx.md")
    text = table()
    if "--check" in sys.argv:
        sys.exit(0 if page.read_text(encoding="utf-8") == text else "docs/onnx.md is not up to date; run docs/onnx_coverage.py")
    page.write_text(text, encoding="utf-8")
