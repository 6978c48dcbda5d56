"""Real data sets, split and scaled, and the corruption of their labels."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mgs_core._errors import ArgumentError, extra, renamed
from mgs_core._types import Array
from mgs_core.experiments.checks import check_inputs, check_labels, count_classes

NOISE_KINDS = ("symmetric", "pair")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Hold a classification problem.

    Attributes:
        name: where it is from.
        train_inputs: (n, *shape), float32, scaled to mean 0 and standard deviation 1 over all values.
        train_labels: (n,), integers, as given to the training: perhaps wrong.
        true_labels: (n,), the labels before corruption.
        test_inputs: scaled like the training inputs.
        test_labels: clean.
        classes: number of classes c.
        mean: that was subtracted from the inputs.
        deviation: by which they were divided then.
    """

    name: str
    train_inputs: Array
    train_labels: Array
    true_labels: Array
    test_inputs: Array
    test_labels: Array
    classes: int
    mean: float = 0.0
    deviation: float = 1.0

    @property
    def wrong(self) -> Array:
        """Return which training labels are wrong, (n,) of bool."""
        return self.train_labels != self.true_labels


def load_dataset(source: str, *, samples: int | None = None, seed: int = 0) -> Dataset:
    """Load a data set and draw the training samples.

    Args:
        source: "digits" (1797 images of 8×8, bundled with scikit-learn; 40 % are the test set), "mnist" (scikit-learn fetches it
            from OpenML), or the path of an .npz file with x_train, y_train, x_test, y_test.
        samples: training samples to draw, the classes in equal shares as far as they go; None for all.
        seed: seed of the split and the draw.

    Returns:
        The data set, labels clean.

    Raises:
        ArgumentError: when the source is unknown or damaged, or too small.
        BackendError: when scikit-learn is needed and not installed.

    Example:
        >>> from mgs_core.experiments import load_dataset
        >>> load_dataset("digits", samples=500).train_inputs.shape
        (500, 8, 8)
    """
    random = np.random.default_rng(seed)
    if source == "digits":
        arrays = _split(*load_digits_arrays(), random)
    elif source == "mnist":
        with extra("app", "The data set 'mnist'"):
            from sklearn.datasets import fetch_openml
        try:
            bundle = fetch_openml("mnist_784", version=1, as_frame=False)
        except OSError as error:  # URLError is one
            raise ArgumentError(
                f"`source` must be within reach; mnist could not be fetched from OpenML ({error}). "
                "Pass the path of an .npz file with x_train, y_train, x_test, y_test instead."
            ) from error
        x, y = bundle.data.reshape(-1, 28, 28), bundle.target.astype(int)
        arrays = {"x_train": x[:60000], "y_train": y[:60000], "x_test": x[60000:], "y_test": y[60000:]}
    else:
        with renamed(path="source"):
            arrays = read_arrays(source, ("x_train", "y_train", "x_test", "y_test"))
    return _prepare(Path(source).stem if source.endswith(".npz") else source, arrays, samples, random)


def load_digits_arrays() -> tuple[Array, Array]:
    """Return scikit-learn's digits: images (1797, 8, 8) and labels."""
    with extra("app", "The data set 'digits'"):
        from sklearn.datasets import load_digits
    bundle = load_digits()
    return bundle.images, bundle.target


def corrupt(data: Dataset, rate: float, kind: str = "symmetric", *, seed: int = 0) -> Dataset:
    """Make some training labels wrong.

    Args:
        data: a data set with clean labels.
        rate: probability for each label to be redrawn, 0 to 1.
        kind: "symmetric": redrawn uniformly over the c classes that have samples, so that 1/c of them stay right; "pair":
            replaced by the next of them.
        seed: seed of the draw.

    Returns:
        The data set with new `train_labels`.

    Raises:
        ArgumentError: when the rate is out of range or the kind unknown.

    Example:
        >>> from mgs_core.experiments.data import corrupt, load_dataset
        >>> float(corrupt(load_dataset("digits"), 0.5, "pair").wrong.mean().round(1))
        0.5
    """
    check_noise(rate, kind)
    random = np.random.default_rng(seed)
    labels = data.true_labels
    chosen = random.random(labels.shape) < rate
    present = np.unique(labels)  # a class of which there are no samples is none, as 0 where labels begin at 1
    at = random.integers(0, len(present), labels.shape) if kind == "symmetric" else np.searchsorted(present, labels) + 1
    other = present[at % len(present)]
    return replace(data, train_labels=np.where(chosen, other, labels))


def check_noise(rate: float, kind: str) -> None:
    """Refuse a rate that is no probability, and an unknown kind."""
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        raise ArgumentError(f"`rate` must be a probability between 0 and 1; got {rate!r}.")
    if kind not in NOISE_KINDS:
        raise ArgumentError(f"`kind` must be one of {', '.join(NOISE_KINDS)}; got {kind!r}.")


def _split(inputs: Array, labels: Array, random: np.random.Generator) -> dict[str, Array]:
    order = random.permutation(len(labels))
    cut = int(0.6 * len(labels))
    train, test = order[:cut], order[cut:]
    return {"x_train": inputs[train], "y_train": labels[train], "x_test": inputs[test], "y_test": labels[test]}


