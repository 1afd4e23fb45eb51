"""The console: streams that nobody reads, tables in pipes and on terminals, logs of one line, levels of logs."""

import logging
import os
import sys
from pathlib import Path

import pytest

from lorasmith.cli.terminal import DisplayHandler, opened_display, show_table
from lorasmith.reporting.display import Shown
from lorasmith.reporting.lines import Lines
from lorasmith.reporting.streams import Printer

LONG = "a value of many words " * 30 + "without an end"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_what_cannot_be_printed_is_lost_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with open("/dev/full", "w") as full:
        printer = Printer(lambda: full)
        for _ in range(3):
            printer.line("x" * 10_000)
    assert caplog.messages == ["nothing more is printed (No space left on device)"]


def test_a_pipe_that_nobody_reads(caplog: pytest.LogCaptureFixture) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        Printer(lambda: pipe).line("x" * 10_000)
    assert caplog.messages == ["nothing more is printed (Broken pipe)"]


def test_a_program_without_streams(capsys: pytest.CaptureFixture[str]) -> None:
    Printer(lambda: None).line("x")
    assert capsys.readouterr() == ("", "")


def test_a_table_in_a_pipe_has_its_cells_whole(capsys: pytest.CaptureFixture[str]) -> None:
    show_table([("a", LONG), ("much longer", "2")], ("name", "value"))
    show_table([])
    assert capsys.readouterr().out == f"name\tvalue\na\t{LONG}\nmuch longer\t2\n\n"


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize("columns", [40, 100])
def test_a_table_on_a_terminal_fits_it(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from screens import opened_terminal

    with opened_terminal(columns) as terminal, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", terminal.stream)
        show_table([("a", LONG[:150]), ("b", "2")])
        rows = terminal.lines()
    shown = "".join(row.removeprefix("a").replace(" ", "") for row in rows[:-1])
    assert shown == LONG[:150].replace(" ", "") and rows[-1].split() == ["b", "2"]


def test_a_log_message_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    handler = DisplayHandler(Shown(Lines(Printer(lambda: sys.stdout))))
    for level in (logging.INFO, logging.WARNING):
        handler.handle(logging.LogRecord("lorasmith", level, "", 0, "two\n  %s", ("lines " * 50,), None))
    text = f"two {'lines ' * 50}".strip()
    assert capsys.readouterr().out == f"{text}\nwarning: {text}\n"


def test_an_unknown_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    level = logging.getLogger("lorasmith").level
    monkeypatch.setenv("LORASMITH_LOG", "loud")
    with pytest.raises(ValueError, match="^LORASMITH_LOG must be one of debug, info, warning, error, got loud$"):
        with opened_display():
            pass
    assert logging.getLogger("lorasmith").level == level
