"""The picture: a PNG that holds what it should."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

from mgs_core.report.looks import looks
from mgs_core.report.picture import picture
from mgs_core.report.runs import read


@pytest.fixture
def figure(monkeypatch):
    """Keep the figure that is saved."""
    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **named: (kept.append(self), save(self, *args, **named)))
    return kept


def test_four_panels_with_every_mean(make_records, figure):
    records = make_records(4, 3, 8)
    pixels = imread(io.BytesIO(picture(read(records), ["digits"])))
    assert pixels.shape[1] == 1640
    assert pixels.shape[0] > 900
    panels = figure[0].axes
    assert [panel.get_title(loc="left") for panel in panels] == [
        "Test accuracy", "Wrong labels memorised", "Trace", "Similarity part of the log-determinant",
    ]  # fmt: skip
    drawn = looks(read(records).regularizers)
    for panel, field in zip(panels, ("test_accuracy", "memorisation", "mgs_trace", "mgs_similarity"), strict=True):
        lines = [line for line in panel.get_lines() if len(line.get_xdata()) == 8]
        assert len(lines) == 4
        for line, name in zip(lines, drawn, strict=True):
            values = [
                [r[field] for r in records if r["event"] == "epoch" and r["regularizer"] == name and r["epoch"] == at]
                for at in range(1, 9)
            ]
            np.testing.assert_allclose(line.get_ydata(), np.mean(values, axis=1))
            assert line.get_color() == drawn[name].colours[0]


def test_names_neither_overlap_nor_leave_the_picture(make_records, figure):
    picture(read(make_records(25, 1, 10)), ["digits"])
    renderer = FigureCanvasAgg(figure[0]).get_renderer()
    width, height = figure[0].bbox.width, figure[0].bbox.height
    for panel in figure[0].axes:
        boxes = [text.get_window_extent(renderer) for text in panel.texts]
        assert len(boxes) == 25
        for box in boxes:
            assert 0 <= box.x0 < box.x1 <= width
            assert 0 <= box.y0 < box.y1 <= height
        middles = sorted((box.y0 + box.y1) / 2 for box in boxes)
        assert min(second - first for first, second in itertools.pairwise(middles)) > 0.9 * 16 * 100 / 72
        others = [other for other in figure[0].axes if other is not panel]
        assert not any(other.get_window_extent(renderer).overlaps(box) for other in others for box in boxes)


def test_bytes_are_the_same_each_time(make_records):
    comparison = read(make_records(3, 2, 4))
    assert picture(comparison, ["digits"]) == picture(comparison, ["digits"])


def test_no_curve(figure):
    assert picture(read([{"event": "run", "regularizer": "none"}]), []).startswith(b"\x89PNG")
    assert figure[0].axes == []
    assert "No curve is recorded." in [text.get_text() for text in figure[0].texts]


def test_names_are_no_formulas():
    records = [{"event": "epoch", "regularizer": "$x_{$ 数", "epoch": at, "test_accuracy": 0.1 * at} for at in (1, 2)]
    assert picture(read(records), ["$a$ 数"]).startswith(b"\x89PNG")


def test_effective_rank_stands_in_for_the_similarity_part(make_records, figure):
    records = [{key: value for key, value in record.items() if key != "mgs_similarity"} for record in make_records(2, 1, 3)]
    picture(read(records), [])
    assert [panel.get_title(loc="left") for panel in figure[0].axes][-1] == "Effective rank"
