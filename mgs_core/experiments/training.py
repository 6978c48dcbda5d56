"""One run: train a network by a recipe, and measure after each epoch what it has learnt and what it has memorised."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mgs_core._errors import ArgumentError, MgsError, renamed
from mgs_core._registry import get_backend
from mgs_core._types import Array
from mgs_core.experiments.audit import audit
from mgs_core.experiments.data import Dataset, corrupt, load_dataset
from mgs_core.experiments.networks import is_file, make_network, save_own
from mgs_core.experiments.optimizer import schedule
from mgs_core.experiments.recipes import Recipe
from mgs_core.experiments.settings import Settings
from mgs_core.experiments.step import PEER, PROBE, begin, make_step
from mgs_core.functional import FunctionalModel
from mgs_core.kernel import kernel
from mgs_core.summary import summarize

_PIECE = 2048  # samples that are predicted at a time
_FINAL = ("memorisation", "mgs_trace", "mgs_log_determinant", "mgs_similarity", "mgs_effective_rank")


def train(recipe: Recipe, seed: int, settings: Settings, *, folder: Path | None = None) -> Iterator[dict[str, Any]]:
    """Train once and yield records: one after each epoch, and one of the run at the end.

    The seed fixes data split, wrong labels, weights (but those of a file), order of the samples and masks, all drawn in NumPy, so
    that every recipe and every backend meets the same.

    Args:
        recipe: the regulariser.
        seed: number of the run.
        settings: what all runs share.
        folder: where the run of seed 0 writes a model of the user's own, trained, as "models/<recipe>.onnx"; None for nowhere.

    Yields:
        Records with "event" ("epoch" or "run"), "regularizer", "seed" and figures by name; accuracies are shares.

    Raises:
        ArgumentError: when the data or the model do not fit the settings, the training diverges, or the audit leaves no sample.
    """
    data = draw(settings, seed)
    begun, best = time.perf_counter(), 0.0
    run = Trainer(recipe, data, settings, seed)
    figures: dict[str, Any] = {}
    for epoch in range(1, settings.epochs + 1):
        trained, figures = run.epoch(epoch), run.measure(epoch)
        best = max(best, figures["test_accuracy"])
        yield {"event": "epoch", "regularizer": recipe.name, "seed": seed, "epoch": epoch, **trained, **figures}
    if folder is not None and seed == 0 and is_file(settings.model):
        save_own(settings.model, run.kept, folder / "models" / f"{recipe.name}.onnx")
    yield {
        "event": "run",
        "regularizer": recipe.name,
        "seed": seed,
        "strength": recipe.strength,
        "last_test_accuracy": figures["test_accuracy"],
        "best_test_accuracy": best,
        **{name: figures[name] for name in _FINAL},
        "epochs": settings.epochs,
        "seconds": time.perf_counter() - begun,
    }


def draw(settings: Settings, seed: int) -> Dataset:
    """Return the data of a run: what the seed draws, with its wrong labels."""
    with renamed(source="data"):
        data = load_dataset(settings.data, samples=settings.samples, seed=seed)
    return corrupt(data, settings.noise, settings.noise_kind, seed=seed)


def taught(recipe: Recipe, data: Dataset, settings: Settings, seed: int, model: FunctionalModel) -> tuple[Array, Array]:
    """Return the inputs and labels that a recipe trains on: all but the held-out ones, and what the audit makes of them.

    Args:
        recipe: the regulariser.
        data: the data set, its training labels corrupted.
        settings: what all runs share.
        seed: number of the run.
        model: of the user's own, before its training; built-in ones are drawn by the audit.

    Returns:
        (inputs, labels).

    Raises:
        ArgumentError: when the audit leaves no sample.
    """
    fit = slice(held_out(recipe, len(data.train_labels)), None)
    inputs, labels = data.train_inputs[fit], data.train_labels[fit]
    if not (recipe.relabel or recipe.select):
        return inputs, labels
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The samples predict|The networks have learnt")  # a comparison shows what it leads to
        found = audit(
            inputs, labels, model=model if is_file(settings.model) else settings.model,
            backend=settings.backend, batch_size=settings.batch_size, seed=seed,
        )  # fmt: skip
    if recipe.relabel:
        labels = found.suggested
    if not recipe.select:
        return inputs, labels
    trusted = ~found.contradicted
    if not trusted.any():
        raise ArgumentError("`select` must leave samples to train on; the audit contradicts the label of each.")
    return inputs[trusted], labels[trusted]


def held_out(recipe: Recipe, samples: int) -> int:
    """Return how many of the training samples, the first ones, a recipe holds out; at least one if any."""
    return max(1, int(recipe.hold_out * samples)) if recipe.hold_out else 0


def batch(
    recipe: Recipe, x: Array, y: Array, classes: int, masks: dict[str, int], random: np.random.Generator
) -> tuple[dict[str, Array], Array]:
    """Return the inputs of a step by name, and its soft targets (n, c): mixed, masked and smoothed as the recipe says."""
    targets = np.eye(classes, dtype=np.float32)[y]
    targets = (1.0 - recipe.label_smoothing) * targets + np.float32(recipe.label_smoothing / classes)
    if recipe.mixup:
        share = np.float32(random.beta(recipe.mixup, recipe.mixup))
        other = random.permutation(len(y))
        x, targets = share * x + (1 - share) * x[other], share * targets + (1 - share) * targets[other]
    inputs = {"x": x.astype(np.float32)}
    if recipe.jacobian_penalty:
        drawn = random.normal(size=targets.shape)
        inputs[PROBE] = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
    for name, width in masks.items():
        kept = random.random((len(y), width)) >= recipe.dropout
        inputs[name] = kept.astype(np.float32) / np.float32(1.0 - recipe.dropout)
    return inputs, targets.astype(np.float32)


def learnt(recipe: Recipe, epoch: int, epochs: int, size: int) -> Array:
    """Return from how many of a batch's samples each network of co-teaching learns in an epoch."""
    share = recipe.forgotten * min(1.0, epoch / max(1.0, 0.25 * epochs))
    return np.asarray(max(1, round((1.0 - share) * size)), dtype=np.float32)


