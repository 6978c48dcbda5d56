"""What is found out about structures: kept for the last used ones, and verified."""

from __future__ import annotations

import pytest

import mgs_core as mgs
from mgs_core._known import KEPT, KEPT_FINDINGS, Known, KnownByOwner, Recent


def asked(known, finds, key="structure"):
    """Ask as often as there are findings to give; return which of them were asked for, and what came."""
    used, came = [], []
    for number, found in enumerate(finds):

        def find(number=number, found=found):
            used.append(number)
            if isinstance(found, Exception):
                raise found
            return found

        try:
            came.append(known.of(key, find))
        except mgs.SamplesInteractError:
            came.append("refused")
    return used, came


def test_a_finding_is_verified_at_the_powers_of_two():
    used, came = asked(Known(), [("a", True)] * 20)
    assert used == [0, 1, 3, 7, 15]
    assert came == ["a"] * 20


def test_a_finding_that_has_changed_is_verified_at_each_use():
    assert asked(Known(), [("a", True), ("b", True), ("a", True), ("b", True)]) == ([0, 1, 2, 3], list("abab"))


def test_a_refusal_is_not_kept_and_the_structure_is_looked_at_each_time():
    mixes = mgs.SamplesInteractError("they do")
    assert asked(Known(), [mixes, ("a", True), ("a", True), mixes]) == ([0, 1, 2, 3], ["refused", "a", "a", "refused"])
    assert asked(Known(), [("a", True), mixes, ("a", True), mixes]) == ([0, 1, 2, 3], ["a", "refused", "a", "refused"])


def test_what_may_not_hold_for_other_values_is_not_kept():
    known = Known()
    assert asked(known, [("a", False), ("b", False), ("c", True), ("c", True), ("d", True)])[0] == [0, 1, 2, 3]
    assert asked(known, [("d", False)] * 4, key="another")[0] == [0, 1, 2, 3]


def test_the_last_used_structures_are_kept():
    known = Known()
    for length in range(3 * KEPT_FINDINGS):
        known.of(length, lambda: ("a", True))
        known.of("often", lambda: ("a", True))
    assert len(known) == KEPT_FINDINGS
    assert known.kept("often") == "a"
    assert known.kept(3 * KEPT_FINDINGS - 1) == "a"
    assert known.kept(0) is None
    recent = Recent()
    for key in range(2 * KEPT):
        recent.put(key, key)
    assert (len(recent), recent.take(0), recent.take(KEPT)) == (KEPT, None, KEPT)


def test_methods_of_one_object_are_known_apart_and_as_long_as_it_lives():
    class Owner:
        def one(self):
            pass

        def two(self):
            pass

    known, owner = KnownByOwner(), Owner()
    assert known.of(owner.one) is known.of(owner.one)
    assert known.of(owner.one) is not known.of(owner.two)
    assert known.of(Owner().one) is not known.of(owner.one)
    assert known.of(object()) is not known.of(object())  # which take no weak reference
    assert len(known._known) == 1
    del owner
    assert len(known._known) == 0


def test_errors_of_arguments_pass():
    with pytest.raises(mgs.ArgumentError, match="bad"):
        asked(Known(), [mgs.ArgumentError("bad")])
