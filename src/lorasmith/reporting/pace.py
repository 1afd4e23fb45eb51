"""How fast work goes, averaged, and how long what is left of it takes; counts and durations in words."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch, which takes seconds
    from lorasmith.types import Step

WINDOW = 60.0  # seconds that a rate is averaged over
SMOOTHING = 0.9  # share of a mean loss that each step leaves of the earlier ones
WORTH_TELLING = 2.0  # seconds of a stage that people should hear of


class Pace:
    """Work of `total` pieces (None: unknown), `done` of which were done before; unit: what a line says they are."""

    def __init__(
        self, total: int | None, done: int = 0, clock: Callable[[], float] = time.monotonic, unit: str = ""
    ) -> None:
        self.total, self.done, self.clock, self.unit = total, done, clock, unit
        self.is_over = False  # with or without all of it done
        self.began = clock()
        self._marks = deque([(self.began, done)])  # times, and what was done by then, over the last WINDOW seconds

    def advance(self, count: int) -> None:
        now = self.clock()
        self.done += count
        self._marks.append((now, self.done))
        while len(self._marks) > 2 and self._marks[1][0] <= now - WINDOW:
            self._marks.popleft()

    @property
    def seconds(self) -> float:
        """Since the work began."""
        return self.clock() - self.began

    @property
    def rate(self) -> float | None:
        """Pieces a second; None before the first one, and for work that takes no time."""
        (first, before), (last, done) = self._marks[0], self._marks[-1]
        return (done - before) / (last - first) if last > first and done > before else None

    @property
    def seconds_left(self) -> float | None:
        """None where it cannot be told. It counts down from piece to piece; a piece that is late lowers the rate."""
        if self.total is None or self.rate is None:
            return None
        (first, before), (last, done) = self._marks[0], self._marks[-1]
        left, now = self.total - self.done, self.clock()
        if (now - last) * self.rate > 1:
            return left * (now - first) / (done - before + 1)
        return left / self.rate - (now - last)


@dataclass(frozen=True)
class Work:
    """One stage, as it is shown."""

    label: Callable[[], str]
    pace: Pace
    notes: Callable[[], Sequence[str]] = tuple  # the most important first
    stays: bool = False  # on the screen when it is done


class Training:
    """How far a training has come, over all of its steps; `earlier` ones belong to the LoRA that it continues."""

    def __init__(self, pace: Pace, *, earlier: int, steps_per_epoch: float) -> None:
        assert pace.total is not None
        self.pace, self.total = pace, pace.total
        self._earlier, self._steps_per_epoch = earlier, steps_per_epoch
        self.loss: float | None = None  # smoothed

    def take(self, step: "Step") -> None:
        """A step that is done; where the run went back in between, it may have an earlier number."""
        self.loss = step.loss if self.loss is None else SMOOTHING * self.loss + (1 - SMOOTHING) * step.loss
        self.pace.advance(step.step - self._earlier - self.pace.done)

    @property
    def epoch(self) -> int:
        """The pass over the pictures that the last step belongs to, counted from 1."""
        return max(1, math.ceil(self.pace.done / self._steps_per_epoch))

    @property
    def epochs(self) -> int:
        return math.ceil(self.total / self._steps_per_epoch)

    @property
    def notes(self) -> list[str]:
        """What a line says besides counts and time, the most important first."""
        loss = [] if self.loss is None else [f"loss {self.loss:.4f}"]
        rate = [] if self.pace.rate is None else [rate_of(self.pace.rate, "step")]
        return [f"epoch {self.epoch}/{self.epochs}", *loss, *rate]


def duration(seconds: float) -> str:
    """ "0:42" or "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def in_short(pace: Pace, notes: Sequence[str] = ()) -> list[str]:
    """What a line says of work whose total is known: "12/160" or "12/160 MB", notes, and "1:20 left" or "in 1:35"."""
    if pace.is_over or pace.done == pace.total:
        end = [f"in {duration(pace.seconds)}"]
    else:
        end = [] if pace.seconds_left is None else [f"{duration(pace.seconds_left)} left"]
    return [f"{pace.done}/{pace.total} {pace.unit}".rstrip(), *notes, *end]


def counted(number: int, what: str) -> str:
    """ "1 step" or "2 steps"."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def rate_of(rate: float, what: str) -> str:
    """ "2.21 steps/s" or, where one takes longer than a second, "3.10 s/step"."""
    return f"{rate:.3g} {what}s/s" if rate >= 1 else f"{1 / rate:.3g} s/{what}"