def read_arrays(path: str | Path, names: Iterable[str]) -> dict[str, Array]:
    """Read arrays from an .npz file.

    Args:
        path: the file, untrusted: pickled objects are refused.
        names: arrays that it must hold.

    Returns:
        All arrays that it holds, by name.

    Raises:
        ArgumentError: when the file is missing, damaged, holds objects, or lacks an array.
    """
    if not str(path).endswith(".npz"):
        raise ArgumentError(f"`path` must be the path of an .npz file, or a name that --help lists; got {str(path)!r}.")
    if not Path(path).is_file():
        raise ArgumentError(f"`path` must be a file that exists; got {str(path)!r}. Check the path.")
    try:
        with Path(path).open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        archive = isinstance(error, OSError) or zipfile.is_zipfile(path)
        raise ArgumentError(
            f"`path` must be an .npz file of plain number arrays; {str(path)!r} "
            f"{f'cannot be read: {error}' if archive else 'is no archive such as numpy.savez writes'}. "
            "Pickled objects are refused, for reading them can run code; save the arrays with a numeric dtype."
        ) from error
    require(arrays, names, path)
    return arrays


def require(arrays: Mapping[str, Array], names: Iterable[str], path: str | Path) -> None:
    """Refuse arrays that lack a name.

    Args:
        arrays: what a file holds, by name.
        names: what it must hold.
        path: the file, for the message.

    Raises:
        ArgumentError: when an array is missing, or no array.
    """
    names = list(names)
    missing = [name for name in names if name not in arrays]
    if missing:
        raise ArgumentError(
            f"`path` must hold {', '.join(names)}; {str(path)!r} lacks {', '.join(missing)} "
            f"and has {', '.join(arrays) or 'nothing'}."
        )
    for name in names:
        if not arrays[name].ndim:
            raise ArgumentError(f"`path` must hold samples along the first axis of {name!r}; {str(path)!r} holds a single value.")


def named_labels(labels: Any, names: Any, called: str) -> tuple[Any, list[str] | None]:
    """Return labels as numbers, and the names of the classes: what the labels are, or an array of the file."""
    if labels.dtype.kind == "U":
        found, numbers = np.unique(labels, return_inverse=True)
        return numbers.reshape(labels.shape), [str(name) for name in found]
    if names is None:
        return labels, None
    least = int(labels.max()) + 1 if labels.size and labels.dtype.kind in "iu" else 0  # other labels are refused by the audit
    if names.ndim != 1 or len(names) < least:
        raise ArgumentError(
            f"`names` in the data must name each of the {least} classes of `{called}`; got shape {names.shape}. "
            "Write one name for each number, or leave the array out."
        )
    return labels, [str(name) for name in names]


def _prepare(name: str, arrays: dict[str, Array], samples: int | None, random: np.random.Generator) -> Dataset:
    for part in ("train", "test"):
        x, y = f"x_{part}", f"y_{part}"
        check_inputs(x, arrays[x])
        check_labels(y, arrays[y], len(arrays[x]), f"numpy.searchsorted(numpy.unique(y_train), {y})")
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        shapes = arrays["x_train"].shape[1:], arrays["x_test"].shape[1:]
        raise ArgumentError(f"`x_train` and `x_test` must have samples of one shape; got {shapes[0]} and {shapes[1]}.")
    classes = count_classes(arrays["y_train"], "y_train")
    if classes < 2 or int(arrays["y_test"].max()) >= classes:
        raise ArgumentError(
            f"`y_train` must hold at least 2 classes, and all that `y_test` holds; got labels up to {classes - 1} "
            f"and {int(arrays['y_test'].max())}."
        )
    chosen = _draw(arrays["y_train"], samples, random)
    y = arrays["y_train"][chosen].astype(np.int64)
    x, mean, deviation = scale(arrays["x_train"][chosen])
    test = ((arrays["x_test"].astype(np.float64) - mean) / deviation).astype(np.float32)
    return Dataset(name, x, y, y, test, arrays["y_test"].astype(np.int64), classes, mean, deviation)


def scale(inputs: Array) -> tuple[Array, float, float]:
    """Return inputs with mean 0 and standard deviation 1 over all values in float32, and the mean and deviation they had.

    It is done in float64: in float32 differences between large numbers would be lost, and squares of very large or small ones.

    Args:
        inputs: real numbers, finite.
    """
    values = inputs.astype(np.float64)
    top = float(np.max(np.abs(values))) or 1.0
    mean, deviation = float(np.mean(values / top)), float(np.std(values / top))
    mean, deviation = mean * top, (deviation if deviation > 1e-15 else 1.0) * top  # all are equal but for rounding
    return ((values - mean) / deviation).astype(np.float32), mean, deviation


def _draw(labels: Array, samples: int | None, random: np.random.Generator) -> Any:
    """Return indices of `samples` samples, taking one of each class in turn."""
    if samples is None:
        return random.permutation(len(labels))
    if isinstance(samples, bool) or not isinstance(samples, (int, np.integer)) or not 2 <= samples <= len(labels):
        raise ArgumentError(f"`samples` must be an integer between 2 and {len(labels)}, what the data hold; got {samples!r}.")
    order = random.permutation(len(labels))
    turn = np.empty(len(labels), dtype=int)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        turn[members] = np.arange(len(members))
    return random.permutation(order[np.argsort(turn[order], kind="stable")][:samples])
