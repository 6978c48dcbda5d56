"""The table against statistics computed here from the records."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import scipy.stats

from mgs_core._errors import ArgumentError
from mgs_core.report import table, write_report
from mgs_core.report.overview import full_row
from mgs_core.report.runs import group, read

SHARES = {"test % ± s.e.": "last_test_accuracy", "best % ± s.e.": "best_test_accuracy", "memor. % ± s.e.": "memorisation"}
METRICS = {
    "trace": "mgs_trace", "log det": "mgs_log_determinant", "simil. part": "mgs_similarity", "eff. rank": "mgs_effective_rank",
}  # fmt: skip
KEYS = ["regulariser", *SHARES, *METRICS, "time s", "runs"]


def number(text):
    """Return a written number and half a unit of its last digit."""
    mantissa, _, exponent = text.replace("−", "-").partition("e")
    scale = 10.0 ** int(exponent or 0)
    digits = len(mantissa.partition(".")[2])
    return float(mantissa) * scale, 0.5 * 10.0**-digits * scale


def run(name, seed, **figures):
    return {"event": "run", "regularizer": name, "seed": seed, **figures}


def epoch(name, seed, number_, **figures):
    return {"event": "epoch", "regularizer": name, "seed": seed, "epoch": number_, **figures}


def test_rows_hold_mean_and_standard_error(make_records):
    records = make_records()
    rows = table(records)
    assert len(rows) == 10
    for row in rows:
        assert list(row) == KEYS
        runs = [record for record in records if record["event"] == "run" and record["regularizer"] == row["regulariser"]]
        assert row["runs"] == "3"
        for key, field in SHARES.items():
            values = 100 * np.array([record[field] for record in runs])
            for text, expected in zip(row[key].split("±"), (values.mean(), scipy.stats.sem(values)), strict=True):
                found, tolerance = number(text)
                assert found == pytest.approx(expected, abs=1.001 * tolerance)
        for key, field in METRICS.items():
            found, tolerance = number(row[key])
            assert found == pytest.approx(np.mean([record[field] for record in runs]), abs=1.001 * tolerance)
        assert float(row["time s"]) == 5.0


def test_full_rows_hold_all_standard_errors(make_records):
    records = make_records(4)
    titles = {"trace": "mgs_trace", "log-determinant": "mgs_log_determinant", "effective rank": "mgs_effective_rank"}
    row = full_row(read(records), "none")
    runs = [record for record in records if record["event"] == "run" and record["regularizer"] == row["regulariser"]]
    for title, field in titles.items():
        values = [record[field] for record in runs]
        for text, expected in zip(row[title].split(" ± "), (np.mean(values), scipy.stats.sem(values)), strict=True):
            found, tolerance = number(text)
            assert found == pytest.approx(expected, abs=1.001 * tolerance)


def test_the_table_fits_eighty_columns(make_records):
    rows = table(make_records())
    widths = [max(len(word) for word in (*key.split(), *(row[key] for row in rows))) for key in KEYS]
    assert sum(widths) + len(widths) - 1 <= 80


def test_highest_last_test_accuracy_comes_first():
    rows = table([run("a", 0, last_test_accuracy=0.5), run("b", 0), run("c", 0, last_test_accuracy=0.7)])
    assert [row["regulariser"] for row in rows] == ["c", "a", "b"]


def test_one_seed_has_no_error():
    row = table([run("none", 0, last_test_accuracy=0.5, memorisation=None, mgs_trace=math.nan, seconds=math.inf)])[0]
    assert row["test % ± s.e."] == "50.0"
    assert row["memor. % ± s.e."] == row["trace"] == row["time s"] == row["log det"] == "–"


def test_unfinished_runs_do_not_count_beside_finished_ones():
    records = [run("a", 0, last_test_accuracy=0.5), epoch("a", 0, 1, test_accuracy=0.6), epoch("a", 1, 1, test_accuracy=0.9)]
    row = table(records)[0]
    assert row["test % ± s.e."] == "50.0"
    assert row["best % ± s.e."] == "60.0"  # filled up from the epochs of the same run
    assert row["runs"] == "1 of 2"


def test_a_regulariser_without_finished_runs_shows_its_last_epochs():
    records = [epoch("a", 0, at, test_accuracy=value, memorisation=0.1 * at) for at, value in ((1, 0.9), (3, 0.5), (2, 0.7))]
    row = table(records)[0]
    assert row["test % ± s.e."] == "50.0"
    assert row["best % ± s.e."] == "90.0"
    assert row["memor. % ± s.e."] == "30.0"
    assert row["runs"] == "1 unfinished"


def test_failed_runs_do_not_count_and_are_named():
    failed = {"event": "failed", "of": "run", "regularizer": "b", "error": "why"}
    records = [run("a", 0, last_test_accuracy=0.5), epoch("b", 0, 1, test_accuracy=0.9), run("c", 0, last_test_accuracy=0.4)]
    records += [{**failed, "seed": 0}, {**failed, "seed": 1}, {**failed, "regularizer": "c", "seed": 1}]
    rows = {row["regulariser"]: row for row in table(records)}
    assert {name: row["runs"] for name, row in rows.items()} == {"a": "1", "b": "2 failed", "c": "1 of 2"}
    assert rows["b"]["test % ± s.e."] == "–"


def test_a_run_that_failed_and_was_tried_again_counts():
    failed = {"event": "failed", "of": "run", "regularizer": "a", "error": "why", "seed": 0}
    for records in ([failed, run("a", 0, last_test_accuracy=0.5)], [run("a", 0, last_test_accuracy=0.5), failed]):
        (row,) = table(records)
        assert (row["runs"], row["test % ± s.e."]) == ("1", "50.0")


def test_missing_figures_come_from_the_epoch_whose_weights_were_kept():
    records = [epoch("a", 0, at, mgs_magnitude=float(at), mgs_trace=10.0 * at) for at in (1, 2, 3)] + [
        run("a", 0, epochs=2, mgs_trace=5.0)
    ]
    final = read(records).runs[0].final
    assert final["mgs_magnitude"] == 2.0
    assert final["mgs_trace"] == 5.0


def test_order_of_the_records_does_not_matter(make_records):
    records = make_records(4, 2, 5)
    assert table(records[::-1]) == table(records)


def test_names_and_seeds_may_be_missing():
    rows = table([{"event": "run", "last_test_accuracy": 0.5}, {"event": "epoch", "regularizer": None, "test_accuracy": 0.6}])
    assert [(row["regulariser"], row["runs"]) for row in rows] == [("unnamed", "1")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", "plain"), ("mgs-trace", "mgs"), ("mixup+mgs-agreement", "mgs"), ("MGS trace", "mgs"), ("omgs", "other"),
        ("mgsx", "other"), ("dropout", "other"), ("", "other"),
    ],
)  # fmt: skip
def test_groups(name, expected):
    assert group(name) == expected


@pytest.mark.parametrize("records", [[], [{"event": "start"}], [{}]])
def test_no_records(records, tmp_path):
    with pytest.raises(ArgumentError, match=re.escape("`records` must hold at least one record of an epoch or a run; got none.")):
        table(records)
    with pytest.raises(ArgumentError, match="at least one record"):
        write_report(records, {}, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.wrong_types
@pytest.mark.parametrize(("records", "got"), [({}, "dict"), ("text", "str"), (None, "NoneType"), (iter(()), "iterator")])
@pytest.mark.wrong_types
def test_records_of_another_type(records, got):
    with pytest.raises(ArgumentError, match=f"`records` must be a list of dicts; got .*{got}"):
        table(records)


@pytest.mark.wrong_types
def test_a_record_of_another_type():
    with pytest.raises(ArgumentError, match="`records` must be a list of dicts; got one of type int"):
        table([run("none", 0), 3])
