"""One network with the same weights in torch and in Keras: native kernels, and those through ONNX on every backend, are one."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import onnx
import pytest

import mgs_core as mgs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
BACKENDS = [name for name, installed in mgs.available_backends().items() if installed and name != "keras"]
INPUTS = np.random.default_rng(0).normal(size=(4, 2, 6, 6))
EXPORTS = ("torch-trace", "torch-dynamo", "keras")


def torch_network(torch):
    nn = torch.nn
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 7),
        nn.LayerNorm(7, eps=1e-3), nn.SiLU(), nn.Linear(7, 3),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape))
    return net.eval()


def keras_network(keras, net):
    """Return the same function with Keras' axes: channels last, in the flattened vector too.

    Without batch normalisation: Keras' exporter multiplies its gains with the statistics, so that they are other parameters.
    """
    layers = keras.layers
    model = keras.Sequential([
        keras.Input((6, 6, 2)), layers.Conv2D(4, 3, padding="same"),
        layers.Activation("tanh"), layers.AveragePooling2D(2), layers.Flatten(), layers.Dense(7), layers.LayerNormalization(),
        layers.Activation("silu"), layers.Dense(3),
    ])  # fmt: skip
    conv, dense, norm, out = (net[at] for at in (0, 4, 5, 7))
    mixed = dense.weight.detach().numpy().reshape(7, 4, 3, 3).transpose(2, 3, 1, 0).reshape(36, 7)
    values = [
        conv.weight.detach().numpy().transpose(2, 3, 1, 0), conv.bias, mixed, dense.bias,
        norm.weight, norm.bias, out.weight.T, out.bias,
    ]  # fmt: skip
    model.set_weights([value if isinstance(value, np.ndarray) else value.detach().numpy() for value in values])
    return model


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The native kernels, in float64, and the files."""
    torch, keras = pytest.importorskip("torch"), pytest.importorskip("keras")
    for name in ("tf2onnx", "onnxscript"):
        pytest.importorskip(name)
    if keras.backend.backend() != "tensorflow":
        pytest.skip("Keras runs on another backend")
    net = torch_network(torch)
    model = keras_network(keras, net)
    files = {}
    single = torch.from_numpy(INPUTS.astype(np.float32))
    buffer = io.BytesIO()
    torch.onnx.export(
        net, (single,), buffer, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n"}}, do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE,
    )  # fmt: skip
    files["torch-trace"] = onnx.load_from_string(buffer.getvalue())
    batch = torch.export.Dim("batch", min=1, max=64)
    files["torch-dynamo"] = torch.onnx.export(
        net, (single,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False, optimize=False
    ).model_proto
    model(np.zeros((1, 6, 6, 2), np.float32))
    path = tmp_path_factory.mktemp("keras") / "model.onnx"
    model.export(str(path), format="onnx", verbose=False)
    files["keras"] = onnx.load(path)
    wide = keras.models.clone_model(
        model, clone_function=lambda layer: layer.__class__.from_config({**layer.get_config(), "dtype": "float64"})
    )
    wide.set_weights(model.get_weights())
    native = {
        "torch": mgs.kernel(net.double(), torch.from_numpy(INPUTS)),
        "keras": mgs.kernel(wide, keras.ops.convert_to_tensor(INPUTS.transpose(0, 2, 3, 1))),
    }
    return {name: np.asarray(mgs.get_backend(value).to_numpy(value)) for name, value in native.items()}, files


def close(found, expected):
    assert expected.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9 * expected.max())


def test_native_kernels_of_torch_and_keras_are_one(kernels):
    close(kernels[0]["keras"], kernels[0]["torch"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("export", EXPORTS)
def test_kernel_through_onnx_is_the_native_one(kernels, export, backend):
    native, files = kernels
    context = contextlib.nullcontext()
    if backend == "jax":
        import jax

        context = jax.experimental.enable_x64() if hasattr(jax.experimental, "enable_x64") else jax.enable_x64(True)
    with context:
        loaded, get = mgs.onnx.load(files[export], backend=backend, dtype="float64"), mgs.get_backend(backend)
        x = INPUTS.transpose(0, 2, 3, 1) if export == "keras" else INPUTS
        found = np.asarray(get.to_numpy(mgs.kernel(loaded, get.asarray(np.ascontiguousarray(x)))))
    close(found, native[export.split("-")[0]])


@pytest.mark.parametrize("export", EXPORTS)
def test_a_saved_update_runs_in_onnxruntime(kernels, export, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    loaded = mgs.onnx.load(kernels[1][export])
    random = np.random.default_rng(1)
    updated = {
        name: value + 0.1 * random.normal(size=value.shape).astype(value.dtype) for name, value in loaded.parameters.items()
    }
    mgs.onnx.save(loaded, tmp_path / "saved.onnx", parameters=updated)
    onnx.checker.check_model(str(tmp_path / "saved.onnx"), full_check=True)
    session = runtime.InferenceSession(tmp_path / "saved.onnx", providers=["CPUExecutionProvider"])
    x = INPUTS.astype(np.float32)
    x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if export == "keras" else x
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(found, loaded.function(updated, x), rtol=1e-4, atol=1e-5)
    assert np.max(np.abs(found - loaded(x))) > 1e-3
