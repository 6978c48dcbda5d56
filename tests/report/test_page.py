"""The page: its numbers against the records, its safety, and that it needs nothing beside it."""

from __future__ import annotations

import itertools
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import scipy.stats
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from mgs_core._errors import ArgumentError
from mgs_core.report import write_report
from mgs_core.report.files import write_files
from mgs_core.report.metrics import KERNEL_METRICS, SECTIONS

VOID = {"meta", "link", "input", "br", "hr", "img"}
CURVES = [metric for _, _, metrics in SECTIONS for metric in metrics]
HOSTILE = """</script><script>alert(1)</script><b onmouseover='x'>&"{{ 7 * 7 }}{% raw %}$x_1$"""


class Page(HTMLParser):
    """Collect what a page refers to and the tables of its figures, and see that its tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.figure = ""
        self.cell: list[str] | None = None
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "figure":
            self.figure = dict(attrs)["id"]
        elif tag == "table":
            self.table = self.tables.setdefault(self.figure or "results", [])
        elif tag == "tr":
            self.table.append([])
        elif tag in {"th", "td"}:
            self.cell = []

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "figure":
            self.figure = ""
        elif tag in {"th", "td"}:
            self.table[-1].append("".join(self.cell).strip())
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell.append(data)
        if "script" not in self.open and "style" not in self.open:
            self.words.append(data)


def write(records, settings, folder):
    text = write_report(records, settings, folder).read_text(encoding="utf-8")
    return text, Page(text)


def parsed(text):
    """Return the numbers of a cell with half a unit of the last digit of each."""
    found = []
    for mantissa, digits, exponent in re.findall(r"([+-]?\d+(?:\.(\d+))?)(?:e(-?\d+))?", text.replace("−", "-")):
        scale = 10.0 ** int(exponent or 0)
        found.append((float(mantissa) * scale, 0.5001 * scale * 10.0 ** -len(digits)))
    return found


def assert_written(text, expected):
    numbers = parsed(text)
    assert len(numbers) == len(expected), text
    for (number, tolerance), value in zip(numbers, expected, strict=True):
        assert number == pytest.approx(value, abs=tolerance + 5e-4 * abs(value))


@pytest.fixture(scope="module")
def example(make_records, tmp_path_factory):
    records = make_records(5, 3, 12)
    return records, *write(records, {"data": "digits", "noise": 0.4}, tmp_path_factory.mktemp("report"))


def test_every_chart_has_its_numbers_as_a_table(example):
    _, text, page = example
    drawings = re.findall(r'<figure class="card[^"]*" id="([^"]+)">(.*?)</figure>', text, re.DOTALL)
    assert len(drawings) == len(CURVES) + 1 + 1 + 8
    for identity, figure in drawings:
        assert figure.count('role="img"') == 1
        assert re.search(r'role="img" aria-label="[^"]{10,}"', figure)
        assert figure.index("<svg") < figure.index("<details>") < figure.index("<table>")
        assert len(page.tables[identity]) > 1
        assert len({len(row) for row in page.tables[identity]}) == 1


@pytest.mark.parametrize("metric", CURVES, ids=lambda metric: metric.field)
def test_curves_are_mean_lowest_and_highest(example, metric):
    records, _, page = example
    header, *rows = page.tables[metric.field.replace("_", "-")]
    assert [row[0] for row in rows] == [str(epoch) for epoch in range(1, 13)]
    factor = 100 if metric.share else 1
    for row in rows:
        for name, text in zip(header[1:], row[1:], strict=True):
            values = [
                factor * record[metric.field]
                for record in records
                if record["event"] == "epoch" and record["regularizer"] == name and record["epoch"] == int(row[0])
            ]
            assert len(values) == 3
            expected = (np.mean(values), min(values), max(values)) if min(values) < max(values) else (values[0],)
            assert_written(text, expected)


def finals(records):
    """Return the last figures of each run: those of its record, and of the epoch whose weights it kept."""
    found = []
    for run in (record for record in records if record["event"] == "run"):
        kept = next(
            record for record in records
            if record["event"] == "epoch"
            and (record["regularizer"], record["seed"], record["epoch"]) == (run["regularizer"], run["seed"], run["epochs"])
        )  # fmt: skip
        found.append({**kept, **run, "test_accuracy": run["last_test_accuracy"]})
    return found


def test_correlations_equal_those_of_scipy(example):
    records, _, page = example
    runs = finals(records)
    header, *rows = page.tables["correlations"]
    assert header == ["metric", "ρ, memorised", "runs", "ρ, test accuracy", "runs"]
    assert len(rows) == len(KERNEL_METRICS)
    for metric, row in zip(KERNEL_METRICS, rows, strict=True):
        assert (row[2], row[4]) == ("15", "15")
        for text, outcome in ((row[1], "memorisation"), (row[3], "test_accuracy")):
            expected = scipy.stats.spearmanr([run[metric.field] for run in runs], [run[outcome] for run in runs]).statistic
            assert parsed(text)[0][0] == pytest.approx(expected, abs=0.00501)


def test_scatter_lists_every_run(example):
    records, text, page = example
    runs = {(run["regularizer"], str(run["seed"])): run for run in finals(records)}
    header, *rows = page.tables["mgs-effective-rank-memorisation"]
    assert header == ["regulariser", "seed", "Effective rank", "wrong labels memorised, %"]
    assert {(row[0], row[1]) for row in rows} == set(runs)
    for row in rows:
        run = runs[row[0], row[1]]
        assert_written(row[2], [run["mgs_effective_rank"]])
        assert_written(row[3], [100 * run["memorisation"]])
    figure = text[text.index('id="mgs-effective-rank-memorisation"') :].partition("</figure>")[0]
    assert figure.count("data-text=") == 15


def test_glance_holds_the_means(example):
    records, _, page = example
    for name, wrong, right in page.tables["glance"][1:]:
        runs = [run for run in finals(records) if run["regularizer"] == name]
        assert_written(wrong, [100 * np.mean([run["memorisation"] for run in runs])])
        assert_written(right, [100 * np.mean([run["test_accuracy"] for run in runs])])


def test_curves_are_drawn_where_their_axis_says(example):
    """The places of the ticks of an axis say where a number lies; the line's points must agree with them."""
    records, text, _ = example
    figure = text[text.index('id="memorisation"') :].partition("</figure>")[0]
    ticks = [(float(y), float(n)) for y, n in re.findall(r'y="([\d.]+)" text-anchor="end">(\d+) %<', figure)]
    slope, offset = np.polyfit([n - 0 for _, n in ticks], [y - 4 for y, _ in ticks], 1)
    index = re.search(r'data-k="(\d+)"><input[^>]*>(?:(?!</label>).)*<span>none</span>', text, re.DOTALL).group(1)
    group = re.search(rf'<g class="k k{index} plain"(?:(?!</g>).)*<path class="curve" d="M([^"]+)"', figure, re.DOTALL).group(1)
    drawn = [float(point.split(",")[1]) for point in group.split("L")]
    expected = [
        np.mean(
            [
                100 * r["memorisation"]
                for r in records
                if r["event"] == "epoch" and r["regularizer"] == "none" and r["epoch"] == epoch
            ]
        )
        for epoch in range(1, 13)
    ]
    np.testing.assert_allclose(drawn, np.polyval([slope, offset], expected), atol=0.25)


