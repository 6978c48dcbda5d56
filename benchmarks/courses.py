"""What the numbers do over a training: the courses that docs/reading.md shows, on three of scikit-learn's data sets.

Run with `python -P benchmarks/courses.py`. Each network, an MLP of PyTorch as its layers begin, trains without a regulariser on
labels of which some are redrawn; and a second one on the samples that `mgs.audit` does not find contradicted. Kernels are of the
head "trace". Rows are means over the seeds.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import numpy as np
import torch
from mgs_core.adapters.torch import MGSMonitor
from sklearn import datasets

import mgs_core as mgs

SETS = {
    "digits": (datasets.load_digits, 128, 64),
    "wine": (datasets.load_wine, 64, 32),
    "breast cancer": (datasets.load_breast_cancer, 64, 32),
}


def split(name: str, noise: float, seed: int) -> dict[str, Any]:
    """Return training and test samples, pixels scaled as a whole and columns one by one, and labels of which some are redrawn."""
    x, y = SETS[name][0](return_X_y=True)
    random = np.random.default_rng(seed)
    order, cut = random.permutation(len(y)), int(0.6 * len(y))
    train, test = order[:cut], order[cut:]
    mean, deviation = (x[train].mean(), x[train].std()) if name == "digits" else (x[train].mean(0), x[train].std(0))
    x = ((x - mean) / deviation).astype(np.float32)
    given = np.where(random.random(cut) < noise, random.integers(0, y.max() + 1, cut), y[train])
    return {"x": x[train], "given": given, "true": y[train], "x_test": x[test], "y_test": y[test]}


def train(
    name: str, data: dict[str, Any], kept: np.ndarray, probes: list[np.ndarray], epochs: int, seed: int
) -> tuple[torch.nn.Module, list[list[dict[str, Any]]]]:
    """Train on the kept samples; return the network and the records of each probe, one for each epoch."""
    _, width, batch = SETS[name]
    x, y = torch.tensor(data["x"]), torch.tensor(data["given"])
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(x.shape[1], width), torch.nn.ReLU(), torch.nn.Linear(width, width), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(width, int(data["true"].max()) + 1))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    monitors = [MGSMonitor(model, x[probe], labels=y[probe], every=1) for probe in probes]
    chosen = torch.tensor(np.flatnonzero(kept))
    for _ in range(epochs):
        for part in chosen[torch.randperm(len(chosen))].split(batch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
        for monitor in monitors:
            monitor.step()
    return model, [monitor.history for monitor in monitors]


def run(name: str, noise: float, epochs: int, samples: int, seed: int) -> dict[str, float]:
    """Return the figures of one seed."""
    data = split(name, noise, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of columns, which are scaled here
        found = mgs.audit(data["x"], data["given"], seed=seed)
    trusted = np.flatnonzero(~found.contradicted)[:samples]
    everything = np.ones(len(data["given"]), dtype=bool)
    model, (course, of_trusted) = train(name, data, everything, [np.arange(samples), trusted], epochs, seed)
    _, (cleaned,) = train(name, data, ~found.contradicted, [trusted], epochs, seed)
    with torch.no_grad():
        predicted, tested = (model(torch.tensor(data[part])).argmax(1).numpy() for part in ("x", "x_test"))
    wrong, fitted = data["given"] != data["true"], predicted == data["given"]
    ranks = [record["mgs_effective_rank"] for record in course]
    cosines = [record["mgs_same_class_cosine"] for record in course]
    similarities = [record["mgs_similarity"] for record in course]
    return {
        "rank, lowest": min(ranks),
        "rank, end": ranks[-1],
        "cosine, highest": max(cosines),
        "cosine, end": cosines[-1],
        "similarity, lowest": min(similarities),
        "similarity, end": similarities[-1],
        "test %": 100 * float(np.mean(tested == data["y_test"])),
        "memorised": float(np.mean(fitted[wrong])) if wrong.any() else float("nan"),
        "contradicted and predicted": float(np.mean(fitted[found.contradicted])) if found.contradicted.any() else float("nan"),
        "rank of trusted samples, all": of_trusted[-1]["mgs_effective_rank"],
        "rank of trusted samples, cleaned": cleaned[-1]["mgs_effective_rank"],
    }


def main() -> None:
    """Print a row for each data set and share of redrawn labels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--samples", type=int, default=100, help="of a probe")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for at, (name, noise) in enumerate((name, noise) for name in SETS for noise in (0.0, 0.2, 0.4)):
        runs = [run(name, noise, options.epochs, options.samples, seed) for seed in range(options.seeds)]
        if not at:
            print("| data | redrawn |", " | ".join(runs[0]), "|\n|---|---|" + "---|" * len(runs[0]))
        means = [np.mean([one[figure] for one in runs]) for figure in runs[0]]
        print(f"| {name} | {noise:.0%} |", " | ".join(f"{value:.3g}" for value in means), "|", flush=True)


if __name__ == "__main__":
    main()
