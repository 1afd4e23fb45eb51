"""Work as plain lines: where output is no terminal, or a dumb one."""

import io
import sys

import pytest

from lorasmith.reporting.display import Shown
from lorasmith.reporting.lines import Lines, Muted
from lorasmith.reporting.pace import Pace, Work
from lorasmith.reporting.streams import Printer


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_when_work_begins_after_two_seconds_and_every_half_minute() -> None:
    out, clock = io.StringIO(), Clock()
    pace = Pace(100, clock=clock)
    with Lines(Printer(lambda: out)) as lines, lines.showing(Work(lambda: "encoding", pace)) as changed:
        for _ in range(99):
            clock.now += 1
            pace.advance(1)
            changed()
    assert out.getvalue().splitlines() == [
        "encoding",
        "encoding: 2/100, 1:38 left",
        "encoding: 32/100, 1:08 left",
        "encoding: 62/100, 0:38 left",
        "encoding: 92/100, 0:08 left",
    ]


def test_a_short_stage_is_one_line() -> None:
    out = io.StringIO()
    display = Shown(Lines(Printer(lambda: out)))
    with display.stage("encoding", 2) as advance:
        advance(1)
    display.warning("something")
    assert out.getvalue() == "encoding\nwarning: something\n"


def test_processes_after_the_first_show_no_work() -> None:
    out = io.StringIO()
    display = Shown(Muted(Printer(lambda: out)))
    with display.stage("encoding", 2) as advance:
        advance(2)
    display.warning("something")
    assert out.getvalue() == "warning: something\n"


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_a_dumb_terminal_is_not_drawn_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from screens import opened_terminal

    monkeypatch.setenv("TERM", "xterm")
    with opened_terminal(40) as terminal:
        printer = Printer(lambda: terminal.stream)
        assert (printer.is_interactive, printer.width) == (True, 40)
        monkeypatch.setenv("TERM", "dumb")
        assert not printer.is_interactive
