"""Ctrl-C, SIGTERM and SIGHUP: each ends a command in order, at once or after the step in hand."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lorasmith.distributed.torchrun import is_under_torchrun

INTERRUPTED = 130  # the exit code
STOPPING = (signal.SIGINT, signal.SIGTERM) if sys.platform == "win32" else (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP,
)  # fmt: skip


class Interruption:
    """Raises KeyboardInterrupt where a signal comes; remembers that one came, as libraries may swallow the error."""

    def __init__(self) -> None:
        self.has_come = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.has_come = True
        _ignore_hangups(signum)
        raise KeyboardInterrupt

    def raise_if_it_has_come(self) -> None:
        if self.has_come:
            raise KeyboardInterrupt


@contextmanager
def interruptions() -> Iterator[Interruption]:
    """Until this is closed, Ctrl-C, SIGTERM and a terminal that closes raise KeyboardInterrupt."""
    interruption = Interruption()
    with _handled_by(interruption):
        yield interruption


def raise_if_interrupted() -> None:
    """KeyboardInterrupt where one was raised before and swallowed, as happens while modules are imported.

    Not where it is being handled: what is saved then may take a stage.
    """
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, Interruption) and not isinstance(sys.exception(), KeyboardInterrupt):
        handler.raise_if_it_has_come()


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """The first signal sets the flag; a second Ctrl-C or SIGTERM does as before.

    But not where torchrun started the program: it passes Ctrl-C on, so that each comes twice, and kills what goes on.
    """
    stop = threading.Event()
    usual = {name: signal.getsignal(name) for name in STOPPING}

    def first(signum: int, frame: FrameType | None) -> None:
        stop.set()
        if not is_under_torchrun():
            signal.signal(signum, usual[signal.Signals(signum)])
        _ignore_hangups(signum)

    with _handled_by(first):
        yield stop


def _ignore_hangups(signum: int) -> None:
    """From now on, as a terminal that closes sends one by itself and one by its shell."""
    if sys.platform != "win32" and signum == signal.SIGHUP:
        signal.signal(signum, signal.SIG_IGN)


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """But for a SIGHUP that is ignored, as `nohup` has it."""
    usual = {name: signal.getsignal(name) for name in STOPPING}
    if sys.platform != "win32" and usual[signal.SIGHUP] is signal.SIG_IGN:
        del usual[signal.SIGHUP]
    for name in usual:
        signal.signal(name, handler)
    try:
        yield
    finally:
        for name, earlier in usual.items():
            signal.signal(name, earlier)