def test_page_needs_nothing_beside_it(example):
    _, text, page = example
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "img", "image", "use", "base", "audio", "video", "source"}
        assert not {"src", "srcset", "action", "formaction", "poster", "ping", "xlink:href"} & set(attributes)
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(
        r"https?:|//[a-z]|@import|fetch\(|XMLHttpRequest|WebSocket|import\(|sendBeacon", text.replace("// The page", "")
    )
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)'\"]*)", text))


def test_identities_are_unique(example):
    _, _, page = example
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))


def test_page_is_the_same_each_time(example, tmp_path):
    records, text, _ = example
    again, _ = write(records[::-1], {"data": "digits", "noise": 0.4}, tmp_path)
    assert again == text


def test_names_and_settings_are_escaped(tmp_path):
    records = [
        {"event": event, "regularizer": HOSTILE, "seed": f"{HOSTILE}{seed}", "epoch": 1, "test_accuracy": 0.5, **figures}
        for seed in (1, 2, 3)
        for figures in [{"last_test_accuracy": 0.5, "memorisation": 0.1 * seed, "mgs_trace": 2.0}]
        for event in ("epoch", "run")
    ]
    text, page = write(records, {HOSTILE: HOSTILE, "data": HOSTILE}, tmp_path)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "b" not in {tag for tag, _ in page.tags}
    assert "alert(1)</script>" not in text
    assert page.tables["test-accuracy"][0] == ["epoch", HOSTILE]
    assert page.tables["mgs-trace-memorisation"][1][:2] == [HOSTILE, f"{HOSTILE}1"]
    assert HOSTILE in "".join(page.words)


