"""Audit labels: train networks, each on its share, and let their kernel say which labels other samples contradict."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mgs_core import onnx
from mgs_core._arguments import integer
from mgs_core._errors import ArgumentError
from mgs_core._matrix import as_numpy, cosine_kernel
from mgs_core._registry import get_backend
from mgs_core._types import Array
from mgs_core.experiments.checks import check_inputs, check_labels, count_classes, warn_of_units
from mgs_core.experiments.data import Dataset, scale
from mgs_core.experiments.models import MODELS, build
from mgs_core.experiments.networks import own_network
from mgs_core.experiments.optimizer import adam, check_learning_rate, schedule, start
from mgs_core.functional import FunctionalModel
from mgs_core.heads import cross_entropy
from mgs_core.kernel import kernel
from mgs_core.suspicion import Suspicion, described, judge, much_by_heart, predictable, warn_of_chance

#: Samples that are judged together: the regression takes their cube in time and their square in memory.
BLOCK = 2048
_EPOCHS = 4
_LEAST_STEPS, _LEAST_STEPS_OF_OTHERS = 24, 84  # convolutions learn more slowly what to look at than "mlp"


@dataclass(frozen=True, eq=False)
class Audit:
    """Hold what an audit found.

    A sample is judged by all other samples of its block. There is one block, of all samples, unless there are more than `block`
    of them: then they are split at random, and no sample is compared with one of another block.

    Attributes:
        scores: (n,), how far another class is predicted ahead of the given one, from the others of its block; high is suspicious.
        given: (n,), the labels as they came.
        suggested: (n,), the labels that the others of its block predict.
        contradicted: (n,) of bool, labels that these contradict, see `suspicion`; their number estimates how many are wrong.
        class_cosine: (n,), mean cosine of the gradient of a sample's loss with those of the same label in its batch, over the
            training; NaN for a sample that never met one, as where a class has no more samples than there are networks.
        neighbours: (n,), share of the ten nearest samples of its block that bear another label.
        weights: (n,), at least 0, mean 1: train on `mean(w · loss)` to make little of suspicious labels.
        blocks: how many blocks the samples were split into.
        predictable: share of the labels that the others of the block predict as given, before any label is distrusted, by the
            networks that were not trained on them; where there is one network, by that. Where it is low, classes overlap or
            labels are wrong, and the audit cannot tell which.
        by_heart: of the labels that networks which were not trained on them contradict, the share that all together do not;
            above 0.4 there is a warning, for they have learnt labels by heart. 0 where samples are judged apart.

    Example:
        >>> import mgs_core as mgs
        >>> from sklearn.datasets import load_digits
        >>> images, labels = load_digits(n_class=3, return_X_y=True)
        >>> labels[7] = (labels[7] + 1) % 3
        >>> int(mgs.audit(images, labels, epochs=2).order[0])
        7
    """

    scores: Array
    given: Array
    suggested: Array
    contradicted: Array
    class_cosine: Array
    neighbours: Array
    weights: Array
    blocks: int = 1
    predictable: float = float("nan")
    by_heart: float = float("nan")

    @property
    def order(self) -> Array:
        """Return the samples, the most suspicious first."""
        return np.argsort(-self.scores, kind="stable")

    def __str__(self) -> str:
        """Return the figures, and the most suspicious samples."""
        return described(self, {"by_heart": self.by_heart, "blocks": self.blocks}, given=self.given)


def audit(
    inputs: Array,
    labels: Array,
    *,
    model: Any = "mlp",
    backend: str = "numpy",
    networks: int = 2,
    apart: bool = False,
    epochs: int | None = None,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    block: int = BLOCK,
    seed: int = 0,
    on_epoch: Callable[[int], None] = lambda epoch: None,
) -> Audit:
    """Rank labels by how far the gradients of other samples contradict them: all others, or of many samples those of a block.

    Networks are trained each on its share of the samples, and not for long, before they can learn wrong labels by heart. The mean
    of their cosine kernels goes through `suspicion`.

    Args:
        inputs: (n, …), real numbers; scaled here as a whole to mean 0 and standard deviation 1, but for a model of yours. A
            warning says so of a table of which half of the columns together have hardly any of the variance.
        labels: integers (n,), from 0.
        model: "mlp", "cnn", or a classifier in ONNX (path or proto) that takes the inputs as they are, and is trained before a
            softmax or sigmoid at its end; or a `FunctionalModel` on the backend that takes them in float32 and returns logits
            (n, c).
        backend: name of the backend that trains.
        networks: how many are trained, each on 1/networks of the samples of each label, but on two at least; each from weights of
            its own, those of a model of yours from its weights.
        apart: judge each sample only by the networks that were not trained on it; it takes two. It finds more where samples have
            many columns, whose labels a network learns at once by heart; elsewhere less, and it contradicts more right labels.
        epochs: steps of each network, as passes over all samples; None for 4, or more where samples are few: enough for 24 steps
            of "mlp" and 84 of others.
        batch_size: samples per step.
        learning_rate: of Adam, at the start; above 0.
        block: samples that are judged together, at least 3: more samples are split at random into blocks of at most this
            many, and each is compared with those of its own block only.
        seed: seed of weights, order and blocks.
        on_epoch: called with the number of each finished epoch, of at most `networks · epochs`.

    Returns:
        The audit; NumPy arrays in the order of the samples.

    Raises:
        ArgumentError: when inputs, labels or another argument do not fit.

    Cost:
        For each network its training, with one kernel per step (about twice plain training), and one kernel of the c outputs of
        each block; for each block one eigendecomposition, up to six inversions and one for each network, together at most about
        `(22 + 2·networks) · n · block²` operations, with `apart` `22 · networks · n · block²`; memory for
        `(2·networks + 4) · block²` numbers, with `apart` `(3·networks + 2) · block²`.

    Example:
        >>> import mgs_core as mgs
        >>> from sklearn.datasets import load_digits
        >>> images, labels = load_digits(n_class=2, return_X_y=True)
        >>> mgs.audit(images, labels, epochs=1).scores.shape
        (360,)
    """
    x, given, classes = _checked(inputs, labels)
    built_in = _is_built_in(model)
    if built_in:
        x, _, _ = scale(x)
        warn_of_units(x)
    networks, batch_size = integer("networks", networks, 1), integer("batch_size", batch_size, 2)
    networks = min(networks, max(1, len(given) // 2))  # each is trained on at least two samples
    if apart and networks < 2:
        remedy = "Pass networks=2" if len(given) > 3 else "Pass four samples or more"
        raise ArgumentError(f"`networks` must be at least 2 with apart=True; got 1, which is trained on all samples. {remedy}.")
    block, seed = integer("block", block, 3), integer("seed", seed, 0)
    check_learning_rate(learning_rate)
    epochs = usual_epochs(len(given), batch_size, model) if epochs is None else integer("epochs", epochs, 1)
    x = x.astype(np.float32, copy=False)
    if built_in:
        starts = [_built(model, backend, x, classes, seed, number) for number in range(networks)]
    else:
        starts = [_own(model, backend, x, given, classes)] * networks
    outputs = starts[0](get_backend(backend).asarray(x[:1])).shape
    if len(outputs) != 2 or outputs[1] < classes:
        raise ArgumentError(f"`model` must return (n, c), c ≥ {classes} for these labels; for one sample it returned {outputs}.")
    classes = outputs[1]
    random = np.random.default_rng([seed, 3])
    share, steps = _shares(given, len(starts), random), len(given) // min(batch_size, len(given))
    trained = []
    for number, own in enumerate(starts):
        training = _Training(own, backend, x, given, classes)
        batches = _batches(np.flatnonzero(share == number), batch_size, random)
        for epoch in range(epochs):
            for step in range(epoch * steps, (epoch + 1) * steps):
                training.step(next(batches), schedule(step, epochs * steps, learning_rate))
            on_epoch(number * epochs + epoch + 1)
        trained.append(training)
    parts = [np.sort(part) for part in np.array_split(random.permutation(len(given)), -(-len(given) // block))]
    judged = [_judged([own.cosine(part) for own in trained], share[part], given[part], classes, apart) for part in parts]
    back = np.argsort(np.concatenate(parts))
    fields = {
        name: np.concatenate([getattr(one, name) for one, _ in judged])[back]
        for name in ("scores", "suggested", "contradicted", "neighbours", "weights")
    }
    met = sum(own.counts for own in trained)
    class_cosine = np.where(met > 0, sum(own.sums for own in trained) / np.maximum(met, 1), np.nan)
    seen, unseen = np.average([(one.predictable, right) for one, right in judged], axis=0, weights=list(map(len, parts)))
    chance = 2 * (unseen * (1 - unseen) / len(given)) ** 0.5
    heart = float((seen - unseen) / (1 - unseen)) if seen - unseen > chance and unseen < 1 else 0.0
    _warn_of_memory(heart, float(seen), float(unseen))
    warn_of_chance(float(unseen), given, "`inputs`")
    return Audit(given=given, class_cosine=class_cosine, blocks=len(parts), predictable=float(unseen), by_heart=heart, **fields)


def usual_epochs(samples: int, batch_size: int = 64, model: Any = "mlp") -> int:
    """Return the default number of epochs: 4, or enough for 24 steps of the MLP and 84 of other models."""
    least = _LEAST_STEPS if model == "mlp" else _LEAST_STEPS_OF_OTHERS
    return max(_EPOCHS, -(-least // max(1, samples // batch_size)))


def _shares(given: Array, networks: int, random: np.random.Generator) -> Array:
    """Return which network is trained on each sample; each gets as many samples of a label, drawn at random."""
    order = random.permutation(len(given))
    order = order[np.argsort(given[order], kind="stable")]
    share = np.empty(len(given), dtype=np.int64)
    share[order] = np.arange(len(given)) % networks
    return share


def _batches(samples: Array, batch_size: int, random: np.random.Generator) -> Iterator[Array]:
    """Yield batches, pass after pass in a new order; a last one that is not full is left out."""
    size = min(batch_size, len(samples))
    while True:
        order = random.permutation(samples)
        yield from (order[start : start + size] for start in range(0, len(order) - size + 1, size))


def _judged(kernels: list[Array], share: Array, given: Array, classes: int, apart: bool) -> tuple[Suspicion, float]:
    """Return what the kernels say of a block's labels, and how many of these those predict that were not trained on them."""
    total, networks = np.sum(kernels, axis=0), len(kernels)
    own = [share == number for number in range(networks)]
    others = [total if networks == 1 else (total - kernel) / (networks - 1) for kernel in kernels]
    if apart:
        found = judge(others, own, given, classes)
        return found, found.predictable
    found = judge([total / networks], [np.ones(len(given), dtype=bool)], given, classes)
    return found, predictable(others, own, given, classes, found.ridge)


