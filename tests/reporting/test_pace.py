"""Rates and times left against their formulas; words for counts and durations."""

import pytest

from lorasmith.reporting.pace import WINDOW, Pace, Training, counted, duration, in_short, rate_of
from lorasmith.types import Step


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_rate_is_the_mean_over_the_last_minute() -> None:
    clock = Clock()
    pace = Pace(200, clock=clock)
    times = [5.0 * n for n in range(1, 5)] + [20 + 0.5 * n for n in range(1, 161)]  # slow ones first
    for clock.now in times:
        pace.advance(1)
        known = [t for t in (0.0, *times) if t <= clock.now]
        first = max((t for t in known if t <= clock.now - WINDOW), default=0.0)
        assert pace.rate == pytest.approx(sum(t > first for t in known) / (clock.now - first))
    assert pace.seconds_left == pytest.approx(36 / 2)
    clock.now += 0.25
    assert pace.seconds_left == pytest.approx(36 / 2 - 0.25), "it counts down between two pieces"
    clock.now += 60
    assert pace.seconds_left == pytest.approx(36 * 120.25 / 121), "a piece that is late lowers the rate"


def test_what_cannot_be_told_is_not() -> None:
    clock = Clock()
    unknown, begun, quick = Pace(None, clock=clock), Pace(10, clock=clock), Pace(10, clock=clock)
    quick.advance(1)
    clock.now = 4.0
    unknown.advance(2)
    assert (unknown.rate, unknown.seconds_left) == (0.5, None)
    assert (begun.rate, begun.seconds_left) == (quick.rate, quick.seconds_left) == (None, None)


def test_a_resumed_training_counts_from_its_first_step() -> None:
    clock = Clock()
    training = Training(Pace(100, 40, clock=clock), earlier=1000, steps_per_epoch=2.5)
    assert (training.epoch, training.epochs, training.loss) == (16, 40, None)
    clock.now = 2.0
    training.take(Step(1041, 2.0, 1e-4, 1.0, 1.5))
    training.take(Step(1042, 1.0, 1e-4, 1.0, 0.5))
    assert (training.epoch, training.pace.rate, training.pace.seconds_left) == (17, 1.0, 58.0)
    assert training.loss == pytest.approx(0.9 * 2 + 0.1 * 1)
    assert in_short(training.pace, training.notes) == [
        "42/100", "epoch 17/40", "loss 1.9000", "1 steps/s", "0:58 left"
    ]  # fmt: skip


def test_words() -> None:
    assert [counted(n, "step") for n in (0, 1, 2, 1000)] == ["0 steps", "1 step", "2 steps", "1,000 steps"]
    assert [duration(s) for s in (0.4, 61, 3599.6, 3723)] == ["0:00", "1:01", "1:00:00", "1:02:03"]
    assert [rate_of(r, "step") for r in (2.214, 0.25, 120)] == ["2.21 steps/s", "4 s/step", "120 steps/s"]
