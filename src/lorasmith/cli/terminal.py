"""What a command opens to be seen: its display, its log, the tables that it prints. No torch: all of it comes first."""

import importlib
import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from rich.console import Console
from rich.table import Column, Table

from lorasmith import __version__
from lorasmith.distributed.torchrun import is_first, is_first_here
from lorasmith.reporting.bars import Bars
from lorasmith.reporting.display import Display, Shown
from lorasmith.reporting.events import Events
from lorasmith.reporting.lines import Lines, Muted
from lorasmith.reporting.progress import Progress, tracked
from lorasmith.reporting.streams import Printer

log = logging.getLogger(__name__)

LEVELS = ("debug", "info", "warning", "error")
MODEL_LIBRARIES = ("torch", "transformers", "diffusers", "lorasmith.models.load")

stdout, stderr = Printer(lambda: sys.stdout), Printer(lambda: sys.stderr)
console = Console(file=cast(Any, stdout), markup=False, emoji=False)  # paths as they are


@contextmanager
def opened_display(events: Events | None = None) -> Iterator[Display]:
    """Says at once what has started, and shows work until it is closed: on stderr, or as these events.

    Logs go there too. Of several processes, the first one shows its work.
    """
    if events is not None:
        with events:
            _log_to(events)
            yield events
        return
    with _view() as view:
        display = Shown(view)
        _log_to(display)
        if is_first():
            display.info(f"lorasmith {__version__}")
        yield display


def _view() -> Bars | Lines | Muted:
    if not is_first():
        return Muted(stderr)
    return Bars(stderr) if stderr.is_interactive else Lines(stderr)


def load(progress: Progress, what: str, modules: Sequence[str]) -> None:
    """Imports what takes seconds; the libraries that load models are quieted."""
    for name in tracked(modules, f"loading {what}", progress, len(modules)):
        importlib.import_module(name)
    if "diffusers" in modules:
        quiet_libraries()


class DisplayHandler(logging.Handler):
    """A log in a display, a line for each message."""

    def __init__(self, display: Display) -> None:
        super().__init__()
        self.display = display

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if record.exc_info:
            text = f"{text}\n{logging.Formatter().formatException(record.exc_info)}"
        (self.display.warning if record.levelno >= logging.WARNING else self.display.info)(text)


def _log_to(display: Display) -> None:
    """Our own logs at the level that LORASMITH_LOG names (info by default), and warnings; libraries' from errors on.

    Of several processes on a machine, one speaks.
    """
    asked = os.environ.get("LORASMITH_LOG", "info").lower()
    if asked not in LEVELS:
        raise ValueError(f"LORASMITH_LOG must be one of {', '.join(LEVELS)}, got {asked}")
    level = asked if is_first_here() else "error"
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, DisplayHandler)]:
        root.removeHandler(handler)  # of a command before this one, whose display is closed
    if not root.handlers:
        root.addHandler(DisplayHandler(display))
        root.setLevel(logging.ERROR)
        logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(level.upper())
    logging.getLogger("lorasmith").setLevel(level.upper())
    threading.excepthook = _log_failure


def _log_failure(failed: threading.ExceptHookArgs) -> None:
    """What became of a library's thread, whose error is raised where its work is asked for."""
    log.debug("a thread failed", exc_info=failed.exc_value)


def quiet_libraries() -> None:
    """No progress bars and no advice from the libraries that load models."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(diffusers|transformers)\.")


def show_table(rows: Sequence[tuple[str, ...]], columns: Sequence[str] = ()) -> None:
    """Rows of text, under the names of their columns where these are given; nothing without rows.

    Where no terminal shows it, each row is its cells as they are, with tabs between them.
    """
    if not rows:
        return
    if not stdout.isatty():
        for row in [columns, *rows] if columns else rows:
            stdout.line("\t".join(row))
        stdout.line("")
        return
    names = columns or [""] * len(rows[0])
    table = Table(*(Column(n, overflow="fold") for n in names), show_header=bool(columns), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console.print(table, width=stdout.width)
    stdout.line("")


def show_json(document: Mapping[str, Any]) -> None:
    """One JSON document, and nothing else, on stdout: in one line, unless a person reads it."""
    stdout.line(json.dumps(document, indent=1 if stdout.isatty() else None, ensure_ascii=False, allow_nan=False))
