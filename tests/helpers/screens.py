"""A terminal for tests: one end is a stream to print to, the other is read into a screen that can be looked at."""

import fcntl
import os
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import pyte

ROWS = 24


class Terminal:
    """A pseudo-terminal and its screen."""

    def __init__(self, stream: TextIO, master: int, columns: int) -> None:
        self.stream, self.master = stream, master
        self.screen = pyte.Screen(columns, ROWS)
        self._feed = pyte.ByteStream(self.screen)
        self.resize(columns)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
        self.screen.resize(ROWS, columns)

    def lines(self) -> list[str]:
        """What the screen shows by now, without blank lines."""
        os.set_blocking(self.master, False)
        try:
            while content := os.read(self.master, 65536):
                self._feed.feed(content)
        except BlockingIOError:
            pass
        return [text for line in self.screen.display if (text := line.rstrip())]


@contextmanager
def opened_terminal(columns: int = 80, encoding: str = "utf-8") -> Iterator[Terminal]:
    master, slave = os.openpty()
    try:
        with open(slave, "w", encoding=encoding) as stream:
            yield Terminal(stream, master, columns)
    finally:
        os.close(master)
