"""Processes that run `lorasmith` and are killed: at a moment, or after a change that they make to the disk."""

import io
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

from lorasmith.cli.main import INTERRUPTED, main

PRELOADED = ["lorasmith.cli.main", "lorasmith.cli.terminal", "lorasmith.runs.run", "lorasmith.config"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
KILL = signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL  # there it ends a process as SIGKILL does
READY, CODE = ".ready", ".code"
UNKNOWN = 255  # what a server of forks says where it has missed how a process ended
PATIENCE = 300.0  # seconds a run may take before it counts as hanging

Processes = ForkServerContext | SpawnContext


@dataclass(frozen=True)
class Blow:
    """A signal after `delay` seconds; `grace` seconds after one that asks to stop comes a kill."""

    delay: float
    signal: int = KILL
    grace: float = PATIENCE


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int | None  # None where it hung
    pid: int | None
    seconds: float
    log: Path  # what it printed
    is_fair: bool  # it ended by itself, of what killed it, or as it should when asked to stop


class Fuse:
    """Kills its own process after the k-th change to the disk; a write comes in two halves, each a change.

    What SIGKILL leaves does not depend on fsync, and is the same just after a change and just before the next.
    """

    def __init__(self, k: int) -> None:
        self.left = k

    def burn(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), KILL)

    def set(self) -> None:
        """Stands in for all that changes the disk, for the rest of the process's life."""
        os.replace, os.unlink, os.mkdir = map(self._burning, (os.replace, os.unlink, os.mkdir))
        plain_open, plain_io_open = os.open, io.open

        def fused_open(path: Any, flags: int, *rest: Any, dir_fd: int | None = None) -> int:
            descriptor = plain_open(path, flags, *rest, dir_fd=dir_fd)
            if flags & os.O_CREAT:
                self.burn()
            return descriptor

        def fused_io_open(file: Any, mode: str = "r", *rest: Any) -> Any:
            if mode not in ("wb", "ab"):
                return plain_io_open(file, mode, *rest)
            opened = Halved(file, mode, self.burn)
            self.burn()
            return opened

        os.open, io.open = fused_open, fused_io_open  # Path.open calls io.open

    def _burning(self, call: Callable[..., None]) -> Any:
        def burning(*arguments: Any, dir_fd: int | None = None) -> None:
            call(*arguments) if dir_fd is None else call(*arguments, dir_fd=dir_fd)
            self.burn()

        return burning


class Halved(io.FileIO):
    """A file that calls `burn` after each half of what is written."""

    def __init__(self, path: Path, mode: str, burn: Callable[[], None]) -> None:
        super().__init__(path, mode)
        self.burn = burn

    def write(self, content: Any) -> int:
        view = memoryview(content)
        for half in (view[: len(view) // 2], view[len(view) // 2 :]):
            super().write(half)
            self.burn()
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        length = super().truncate(size)
        self.burn()
        return length


@dataclass(frozen=True)
class Runs:
    """Runs `lorasmith` in a folder, in processes of their own."""

    processes: Processes
    folder: Path

    def ended(self, *arguments: str, blow: Blow | None = None, change: int = 0) -> Ended:
        """change: the number of the change to the disk after which the process kills itself; 0: none."""
        began, log = time.monotonic(), self.folder / f"{len(list(self.folder.glob('*.log'))):04d}.log"
        process = self.processes.Process(target=_run_command, args=(arguments, self.folder, log, change))
        process.start()
        if blow is not None:
            process.join(blow.delay)
            if blow.signal != KILL and process.pid is not None:
                # before, there is no program that could be asked
                while process.is_alive() and not log.with_suffix(READY).exists():
                    process.join(0.01)
                with suppress(ProcessLookupError):
                    os.kill(process.pid, blow.signal)
                process.join(blow.grace)
            process.kill()
        process.join(PATIENCE)
        code, seconds = process.exitcode, time.monotonic() - began
        if code == UNKNOWN and log.with_suffix(CODE).exists():
            code = int(log.with_suffix(CODE).read_text())
        process.kill()
        log.touch()
        fair_codes = {0} | ({-KILL} if change else set()) | (set() if blow is None else {-KILL, -blow.signal})
        is_stopped = blow is not None and blow.signal != KILL and (code == INTERRUPTED or _ends_late(log))
        return Ended(code, process.pid, seconds, log, code in fair_codes or is_stopped)


def _ends_late(log: Path) -> bool:
    """Whether Ctrl-C came after `main`, where it ends Python with a traceback."""
    return log.read_text(encoding="utf-8", errors="replace").rstrip().endswith("KeyboardInterrupt")


def _run_command(arguments: tuple[str, ...], folder: Path, log: Path, change: int) -> None:
    """What a child process does; once it writes to the log, it says that it is ready."""
    os.chdir(folder)
    with log.open("w", encoding="utf-8") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    log.with_suffix(READY).touch()
    sys.argv = ["lorasmith", *arguments]
    if change:
        Fuse(change).set()
    try:
        main()
    except SystemExit as ended:
        log.with_suffix(CODE).write_text(str(ended.code))
        raise


def started(log: Path) -> Processes:
    """What makes processes; the server that they are forked from writes to the log."""
    os.environ.update(ENVIRONMENT)
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    stderr = os.dup(2)
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 2)
        process = context.Process(target=int)  # the first one starts the server
        process.start()
        process.join()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    return context
