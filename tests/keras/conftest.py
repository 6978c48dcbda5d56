"""One Keras backend a process, by KERAS_BACKEND, else the first that is installed. Skip the folder without Keras."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for keras_oracle

_FRAMEWORKS = [name for name in ("torch", "jax", "tensorflow") if importlib.util.find_spec(name)]
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_ENABLE_X64", "1")
# two devices, for the test of replicas; most of the time goes to XLA's compiler, which need not try hard
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0")
if _FRAMEWORKS:
    os.environ.setdefault("KERAS_BACKEND", _FRAMEWORKS[0])
_USABLE = importlib.util.find_spec("keras") and os.environ.get("KERAS_BACKEND") in _FRAMEWORKS
collect_ignore_glob = [] if _USABLE else ["test_*.py"]


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:  # Keras' own variables on PyTorch
            item.add_marker(pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"))


@pytest.fixture
def float64(monkeypatch):
    """Let layers made in the test compute in float64."""
    import keras
    from keras.src.backend.common import dtypes

    # on PyTorch and JAX Keras computes products of float64 in float32
    monkeypatch.setitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float64")
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])


if not collect_ignore_glob and os.environ["KERAS_BACKEND"] == "tensorflow":
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
