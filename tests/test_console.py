"""The terminal: streams that nobody reads, a clock that stands still, levels of logs that there are not."""

import logging
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from lorasmith.console import Printer, follow, set_up_logging
from lorasmith.types import Step


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_what_cannot_be_printed_is_lost_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with open("/dev/full", "w") as full:
        console = Console(file=Printer(lambda: full))  # pyright: ignore[reportArgumentType]
        for _ in range(3):
            console.print("x" * 10_000)
    assert caplog.messages == ["nothing more is printed (No space left on device)"]


def test_a_pipe_that_nobody_reads(caplog: pytest.LogCaptureFixture) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        Console(file=Printer(lambda: pipe)).print("x" * 10_000)  # pyright: ignore[reportArgumentType]
    assert caplog.messages == ["nothing more is printed (Broken pipe)"]


def test_a_program_without_streams(capsys: pytest.CaptureFixture[str]) -> None:
    Console(file=Printer(lambda: None)).print("x")  # pyright: ignore[reportArgumentType]
    assert capsys.readouterr() == ("", "")


def test_steps_that_take_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    follow((Step(number, 0.5, 1e-4, 1.0, 0.0) for number in (1, 2)), 2, 0)
    assert "2/2 loss 0.5000 - steps/s" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")
def test_steps_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    with open(reading, "rb") as screen, open(writing, "w") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        follow((Step(number, 0.5, 1e-4, 1.0, 0.5) for number in (1, 2)), 2, 0)
        terminal.flush()
        shown = os.read(screen.fileno(), 100_000)
    assert b"2/2" in shown
    assert shown.rstrip().endswith(b"\x1b[?25h"), "the cursor is shown again"


def test_an_unknown_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    level, hook = logging.getLogger("lorasmith").level, sys.excepthook
    monkeypatch.setenv("LORASMITH_LOG", "loud")
    with pytest.raises(ValueError, match="^LORASMITH_LOG must be one of debug, info, warning, error, got loud$"):
        set_up_logging()
    assert (logging.getLogger("lorasmith").level, sys.excepthook) == (level, hook)
