"""What calset prints: tables, JSON lines, progress. The command line's only printer.

Why apart: traces are untrusted text, so every string that reaches a terminal passes ``clean`` here; and a program
reading calset must never meet a table or a progress bar, so the choice between the two is made here once.
It must not know what the numbers mean.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from calset.io.jsonable import jsonable
from calset.io.progress import OnProgress, Progress

# C0 and C1 control characters but tab and newline, the line and paragraph separators, and the bidirectional marks and
# overrides that can reorder a line.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
PLAIN_SECONDS = 5.0  # how often plain progress prints a line


def clean(text: Any) -> str:
    """``text`` without control sequences; lone surrogates are replaced."""
    plain = str(text).replace("\r\n", "\n")
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", plain).encode("utf-8", "replace").decode("utf-8")


def emit_json(value: Any) -> None:
    """One JSON document on one line of standard output."""
    sys.stdout.write(json_line(value))


def json_line(value: Any) -> str:
    """One JSON document as a line, harmless to a terminal."""
    text = json.dumps(jsonable(value), ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")
    # As escapes they mean the same to a JSON parser and nothing to a terminal.
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def say(text: str = "") -> None:
    """A line of standard output."""
    sys.stdout.write(clean(text) + "\n")


def note(text: str) -> None:
    """A line of standard error: warnings and remarks that are not the result."""
    sys.stderr.write(clean(text) + "\n")


def cell(value: Any) -> str:
    """A table cell: numbers short, missing values as a dash, text on one line."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, list | tuple | dict):
        return clean(json.dumps(jsonable(value), ensure_ascii=False)).replace("\n", " ")
    return clean(value).replace("\n", "\\n").replace("\t", " ")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None) -> None:
    """A table on a terminal; tab-separated lines with a header elsewhere."""
    if not sys.stdout.isatty():
        if title:
            say(f"# {title}")
        say("\t".join(map(cell, columns)))
        for row in rows:
            sys.stdout.write("\t".join(cell(v) for v in row) + "\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    view = Table(title=Text(clean(title)) if title else None, title_justify="left", header_style="bold")
    listed = [list(row) for row in rows]
    for i, column in enumerate(columns):
        numeric = bool(listed) and all(
            r[i] is None or (isinstance(r[i], int | float) and not isinstance(r[i], bool)) for r in listed
        )
        # Text, not str: rich would read "[a-z]" as markup.
        view.add_column(Text(cell(column)), justify="right" if numeric else "left", overflow="fold")
    for row in listed:
        view.add_row(*(Text(_shorten(cell(v))) for v in row))
    Console().print(view)


def heatmap(title: str, columns: Sequence[str], rows: Iterable[tuple[str, Sequence[tuple[str, float]]]]) -> None:
    """A table whose cells (text, shade from 0 to 1) are shaded; for a terminal, which must be asked about before."""
    from rich.console import Console
    from rich.style import Style
    from rich.table import Table
    from rich.text import Text

    view = Table(title=Text(clean(title)), title_justify="left", header_style="bold", padding=(0, 1))
    for i, column in enumerate(columns):
        view.add_column(Text(cell(column)), justify="right" if i else "left")
    for label, cells in rows:
        shaded = [Text(f" {cell(text)} ", Style.parse(_shade(shade)) if shade else "") for text, shade in cells]
        view.add_row(Text(cell(label)), *shaded)
    Console().print(view)


def _shade(shade: float) -> str:
    """From a pale to a deep blue, with ink that stays readable on it."""
    red, green, blue = (round(a + (b - a) * shade) for a, b in zip((222, 235, 247), (8, 48, 107), strict=True))
    return f"{'#ffffff' if shade > 0.55 else '#10243e'} on #{red:02x}{green:02x}{blue:02x}"


def _shorten(text: str, width: int = 300) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


class ProgressView:
    """Progress on standard error: a bar on a terminal, a line now and then elsewhere, JSON lines or silence if asked.

    Args:
        main: the phase that the label says enough of: only JSON lines name it.
    """

    def __init__(self, mode: str, label: str, main: str | None = None) -> None:
        self.mode = ("bar" if sys.stderr.isatty() else "plain") if mode == "auto" else mode
        self.label, self.main = label, main
        self._bar: Any = None
        self._task: Any = None
        self._printed = 0.0
        self._last = ""

    def show(self, event: Progress) -> None:
        if self.mode == "none":
            return
        facts = {name: f"{fact:.0%}" if isinstance(fact, float) else fact for name, fact in event.facts.items()}
        if event.eta_seconds is not None:
            facts["ETA"] = duration(event.eta_seconds)
        if self.mode == "json":
            counts = {"phase": event.phase, "done": event.done, "total": event.total}
            sys.stderr.write(json_line({"event": self.label, **counts, **facts, "final": event.final}))
            sys.stderr.flush()
            return
        named = {"phase": event.phase, **facts} if event.phase != self.main else facts
        shown = ", ".join(f"{name} {fact}" for name, fact in named.items())
        if self.mode == "bar":
            self._draw(event.done, event.total, shown)
            return
        of = "" if event.total is None else f"/{event.total}"
        line = f"{self.label}: {event.done}{of}" + (f", {shown}" if shown else "")
        now = time.monotonic()
        if line != self._last and (event.final or now - self._printed >= PLAIN_SECONDS):
            self._printed, self._last = now, line
            sys.stderr.write(clean(line) + "\n")
            sys.stderr.flush()

    def _draw(self, done: int, total: int | None, shown: str) -> None:
        if self._bar is None:
            from rich import progress as rich_progress
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

            self._bar = rich_progress.Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[facts]}", markup=False),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(clean(self.label), total=total, facts="")
        self._bar.update(self._task, completed=done, total=total, facts=clean(shown))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@contextmanager
def progress(mode: str, label: str, main: str | None = None) -> Iterator[OnProgress]:
    """Yield what shows events in a ``ProgressView``, which is closed however the work ends."""
    view = ProgressView(mode, label, main)
    try:
        yield view.show
    finally:
        view.close()


@contextmanager
def stages(mode: str) -> Iterator[OnProgress]:
    """Yield what shows the events of each phase in a ``ProgressView`` of its own."""
    current: list[ProgressView] = []

    def show(event: Progress) -> None:
        if not current or current[-1].label != event.phase:
            for view in current:
                view.close()
            current[:] = [ProgressView(mode, event.phase, main=event.phase)]
        current[-1].show(event)

    try:
        yield show
    finally:
        for view in current:
            view.close()


def duration(seconds: float | None) -> str:
    """Seconds as ``1h02m``, ``3m05s`` or ``12s``; empty when unknown."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