def _is_built_in(model: Any) -> bool:
    """Say whether a model is named as built-in ones are, perhaps by a wrong name, which is refused where it is built."""
    return isinstance(model, str) and (model in MODELS or not (Path(model).suffix or Path(model).exists()))


def _built(model: str, backend: str, x: Array, classes: int, seed: int, number: int) -> FunctionalModel:
    """Return the network of this number before its training."""
    return onnx.load(build(model, x.shape[1:], classes, seed=[seed, number] if number else seed).plain, backend=backend)


def _own(model: Any, backend: str, x: Array, given: Array, classes: int) -> FunctionalModel:
    """Return the user's model, as it returns logits of inputs as they are."""
    if isinstance(model, FunctionalModel):
        return model
    if not isinstance(model, (str, os.PathLike)) and not hasattr(model, "graph"):
        raise ArgumentError(
            f'`model` must be "mlp", "cnn", a path or an onnx.ModelProto, or a FunctionalModel; got {type(model).__name__}. '
            "Export a module of a framework to ONNX, or wrap it: FunctionalModel(function, parameters), with its backend."
        )
    data = Dataset("", x, given, given, x, given, classes)
    return own_network(model, data, backend=backend, seed=0, more=True).plain


class _Training:
    """Hold the state of the training."""

    def __init__(self, model: FunctionalModel, backend: str, x: Array, given: Array, classes: int) -> None:
        self._backend = get_backend(backend)
        self._function, self._x, self._given, self._classes = model.function, x, given, classes
        self._parameters = model.parameters
        self._moments = start(model.parameters)
        self.sums, self.counts = np.zeros(len(given)), np.zeros(len(given))  # of cosines with samples of the same label
        value_and_gradient = self._backend.value_and_gradient(self._loss)

        def step(parameters: Any, moments: Any, inputs: Array, targets: Array, now: Array) -> tuple[Array, Any, Any]:
            matrix = kernel(FunctionalModel(self._function, parameters), inputs, targets, output="loss")
            _, gradient = value_and_gradient(parameters, inputs, targets)
            return (matrix, *adam(parameters, gradient, moments, now))

        self._step = self._backend.compile(step)

    def step(self, batch: Array, now: Array) -> None:
        """Take one step on these samples."""
        asarray = self._backend.asarray
        targets = np.eye(self._classes, dtype=np.float32)[self._given[batch]]
        matrix, self._parameters, self._moments = self._step(
            self._parameters, self._moments, asarray(self._x[batch]), asarray(targets), asarray(now)
        )
        self._compare(np.asarray(self._backend.to_numpy(matrix), dtype=np.float64), batch)

    def cosine(self, samples: Array) -> Array:
        """Return the cosine kernel of the outputs at samples."""
        model = FunctionalModel(self._function, self._parameters)
        matrix = kernel(model, self._backend.asarray(self._x[samples]), chunk_size=min(256, len(samples)))
        matrix = np.asarray(self._backend.to_numpy(matrix), dtype=np.float64)
        return cosine_kernel(matrix)

    def _loss(self, parameters: Any, inputs: Array, targets: Array) -> Array:
        losses = cross_entropy(self._function(parameters, inputs), targets)
        return self._backend.namespace.mean(losses)

    def _compare(self, matrix: Array, batch: Array) -> None:
        given = self._given[batch]
        same = (given[:, None] == given) & ~np.eye(len(batch), dtype=bool)
        root = np.sqrt(np.maximum(np.diagonal(matrix), np.finfo(np.float64).tiny))
        met = same.sum(axis=1)
        self.sums[batch] += (matrix / root[:, None] / root * same).sum(axis=1) / np.maximum(met, 1)
        self.counts[batch] += met > 0


def _warn_of_memory(heart: float, seen: float, unseen: float) -> None:
    """Warn where networks agree with labels because they have learnt them by heart."""
    if much_by_heart(heart):
        warnings.warn(
            f"The networks have learnt labels by heart, as where samples have many columns: they predict {seen:.0%} of the "
            f"labels, but {unseen:.0%} of those that they were not trained on. Pass apart=True (--apart), so that each sample is "
            "judged by networks that were not trained on it.",
            UserWarning,
            stacklevel=3,
        )


def _checked(inputs: Array, labels: Array) -> tuple[Array, Array, int]:
    x, y = as_numpy(inputs), as_numpy(labels)
    check_inputs("inputs", x)
    check_labels("labels", y, len(x), "numpy.unique(labels, return_inverse=True)[1]")
    if y.min() == y.max():
        raise ArgumentError(f"`labels` must be of at least 2 classes; got {y[0]} for all. Pass samples of several classes.")
    if np.all(x == x[:1]):
        raise ArgumentError(f"`inputs` must differ between samples; got {len(x)} equal ones, which say nothing about labels.")
    return x, y.astype(np.int64), count_classes(y, "labels")
