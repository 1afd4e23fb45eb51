"""What a command shows of its work while it runs, for people: bars on a terminal, lines elsewhere."""

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from lorasmith.reporting.pace import WORTH_TELLING, Pace, Training, Work
from lorasmith.reporting.progress import Advance, Progress
from lorasmith.reporting.signals import raise_if_interrupted

if TYPE_CHECKING:  # torch, which takes seconds
    from lorasmith.types import Step

Take = Callable[["Step"], None]


class Display(Progress, Protocol):
    """Shows stages, a training and what happens in between."""

    def training(self, training: Training, stop: threading.Event) -> AbstractContextManager[Take]:
        """Its value is called with each step; `stop`: set when the step in hand is to be the last."""
        ...

    def info(self, text: str) -> None: ...

    def warning(self, text: str) -> None: ...


class View(Protocol):
    """Where work is shown."""

    def line(self, text: str) -> None: ...

    def showing(self, work: Work) -> AbstractContextManager[Callable[[], None]]:
        """Its value is called whenever the work has changed."""
        ...


class Shown:
    """A display in a view."""

    def __init__(self, view: View) -> None:
        self.info = view.line
        self._view = view

    def warning(self, text: str) -> None:
        self.info(f"warning: {text}")

    def wrote(self, what: Literal["checkpoint", "sample"], path: Path) -> None:
        if what == "sample":
            self.info(f"{what}: {path}")

    @contextmanager
    def stage(self, what: str, total: int | None = None, unit: str = "") -> Iterator[Advance]:
        raise_if_interrupted()
        pace = Pace(total, unit=unit)
        with self._view.showing(Work(lambda: what, pace)) as changed:

            def advance(count: int) -> None:
                raise_if_interrupted()
                pace.advance(count)
                changed()

            yield advance
        if pace.seconds > WORTH_TELLING:
            self.info(f"{what}: done in {pace.seconds:.0f} s")

    @contextmanager
    def training(self, training: Training, stop: threading.Event) -> Iterator[Take]:
        pace = training.pace

        def label() -> str:
            if pace.done == training.total or not (pace.is_over or stop.is_set()):
                return "training"
            return "stopped" if pace.is_over else "stopping"

        with self._view.showing(Work(label, pace, lambda: training.notes, stays=True)) as changed:

            def take(step: "Step") -> None:
                training.take(step)
                changed()

            try:
                yield take
            finally:
                pace.is_over = True


def follow(steps: Generator["Step", None, None], training: Training, display: Display, stop: threading.Event) -> None:
    """Runs through the steps while they are shown."""
    with closing(steps), display.training(training, stop) as take:
        for step in steps:
            take(step)
