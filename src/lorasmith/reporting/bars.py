"""Progress bars at the bottom of a terminal, redrawn in place; everything else is printed above them.

The cursor rests at the start of the first bar, so that whatever a resized window makes of them lies behind it, and one
erasure takes it away. It is never hidden: a process that is killed leaves a sound terminal.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lorasmith.reporting.pace import Work, duration, in_short
from lorasmith.reporting.streams import Printer

INTERVAL = 0.25  # seconds between two drawings
BAR_MIN, BAR_MAX = 4, 40  # columns
ERASE, UP, WRAP, NO_WRAP = "\r\x1b[J", "\x1b[{}A", "\x1b[?7h", "\x1b[?7l"
GAP = "  "


@dataclass(frozen=True)
class Signs:
    """What a bar is made of."""

    done: str
    left: str


THIN, ASCII = Signs("━", "─"), Signs("#", ".")


def bar_of(work: Work, width: int, signs: Signs) -> str:
    """A line of at most `width` columns.

    Of what does not fit, notes are left out from the last on, then the bar, then words of the label from the last on.
    """
    label, pace = work.label(), work.pace
    if pace.total is None:
        return f"{label}{GAP}{duration(pace.seconds)}"[:width]
    notes = [*work.notes()]
    while True:
        text = GAP.join(in_short(pace, notes))
        room = width - len(label) - len(text) - 2
        if room >= BAR_MIN or not notes:
            break
        notes.pop()
    if room < BAR_MIN:
        while len(label) + 1 + len(text) > width and " " in label:
            label = label.rpartition(" ")[0]
        return f"{label} {text}"[:width]
    columns = min(room, BAR_MAX)
    done = columns * pace.done // max(1, pace.total)
    return f"{label} {signs.done * done}{signs.left * (columns - done)} {text}"


class Bars:
    """A thread redraws them, so that time passes on the screen while one piece of work takes long."""

    def __init__(self, printer: Printer) -> None:
        self._printer = printer
        self._signs = THIN if printer.can_print(THIN.done + THIN.left) else ASCII
        self._shown: list[Work] = []
        self._lock = threading.RLock()
        self._drawn = 0.0
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._redraw, daemon=True)

    def __enter__(self) -> "Bars":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_closed.set()
        self._thread.join()
        with self._lock:
            if self._shown:  # by generators that an error left open
                self._shown.clear()
                self._printer.write(ERASE)
                self._printer.flush()

    def line(self, text: str) -> None:
        """Prints a line above the bars."""
        with self._lock:
            self._printer.write(f"{ERASE if self._shown else ''}{text}\n")
            self._draw()
            self._printer.flush()

    @contextmanager
    def showing(self, work: Work) -> Iterator[Callable[[], None]]:
        with self._lock:
            self._shown.append(work)
            self._draw()
        try:
            yield self._draw_soon
        finally:
            with self._lock:
                if work in self._shown:
                    self._shown.remove(work)
                    last = bar_of(work, self._width, self._signs) + "\n" if work.stays else ""
                    self._printer.write(ERASE + last)
                    self._draw()
                    self._printer.flush()

    def _draw_soon(self) -> None:
        """Draws where that was not just done."""
        if time.monotonic() - self._drawn > INTERVAL / 2:
            self._draw()

    def _draw(self) -> None:
        with self._lock:
            if self._shown:
                lines = "\n".join(bar_of(work, self._width, self._signs) for work in self._shown)
                up = UP.format(len(self._shown) - 1) if len(self._shown) > 1 else ""
                self._printer.write(f"{ERASE}{NO_WRAP}{lines}{WRAP}{up}\r")
                self._printer.flush()
            self._drawn = time.monotonic()

    @property
    def _width(self) -> int:
        """One column less than the terminal's, as some put the cursor into the next line after a full one."""
        return self._printer.width - 1

    def _redraw(self) -> None:
        while not self._is_closed.wait(INTERVAL):
            self._draw()