def test_names_stay_within_their_card(make_records, settings, tmp_path):
    """Measured in the widest usual face: what a drawing leaves beside it, and the padding of the card, hold each name."""
    text, _ = write(make_records(25, 1, 3), settings, tmp_path)
    bold = FontProperties(family="DejaVu Sans", weight="bold")
    places = re.findall(r'<text class="name" x="([\d.]+)"[^>]*?(text-anchor="end")?>([^<]+)</text>', text)
    mgs = [(float(x), end, name) for x, end, name in places if name.startswith("mgs-")]
    assert any(len(name) == 20 for *_, name in mgs)
    for x, end, name in mgs:
        wide = TextPath((0, 0), name, size=13, prop=bold).get_extents().width
        assert (wide <= x + 12) if end else (x + wide <= 440 + 12), name


def test_a_long_name_leaves_room_for_the_numbers(make_records, settings, tmp_path):
    text, _ = write(make_records(2, 1, 3), settings, tmp_path)
    assert re.search(r"\.row \{[^}]* max-width: min\(24em, 45vw\); white-space: normal; overflow-wrap: anywhere;", text)
    rows = re.findall(r'<th scope="row">(.*?)</th>', text, re.DOTALL)
    assert rows
    assert all('<span class="row">' in row for row in rows)


def test_the_results_have_room_for_all_columns_on_a_wide_screen(example):
    _, text, _ = example
    assert "@media (min-width: 1400px) { .beside { grid-template-columns: minmax(0, 1fr) minmax(0, 2.5fr); } }" in text
    assert ".ranking th, .ranking td { padding-inline: 6px; }" in text


def test_headings_skip_no_level_and_every_table_has_a_caption(example):
    _, text, page = example
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise([0, *levels]))
    assert text.count("<caption") == text.count("<table")


def test_scatters_are_named_upright_against_across(example):
    _, text, _ = example
    assert "<h3>Wrong labels memorised against effective rank</h3>" in text


def test_of_few_epochs_the_axis_leaves_out_none(make_records, settings, tmp_path):
    text, _ = write(make_records(3, 1, 4), settings, tmp_path)
    assert "The axis leaves out" not in text


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 5), (1, 3, 1), (10, 1, 3), (25, 2, 3)])
def test_shapes(make_records, shape, settings, tmp_path):
    _, page = write(make_records(*shape), settings, tmp_path)
    assert len(page.tables["results"]) == 1 + shape[0]
    assert len(page.tables["test-accuracy"]) == 1 + shape[2]
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_long_runs_are_thinned_and_say_so(make_records, settings, tmp_path):
    text, page = write(make_records(1, 1, 250), settings, tmp_path)
    epochs = [int(row[0]) for row in page.tables["test-accuracy"][1:]]
    assert (len(epochs), epochs[0], epochs[-1]) == (100, 1, 250)
    assert "100 of 250 epochs are drawn and listed." in text


def test_missing_fields(make_records, settings, tmp_path):
    records = []
    for number, record in enumerate(make_records(3, 2, 4)):
        strange = dict.fromkeys(("memorisation", "mgs_trace"), (None, math.nan, -math.inf, "x", -1.0)[number % 5])
        records.append({key: value for key, value in {**record, **strange}.items() if key != "mgs_alignment"})
    text, page = write(records, settings, tmp_path)
    assert "mgs-alignment" not in page.tables
    assert not re.search(r"\b(nan|inf|None)\b", "".join(page.words))
    assert "test-accuracy" in page.tables
    assert "NaN" not in text


