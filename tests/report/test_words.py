"""The sentences, against records for which they can be foretold."""

from __future__ import annotations

import pytest

from mgs_core.report.dots import correlations
from mgs_core.report.runs import read
from mgs_core.report.words import findings, verdict


def run(name, seed, test=None, wrong=None, **figures):
    return {
        "event": "run", "regularizer": name, "seed": seed, "last_test_accuracy": test, "memorisation": wrong, **figures,
    }  # fmt: skip


def said(records):
    comparison = read(records)
    return [
        sentence.replace("\u00a0", " ") for sentence in (verdict(comparison), *findings(comparison, correlations(comparison)))
    ]


def test_who_memorises_most_and_least():
    records = [run("none", 0, 0.6, 0.8), run("none", 1, 0.7, 0.9), run("mgs-trace", 0, 0.9, 0.1), run("mgs-trace", 1, 0.9, 0.2)]
    head, *rest = said(records)
    assert head == "Without a regulariser, the network memorises 85.0 % of the wrong labels; with mgs-trace, 15.0 %."
    assert "Test accuracy ends highest with mgs-trace, at 90.0 ± 0.0 % (mean ± standard error over seeds)." in rest
    assert "Without a regulariser it ends at 65.0 ± 5.0 %." in rest


def test_the_plain_run_stands_for_those_that_memorise_as_much():
    records = [
        run(name, seed, 0.6, wrong + 0.1 * seed) for name, wrong in (("none", 0.8), ("b", 0.81), ("c", 0.2)) for seed in (0, 1)
    ]
    assert said(records)[0] == "Without a regulariser, the network memorises 85.0 % of the wrong labels; with c, 25.0 %."
    records[0]["memorisation"] = records[1]["memorisation"] = 0.6
    assert said(records)[0].startswith("With b, the network memorises 86.0 %")


def test_figures_within_the_error_are_not_told_apart():
    records = [run("a", 0, 0.5, 0.4), run("a", 1, 0.7, 0.6), run("b", 0, 0.51, 0.41), run("b", 1, 0.71, 0.61)]
    head, *rest = said(records)
    assert head == "The regularisers memorise alike: 50.0 % to 51.0 % of the wrong labels, within one standard error."
    assert (
        rest[0] == "Test accuracy ends highest with b, at 61.0 ± 10.0 % (mean ± standard error over seeds), not clearly above a."
    )


@pytest.mark.parametrize(("shift", "alike"), [(0.13, True), (0.15, False)])
def test_one_standard_error_of_the_difference_parts_them(shift, alike):
    records = [run(name, seed, None, wrong + 0.2 * seed) for name, wrong in (("a", 0.1), ("b", 0.1 + shift)) for seed in (0, 1)]
    assert ("alike" in said(records)[0]) is alike  # the errors are 0.1 each, that of the difference 0.141


def test_without_wrong_labels_test_accuracy_is_told():
    assert said([run("none", 0, 0.9), run("mixup", 0, 0.95)])[0] == (
        "With mixup, test accuracy ends highest, at 95.0 %; without a regulariser lowest, at 90.0 %."
    )
    assert said([run("a", 0, 0.9), run("b", 0, 0.9)])[0] == (
        "The regularisers end alike: 90.0 % test accuracy, within one standard error."
    )


def test_the_headline_names_no_highest_that_is_level_with_another():
    records = [run(name, seed, test + 0.1 * seed) for name, test in (("a", 0.7), ("b", 0.71), ("none", 0.3)) for seed in (0, 1)]
    head, first, *_ = said(records)
    assert head == "Test accuracy ends between 35.0 % without a regulariser and 76.0 % with b."
    assert first.endswith("not clearly above a.")


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (run("none", 0, 0.9, 0.3), "Without a regulariser, the network memorises 30.0 % of the wrong labels."),
        (run("mgs-trace", 0, 0.9), "With mgs-trace, the network reaches 90.0 % test accuracy."),
        (run("none", 0), "The records hold neither test accuracy nor memorisation."),
    ],
)
def test_one_regulariser(record, sentence):
    assert said([record])[0] == sentence


def test_the_fall_from_the_best_epoch():
    assert "Without a regulariser test accuracy ends at 60.0 %, 20.0 points below its own best epoch." in said(
        [run("none", 0, 0.6, 0.5, best_test_accuracy=0.8)]
    )
    runs = [run("none", 0, 0.8, 0.5, best_test_accuracy=0.8), run("a", 0, 0.9, 0.5)]
    assert "Without a regulariser it ends at 80.0 %, its best epoch." in said(runs)