def disparity(matrix: Array) -> float:
    """Return the distance between the mean loss gradients of two halves, from the kernel of the losses.

    It is the gradient disparity of Forouzesh and Thiran (ECML PKDD 2021, arXiv 2107.06665). With u = ±1 over the size of each
    half, `‖g₁ − g₂‖² = uᵀ K u`.
    """
    first = np.arange(len(matrix)) < len(matrix) // 2
    u = np.where(first, 1.0 / max(1, first.sum()), -1.0 / (~first).sum())
    return float(np.sqrt(max(0.0, u @ matrix @ u)))


class Trainer:
    """Hold the state of one run: the parameters so far, and what trains and measures them.

    Args:
        recipe: the regulariser.
        data: the data set, its training labels corrupted.
        settings: what all runs share.
        seed: number of the run.
    """

    def __init__(self, recipe: Recipe, data: Dataset, settings: Settings, seed: int) -> None:
        self._recipe, self._settings, self._data = recipe, settings, data
        self._backend = get_backend(settings.backend)
        # the order is drawn apart, so that what a recipe draws does not change it
        self._order, self._random = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])
        self._held = held_out(recipe, len(data.train_labels))
        if len(data.train_labels) - self._held < 2:
            raise ArgumentError(
                f"`samples` must leave at least 2 to train on; got {len(data.train_labels)}, of which {recipe.name} holds out "
                f"{self._held}. Take more."
            )
        network = make_network(settings.model, data, backend=settings.backend, seed=seed)
        self._model = network.plain
        self._inputs, self._targets = taught(recipe, data, settings, seed, self._model)
        trained, self._masks = network.masked() if recipe.dropout else (self._model, {})
        self._parameters = self.kept = self._model.parameters
        if recipe.forgotten:
            self._parameters = {**self._parameters, **{PEER + name: value for name, value in network.peer().items()}}
        self._best = -1.0
        self._moments = begin(recipe, self._backend, self._parameters)
        self._step = make_step(recipe, self._backend, trained.function)
        self._forward = self._backend.compile(self._model.function)
        probe = slice(self._held, self._held + settings.probe_samples)
        self._probe = self._backend.asarray(data.train_inputs[probe])
        self._probe_labels = data.train_labels[probe]

    @np.errstate(all="ignore")  # training that diverges is told in words
    def epoch(self, number: int) -> dict[str, float]:
        """Pass once over the training samples; return means over the steps."""
        recipe, epochs, asarray = self._recipe, self._settings.epochs, self._backend.asarray
        x, y = self._inputs, self._targets
        size = min(self._settings.batch_size, len(y))
        steps = len(y) // size
        order = self._order.permutation(len(y))
        more = (asarray(learnt(recipe, number, epochs, size)),) if recipe.forgotten else ()
        losses, begun = [], time.perf_counter()
        for step in range(steps):
            chosen = order[step * size : (step + 1) * size]
            inputs, targets = batch(recipe, x[chosen], y[chosen], self._data.classes, self._masks, self._random)
            now = schedule((number - 1) * steps + step, epochs * steps, self._settings.learning_rate)
            given = {name: asarray(value) for name, value in inputs.items()}
            loss, self._parameters, self._moments = self._step(
                self._parameters, self._moments, given, asarray(targets), asarray(now), *more
            )
            losses.append(loss)
        mean = float(np.mean([self._backend.to_numpy(loss) for loss in losses]))
        return {"train_loss": mean, "train_seconds": time.perf_counter() - begun}

    @np.errstate(all="ignore")
    def measure(self, epoch: int) -> dict[str, Any]:
        """Return accuracies and the summaries of the kernel of the model that would be kept if training ended now."""
        begun, data, fit = time.perf_counter(), self._data, slice(self._held, None)
        validation = {"validation_accuracy": self.validate()} if self._recipe.hold_out else {}
        if not validation or validation["validation_accuracy"] > self._best:
            self.kept = {name: value for name, value in self._parameters.items() if not name.startswith(PEER)}
            self._best = validation.get("validation_accuracy", self._best)
        fitted = self._predict(self.kept, data.train_inputs[fit]) == data.train_labels[fit]
        right = self._predict(self.kept, data.test_inputs) == data.test_labels
        wrong = data.wrong[fit]
        return {
            "train_accuracy": float(np.mean(fitted)),
            "test_accuracy": float(np.mean(right)),
            "memorisation": float(np.mean(fitted[wrong])) if wrong.any() else None,
            **validation,
            **self._summaries(epoch),
            "seconds": time.perf_counter() - begun,
        }

    @np.errstate(all="ignore")
    def validate(self) -> float:
        """Return the share of the held-out noisy training samples that the network as it is now predicts as labelled."""
        held = slice(0, self._held)
        return float(np.mean(self._predict(self._parameters, self._data.train_inputs[held]) == self._data.train_labels[held]))

    def _summaries(self, epoch: int) -> dict[str, float]:
        """Return what the kernels of the outputs and of the losses at the probe say."""
        model = FunctionalModel(self._model.function, self.kept)
        try:
            summary = summarize(kernel(model, self._probe), self._probe_labels)
        except MgsError as error:  # the model was accepted before it was trained
            strength = f", or the strength of {self._recipe.name}" if self._recipe.tuned else ""
            top = max(float(np.max(np.abs(self._backend.to_numpy(value)))) for value in self.kept.values())
            raise ArgumentError(
                f"`learning_rate` must be one at which training converges; got {self._settings.learning_rate!r}, and after epoch "
                f"{epoch} the largest weight is {top:.3g}. Lower it{strength}."
                + (f" The kernel says: {error}" if np.isfinite(top) else "")
            ) from error
        matrix = kernel(model, self._probe, self._backend.asarray(self._probe_labels), output="loss")
        return {
            **{f"mgs_{name}": value for name, value in summary.to_dict().items()},
            "gradient_disparity": disparity(np.asarray(self._backend.to_numpy(matrix), dtype=np.float64)),
        }

    def _predict(self, parameters: Any, inputs: Array) -> Array:
        """Return the predicted classes, in pieces that bound the memory."""
        pieces = [
            self._backend.to_numpy(self._forward(parameters, self._backend.asarray(inputs[at : at + _PIECE])))
            for at in range(0, len(inputs), _PIECE)
        ]
        return np.argmax(np.concatenate(pieces), axis=1)
