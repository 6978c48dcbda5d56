"""Mutated files of exporters: each loads and runs, or is refused with a typed error; none crashes, hangs or takes the memory."""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import warnings
from collections import Counter
from pathlib import Path

import onnx
import pytest

import mgs_core as mgs
from mgs_core.experiments.models import build

SECONDS = 20
EXTREMES = (0, 1, -1, 2, 7, 255, 65536, 2**31 - 1, -(2**31), 2**40, 2**62, -(2**63))


class HangError(BaseException):
    """Nothing but this test catches it."""


@pytest.fixture(scope="module")
def seeds(request) -> list[bytes]:
    """Files of the built-in networks and, where torch is installed, of its exporter."""
    export = request.config.pluginmanager.get_plugin(str(request.path.with_name("conftest.py"))).export_torch
    files = [build("cnn", (4, 4), 3, seed=0).masked]
    with contextlib.suppress(pytest.skip.Exception):
        files += [export(name, "trace").proto for name in ("mlp", "conv", "attention", "lstm", "tied", "decoder", "causal")]
    return [proto.SerializeToString() for proto in files]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(changed))
        kind = rng.randrange(5)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at] = rng.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            del changed[at : at + rng.randrange(1, 9)]
        elif kind == 3:
            changed[at:at] = changed[rng.randrange(len(changed)) :][: rng.randrange(1, 40)]
        else:
            changed[at:at] = rng.randbytes(rng.randrange(1, 9))
        if not changed:
            return bytes(data[:1])
    return bytes(changed)


def mutate_structure(data: bytes, rng: random.Random) -> bytes:
    proto = onnx.ModelProto.FromString(data)
    graph = proto.graph
    for _ in range(rng.choice((1, 1, 2, 3))):
        node = rng.choice(graph.node)
        kind = rng.randrange(8)
        if kind == 0 and node.attribute:
            attribute = rng.choice(node.attribute)
            attribute.i = rng.choice(EXTREMES)
            if attribute.ints:
                attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(EXTREMES)
        elif kind == 1 and graph.initializer:
            tensor = rng.choice(graph.initializer)
            if tensor.dims:
                tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(EXTREMES)
        elif kind == 2 and node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice(
                [*rng.choice(graph.node).output, *rng.choice(graph.node).input, ""]
            )
        elif kind == 3:
            node.op_type = rng.choice(graph.node).op_type if rng.random() < 0.5 else rng.choice(_OPERATORS)
        elif kind == 4:
            proto.opset_import[0].version = rng.choice((1, 6, 9, 11, 13, 17, 18, 20, 28))
        elif kind == 5 and graph.initializer:
            tensor = rng.choice(graph.initializer)
            tensor.data_type = rng.randrange(25)
        elif kind == 6 and graph.initializer:
            tensor = rng.choice(graph.initializer)
            if tensor.data_type == onnx.TensorProto.INT64 and tensor.raw_data:
                tensor.raw_data = b"".join(rng.choice(EXTREMES).to_bytes(8, "little", signed=True) for _ in tensor.raw_data[::8])
        else:
            graph.node.remove(node)
            if not graph.node:
                break
    return proto.SerializeToString()


_OPERATORS = sorted({name for domain, name in mgs.onnx.operators.registry.supported() if not domain})


def fuzz(files: list[bytes], count: int, seed: int, folder) -> Counter[str]:
    """Try mutations; return how they ended. Anything but success or a typed error escapes."""
    rng = random.Random(seed)
    ends: Counter[str] = Counter()
    path = folder / "mutated.onnx"

    def hang(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, hang)
    try:
        for case in range(count):
            data = rng.choice(files)
            path.write_bytes((mutate_structure if rng.random() < 0.7 else mutate_bytes)(data, rng))
            signal.alarm(SECONDS)
            try:
                model = mgs.onnx.load(path)
                model(model.function.example_inputs(2))
                ends["evaluated"] += 1
            except mgs.MgsError as error:
                ends[type(error).__name__] += 1
            except BaseException as error:
                raise AssertionError(f"case {case} of seed {seed} ended in {type(error).__name__}: {error}") from error
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, before)
    return ends


@pytest.mark.parametrize(
    ("count", "seed"), [(300, 0), *(pytest.param(2000, seed, marks=pytest.mark.slow) for seed in range(1, 11))]
)
def test_mutated_files_are_evaluated_or_refused(seeds, count, seed, tmp_path, monkeypatch):
    monkeypatch.setattr("mgs_core.onnx.tensors.MAX_ELEMENTS", 1 << 22)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 30), hard))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numbers overflow where mutations say so
            ends = fuzz(seeds, count, seed=seed, folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    print(f"seed {seed}: {dict(ends)}")
    assert ends["evaluated"] > count // 50  # the mutations are not all fatal
    assert ends["ArgumentError"] > count // 10
    assert ends["UnsupportedModelError"] > 0
