"""A training as events: a JSON object a line, for programs that read along."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasmith import __version__
from lorasmith.errors import text_of
from lorasmith.reporting.display import Take
from lorasmith.reporting.pace import Pace, Training
from lorasmith.reporting.progress import Advance
from lorasmith.reporting.signals import raise_if_interrupted
from lorasmith.reporting.streams import Printer

if TYPE_CHECKING:  # torch, which takes seconds
    from lorasmith.types import Step

INTERVAL = 1.0  # seconds between two events of one stage


class Events:
    """A display and a report that programs read, of the first process alone. They end in done, stopped or error."""

    def __init__(self, printer: Printer, is_first: bool) -> None:
        self._printer, self._is_first = printer, is_first
        self._lock = threading.RLock()

    def __enter__(self) -> "Events":
        self._emit("start", version=__version__)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._emit("stopped")
        elif error is not None:
            self._emit("error", message=text_of(error))

    def _emit(self, event: str, **fields: Any) -> None:
        if not self._is_first:
            return
        with self._lock:
            self._printer.line(json.dumps({"event": event, **fields}))

    def saved(self, steps: int, paths: Sequence[Path]) -> None:
        for path in paths:
            self._emit("saved", path=str(path), steps=steps)

    def stopped(self, done: int, total: int) -> None:
        self._emit("stopped", step=done, steps=total)

    def done(self, summary: Sequence[tuple[str, str]], folder: Path) -> None:
        self._emit("done", folder=str(folder), summary=dict(summary))

    def info(self, text: str) -> None:
        self._emit("info", message=text)

    def warning(self, text: str) -> None:
        self._emit("warning", message=text)

    def wrote(self, what: Literal["checkpoint", "sample"], path: Path) -> None:
        self._emit(what, path=str(path))

    @contextmanager
    def stage(self, what: str, total: int | None = None, unit: str = "") -> Iterator[Advance]:
        raise_if_interrupted()
        pace, due = Pace(total), INTERVAL

        def told(is_done: bool) -> None:
            seconds = round(pace.seconds, 3)
            self._emit("stage", stage=what, done=pace.done, total=total, unit=unit, seconds=seconds, ended=is_done)

        def advance(count: int) -> None:
            nonlocal due
            raise_if_interrupted()
            pace.advance(count)
            if pace.seconds >= due:
                due = pace.seconds + INTERVAL
                told(False)

        told(False)
        yield advance
        told(True)

    @contextmanager
    def training(self, training: Training, stop: threading.Event) -> Iterator[Take]:
        def take(step: "Step") -> None:
            training.take(step)
            self._emit(
                "step", step=training.pace.done, steps=training.total, epoch=training.epoch, epochs=training.epochs,
                loss=step.loss, mean_loss=training.loss, lr=step.lr, grad_norm=step.grad_norm, seconds=step.seconds,
                seconds_left=training.pace.seconds_left,
            )  # fmt: skip

        yield take
