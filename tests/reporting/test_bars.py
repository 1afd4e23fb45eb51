"""Bars on a screen: of any width, of one that changes, with lines above them, and when the terminal goes away."""

import os
import sys
from collections.abc import Sequence

import pytest

if sys.platform == "win32":
    pytest.skip("there are no pseudo-terminals", allow_module_level=True)

from hypothesis import given
from hypothesis import strategies as st
from screens import opened_terminal

from lorasmith.reporting.bars import ASCII, THIN, Bars, bar_of
from lorasmith.reporting.display import Shown
from lorasmith.reporting.pace import Pace, Work
from lorasmith.reporting.progress import tracked
from lorasmith.reporting.streams import Printer

NOTES = ("epoch 48/100", "loss 0.1234", "2.21 steps/s")


def pace_of(total: int | None, done: int) -> Pace:
    """So far done in 100 seconds."""
    times = iter((0.0, 100.0))
    last = 100.0
    pace = Pace(total, clock=lambda: next(times, last))
    pace.advance(done)
    return pace


def line(width: int, total: int | None = 250, done: int = 120, notes: Sequence[str] = NOTES) -> str:
    return bar_of(Work(lambda: "training", pace_of(total, done), lambda: notes), width, THIN)


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (79, "training ━━━━━━─────── 120/250  epoch 48/100  loss 0.1234  2.21 steps/s  1:48 left"),
        (65, "training ━━━━━─────── 120/250  epoch 48/100  loss 0.1234  1:48 left"),
        (39, "training ━━━━━──────── 120/250  1:48 left"),
        (25, "training 120/250  1:48 left"[:25]),
    ],
)
def test_a_line_drops_what_matters_least(width: int, expected: str) -> None:
    drawn = line(width)
    assert drawn.replace("━", "").replace("─", "") == expected.replace("━", "").replace("─", "")
    assert len(drawn) == width


def test_a_narrow_line_keeps_the_time_rather_than_the_label() -> None:
    work = Work(lambda: "encoding validation pictures", pace_of(128, 62))
    assert bar_of(work, 39, THIN) == "encoding validation 62/128  1:46 left"
    assert bar_of(work, 27, THIN) == "encoding 62/128  1:46 left"


@given(
    width=st.integers(1, 200),
    total=st.none() | st.integers(0, 10**6),
    done=st.integers(0, 10**6),
    notes=st.lists(st.text("abc 1", max_size=20), max_size=4),
)
def test_a_line_never_exceeds_its_width(width: int, total: int | None, done: int, notes: list[str]) -> None:
    drawn = line(width, total, done if total is None else min(done, total), notes)
    assert len(drawn) <= width and drawn.startswith("training"[:width])


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_stage_leaves_no_trace_but_what_was_said(columns: int) -> None:
    with opened_terminal(columns) as terminal, Bars(Printer(lambda: terminal.stream)) as bars:
        display = Shown(bars)
        with display.stage("encoding pictures", 3) as advance:
            assert [row.partition(" ")[0] for row in terminal.lines()] == ["encoding"]
            advance(1)
            display.info("a line")
            display.warning("wrapped " * 30)
            with display.stage("reading", None):
                rows = terminal.lines()
                assert rows[0] == "a line" and [row.split()[0] for row in rows[-2:]] == ["encoding", "reading"]
            assert "1/3" in terminal.lines()[-1]
        rows = terminal.lines()
    assert rows[0] == "a line" and rows[1].startswith("warning: wrapped wrapped")
    assert not any("encoding" in row for row in rows) and not terminal.screen.cursor.hidden


def test_a_window_that_changes_its_size_shows_one_bar() -> None:
    with opened_terminal(80) as terminal, Bars(Printer(lambda: terminal.stream)) as bars:
        with bars.showing(Work(lambda: "training", Pace(10), lambda: NOTES)) as changed:
            for columns in (80, 40, 200, 60):
                terminal.resize(columns)
                bars.line(f"{columns} columns")
                changed()
                rows = terminal.lines()
                assert rows[-1].startswith("training ") and len(rows[-1]) < columns
                assert sum("training" in row for row in rows) == 1
        assert terminal.lines() == ["80 columns", "40 columns", "200 columns", "60 columns"]


def test_the_cursor_rests_where_an_erasure_takes_away_all_that_a_terminal_may_wrap() -> None:
    with opened_terminal() as terminal, Bars(Printer(lambda: terminal.stream)) as bars:
        display = Shown(bars)
        with display.stage("one"), display.stage("two"):
            assert [row.split()[0] for row in terminal.lines()] == ["one", "two"]
            assert (terminal.screen.cursor.x, terminal.screen.cursor.y) == (0, 0)


def test_a_bar_that_an_error_leaves_open_is_gone_when_the_display_is_closed() -> None:
    with opened_terminal() as terminal:
        with Bars(Printer(lambda: terminal.stream)) as bars:
            items = tracked("ab", "encoding", Shown(bars), 2)
            assert next(items) == "a" and terminal.lines()[0].startswith("encoding")
        assert terminal.lines() == []
        print("next", file=terminal.stream, flush=True)
        del items
        assert terminal.lines() == ["next"]


def test_a_training_leaves_its_last_line() -> None:
    with opened_terminal() as terminal, Bars(Printer(lambda: terminal.stream)) as bars:
        with bars.showing(Work(lambda: "training", pace_of(250, 250), lambda: NOTES, stays=True)):
            pass
        (last,) = terminal.lines()
    assert last.startswith("training ━━━━") and "250/250  epoch 48/100" in last and last.endswith("in 1:40")


@pytest.mark.parametrize("encoding", ["cp437", "cp1252", "ascii"])
def test_code_pages_without_the_signs_get_others(encoding: str) -> None:
    with opened_terminal(encoding=encoding) as terminal, Bars(Printer(lambda: terminal.stream)) as bars:
        with bars.showing(Work(lambda: "training", pace_of(2, 1))):
            assert ASCII.done * 2 + ASCII.left * 2 in terminal.lines()[0]


def test_a_terminal_that_is_closed_loses_lines_and_not_the_work(caplog: pytest.LogCaptureFixture) -> None:
    with opened_terminal() as terminal, Bars(Printer(lambda: terminal.stream)) as bars:
        display = Shown(bars)
        with display.stage("encoding", 2) as advance:
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, terminal.master)  # closes the terminal, and keeps the number for its end
            os.close(null)
            for _ in range(2):
                advance(1)
                display.info("lost")
    assert caplog.messages == ["nothing more is printed (Input/output error)"]
