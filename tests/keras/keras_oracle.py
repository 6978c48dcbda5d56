"""What the tests of Keras models compare with: ordinary gradients, one sample at a time, by the framework itself."""

from __future__ import annotations

from typing import Any

import keras
import mgs_oracles
import numpy as np

import mgs_core as mgs

BACKEND = keras.backend.backend()


def draw_weights(model: Any, seed: int = 0) -> Any:
    """Give the model weights that do not depend on the backend; variances stay positive."""
    random = np.random.default_rng(seed)
    model.set_weights(
        [0.5 + np.abs(w) if w.ndim < 2 else w for w in (random.normal(size=w.shape) * 0.6 for w in model.get_weights())]
    )
    return model


def flat(outputs: Any) -> Any:
    return keras.ops.concatenate([keras.ops.reshape(leaf, (leaf.shape[0], -1)) for leaf in keras.tree.flatten(outputs)], axis=-1)


def gradient(model: Any, x: Any, scalar: Any) -> np.ndarray:
    """Return the gradient of `scalar(outputs)` in the trainable variables, flat."""
    variables = model.trainable_variables
    x = keras.tree.map_structure(keras.ops.convert_to_tensor, x)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = scalar(flat(model(x)))
        found = tape.gradient(value, [v.value for v in variables], unconnected_gradients="zero")
        found = [tf.convert_to_tensor(g) for g in found]
    elif BACKEND == "torch":
        import torch

        value = scalar(flat(model(x)))
        found = torch.autograd.grad(value, [v.value for v in variables], allow_unused=True, materialize_grads=True)
    else:
        import jax

        fixed = [v.value for v in model.non_trainable_variables]

        def of(values):
            return scalar(flat(model.stateless_call(values, fixed, x)[0]))

        found = jax.jit(jax.grad(of))([v.value for v in variables])
    return np.concatenate([np.ravel(keras.ops.convert_to_numpy(g)) for g in found])


def rows(model: Any, x: Any) -> np.ndarray:
    """Return the gradient of each output of each sample, (n, c, p)."""
    n = len(keras.tree.flatten(x)[0])
    samples = [keras.tree.map_structure(lambda leaf, a=a: keras.ops.convert_to_tensor(leaf[a : a + 1]), x) for a in range(n)]
    if BACKEND == "jax":  # eager JAX takes seconds for each
        import jax

        fixed = [v.value for v in model.non_trainable_variables]
        jacobian = jax.jit(jax.jacrev(lambda values, x: flat(model.stateless_call(values, fixed, x)[0])[0]))
        found = [jacobian([v.value for v in model.trainable_variables], sample) for sample in samples]
        return np.array([np.concatenate([np.reshape(g, (len(g), -1)) for g in each], axis=1) for each in found])
    c = flat(model(samples[0])).shape[1]
    return np.array([[gradient(model, sample, lambda outputs, k=k: outputs[0, k]) for k in range(c)] for sample in samples])


def kernel_function(model: Any, **options: Any) -> Any:
    """Return `(x, y) → kernel` of the model as it is at the call, compiled once, as users who take many have it."""
    backend = mgs.get_backend(model)
    function = backend.functional(model).function
    compiled = backend.compile(lambda p, x, y: mgs.kernel(mgs.FunctionalModel(function, p), x, y, **options))

    def of(x: Any, y: Any = None) -> np.ndarray:
        x, *rest = (keras.tree.map_structure(keras.ops.convert_to_tensor, batch) for batch in (x, y) if batch is not None)
        return numpy(compiled(backend.current(function).parameters, x, *rest or [None]))

    return of


def kernel(model: Any, x: Any, y: Any = None, **options: Any) -> np.ndarray:
    """Return the model's kernel; on JAX by a compiled call, for eagerly it takes seconds."""
    return numpy(mgs.kernel(model, x, y, **options)) if BACKEND != "jax" else kernel_function(model, **options)(x, y)


def numpy(array: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(array)


def close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    mgs_oracles.close(numpy(actual), numpy(expected), tolerance)
