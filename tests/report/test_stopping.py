"""Early stopping without validation data: the chosen epochs, by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from mgs_core.report import write_report
from mgs_core.report.runs import read
from mgs_core.report.stopping import stopping, stopping_table

TEST = [0.5, 0.8, 0.7, 0.6, 0.65, 0.55, 0.5, 0.45]
CURVES = {
    "mgs_trace": [3.0, 1.0, 1.0, 2.0, 4.0, 5.0, 6.0, 7.0],  # least at 2, the first of equals
    "mgs_alignment": [0.1, 0.2, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1],  # greatest at 3
    "gradient_disparity": [1.0, 2.0, 1.0, 2.0, 3.0, 2.0, 4.0, 5.0],  # rises at 2, 4, 5, 7, 8: stops at 7
    "mgs_other_class_cosine": [0.0] * 8,  # no direction is good
}


def run(name="none", seed=0, shift=0.0, **more):
    records = [
        {"event": "epoch", "regularizer": name, "seed": seed, "epoch": number + 1, "test_accuracy": test + shift, **more}
        | {field: values[number] for field, values in CURVES.items()}
        for number, test in enumerate(TEST)
    ]
    return [*records, {"event": "run", "regularizer": name, "seed": seed, "last_test_accuracy": TEST[-1] + shift}]


def test_each_rule_stops_where_it_says():
    found = {each.rule: each for each in stopping(read([*run(), *run(seed=1, shift=0.1)]))}
    assert {rule: each.accuracies for rule, each in found.items()} == {
        "Trace, least": pytest.approx((0.8, 0.9)),
        "Alignment with the labels, greatest": pytest.approx((0.7, 0.8)),
        "Gradient disparity, before its fifth rise": pytest.approx((0.5, 0.6)),
        "Last epoch": pytest.approx((0.45, 0.55)),
    }
    assert [each.lost for each in found.values()] == pytest.approx([0.0, 0.1, 0.3, 0.35])
    assert found["Trace, least"].rank is None  # two runs have no rank correlation


def test_chosen_epochs_are_correlated_with_the_best():
    records = run()
    for seed, best in ((1, 5), (2, 8), (3, 3)):
        for record in run(seed=seed):
            if record["event"] == "epoch":
                record["test_accuracy"] = 0.9 if record["epoch"] == best else 0.1
                record["mgs_trace"] = float(abs(record["epoch"] - (9 - best)))
            records.append(record)
    trace = next(each for each in stopping(read(records)) if each.rule == "Trace, least")
    assert trace.rank == pytest.approx(-0.4)  # chosen 2, 4, 1, 6 where best are 2, 5, 8, 3


def test_runs_that_kept_an_epoch_themselves_stand_apart(tmp_path):
    records = [*run(), *run("early-stopping", validation_accuracy=0.5)]
    comparison = read(records)
    table = stopping_table(stopping(comparison), comparison)
    assert [len(each.accuracies) for each in stopping(comparison)] == [1, 1, 1, 1]
    assert table.rows[-1] == ("Other runs, stopped by noisy validation data", "45.0", "–", "–")
    assert "Trace, least" in write_report(records, {}, tmp_path).read_text(encoding="utf-8")


def test_the_loss_has_the_error_of_its_differences():
    comparison = read([*run(), *run(seed=1, shift=0.1)])
    rows = {row[0]: row for row in stopping_table(stopping(comparison), comparison).rows}
    assert rows["Last epoch"] == ("Last epoch", "50.0 ± 5.0", "35.0 ± 0.0", "–")  # both runs lose 35 points, whatever their level


def test_without_curves_there_is_no_table():
    short = read([record for record in run() if record["event"] == "run" or record["epoch"] < 3])
    assert stopping(short) == []
    assert stopping_table([], short) is None
