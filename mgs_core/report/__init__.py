"""The report of a comparison: its table, its picture and its self-contained page."""

import importlib

from mgs_core._errors import extra

with extra("app", "The report"):
    for _package in ("jinja2", "matplotlib"):
        importlib.import_module(_package)

from mgs_core.report.gallery import headline as headline
from mgs_core.report.gallery import write_audit as write_audit
from mgs_core.report.overview import table as table
from mgs_core.report.page import write_report as write_report