def test_no_figure_at_all(tmp_path):
    _, page = write(
        [{"event": "run", "regularizer": "none", "seed": 0}, {"event": "epoch", "regularizer": "none", "seed": 1}], {}, tmp_path
    )
    assert set(page.tables) == {"results"}
    assert page.tables["results"][1][1:] == ["–"] * 8 + ["1 of 2"]
    assert "The records hold neither test accuracy nor memorisation." in "".join(page.words)


def test_unfinished_runs_are_marked(make_records, settings, tmp_path):
    records = [
        record for record in make_records(3, 3, 6)
        if not (record["regularizer"] == "dropout" and record.get("epoch", 9) > 4)
        and not (record["regularizer"] == "none" and record["seed"] == 2 and record.get("epoch", 9) > 3)
    ]  # fmt: skip
    text, page = write(records, settings, tmp_path)
    runs = {row[0]: row[-1] for row in page.tables["results"][1:]}
    assert runs == {"none": "2 of 3", "dropout": "3 unfinished", "weight-decay": "3"}
    words = "".join(page.words)
    assert "4 runs are not finished (none and dropout)." in words
    assert "dropout …" in words
    figure = text[text.index('id="test-accuracy"') :].partition("</figure>")[0]
    assert figure.count('class="curve open-run"') == 1
    assert "Thin broken lines without a name" in figure
    column = page.tables["test-accuracy"][0].index("dropout")
    assert [row[column] == "–" for row in page.tables["test-accuracy"][1:]] == [False] * 4 + [True] * 2


def test_a_kept_epoch_is_marked(make_records, settings, tmp_path):
    text, _ = write(make_records(4, 2, 12), settings, tmp_path)  # the fourth is early stopping, which keeps the fifth epoch
    figure = text[text.index('id="test-accuracy"') :].partition("</figure>")[0]
    line = re.findall(r'<path class="curve" d="M([^"]+)"', figure[: figure.index('class="hollow"')])[-1]
    assert figure.count('class="hollow"') == 1
    mark = re.search(r'class="hollow" transform="translate\(([^)]+)\)', figure).group(1)
    assert [float(place) for place in mark.split(",")] == [float(place) for place in line.split("L")[4].split(",")]


@pytest.mark.wrong_types
def test_settings_that_are_no_dict(make_records, tmp_path):
    with pytest.raises(ArgumentError, match="`settings` must be a dict; got list"):
        write_report(make_records(1, 1, 1), [], tmp_path)


def test_an_unwritable_folder(make_records, settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match=r"`folder` must be a folder that can be written; got .*file.*Choose another"):
        write_report(make_records(1, 1, 1), settings, tmp_path / "file")


def test_older_files_are_replaced_in_one_step(make_records, settings, tmp_path, monkeypatch):
    path = write_report(make_records(1, 1, 1), settings, tmp_path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("full")

    monkeypatch.setattr("mgs_core.report.files.Path.replace", fail)
    with pytest.raises(ArgumentError, match="full"):
        write_report(make_records(2, 1, 1), settings, tmp_path)
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["figure.png", "report.html"]


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002])
def test_files_have_the_rights_that_the_umask_leaves(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_files(tmp_path, {"file": b"text"})
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


def test_failed_runs_and_the_versions_are_on_the_page(make_records, settings, tmp_path):
    made = {"versions": {"mgs_core": "9.8.7", "numpy": "2.0"}}
    failed = {"event": "failed", "of": "run", "regularizer": "<mine>", "seed": 3, "error": "`x` must be < 1; got 2.", **made}
    text = write_report([*make_records(2, 1, 3), failed], settings, tmp_path).read_text(encoding="utf-8")
    assert "1 run with &lt;mine&gt; failed (seed 3) and is left out: `x` must be &lt; 1; got 2." in text
    assert "mgs_core 9.8.7, numpy 2.0" in text
    only = write_report([failed], settings, tmp_path).read_text(encoding="utf-8")
    assert "<h1>Every run failed.</h1>" in only


def test_records_and_settings_are_left_alone(make_records, settings, tmp_path):
    records = make_records(2, 1, 3)
    copies, before = [dict(record) for record in records], dict(settings)
    write_report(records, settings, tmp_path)
    assert (records, settings) == (copies, before)
