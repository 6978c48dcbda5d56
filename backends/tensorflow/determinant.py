"""The log determinant of a kernel."""

from __future__ import annotations

import tensorflow as tf

from mgs_core._types import Array


def log_determinant(kernel: Array, eps: float) -> Array:
    """Return log det(I + K), as the core's `penalty.py` says, but in the kernel's own precision; NaN of what has no factor.

    In double precision its derivative would take two to three times as long.

    Args:
        kernel: K, (n, n).
        eps: of the precision in which K was computed.
    """
    known, n = tf.stop_gradient(kernel), kernel.shape[0]
    identity = tf.eye(n, dtype=kernel.dtype)
    small = tf.maximum(4.0 * eps / n**0.5 * tf.linalg.trace(known), 1.0)
    large = tf.maximum(4.0 * eps * tf.sqrt(tf.reduce_sum(tf.square(known))), 1.0)

    def tried() -> Array:
        least = tf.reduce_min(tf.linalg.diag_part(tf.linalg.cholesky(known + small * identity)))
        return tf.where(tf.square(least) > 0.95 * small, small, large)  # exactly at least `small`, without rounding

    ridge = tf.cond(large > 1.0, tried, lambda: small)
    factor = tf.linalg.cholesky(kernel + ridge * identity)
    value = 2.0 * tf.reduce_sum(tf.math.log(tf.linalg.diag_part(factor)))

    def excess() -> Array:
        half = tf.linalg.triangular_solve(tf.stop_gradient(factor), identity)
        return tf.minimum(tf.math.log(ridge) * ridge * tf.reduce_sum(tf.square(half)), tf.stop_gradient(value))

    return value - tf.cond(ridge > 1.0, excess, lambda: tf.zeros((), kernel.dtype))
