"""What it gains to train without the labels that an audit contradicts: digits, 40 % of the labels redrawn, an MLP in PyTorch.

Run with `python -P benchmarks/audit_training.py`; prints percent of clean test samples after the last epoch.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import mgs_core as mgs
from mgs_core.experiments.data import corrupt, load_dataset

SEEDS, EPOCHS, BATCH = 3, 50, 64


def train(x: torch.Tensor, y: torch.Tensor, decay: float, seed: int, epochs: int = EPOCHS) -> torch.nn.Module:
    """Return a network trained by AdamW with cosine decay."""
    torch.manual_seed(seed)
    widths = [x[0].numel(), 256, 256, 10]
    layers = [part for a, b in pairwise(widths) for part in (torch.nn.Linear(a, b), torch.nn.ReLU())]
    model = torch.nn.Sequential(torch.nn.Flatten(), *layers[:-1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=decay)
    steps = len(y) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(y))[: steps * BATCH].split(BATCH):
            loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


def main() -> None:
    """Train and print."""
    torch.set_num_threads(1)
    right: dict[tuple[str, float], list[float]] = {}
    for seed in range(SEEDS):
        data = corrupt(load_dataset("digits", seed=seed), 0.4, "symmetric", seed=seed)
        low, high = data.train_inputs.min(), data.train_inputs.max()
        x, test = (
            torch.tensor((part - low) / (high - low), dtype=torch.float32) for part in (data.train_inputs, data.test_inputs)
        )
        y = torch.tensor(data.train_labels)
        contradicted = mgs.audit(x, y, seed=seed).contradicted
        told(contradicted, data.wrong, "mgs.audit")
        for decay in (0.0, 3.0):
            own = mgs.suspicion(mgs.kernel(train(x, y, decay, seed, epochs=4), x), y).contradicted
            told(own, data.wrong, f"the same network after 4 epochs, decay {decay:.0f}")
            for name, left in (
                ("all samples", np.ones_like(data.wrong)),
                ("without those that mgs.audit contradicts", ~contradicted),
                ("without those that the same network contradicts after 4 epochs", ~own),
                ("without all wrong labels", ~data.wrong),
            ):
                model = train(x[left], y[left], decay, seed)
                found = model(test).argmax(1).numpy() == data.test_labels
                right.setdefault((name, decay), []).append(100 * float(found.mean()))
    shown = Table("trained on", "no weight decay", "weight decay 3")
    for name in dict.fromkeys(name for name, _ in right):
        cells = (right[name, decay] for decay in (0.0, 3.0))
        shown.add_row(name, *(f"{np.mean(of):.1f} ± {np.std(of, ddof=1) / len(of) ** 0.5:.1f}" for of in cells))
    Console(width=120).print(shown)


def told(contradicted: Any, wrong: Any, name: str) -> None:
    """Print what was found."""
    print(f"{name}: {contradicted[wrong].mean():.0%} of the wrong labels found, {wrong[contradicted].mean():.0%} of what it says")


if __name__ == "__main__":
    main()
