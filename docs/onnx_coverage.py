"""Run ONNX's own node tests on a backend, and write the page with the table of coverage, docs/onnx.md.

    python docs/onnx_coverage.py              # writes the table
    python docs/onnx_coverage.py --check      # fails when the table is not up to date
    python docs/onnx_coverage.py --skipped    # lists the tests that are skipped, each with its reason

The tests in tests/onnx/test_conformance.py run the same cases, and fail when what is skipped is not refused.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, defs, numpy_helper

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
#: Single cases of supported operators.
CASES = {
    **dict.fromkeys(
        ("test_training_dropout", "test_training_dropout_default", "test_training_dropout_default_mask",
         "test_training_dropout_mask"),
        "training mode of Dropout is random",
    ),
    **dict.fromkeys(
        ("test_batchnorm_epsilon_training_mode", "test_batchnorm_example_training_mode"),
        "training mode of BatchNormalization lets samples interact",
    ),
    "test_scan_sum": "Scan of opset 8; onnx.version_converter brings it up",
    "test_if_opt": "a branch gives an absent value",
}  # fmt: skip
_TINY = "numbers of 8 and fewer bits that are not int8 or uint8: quantised weights have no gradient"
#: Element types without an implementation.
TYPES = {
    TensorProto.STRING: _STRINGS,
    **dict.fromkeys(
        (
            TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FNUZ, TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E5M2FNUZ,
            TensorProto.FLOAT8E8M0, TensorProto.FLOAT4E2M1, TensorProto.UINT4, TensorProto.INT4, TensorProto.UINT2,
            TensorProto.INT2,
        ),
        _TINY,
    ),
}  # fmt: skip
#: The backends, and what they are called on the page.
BACKENDS = {"numpy": "NumPy", "torch": "PyTorch", "jax": "JAX", "tensorflow": "TensorFlow"}
#: Element types of inputs that a backend does not take.
BACKEND_TYPES = {
    "numpy": {TensorProto.BFLOAT16: "bfloat16, which has no products there, and float32 sums with numbers"},
    "torch": dict.fromkeys(
        (TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64),
        "unsigned integers of 16 and more bits, which have hardly any arithmetic there",
    ),
}


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
    if case.name in CASES:
        return CASES[case.name]
    for kind in _types(case.model):
        if kind in TYPES:
            return TYPES[kind]
    taken = BACKEND_TYPES.get(backend, {})
    return next((taken[kind] for value in case.model.graph.input for kind in _element(value.type) if kind in taken), "")


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
        results = program([None if value is None else to_device(found, _arrays(value)) for value in inputs])
        for result, wanted in zip(results, expected, strict=True):
            pairs = zip(result, wanted, strict=True) if isinstance(result, list) else [(result, wanted)]
            for got, right in pairs:
                _compare(found, got, _array(right), case)


def _array(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)


def _arrays(value: Any) -> Any:
    return [_array(each) for each in value] if isinstance(value, list) else _array(value)


def _compare(backend: Any, got: Any, right: Any, case: Any) -> None:
    dtype = str(getattr(got.dtype, "name", got.dtype)).removeprefix("torch.")
    wanted = {right.dtype.name, right.dtype.name.replace("64", "32")} if backend.name == "jax" else {right.dtype.name}
    assert dtype in wanted, f"{dtype} is not {right.dtype}"
    got = got if isinstance(got, np.ndarray) else np.asarray(backend.to_numpy(got))
    half = right.dtype.name in ("bfloat16", "float16")
    relative, absolute = (1e-2, 5e-3) if half else (case.rtol, max(case.atol, 1e-6))
    if half:
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
    """Yield the element types of the inputs and outputs, and those that nodes convert to."""
    for graph in _graphs(model):
        if isinstance(graph, onnx.GraphProto):
            for value in (*graph.input, *graph.output):
                yield from _element(value.type)
        for node in graph.node:
            yield from (attribute.i for attribute in node.attribute if attribute.name == "to")


def _element(kind: onnx.TypeProto) -> list[int]:
    """Return the element type of a tensor, or of the tensors in a sequence or optional value."""
    name = kind.WhichOneof("value")
    if name == "tensor_type":
        return [kind.tensor_type.elem_type]
    return _element(getattr(kind, name).elem_type) if name in ("sequence_type", "optional_type") else []


def table() -> str:
    """Return the page: for each operator its versions, how many node tests pass on each backend, and why the others are skipped.

    A test that is not skipped passes: tests/onnx/test_conformance.py runs them all, and sees that each skipped one is refused.

    Returns:
        Markdown.
    """
    tests: dict[str, list[Any]] = {}
    for case in cases():  # those of several nodes come from definitions by other operators
        tests.setdefault(case.model.graph.node[0].op_type if len(case.model.graph.node) == 1 else "", []).append(case)
    known = supported()
    latest: dict[tuple[str, str], int] = {}
    for schema in defs.get_all_schemas_with_history():
        if schema.domain in ("", "ai.onnx.ml") and not schema.deprecated:
            key = (schema.domain, schema.name)
            latest[key] = max(latest.get(key, 0), schema.since_version)
    lines = [
        _HEAD,
        "",
        f"| operator | from opset | newest version | node tests | {' | '.join(BACKENDS.values())} | the others are skipped for |",
        f"|{'---|' * (5 + len(BACKENDS))}",
    ]
    defined = []
    for domain, name in sorted(latest, key=lambda key: (key[0] != "", key[1])):
        own = tests.get(name, [])
        if (domain, name) in known:
            passed = " | ".join(str(sum(not why_skipped(case, backend) for case in own)) for backend in BACKENDS)
            reasons = Counter(_reason(case) for case in own if _reason(case))
            said = "; ".join(f"{reason} ({count})" for reason, count in reasons.items())
            full = f"{domain}.{name}" if domain else name
            lines.append(
                f"| {full} | {known[domain, name][0]} | {latest[domain, name]} | {len(own) or 'none exist'} | {passed} | {said} |"
            )
        elif defs.get_schema(name, latest[domain, name], domain).has_function and name not in OPERATORS:
            defined.append(name)
    every = [case for own in tests.values() for case in own]
    lines += ["", "By the definition that ONNX itself gives, from other operators: " + ", ".join(defined) + ".", ""]
    lines += [f"Of the {len(every)} node tests of onnx {onnx.__version__}, {len(tests[''])} are of several operators. There pass"]
    lines += [
        ", ".join(f"{sum(not why_skipped(case, backend) for case in every)} on {title}" for backend, title in BACKENDS.items())
        + ". `python docs/onnx_coverage.py --skipped` lists the others, each with its reason."
    ]
    lines += ["", "## Refused", "", "| operator | reason | node tests |", "|---|---|---|"]
    lines += [
        f"| {name} | {reason} | {sum(name in _operators(case.model) for case in every)} |"
        for name, reason in sorted(OPERATORS.items())
    ]
    return "\n".join([*lines, ""])


def _reason(case: Any) -> str:
    """Return why a case is skipped on some backend, with the backend's name where others run it."""
    found = {title: why_skipped(case, backend) for backend, title in BACKENDS.items()}
    if all(found.values()):
        return next(iter(found.values()))
    return next((f"on {title}: {reason}" for title, reason in found.items() if reason), "")


