"""Signals: an error that is not lost, a flag between steps, a terminal that closes."""

import signal
import sys

import pytest

from lorasmith.__main__ import main
from lorasmith.reporting.display import Shown
from lorasmith.reporting.lines import Muted
from lorasmith.reporting.signals import STOPPING, interruptible, interruptions
from lorasmith.reporting.streams import Printer


@pytest.mark.parametrize("signum", STOPPING)
def test_a_signal_is_an_interruption(signum: signal.Signals) -> None:
    usual = signal.getsignal(signum)
    with interruptions() as interruption:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signum)
        assert interruption.has_come
    assert signal.getsignal(signum) is usual


def test_an_interruption_that_a_library_swallows_comes_again_with_the_next_work() -> None:
    display = Shown(Muted(Printer(lambda: None)))
    with interruptions():
        with display.stage("loading", 2) as advance:
            advance(1)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                advance(1)
        with pytest.raises(KeyboardInterrupt), display.stage("encoding"):
            pass


def test_what_is_saved_because_of_an_interruption_is_not_interrupted_by_it() -> None:
    display, done = Shown(Muted(Printer(lambda: None))), []
    with interruptions():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            with display.stage("hashing", 1) as advance:
                advance(1)
                done.append("hashing")
    assert done


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_while_a_step_is_made_the_first_one_waits_and_the_second_does_not(signum: signal.Signals) -> None:
    with interruptions(), interruptible() as stop:
        signal.raise_signal(signum)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signum)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGHUP")
def test_a_terminal_that_closes_may_say_so_twice() -> None:
    usual = signal.getsignal(signal.SIGHUP)
    with interruptions():
        with interruptible() as stop:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)
            assert stop.is_set()
    assert signal.getsignal(signal.SIGHUP) is usual


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGHUP")
def test_nohup_is_respected() -> None:
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptions() as interruption, interruptible() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_set() and not interruption.has_come
    finally:
        signal.signal(signal.SIGHUP, usual)


def test_ctrl_c_while_the_command_line_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lorasmith.__main__.refuse_old", lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit, match="130"):
        main()
    assert capsys.readouterr().err == "lorasmith: stopped\n"
