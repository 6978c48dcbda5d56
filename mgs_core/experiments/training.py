"""One run: train a network by a recipe, and measure after each epoch what it has learnt and what it has memorised."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from mgs_core import onnx
from mgs_core._registry import get_backend
from mgs_core._types import Array
from mgs_core.experiments.audit import audit
from mgs_core.experiments.data import Dataset, corrupt, load_dataset
from mgs_core.experiments.models import build
from mgs_core.experiments.optimizer import schedule, start
from mgs_core.experiments.recipes import Recipe
from mgs_core.experiments.settings import Settings
from mgs_core.experiments.step import make_step
from mgs_core.functional import FunctionalModel
from mgs_core.monitor import Recorder

_PIECE = 2048  # samples that are predicted at a time
_FINAL = ("memorisation", "mgs_trace", "mgs_log_determinant", "mgs_similarity", "mgs_effective_rank")


def train(recipe: Recipe, seed: int, settings: Settings) -> Iterator[dict[str, Any]]:
    """Train once and yield records: one after each epoch, and one of the run at the end.

    The seed fixes data split, wrong labels, weights, order of the samples and masks, all drawn in NumPy, so that every recipe and
    every backend meets the same.

    Args:
        recipe: the regulariser.
        seed: number of the run.
        settings: what all runs share.

    Yields:
        Records with "event" ("epoch" or "run"), "regularizer", "seed" and figures by name; accuracies are shares.
    """
    data = corrupt(
        load_dataset(settings.data, samples=settings.samples, seed=seed), settings.noise, settings.noise_kind, seed=seed
    )
    begun, best = time.perf_counter(), 0.0
    run = _Run(recipe, data, settings, seed)
    figures: dict[str, Any] = {}
    for epoch in range(1, settings.epochs + 1):
        trained, figures = run.epoch(epoch), run.measure(epoch)
        best = max(best, figures["test_accuracy"])
        yield {"event": "epoch", "regularizer": recipe.name, "seed": seed, "epoch": epoch, **trained, **figures}
    yield {
        "event": "run",
        "regularizer": recipe.name,
        "seed": seed,
        "last_test_accuracy": figures["test_accuracy"],
        "best_test_accuracy": best,
        **{name: figures[name] for name in _FINAL},
        "epochs": settings.epochs,
        "seconds": time.perf_counter() - begun,
    }


class _Run:
    """Hold the state of one run."""

    def __init__(self, recipe: Recipe, data: Dataset, settings: Settings, seed: int) -> None:
        self._recipe, self._settings, self._data = recipe, settings, data
        self._backend = get_backend(settings.backend)
        # the order is drawn apart, so that what a recipe draws does not change it
        self._order, self._random = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])
        n = len(data.train_labels)
        held = int(recipe.hold_out * n)
        self._fit, self._held = slice(held, n), slice(0, held)
        self._targets = data.train_labels[self._fit]
        if recipe.relabel:
            x, batch = data.train_inputs[self._fit], settings.batch_size
            found = audit(x, self._targets, model=settings.model, backend=settings.backend, batch_size=batch, seed=seed)
            self._targets = found.suggested
        network = build(settings.model, data.train_inputs.shape[1:], data.classes, seed=seed)
        self._model = onnx.load(network.plain, backend=settings.backend)
        self._masks = network.masks if recipe.dropout else {}
        trained = onnx.load(network.masked, backend=settings.backend) if self._masks else self._model
        self._parameters = self._kept = self._model.parameters
        self._best = -1.0
        self._moments = start(self._parameters)
        self._step = make_step(recipe, self._backend, trained.function)
        self._forward = self._backend.compile(self._model.function)
        probe = slice(held, held + settings.probe_samples)
        self._recorder = Recorder(self._backend.asarray(data.train_inputs[probe]), labels=data.train_labels[probe])

    def epoch(self, number: int) -> dict[str, float]:
        """Pass once over the training samples; return means over the steps."""
        settings = self._settings
        x, y = self._data.train_inputs[self._fit], self._targets
        size = min(settings.batch_size, len(y))
        steps = len(y) // size
        order = self._order.permutation(len(y))
        losses, begun = [], time.perf_counter()
        for step in range(steps):
            batch = order[step * size : (step + 1) * size]
            inputs, targets = self._batch(x[batch], y[batch])
            now = schedule((number - 1) * steps + step, settings.epochs * steps, settings.learning_rate)
            loss, self._parameters, self._moments = self._step(
                self._parameters, self._moments, inputs, targets, self._backend.asarray(now)
            )
            losses.append(loss)
        mean = float(np.mean([self._backend.to_numpy(loss) for loss in losses]))
        return {"train_loss": mean, "train_seconds": time.perf_counter() - begun}

    def measure(self, epoch: int) -> dict[str, Any]:
        """Return accuracies and the summaries of the kernel of the model that would be kept if training ended now."""
        begun = time.perf_counter()
        data = self._data
        validation = {}
        if self._recipe.hold_out:
            held = data.train_inputs[self._held], data.train_labels[self._held]
            validation["validation_accuracy"] = float(np.mean(self._predict(self._parameters, held[0]) == held[1]))
        if not validation or validation["validation_accuracy"] > self._best:
            self._kept, self._best = self._parameters, validation.get("validation_accuracy", self._best)
        given, wrong = data.train_labels[self._fit], data.wrong[self._fit]
        fitted = self._predict(self._kept, data.train_inputs[self._fit]) == given
        right = self._predict(self._kept, data.test_inputs) == data.test_labels
        summary = self._recorder(FunctionalModel(self._model.function, self._kept), epoch)
        return {
            "train_accuracy": float(np.mean(fitted)),
            "test_accuracy": float(np.mean(right)),
            "memorisation": float(np.mean(fitted[wrong])) if wrong.any() else None,
            **validation,
            **({f"mgs_{name}": value for name, value in summary.to_dict().items()} if summary else {}),
            "seconds": time.perf_counter() - begun,
        }

    def _batch(self, x: Array, y: Array) -> tuple[Any, Array]:
        """Return inputs and soft targets, mixed and masked as the recipe says."""
        recipe, c = self._recipe, self._data.classes
        targets = np.eye(c, dtype=np.float32)[y]
        targets = (1.0 - recipe.label_smoothing) * targets + np.float32(recipe.label_smoothing / c)
        if recipe.mixup:
            share = np.float32(self._random.beta(recipe.mixup, recipe.mixup))
            other = self._random.permutation(len(y))
            x, targets = share * x + (1 - share) * x[other], share * targets + (1 - share) * targets[other]
        inputs: dict[str, Any] = {"x": x.astype(np.float32)}
        for name, width in self._masks.items():
            kept = self._random.random((len(y), width)) >= recipe.dropout
            inputs[name] = kept.astype(np.float32) / np.float32(1.0 - recipe.dropout)
        asarray = self._backend.asarray
        return {name: asarray(value) for name, value in inputs.items()}, asarray(targets.astype(np.float32))

    def _predict(self, parameters: Any, inputs: Array) -> Array:
        """Return the predicted classes, in pieces that bound the memory."""
        pieces = [
            self._backend.to_numpy(self._forward(parameters, self._backend.asarray(inputs[at : at + _PIECE])))
            for at in range(0, len(inputs), _PIECE)
        ]
        return np.argmax(np.concatenate(pieces), axis=1)