def test_one_regulariser_ends_highest_of_none():
    assert said([run("a", 0, 0.5, 0.1), run("a", 1, 0.7, 0.1)])[1] == (
        "Test accuracy ends at 60.0 ± 10.0 % (mean ± standard error over seeds)."
    )
    assert said([run("none", 0, 0.5, 0.1), run("none", 1, 0.7, 0.1)])[1] == (
        "Without a regulariser test accuracy ends at 60.0 ± 10.0 % (mean ± standard error over seeds)."
    )


def test_the_metric_with_the_largest_rank_correlation():
    values = [(0.1, 9.0, 3.0), (0.2, 8.0, 1.0), (0.3, 7.0, 4.0), (0.4, 6.0, 5.0), (0.5, 5.0, 2.0)]  # ρ: −1 and 0.2
    records = [run("a", seed, 1 - w, w, mgs_trace=t, mgs_effective_rank=r) for seed, (w, t, r) in enumerate(values)]
    rest = said(records)
    assert rest[-2] == (
        "Over 5 finished runs, the trace tells best which run memorises: rank correlation −1.00; "
        "the effective rank tells least: +0.20."
    )
    assert rest[-1] == "The order of the last test accuracy is met most closely by the trace: +1.00."


@pytest.mark.parametrize(("names", "what"), [("aaa", "3 runs"), ("aaaabbbb", "2 regularisers"), ("abcd", "4 regularisers")])
def test_an_order_that_chance_can_bring_about_is_not_said_to_tell(names, what):
    """Of three runs the least |ρ| but 0 is a half; runs under one regulariser are no independent cases."""
    records = [run(name, at, 0.9 - at / 10, at / 10, mgs_trace=2.0 + at) for at, name in enumerate(names)]
    chance = f", as chance alone can bring about with {what}."
    assert [sentence for sentence in said(records) if "trace" in sentence] == [
        f"Over {len(names)} finished runs, the trace comes closest to the order of memorisation: rank correlation +1.00{chance}",
        f"The order of the last test accuracy is met most closely by the trace: −1.00{chance}",
    ]


def test_no_metric_ranks_well():
    records = [
        run("a", seed, 0.5, w, mgs_similarity=s) for seed, (w, s) in enumerate([(0.1, 3.0), (0.2, 1.0), (0.3, 4.0), (0.4, 2.0)])
    ]
    assert (
        "Over 4 finished runs, no metric ranks memorisation well; the similarity part comes closest: rank correlation +0.00."
        in said(records)
    )


def test_one_seed_is_said():
    sentence = "Each regulariser was run from one seed only: differences may be chance."
    assert sentence in said([run("a", 0, 0.5, 0.1), run("b", 0, 0.6, 0.2)])
    some = said([run("a", 0, 0.5, 0.1), run("a", 1, 0.6, 0.2), run("b", 0, 0.6, 0.2)])
    assert sentence not in some
    assert "Of one run only, without an error: b." in some
    assert sentence not in said([run("a", 0, 0.5, 0.1)])


def test_unfinished_runs_are_said():
    records = [run("a", 0, 0.5, 0.1), {"event": "epoch", "regularizer": "b", "seed": 0, "epoch": 1, "test_accuracy": 0.4}]
    assert (
        said(records)[-1] == "1 run is not finished (b). b: no run is finished, the figures are those of the last epoch so far."
    )


def test_names_stay_as_they_are():
    assert said([run("MixUp-CNN", 0, 0.9, 0.3)])[0].startswith("With MixUp-CNN, the network memorises")


def test_failed_runs_are_said_and_left_out():
    failed = [{"event": "failed", "of": "run", "regularizer": "b", "seed": seed, "error": f"Reason {seed}."} for seed in (0, 2)]
    records = [run("a", 0, 0.5, 0.1), {"event": "epoch", "regularizer": "b", "seed": 0, "epoch": 1, "test_accuracy": 0.9}]
    rest = said([*records, *failed, {**failed[0], "of": "tuning", "seed": 1_000_000}])
    assert rest[-1] == "2 runs with b failed (seeds 0 and 2) and are left out: Reason 0."
    assert not any("not finished" in sentence for sentence in rest)
    assert rest[1] == "Test accuracy ends at 50.0 %."  # of a; b has none
