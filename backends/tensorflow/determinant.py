"""The log determinant of a kernel."""

from __future__ import annotations

import tensorflow as tf

from mgs_core._types import Array


def log_determinant(kernel: Array, eps: float) -> Array:
    """Return log det(I + K), as the core's `penalty.py` says; NaN of what has no factor.

    Args:
        kernel: K, (n, n).
        eps: of the precision in which K was computed.
    """
    wide = tf.cast(kernel, tf.float64)
    known, n = tf.stop_gradient(wide), wide.shape[0]
    identity = tf.eye(n, dtype=wide.dtype)
    small = tf.maximum(1.0, 4.0 * eps / n**0.5 * tf.linalg.trace(known))
    large = tf.maximum(1.0, 4.0 * eps * tf.sqrt(tf.reduce_sum(tf.square(known))))

    def tried() -> Array:
        finite = tf.reduce_all(tf.math.is_finite(tf.linalg.cholesky(known + small * identity)))
        return tf.where(finite, small, large)

    ridge = tf.cond(large > 1.0, tried, lambda: small)
    factor = tf.linalg.cholesky(wide + ridge * identity)
    value = 2.0 * tf.reduce_sum(tf.math.log(tf.linalg.diag_part(factor)))

    def excess() -> Array:
        half = tf.linalg.triangular_solve(tf.stop_gradient(factor), identity)
        return tf.minimum(tf.math.log(ridge) * ridge * tf.reduce_sum(tf.square(half)), tf.stop_gradient(value))

    return tf.cast(value - tf.cond(ridge > 1.0, excess, lambda: tf.zeros((), wide.dtype)), kernel.dtype)
