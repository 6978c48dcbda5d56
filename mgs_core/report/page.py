"""The page: everything in one file that opens from the file system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from mgs_core._errors import ArgumentError
from mgs_core.report.charts import curve_chart
from mgs_core.report.dots import correlation_rows, correlations, glance, scatter
from mgs_core.report.files import write_files
from mgs_core.report.looks import BACKGROUND, looks
from mgs_core.report.metrics import KERNEL_METRICS, OUTCOMES, SCATTERED, SECTIONS
from mgs_core.report.overview import full_row, ranked
from mgs_core.report.picture import picture
from mgs_core.report.runs import read
from mgs_core.report.stopping import stopping, stopping_table
from mgs_core.report.words import findings, verdict


def write_report(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], folder: str | Path) -> Path:
    """Write `report.html`, which needs nothing beside it, and `figure.png`.

    Both are made before either is written, and each replaces its older self in one step.

    Args:
        records: the dicts of `records.jsonl`; any field may be missing or None, and runs may be unfinished.
        settings: the dict of `settings.json`, shown as it is.
        folder: where the files go; made if need be.

    Returns:
        The path of the page.

    Raises:
        ArgumentError: when there is no record of an epoch or a run, or the folder cannot be written.

    Example:
        >>> import tempfile
        >>> from mgs_core.report import write_report
        >>> records = [{"event": "run", "regularizer": "none", "seed": 0, "last_test_accuracy": 0.9}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_report(records, {"data": "digits"}, folder).name
        'report.html'
    """
    if not isinstance(settings, Mapping):
        raise ArgumentError(f"`settings` must be a dict; got {type(settings).__name__}. Read settings.json.")
    page = comparison_page(records, settings).encode("utf-8")
    drawn = picture(read(records), _facts(settings))
    return write_files(folder, {"figure.png": drawn, "report.html": page}) / "report.html"


def comparison_page(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """Return the page of a comparison as HTML."""
    comparison = read(records)
    found = looks(comparison.regularizers)
    order = ranked(comparison)
    correlated = correlations(comparison)
    sections = [
        (identity, title, [chart for metric in metrics if (chart := curve_chart(comparison, metric, found))])
        for identity, title, metrics in SECTIONS
    ]
    scatters = [drawn for metric in SCATTERED for outcome in OUTCOMES if (drawn := scatter(comparison, metric, outcome, found))]
    return render(
        "comparison.html",
        title=verdict(comparison),
        findings=findings(comparison, correlated),
        facts=_facts(settings),
        looks=list(found.values()),
        table=[(found[name], full_row(comparison, name)) for name in order],
        glance=glance(comparison, order, found),
        sections=[section for section in sections if section[2]],
        correlations=correlation_rows(correlated),
        scatters=scatters,
        stopping=stopping_table(stopping(comparison), comparison),
        metrics=[*OUTCOMES, *KERNEL_METRICS],
        settings=settings,
        versions=_versions(records),
    )


def render(template: str, **values: Any) -> str:
    """Return a page of any type in the common style; every value is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mgs_core.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(background=BACKGROUND, **values)


def _versions(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the packages, each with its version, that the records say they were made with."""
    said = [record["versions"] for record in records if isinstance(record.get("versions"), Mapping)]
    return sorted({f"{name} {version}" for found in said for name, version in found.items()})


def _facts(settings: Mapping[str, Any]) -> list[str]:
    """Return the settings that a reader needs first."""
    facts = []
    if settings.get("data") is not None:
        facts.append(f"data {settings['data']}")
    noise = settings.get("noise")
    if isinstance(noise, (int, float)):
        kind = f", {settings['noise_kind']}" if settings.get("noise_kind") and noise else ""
        facts.append(f"{100 * noise:.4g} % of the training labels redrawn{kind}" if noise else "no label redrawn")
    for name, text in (("model", "{}"), ("seeds", "{} seeds"), ("epochs", "{} epochs"), ("backend", "{} backend")):
        if settings.get(name) is not None:
            facts.append(text.format(settings[name]))
    return [fact.removesuffix("s") if fact in ("1 seeds", "1 epochs") else fact for fact in facts]
