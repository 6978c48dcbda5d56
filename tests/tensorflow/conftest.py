"""Quieten TensorFlow before it is imported, and skip the folder where it is missing."""

from __future__ import annotations

import importlib.util
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
collect_ignore_glob = [] if importlib.util.find_spec("tensorflow") else ["test_*.py"]

if not collect_ignore_glob:
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):  # two devices, for the test of replicas
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
