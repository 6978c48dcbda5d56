"""What a comparison is run with."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mgs_core._arguments import integer
from mgs_core._errors import ArgumentError, renamed
from mgs_core.experiments.data import check_noise
from mgs_core.experiments.optimizer import check_learning_rate
from mgs_core.experiments.recipes import RECIPES


@dataclass(frozen=True)
class Settings:
    """Hold the settings that all runs of a comparison share, so that the regulariser alone differs.

    Attributes:
        data: as for `load_dataset`.
        noise: probability of a training label to be redrawn, 0 to 1.
        noise_kind: "symmetric" or "pair".
        samples: training samples, at least 2; None for all.
        model: "mlp", "cnn", or the path of an .onnx file of a classifier, which is trained further.
        backend: name of the backend.
        epochs: passes over the training samples.
        batch_size: samples per step.
        learning_rate: of Adam at the start; it falls to 0 along half a cosine.
        seeds: number of seeds: each draws data, noise, weights (but those of a file) and order anew.
        probe_samples: training samples on which the kernel is measured after each epoch.
        tuning: strengths that are tried for each recipe before its runs, at most 4; 0 takes those of `RECIPES`.

    Raises:
        ArgumentError: when a number is out of range, or the kind of noise unknown.

    Example:
        >>> from mgs_core.experiments import Settings
        >>> Settings(epochs=5).to_dict()["epochs"]
        5
    """

    data: str = "digits"
    noise: float = 0.4
    noise_kind: str = "symmetric"
    samples: int | None = None
    model: str = "mlp"
    backend: str = "numpy"
    epochs: int = 40
    batch_size: int = 64
    learning_rate: float = 2e-3
    seeds: int = 3
    probe_samples: int = 128
    tuning: int = 0

    def __post_init__(self) -> None:
        counts = {"epochs": 1, "batch_size": 2, "seeds": 1, "probe_samples": 2, "tuning": 0}
        for name, least in (counts if self.samples is None else {**counts, "samples": 2}).items():
            object.__setattr__(self, name, integer(name, getattr(self, name), least))  # the class is frozen
        most = max(len(recipe.tried) for recipe in RECIPES.values())
        if self.tuning > most:
            raise ArgumentError(f"`tuning` must be at most {most}, the strengths that a recipe has to try; got {self.tuning}.")
        with renamed(rate="noise", kind="noise_kind"):
            check_noise(self.noise, self.noise_kind)
        check_learning_rate(self.learning_rate)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dict that JSON can hold; of files also what identifies their contents."""
        found = asdict(self)
        for name, suffix in (("model", ".onnx"), ("data", ".npz")):
            path = Path(found[name])
            if path.suffix == suffix and path.is_file():
                found[f"{name}_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found
