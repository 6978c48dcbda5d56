"""What the command `mgs` shows in a terminal: tables, progress, and text that any terminal can show."""

from __future__ import annotations

import codecs
import io
import sys
import warnings
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

console = Console(width=None if sys.stdout is not None and sys.stdout.isatty() else 120)


def plainly() -> None:
    """Let warnings be one line, and what a terminal lacks be replaced."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("mgs", _plainer)
        sys.stdout.reconfigure(errors="mgs")  # what was trained must not be lost for a character that a terminal lacks


def _plainer(error: UnicodeError) -> tuple[str, int]:
    """Return what stands for a character that the terminal cannot show: a number keeps its sign."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "-" if error.object[error.start] == "−" else "?", error.start + 1


def table(*columns: str, **options: Any) -> Table:
    """Return a table that goes on in the next line where a terminal is narrow: of a number that is cut nobody knows the rest."""
    return Table(*(Column(name, overflow="fold") for name in columns), box=box.SIMPLE_HEAD, **options)


class Display:
    """Show one bar for each regulariser while runs go on; where there is no terminal, a line for each finished run."""

    def __init__(self, names: list[str], epochs: int) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {name: self._bars.add_task(name, total=epochs, start=False, state="") for name in names}

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        if console.is_terminal:
            self._bars.start()
        return self._take

    def __exit__(self, *ending: object) -> None:
        self._bars.stop()

    def _take(self, record: dict[str, Any]) -> None:
        name = record["regularizer"]
        if record["event"] == "failed":
            what = f"strength {record['strength']:g}" if record["of"] == "tuning" else f"seed {record['seed']}"
            console.print(f"[red]{name}, {what}: failed.[/] {escape(record['error'])}", soft_wrap=True)
            return
        if record["event"] == "tuning":
            tried = f"strength {record['strength']:g}: {record['validation_accuracy']:.1%} of the noisy validation labels"
            if console.is_terminal:
                self._bars.update(self._tasks[name], state=tried)
            else:
                console.print(f"{name}, {tried}, {record['seconds']:.1f} s")
            return
        if record["event"] == "run":
            if not console.is_terminal:
                console.print(
                    f"{name}, seed {record['seed']}: test {record['last_test_accuracy']:.1%}, {record['seconds']:.1f} s"
                )
            return
        self._bars.start_task(self._tasks[name])
        state = f"test {record['test_accuracy']:6.1%}  trace {record['mgs_trace']:.3g}"
        if record["memorisation"] is not None:
            state = f"memorised {record['memorisation']:6.1%}  {state}"
        self._bars.update(self._tasks[name], advance=1, state=state)
