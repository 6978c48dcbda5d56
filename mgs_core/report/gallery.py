"""The gallery of an audit: the most suspicious samples with their given and suggested labels, and the files for further work."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imsave

from mgs_core._errors import ArgumentError
from mgs_core._matrix import as_numpy
from mgs_core._types import Array
from mgs_core.report.files import write_files
from mgs_core.report.numbers import written_correlation
from mgs_core.report.page import render
from mgs_core.suspicion import by_chance, much_by_heart

_SIDE = 128  # pixels of a picture at most, about as many as it is shown at
FILES = ("weights.npy", "suspects.csv", "audit.html")


def write_audit(audit: Any, inputs: Array, folder: str | Path, *, names: Sequence[str] | None = None, shown: int = 200) -> Path:
    """Write `audit.html`, `suspects.csv` (all samples, the most suspicious first) and `weights.npy`.

    Args:
        audit: what `mgs_core.audit` returned.
        inputs: the samples, (n, …); images are shown: (height, width), or with 1, 3 or 4 channels first or last, the fourth
            their opacity.
        folder: where the files go; made if need be.
        names: of the classes; None for their numbers.
        shown: samples in the gallery.

    Returns:
        The path of the page.

    Raises:
        ArgumentError: when samples or names are too few, or the folder cannot be written.

    Example:
        >>> import tempfile
        >>> import mgs_core as mgs
        >>> from sklearn.datasets import load_digits
        >>> images, labels = load_digits(n_class=2, return_X_y=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_audit(mgs.audit(images, labels, epochs=1), images, folder).name
        'audit.html'
    """
    order = audit.order
    classes = int(max(audit.given.max(), audit.suggested.max())) + 1
    called = [str(k) for k in range(classes)] if names is None else list(names)
    if len(called) < classes:
        raise ArgumentError(f"`names` must name each of the {classes} classes; got {len(called)} names. Name them all.")
    if len(inputs) != len(order):
        raise ArgumentError(f"`inputs` must be the {len(order)} samples of the audit; got {len(inputs)}.")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["sample", "given", "suggested", "score", "class_cosine", "neighbours", "weight", "contradicted"])
    for a in order:
        figures = (audit.scores[a], audit.class_cosine[a], audit.neighbours[a], audit.weights[a])
        written = ("" if isnan(value) else f"{value:.6g}" for value in figures)
        writer.writerow(
            [int(a), called[audit.given[a]], called[audit.suggested[a]], *written, "yes" if audit.contradicted[a] else "no"]
        )
    weights = io.BytesIO()
    np.save(weights, audit.weights)
    page = render(
        "audit.html",
        title=headline(audit),
        facts=[
            f"{len(order)} samples",
            f"{len(np.unique(audit.given))} classes",
            *([f"judged in {audit.blocks} blocks"] if audit.blocks > 1 else []),
            *([] if np.isnan(audit.predictable) else [f"others predict {audit.predictable:.0%} of the labels as given"]),
            "all are shown" if shown >= len(order) else f"the {shown} most suspicious are shown" if shown else "none is shown",
        ],
        others="all other samples of its block, which was drawn at random," if audit.blocks > 1 else "all other samples",
        chance=by_chance(audit.predictable, audit.given),
        heart=f"{audit.by_heart:.0%}" if much_by_heart(audit.by_heart) else "",
        suspects=[
            {
                "sample": int(a),
                "better": bool(audit.scores[a] > 0),
                "picture": _picture(inputs[a]),
                "given": called[audit.given[a]],
                "suggested": called[audit.suggested[a]],
                "score": written_correlation(float(audit.scores[a])),
                "class_cosine": "" if isnan(audit.class_cosine[a]) else written_correlation(float(audit.class_cosine[a])),
                "neighbours": f"{audit.neighbours[a]:.0%}",
                "contradicted": bool(audit.contradicted[a]),
            }
            for a in order[:shown]
        ],
    )
    files = dict(zip(FILES, (weights.getvalue(), table.getvalue().encode(), page.encode()), strict=True))
    return write_files(folder, files) / "audit.html"


def headline(audit: Any) -> str:
    """Return in a sentence how many labels are contradicted and how many other labels fit better.

    Args:
        audit: what `mgs_core.audit` returned.

    Returns:
        The sentence, without its full stop.

    Example:
        >>> import numpy as np
        >>> import mgs_core as mgs
        >>> headline(mgs.suspicion(np.kron(np.eye(2), np.ones((4, 4))), np.repeat([0, 1], 4)))
        'Another label fits 0 of 8 samples better; 0 labels are contradicted'
    """
    better, sure = int(np.sum(audit.scores > 0)), int(np.sum(audit.contradicted))
    return (
        f"Another label fits {better} of {len(audit.scores)} samples better; "
        f"{sure} label{' is' if sure == 1 else 's are'} contradicted"
    )


def _picture(sample: Array) -> str | None:
    """Return an image as a data URI, or None for what is no image."""
    image = np.asarray(as_numpy(sample), dtype=np.float64)
    if image.ndim == 3 and image.shape[0] in (1, 3, 4) and image.shape[0] < min(image.shape[1:]):
        image = np.moveaxis(image, 0, -1)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))) or min(image.shape[:2]) < 4:
        return None
    image = _reduced(image)
    image, opacity = (image[..., :3], image[..., 3:]) if image.ndim == 3 else (image, image[:0])
    low, high = float(image.min()), float(image.max())
    image = (image - low) / (high - low or 1.0)
    if opacity.size and np.ptp(opacity):
        low = min(0.0, float(opacity.min()))
        opacity = (opacity - low) / (opacity.max() - low)
        image = opacity * image + (1 - opacity) / 2  # over grey, on which neither black nor white is lost
    drawn = io.BytesIO()
    imsave(drawn, image, cmap="gray", format="png")
    return "data:image/png;base64," + base64.b64encode(drawn.getvalue()).decode()


def _reduced(image: Array) -> Array:
    """Return means of square blocks, so that the page of an audit of photographs stays small enough to open."""
    step = min(-(-max(image.shape[:2]) // _SIDE), *image.shape[:2])
    high, wide = (length // step for length in image.shape[:2])
    blocks = image[: high * step, : wide * step].reshape(high, step, wide, step, *image.shape[2:])
    return blocks.mean(axis=(1, 3))
