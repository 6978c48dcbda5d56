"""The gallery of an audit: what it says of a sample follows from the figures, whatever the classes are called."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from matplotlib.image import imread

import mgs_core as mgs
from mgs_core.report import write_audit
from mgs_core.report.gallery import _picture

ZERO = np.zeros(6)
GIVEN, SUGGESTED = np.array([0, 1, 0, 1, 0, 1]), np.array([1, 0, 0, 1, 0, 1])
SCORES = np.array([0.9, 0.4, -0.001, -0.2, -0.3, -0.4])


def audit(predictable=0.99, **shares):
    return mgs.Audit(SCORES, GIVEN, SUGGESTED, SCORES > 0.5, ZERO, ZERO, ZERO + 1, predictable=predictable, **shares)


def page(folder, found=None, **options):
    return write_audit(found or audit(), np.ones((6, 3)), folder, **options).read_text(encoding="utf-8")


def test_contradicted_samples_are_told_from_the_others(tmp_path):
    text = page(tmp_path)
    cards = re.findall(r'<li class="card">(.*?)</li>', text, re.DOTALL)
    assert ["contradicted" in card for card in cards] == [True, False, False, False, False, False]
    rows = re.findall(r'<tr><th scope="row">.*?<td>(yes|no)</td></tr>', text)
    assert rows == ["yes", "no", "no", "no", "no", "no"]


@pytest.mark.parametrize(("shown", "sizes"), [(6, [2, 4]), (2, [2]), (0, [])])
def test_samples_whose_label_fits_best_stand_apart(shown, sizes, tmp_path):
    parts = page(tmp_path, shown=shown).split("<section>")[1:]
    assert [part.count('<li class="card">') for part in parts] == sizes
    titles = [re.search("<h2>(.*?)</h2>", part)[1] for part in parts]
    assert titles == ["Another label fits better", "The given label fits best, if by little"][: len(sizes)]


@pytest.mark.parametrize(("predictable", "warned"), [(0.5, True), (0.9, True), (0.99, False), (float("nan"), False)])
def test_labels_that_are_predicted_no_better_than_by_chance(predictable, warned, tmp_path):
    assert ("Drop none for being contradicted." in page(tmp_path, audit(predictable))) is warned


@pytest.mark.parametrize(("heart", "warned"), [(0.75, True), (0.4, False), (float("nan"), False)])
def test_labels_that_were_learnt_by_heart(heart, warned, tmp_path):
    assert ("75% of those that they would contradict" in page(tmp_path, audit(by_heart=heart))) is warned


def test_the_table_is_reached_by_keyboard_and_stands_apart_from_the_cards(tmp_path):
    text = page(tmp_path)
    assert '<div class="scroll" tabindex="0" role="region" aria-label="Numbers">' in text
    assert ".suspects + .card { margin-top: 16px; }" in text


def test_names_written_from_the_right_keep_given_before_suggested(tmp_path):
    text = page(tmp_path, names=["שלום", "<مرحبا>"])
    assert "<s><bdi>שלום</bdi></s>" in text
    assert "<b><bdi>&lt;مرحبا&gt;</bdi></b>" in text
    assert '<span class="unseen">given </span><s>' in text


def test_numbers_have_a_minus_sign(tmp_path):
    text = page(tmp_path)
    assert "score −0.20" in text
    assert not re.search(r"score -|<td>-", text)


@pytest.mark.parametrize(
    ("shown", "said"),
    [(200, "all are shown"), (6, "all are shown"), (2, "the 2 most suspicious are shown"), (0, "none is shown")],
)
def test_how_many_are_shown(shown, said, tmp_path):
    text = page(tmp_path, shown=shown)
    assert f"<li>{said}</li>" in text
    assert ("<table>" in text) is (shown > 0)


@pytest.mark.parametrize(
    ("shape", "size"), [((900, 600, 3), (112, 75)), ((3, 300, 450), (75, 112)), ((4, 3000), (1, 750)), ((128, 99), (128, 99))]
)
def test_photographs_are_drawn_small(shape, size):
    image = np.zeros(shape)
    upright = image.T if len(shape) == 2 else np.moveaxis(image, shape.index(3), 2).swapaxes(0, 1)  # a view, its columns first
    upright[len(upright) // 3 :] = 1.0
    drawn = imread(io.BytesIO(base64.b64decode(_picture(image).partition(",")[2])))
    assert drawn.shape[:2] == size
    assert drawn[..., 0].mean() == pytest.approx(2 / 3, abs=0.02)
