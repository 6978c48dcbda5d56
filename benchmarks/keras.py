"""Cost of the regulariser and of the monitor in Keras' `fit`, as ratios to the plain step.

    KERAS_BACKEND=torch python -P benchmarks/keras.py [--quick]

Milliseconds of a training step: the fastest epoch of several, after one that compiles; the methods take turns, so that a change
of the machine's load meets all. "vmap" takes the kernel from per-sample gradients of the whole model, mapped over the batch, as
one would write it by hand.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # jax's Cholesky factorisation, which threads slow down

import keras
import numpy as np
from keras import layers
from mgs_core.adapters.keras import MGSMonitor, MGSRegularizer, regularize

import mgs_core as mgs

BACKEND = keras.backend.backend()


def mlp() -> keras.Model:
    """Return a network of 64-256-128-10 units."""
    widths = [layers.Dense(256, activation="relu"), layers.Dense(128, activation="relu"), layers.Dense(10)]
    return keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), *widths])


def cnn() -> keras.Model:
    """Return a network of three convolutions, 16-32-32 filters."""
    filters = [
        layers.Conv2D(size, 3, padding="same", activation="relu", strides=stride) for size, stride in ((16, 1), (32, 2), (32, 2))
    ]
    return keras.Sequential([keras.Input((8, 8, 1)), *filters, layers.Flatten(), layers.Dense(10)])


class Clock(keras.callbacks.Callback):
    """Take the time of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Stop."""
        self.times.append(time.perf_counter() - self.start)


def step_times(models: dict[str, keras.Model], batch: int, steps: int, epochs: int) -> dict[str, float]:
    """Return seconds of a step of each model in its fastest epoch."""
    random = np.random.default_rng(0)
    x = random.normal(size=(steps * batch, 8, 8, 1)).astype("float32")
    y = random.integers(0, 10, steps * batch)
    clocks = {name: Clock() for name in models}
    for epoch in range(1 + epochs):
        for name, model in models.items():
            if epoch == 0:
                loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
                model.compile(keras.optimizers.SGD(1e-3), loss, jit_compile=BACKEND == "jax")
            model.fit(x, y, batch_size=batch, epochs=1, verbose=0, callbacks=[clocks[name]])
    return {name: min(clock.times[1:]) / steps for name, clock in clocks.items()}


def vmap_kernel(model: keras.Model) -> Callable[[list[Any], Any, Any], Any]:
    """Return the kernel of the losses by per-sample gradients of the whole model."""
    variables = model.trainable_variables

    def loss(values: list[Any], x: Any, y: Any) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return mgs.cross_entropy(model(x[None]), y[None])[0]

    if BACKEND == "jax":
        import jax

        per_sample = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))
    elif BACKEND == "torch":
        import torch
        from keras.src.backend.torch import nn

        mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

        def per_sample(values: list[Any], x: Any, y: Any) -> Any:
            convert = nn._maybe_convert_to_channels_last
            nn._maybe_convert_to_channels_last = lambda x, *rest: x  # vmap lacks memory formats
            try:
                return mapped(values, x, y)
            finally:
                nn._maybe_convert_to_channels_last = convert
    else:
        import tensorflow as tf

        def gradient(values: list[Any], x: Any, y: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(values)
                value = loss(values, x, y)
            return tape.gradient(value, values)

        def per_sample(values: list[Any], x: Any, y: Any) -> Any:
            return tf.vectorized_map(lambda sample: gradient(values, *sample), (x, y))

    def kernel(values: list[Any], x: Any, y: Any) -> Any:
        rows = [keras.ops.reshape(g, (x.shape[0], -1)) for g in per_sample(values, x, y)]
        return sum(keras.ops.matmul(row, keras.ops.transpose(row)) for row in rows)

    return kernel


def by_vmap(model: keras.Model, regularizer: MGSRegularizer) -> keras.Model:
    """Regularise with that kernel: the same `fit`, the kernel exchanged."""
    model = regularize(model, regularizer)
    kernel = vmap_kernel(model)
    values: Any = mgs.get_backend(model).values
    model._mgs._value = lambda x, y, *_: model._mgs._of_kernel(kernel(values(model.trainable_variables), x, y))
    model._mgs._one_pass_serves = lambda y_pred: False  # which would pass that kernel by
    model._mgs._checked = True
    return model


def main() -> None:
    """Print a row for each model and size of batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps, without vmap")
    quick = parser.parse_args().quick
    regularizer = MGSRegularizer("log_determinant", strength=0.1)
    print(
        f"{BACKEND:10s} {'model':5s} {'batch':>5s} {'plain ms':>9s} {'regularised':>11s} {'first 32':>11s} {'vmap':>11s}",
        flush=True,
    )
    for name, build in (("mlp", mlp), ("cnn", cnn)):
        for batch in (64, 256):
            models = {"plain": build(), "regularised": regularize(build(), regularizer)}
            models["first 32"] = regularize(build(), MGSRegularizer("log_determinant", max_samples=32))
            times = step_times(models, batch, *((20, 5) if quick else (30, 10)))
            if not quick and batch == 64:  # apart, for it is slow
                times |= step_times({"vmap": by_vmap(build(), regularizer)}, batch, 5, 3)
            ratios = [
                f"{times[key] / times['plain']:10.2f}×" if key in times else "" for key in ("regularised", "first 32", "vmap")
            ]
            print(f"{BACKEND:10s} {name:5s} {batch:5d} {1e3 * times['plain']:9.2f}", *ratios, flush=True)
    probe = np.random.default_rng(1).normal(size=(256, 8, 8, 1)).astype("float32")
    for name, build in (("mlp", mlp), ("cnn", cnn)):
        model = build()
        epoch = step_times({name: model}, 64, 60_000 // 64 // (10 if quick else 2), 2)[name] * (60_000 // 64)
        print(f"{BACKEND:10s} {name:5s} an epoch of 60 000 takes {epoch:.1f} s, and its monitor of 256", end="", flush=True)
        for output in ("trace", "random"):
            monitor, times = MGSMonitor(probe, output=output), []
            monitor.set_model(model)
            monitor.on_train_begin()
            for at in range(8):
                start = time.perf_counter()
                monitor.on_epoch_end(at)
                times.append(time.perf_counter() - start)
            print(f', of "{output}": {1e3 * min(times):.0f} ms, {100 * min(times) / epoch:.1f} %', end="", flush=True)
        print()


if __name__ == "__main__":
    main()
