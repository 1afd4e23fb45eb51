"""What a terminal shows of a run: logs, a progress bar, a summary; and Ctrl-C as a flag that is read between steps."""

import io
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from types import FrameType
from typing import Any, TextIO, cast

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from lorasmith.types import Step
from lorasmith.world import is_first_here, is_under_torchrun

log = logging.getLogger(__name__)

STOPPING = (signal.SIGINT, signal.SIGTERM)
LEVELS = ("debug", "info", "warning", "error")


class Printer:
    """A standard stream. Where nobody reads it any more, or its disk is full, what is printed is lost, not the run."""

    def __init__(self, stream: Callable[[], TextIO | None]) -> None:
        self.stream = stream  # what it is now, as callers may replace it; None where the program was started without

    def write(self, text: str) -> int:
        with self._losing() as stream:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._losing() as stream:
            stream.flush()

    def isatty(self) -> bool:
        with self._losing() as stream:
            return stream.isatty()

    def fileno(self) -> int:
        with self._losing() as stream:
            return stream.fileno()

    @property
    def encoding(self) -> str:
        with self._losing() as stream:
            return stream.encoding or "utf-8"

    @contextmanager
    def _losing(self) -> Iterator[TextIO]:
        stream = self.stream() or io.StringIO()
        try:
            yield stream
        except io.UnsupportedOperation:  # of what stands in for a stream
            raise
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python writes there once more when it ends
            log.warning("nothing more is printed (%s)", error.strerror)


console = Console(file=cast(Any, Printer(lambda: sys.stdout)), markup=False, emoji=False)  # paths as they are
# Progress must not put its proxy in the place of sys.stdout: the printer writes there, and the proxy to this console.


def set_up_logging() -> None:
    """Our own logs to stderr, at the level that LORASMITH_LOG names (info by default); libraries' from errors on.

    Of several processes on a machine, one speaks.
    """
    asked = os.environ.get("LORASMITH_LOG", "info").lower()
    if asked not in LEVELS:
        raise ValueError(f"LORASMITH_LOG must be one of {', '.join(LEVELS)}, got {asked}")
    level = asked if is_first_here() else "error"
    terminal = Console(file=cast(Any, Printer(lambda: sys.stderr)))
    handler = RichHandler(console=terminal, show_time=False, show_path=False, show_level=level != "info")
    logging.basicConfig(level=logging.ERROR, format="%(message)s", handlers=[handler])
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


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Ctrl-C, or a SIGTERM, sets the flag; a second one ends the program at once, as usual.

    But not where torchrun started the program: it passes Ctrl-C on, so that each comes twice, and kills what goes on.
    """
    stop = threading.Event()
    usual = {name: signal.getsignal(name) for name in STOPPING}

    def first(signum: int, frame: FrameType | None) -> None:
        stop.set()
        if not is_under_torchrun():
            signal.signal(signum, usual[signal.Signals(signum)])

    for name in STOPPING:
        signal.signal(name, first)
    try:
        yield stop
    finally:
        for name, handler in usual.items():
            signal.signal(name, handler)


def follow(steps: Generator[Step, None, None], total: int, before: int) -> None:
    """Runs through the steps with a progress bar; those of a LoRA that is continued, `before`, do not count."""
    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[rate]} steps/s"), TimeRemainingColumn(),
    )  # fmt: skip
    mean = None
    with closing(steps), Progress(*columns, console=console, redirect_stdout=False) as progress:
        task = progress.add_task("training", total=total, loss="-", rate="-")
        for step in steps:
            mean = step.loss if mean is None else 0.9 * mean + 0.1 * step.loss
            rate = f"{1 / step.seconds:.2f}" if step.seconds else "-"  # of a clock that stands still
            progress.update(task, completed=step.step - before, loss=f"{mean:.4f}", rate=rate)


def tracked(names: Sequence[str], what: str) -> Iterator[str]:
    """Runs through names with a progress bar, which is gone afterwards; nothing where no terminal shows it."""
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False
    ) as progress:
        yield from progress.track(names)


def show_table(rows: Sequence[tuple[str, ...]], columns: Sequence[str] = ()) -> None:
    """Rows of text, under the names of their columns where these are given; nothing without rows.

    Where no terminal shows it, each row is its cells as they are, with tabs between them.
    """
    if not rows:
        return
    if not console.is_terminal:
        for row in (tuple(columns), *rows) if columns else rows:
            _print("\t".join(row))
        _print("")
        return
    names = columns or [""] * len(rows[0])
    table = Table(*(Column(n, overflow="fold") for n in names), show_header=bool(columns), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()


def show_json(document: Mapping[str, Any]) -> None:
    """One JSON document, and nothing else, on stdout."""
    _print(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False))


def _print(line: str) -> None:
    """Exactly as it is: rich would expand tabs and break lines."""
    if not console.quiet:
        print(line, file=console.file)
