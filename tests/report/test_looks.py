"""Looks: distinct without colour, and colours that can be read on both backgrounds."""

from __future__ import annotations

import itertools

import pytest

from mgs_core.report.looks import BACKGROUND, MUTED, PLAIN, STRONG, looks
from mgs_core.report.runs import group

NAMES = ("none", *(f"mgs-{letter}" for letter in "abcdefghijkl"), *(f"other-{letter}" for letter in "abcdefghijklmnopqr"))


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize("colours", [PLAIN, *STRONG, *MUTED])
def test_contrast_of_text_is_at_least_4_5(colours, theme):
    bright, dark = sorted((luminance(colours[theme]), luminance(BACKGROUND[theme])), reverse=True)
    assert (bright + 0.05) / (dark + 0.05) >= 4.5


def test_no_two_look_alike():
    found = looks(NAMES)
    assert [look.name for look in found.values()] == list(NAMES)
    for first, second in itertools.combinations(found.values(), 2):
        assert (first.colours, first.dash, first.mark) != (second.colours, second.dash, second.mark)


def test_neighbours_differ_without_colour():
    found = list(looks(NAMES[:13]).values()) + list(looks(NAMES[13:19]).values())
    for first, second in itertools.pairwise(found):
        if first.group == second.group:
            assert first.mark != second.mark


def test_groups_look_different():
    found = looks(NAMES)
    widths = {kind: {look.width for look in found.values() if look.group == kind} for kind in ("plain", "mgs", "other")}
    assert min(widths["plain"]) > max(widths["mgs"]) > max(widths["other"])
    assert all(look.group == group(name) for name, look in found.items())
    assert all(look.dash == "" for look in found.values() if look.group == "plain")
    assert all(look.dash for look in found.values() if look.group == "other")
