"""How well wrong labels are found: `mgs_core.audit` beside the usual scores, from the same networks and the same training.

Run with `python -P benchmarks/audit.py` (digits), or `--data PATH.npz --samples 2000`; JSON lines go to `--out`. Labels are made
wrong at random, so the truth is known. The peers: cleanlab's self-confidence and normalised margin (`pip install cleanlab`) on
five-fold out-of-sample and on in-sample probabilities; small loss; AUM (Pleiss et al. 2020) and EL2N (Paul et al. 2021), averaged
over the epochs; and, without a network, the 25 nearest neighbours. Probabilities are means over as many networks as the audit
trains, each on all samples; `--epochs` trains those of the peers longer.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import NearestNeighbors

import mgs_core as mgs
from mgs_core.experiments import RECIPES
from mgs_core.experiments.audit import usual_epochs
from mgs_core.experiments.data import corrupt, load_dataset
from mgs_core.experiments.models import build
from mgs_core.experiments.optimizer import schedule, start
from mgs_core.experiments.step import make_step

_OPTIONS = inspect.signature(mgs.audit).parameters  # the peers train as the audit does
NETWORKS, BATCH, RATE = (_OPTIONS[name].default for name in ("networks", "batch_size", "learning_rate"))


def probabilities(x: Any, y: Any, classes: int, at: Any, seed: int, epochs: int | None) -> Any:
    """Train as the audit does, and return the probabilities at `at` after each epoch, mean over the networks."""
    epochs = epochs or usual_epochs(len(y), BATCH)
    return np.mean([_one(x, y, classes, at, [seed, number], epochs) for number in range(NETWORKS)], axis=0)


def _one(x: Any, y: Any, classes: int, at: Any, seed: list[int], epochs: int) -> list[Any]:
    backend = mgs.get_backend("numpy")
    model = mgs.onnx.load(build("mlp", x.shape[1:], classes, seed=seed).plain)
    step, parameters, moments = make_step(RECIPES["none"], backend, model.function), model.parameters, start(model.parameters)
    random, steps, found = np.random.default_rng([*seed, 3]), max(1, len(y) // BATCH), []
    for epoch in range(epochs):
        order = random.permutation(len(y))
        for number in range(steps):
            batch = order[number * BATCH : (number + 1) * BATCH]
            now = schedule(epoch * steps + number, epochs * steps, RATE)
            _, parameters, moments = step(parameters, moments, {"x": x[batch]}, np.eye(classes, dtype=np.float32)[y[batch]], now)
        outputs = model.function(parameters, at).astype(np.float64)
        outputs = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        found.append(outputs / outputs.sum(axis=1, keepdims=True))
    return found


def ours(x: Any, y: Any, seed: int) -> dict[str, Any]:
    """Return the scores of the audit, and of that where networks judge what they were not trained on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The samples predict|The networks have learnt")  # as may be where labels are made wrong
        return {
            "mgs audit": mgs.audit(x, y, seed=seed).scores,
            "mgs audit, apart": mgs.audit(x, y, seed=seed, apart=True).scores,
        }


def neighbours(x: Any, y: Any, classes: int) -> Any:
    """Return the share of each label among the 25 nearest other samples."""
    flat = x.reshape(len(x), -1)
    _, near = NearestNeighbors(n_neighbors=min(26, len(x))).fit(flat).kneighbors(flat)
    near = [[b for b in row if b != a][:25] for a, row in enumerate(near)]
    return np.eye(classes)[y[np.asarray(near)]].mean(axis=1)


def scores(x: Any, y: Any, classes: int, seed: int, epochs: int | None) -> dict[str, Any]:
    """Return the suspicion of every method, high where a label looks wrong."""
    n, one_hot = len(y), np.eye(classes)[y]

    def margin(p: Any) -> Any:
        return np.where(one_hot > 0, -np.inf, p).max(axis=1) - p[np.arange(n), y]

    found = ours(x, y, seed)
    found["25 nearest neighbours"] = margin(neighbours(x, y, classes))
    inside = probabilities(x, y, classes, x, seed, epochs)
    outside, folds = np.zeros((n, classes)), np.random.default_rng(seed).permutation(n) % 5
    for fold in range(5):
        rest = folds != fold
        outside[~rest] = probabilities(x[rest], y[rest], classes, x[~rest], seed, epochs)[-1]
    found |= {
        "small loss": -np.log(np.maximum(np.mean(inside, axis=0)[np.arange(n), y], 1e-300)),
        "AUM": np.mean([margin(np.log(np.maximum(p, 1e-300))) for p in inside], axis=0),
        "EL2N": np.mean([np.linalg.norm(p - one_hot, axis=1) for p in inside], axis=0),
    }
    try:
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return found
    for place, p in (("out of sample", outside), ("in sample", inside[-1])):
        for method in ("self_confidence", "normalized_margin"):
            found[f"cleanlab {method.replace('_', ' ')}, {place}"] = -get_label_quality_scores(y, p, method=method)
    return found


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="passes over the samples of the peers; those of the audit by default")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    records = []
    for kind in ("symmetric", "pair"):
        for rate in (0.1, 0.2, 0.4):
            for seed in range(options.seeds):
                data = corrupt(load_dataset(options.data, samples=options.samples, seed=seed), rate, kind, seed=seed)
                count = int(data.wrong.sum())
                found = scores(data.train_inputs, data.train_labels, data.classes, seed, options.epochs)
                for name, value in found.items():
                    first = np.argsort(-value)[:count]
                    records.append({
                        "data": data.name, "samples": len(data.train_labels), "kind": kind, "rate": rate, "seed": seed,
                        "epochs": options.epochs,
                        "method": name,
                        "auroc": float(roc_auc_score(data.wrong, value)),
                        "average_precision": float(average_precision_score(data.wrong, value)),
                        "precision": float(data.wrong[first].mean()),
                    })  # fmt: skip
    if options.out:
        options.out.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    cells = sorted({(record["kind"], record["rate"]) for record in records}, reverse=True)
    for metric in ("auroc", "average_precision", "precision"):
        table = Table("method", *(f"{kind} {rate:.0%}" for kind, rate in cells), title=f"{options.data}: {metric}, mean ± s.e.")
        for name in dict.fromkeys(record["method"] for record in records):
            row = []
            for kind, rate in cells:
                values = [r[metric] for r in records if (r["method"], r["kind"], r["rate"]) == (name, kind, rate)]
                error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
                row.append(f"{np.mean(values):.3f} ± {error:.3f}")
            table.add_row(name, *row)
        Console(width=140).print(table)


if __name__ == "__main__":
    main()