_HEAD = """# ONNX models

`mgs_core.onnx.load(path, backend=…)` gives any exported network as a functional model, on every backend;
`mgs_core.onnx.save` writes it back with other parameters. A loaded model can be pickled and copied. Files are not trusted: sizes
are checked before memory is taken, external data must lie in the model's folder, and whatever is damaged is refused with the
name of the node or tensor.

## Which initialisers are parameters

An ONNX file does not say which of its tensors are trained. A floating-point initialiser counts as trained when it reaches,
through views (Transpose, Reshape, Cast, …) and operations on constants, an input where networks keep weights, or is added to,
multiplied with or chosen in place of data behind the first weights. Not counted are single numbers (but the bias of a layer
with one unit), masks (values that are not finite; tables of 0 and one number of at most −10, of one axis −1000, that are
added; what is filled in), cosine and sine of positions, running statistics, what is subtracted or divided by, scalers on the
raw inputs, and initial states of zeros. **Look at what was left out**: `mgs check FILE` lists it with the reason, as does
`load(…).uncounted`.
`load(…, parameters=…)` chooses by names or a predicate instead, among all floating-point initialisers.

Where a file does not tell, the guess may be wrong. Counted though fixed: a table that is added to data or multiplied with it
(sinusoidal positions, a joint table of cosines and sines, a mask that multiplies, the mean and scale that outputs are brought
back to). Not counted though perhaps trained: a temperature, a gate or another single number, an exponent, a divisor, and
prototypes that are subtracted (`h - p`; not `p - h`).

What an exporter has changed cannot always be undone. Undone are: transposed copies of tied embeddings, weights that a loop
hands on as state or holds in its body, running statistics that were merged with equal weights (but in bodies), the zero half
of Keras' recurrent biases, the ones and zeros that PyTorch writes for the gain of a normalisation that has none (but those of
group normalisation with `affine=False`), and the coefficients that scikit-learn's linear models keep in attributes. Not undone
are

* what was folded into one constant: batch normalisation in a convolution, weight and spectral norm, gathered or interpolated
  position tables, a softmax of mixing weights, projections of learnt queries. Export without constant folding:
  `do_constant_folding=False`, with `dynamo=True` `optimize=False`;
* what was left out: PyTorch's dynamo exporter drops biases that are zero, as in a freshly initialised model;
* equal weights that were merged, as fresh ones are (the kernel is that of one weight used twice);
* Keras' batch normalisation, whose export multiplies gains with statistics (the kernel is that of the products).

Files that onnxruntime has optimised beyond its basic level hold operators of its own (`com.microsoft`), which are refused.

## Speed

64 samples, one thread of a CPU, medians of interleaved rounds:

| forward pass | mgs_core on NumPy | onnx ReferenceEvaluator | onnxruntime |
|---|---|---|---|
| perceptron 64-256-256-10 | 0.24 ms | 0.45 ms | 0.16 ms |
| small CNN, 8×8 | 1.6 ms | 58 ms | 0.36 ms |
| transformer, 2 layers of 32 | 4.1 ms | 13.6 ms | 2.0 ms |
| LSTM, 12 steps | 1.35 ms | 1.84 ms | 0.37 ms |
| depthwise separable, 16×16 | 6.9 ms | 22.5 ms | 1.3 ms |

A kernel through ONNX takes 1.05 (PyTorch), 1.01 (JAX), 0.99 (TensorFlow) and 1.03 (NumPy) of the time of the same function
written in the framework. `benchmarks/onnx_route.py` measures this; benchmarks/results/onnx.md has the conditions.

## Operators

The table is written by `docs/onnx_coverage.py` from the node tests that come with ONNX, its columns say how many of them pass.
`tests/onnx/test_conformance.py` runs them on each backend that is installed: what is not skipped must pass, and what is skipped
must be refused with a word on why. Strings, sequences and optional values as inputs, sparse tensors, and floating-point numbers
of 8 and fewer bits are refused. A model may be of any opset up to 28; operators older than "from opset" are refused, and
onnx.version_converter brings them up. If, Loop and Scan need conditions and lengths that are known when the model is traced."""


if __name__ == "__main__":
    page = Path(__file__).with_name("onnx.md")
    if "--skipped" in sys.argv:
        for each in cases():
            if _reason(each):
                print(f"{each.name}: {_reason(each)}")
        sys.exit(0)
    text = table()
    if "--check" in sys.argv:
        sys.exit(0 if page.read_text(encoding="utf-8") == text else "docs/onnx.md is not up to date; run docs/onnx_coverage.py")
    page.write_text(text, encoding="utf-8")
