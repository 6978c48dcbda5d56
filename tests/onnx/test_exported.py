"""Whole models of torch's exporters: values against onnxruntime, kernels against torch's own per-sample gradients in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import mgs_core as mgs


def torch_kernel(module, inputs) -> np.ndarray:
    """A loop of ordinary gradients in float64: (n, n), summed over outputs."""
    import torch

    module = copy.deepcopy(module).double()
    x = torch.from_numpy(inputs if inputs.dtype == np.int64 else inputs.astype(np.float64))
    parameters = list(module.parameters())
    rows = []
    for sample in x:
        y = module(sample[None])[0]
        rows.append([torch.cat([g.ravel() for g in torch.autograd.grad(out, parameters, retain_graph=True)]) for out in y])
    gradients = torch.stack([torch.stack(row) for row in rows]).numpy()
    return np.einsum("acp,bcp->ab", gradients, gradients)


def test_values_agree_with_onnxruntime(from_torch):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(from_torch.proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {session.get_inputs()[0].name: from_torch.inputs})
    np.testing.assert_allclose(mgs.onnx.load(from_torch.proto)(from_torch.inputs), expected, rtol=2e-4, atol=2e-6)


def test_kernel_is_that_of_torch(from_torch):
    model = mgs.onnx.load(from_torch.proto, dtype="float64")
    count = sum(parameter.numel() for parameter in from_torch.module.parameters())
    found = {name: value.shape for name, value in model.parameters.items()}
    assert sum(value.size for value in model.parameters.values()) == count, found
    inputs = from_torch.inputs if from_torch.inputs.dtype == np.int64 else from_torch.inputs.astype(np.float64)
    expected = torch_kernel(from_torch.module, from_torch.inputs)
    np.testing.assert_allclose(mgs.kernel(model, inputs), expected, rtol=1e-6, atol=1e-9 * expected.max())
