"""The standard streams as what is printed goes there: through terminals that close, full disks and narrow encodings."""

import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

log = logging.getLogger(__name__)

USUAL_WIDTH = 80
DUMB = ("dumb", "unknown")


class Printer:
    """A standard stream. Where nobody reads it any more, or its disk is full, what is printed is lost, not the run."""

    def __init__(self, stream: Callable[[], TextIO | None]) -> None:
        self.stream = stream  # what it is now, as callers may replace it; None where the program was started without

    def write(self, text: str) -> int:
        with self._losing() as stream:
            stream.write(text)
        return len(text)

    def line(self, text: str) -> None:
        """Writes a line that is there at once for whoever reads the stream."""
        self.write(text + "\n")
        self.flush()

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

    @property
    def is_interactive(self) -> bool:
        """Whether it is a terminal whose lines can be drawn over."""
        return self.isatty() and os.environ.get("TERM", "").lower() not in DUMB

    @property
    def width(self) -> int:
        """Columns of the terminal as it is now, whatever the variable COLUMNS said when the program began."""
        try:
            return os.get_terminal_size(self.fileno()).columns or USUAL_WIDTH
        except OSError:  # no terminal
            return USUAL_WIDTH

    def can_print(self, text: str) -> bool:
        """Whether the stream's encoding has these characters."""
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            return False
        return True

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
