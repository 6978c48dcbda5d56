"""The TensorFlow backend: walks the traced graph, eagerly or inside a `tf.function`."""

from ._backend import backend as backend
