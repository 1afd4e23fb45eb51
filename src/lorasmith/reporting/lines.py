"""Work shown as plain lines, where output is no terminal that can be drawn over."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lorasmith.reporting.pace import WORTH_TELLING, Work, in_short
from lorasmith.reporting.streams import Printer

INTERVAL = 30.0  # seconds from one line about a stage to the next, after its first one


class Lines:
    """A line when work begins, and some while it goes on."""

    def __init__(self, printer: Printer) -> None:
        self._printer = printer

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def line(self, text: str) -> None:
        self._printer.line(text)

    @contextmanager
    def showing(self, work: Work) -> Iterator[Callable[[], None]]:
        pace, due = work.pace, WORTH_TELLING
        self.line(work.label())

        def state() -> str:
            return f"{work.label()}: {', '.join(in_short(pace, work.notes()))}"

        def changed() -> None:
            nonlocal due
            if pace.total is not None and pace.done < pace.total and pace.seconds >= due:
                due = pace.seconds + INTERVAL
                self.line(state())

        try:
            yield changed
        finally:
            if work.stays:
                self.line(state())


class Muted:
    """Shows no work, as of several processes the first one does; what is said is printed all the same."""

    def __init__(self, printer: Printer) -> None:
        self.line = printer.line

    def __enter__(self) -> "Muted":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @contextmanager
    def showing(self, work: Work) -> Iterator[Callable[[], None]]:
        yield lambda: None
