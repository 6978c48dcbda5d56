"""Make plausible records of a comparison, for tests and for looking at the page."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest

if not all(map(find_spec, ("jinja2", "matplotlib", "scipy"))):  # the extra `app`
    collect_ignore_glob = ["test_*.py"]
SETTINGS = {
    "data": "digits", "noise": 0.4, "noise_kind": "symmetric", "samples": None, "model": "mlp", "backend": "numpy", "epochs": 60,
    "batch_size": 64, "learning_rate": 0.002, "seeds": 3, "probe_samples": 128,
}  # fmt: skip
CHARACTERS = {  # name: memorisation at the end, test accuracy at its best and its end, decades that the trace falls
    "none": (0.92, 0.86, 0.63, 4.0),
    "weight-decay": (0.71, 0.87, 0.71, 3.1),
    "dropout": (0.33, 0.90, 0.86, 1.8),
    "early-stopping": (0.16, 0.87, 0.86, 1.0),
    "label-smoothing": (0.80, 0.87, 0.72, 2.6),
    "mixup": (0.41, 0.88, 0.80, 1.9),
    "gradient-penalty": (0.62, 0.86, 0.75, 2.9),
    "mgs-trace": (0.08, 0.93, 0.925, 0.7),
    "mgs-log-determinant": (0.11, 0.925, 0.917, 0.9),
    "mgs-agreement": (0.14, 0.93, 0.92, 1.2),
}
MORE = (
    "spectral-norm", "sam", "generalised-cross-entropy", "co-teaching", "loss-gradient-penalty", "mgs-cosine", "mgs-log-trace",
    "mgs-agreement+mixup", "mgs-agreement+dropout", "mgs-trace+mixup",
    "cutout", "bootstrap", "elr", "divide-mix", "random-erasing",
)  # fmt: skip


def epoch_record(
    name: str, seed: int, epoch: int, epochs: int, character: tuple[float, ...], random_: random.Random
) -> dict[str, Any]:
    end, best, last, decades = character
    t = epoch / epochs
    rise, fall = 1 - math.exp(-9 * t), 1 / (1 + math.exp(-12 * (t - 0.45)))
    memorisation = 0.05 + (end - 0.05) * fall + random_.gauss(0, 0.006)
    trace = 10 ** (4.3 + 0.5 * math.sin(3 * t) - decades * fall + random_.gauss(0, 0.03))
    magnitude = 128 * math.log(trace / 128) - 20
    rank = 4 + 60 * fall * end + random_.gauss(0, 0.6)
    similarity = -900 + 10 * rank + random_.gauss(0, 6)
    test = 0.1 + (best - 0.1) * rise - (best - last) * fall + random_.gauss(0, 0.005)
    return {
        "event": "epoch", "regularizer": name, "seed": seed, "epoch": epoch,
        "train_loss": 2.3 - 1.5 * rise * end, "train_accuracy": 0.1 + 0.5 * rise + 0.38 * end * fall,
        "test_accuracy": min(test, 1.0), "memorisation": min(max(memorisation, 0), 1),
        "mgs_trace": trace, "mgs_mean_trace": trace / 128, "mgs_log_determinant": magnitude + similarity,
        "mgs_magnitude": magnitude, "mgs_similarity": similarity, "mgs_effective_rank": rank,
        "mgs_top_share": 1 / math.sqrt(rank), "mgs_mean_cosine": 2 / rank, "mgs_same_class_cosine": 0.75 - 0.6 * fall * end,
        "gradient_disparity": 4 - 3 * fall * end + random_.gauss(0, 0.1),
        "mgs_other_class_cosine": -0.05 + 0.1 * fall * end, "mgs_alignment": 0.7 - 0.35 * fall * end, "seconds": 0.02,
    }  # fmt: skip


def make_records(regularizers: int = 10, seeds: int = 3, epochs: int = 60) -> list[dict[str, Any]]:
    characters = dict(CHARACTERS)
    for number, name in enumerate(MORE):
        part = number / len(MORE)
        characters[name] = (0.1 + 0.7 * part, 0.9 - 0.05 * part, 0.9 - 0.2 * part, 0.8 + 2 * part)
    records = []
    for name, character in list(characters.items())[:regularizers]:
        for seed in range(seeds):
            random_ = random.Random(f"{name} {seed}")
            shifted = (character[0] * (1 + random_.gauss(0, 0.03)), *character[1:])
            history = [epoch_record(name, seed, epoch, epochs, shifted, random_) for epoch in range(1, epochs + 1)]
            records += history
            kept = history[epochs // 3] if name == "early-stopping" else history[-1]
            copied = ("memorisation", "mgs_trace", "mgs_log_determinant", "mgs_similarity", "mgs_effective_rank")
            records.append({
                "event": "run", "regularizer": name, "seed": seed, "last_test_accuracy": kept["test_accuracy"],
                "best_test_accuracy": max(record["test_accuracy"] for record in history), **{key: kept[key] for key in copied},
                "epochs": kept["epoch"], "seconds": 4.0 + seed,
            })  # fmt: skip
    return records


@pytest.fixture(name="make_records", scope="session")
def _make_records() -> Callable[..., list[dict[str, Any]]]:
    return make_records


@pytest.fixture
def settings() -> dict[str, Any]:
    return dict(SETTINGS)
