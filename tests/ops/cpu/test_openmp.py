"""How OpenMP's threads wait: what the kernel counts while they do, and when the way of waiting changes."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from ctypes import CDLL
from pathlib import Path

import pytest
import torch

from lorasmith.ops.cpu import openmp
from lorasmith.ops.cpu.openmp import CoreTimes, IdleTeam, Watch, cores_shared, loaded_libgomps

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="libgomp's own rule")

SLEEPS = """
import threading
from pathlib import Path

import torch

from lorasmith.ops.cpu.openmp import IdleTeam

torch.set_num_threads(2)
x = torch.zeros(1 << 20)


def num_sleeps():
    found = 0
    for status in Path("/proc/self/task").glob("*/status"):
        found += sum(int(line.split()[1]) for line in status.read_text().splitlines() if line[:9] == "voluntary")
    return found


def sleeps_of_regions():
    x.add_(1)
    before = num_sleeps()
    for _ in range(200):
        x.add_(1)
    return num_sleeps() - before


spinning = sleeps_of_regions()
team = IdleTeam()
while threading.active_count() == 1 or len(list(Path("/proc/self/task").iterdir())) < 4:
    pass
asleep = sleeps_of_regions()
team.close()
print(spinning, asleep, sleeps_of_regions())
"""


@pytest.mark.slow
def test_threads_sleep_between_regions_while_an_idle_team_is_there() -> None:
    """A region ends with a barrier and the next begins with one: threads that sleep do so at least once in each."""
    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("two threads on one core never spin")
    environment = {name: value for name, value in os.environ.items() if name not in openmp.FIXED_BY}
    printed = subprocess.check_output([sys.executable, "-c", SLEEPS], env=environment, text=True)
    spinning, asleep, spinning_again = map(int, printed.split())
    assert asleep >= 200
    assert max(spinning, spinning_again) < 200


class Load:
    """A clock that goes on by a second at each look, while `others` cores work for other programs and 2 for us."""

    def __init__(self) -> None:
        self.others = 0.0
        self.times = CoreTimes(0, 0, 0)

    def __call__(self) -> CoreTimes:
        clock, all_work, own_work = self.times
        self.times = CoreTimes(clock + 1, all_work + 2 + self.others, own_work + 2)
        return self.times


@pytest.fixture
def load() -> Load:
    return Load()


@pytest.fixture
def watch(load: Load) -> Iterator[Watch]:
    watch = Watch(load)
    watch.start()
    yield watch
    watch.close()


@pytest.mark.parametrize(
    ("before", "others", "has_team"), [(0, 0.05, False), (0, 0.15, False), (0, 1, True), (1, 0.15, True), (1, 0, False)]
)
def test_threads_sleep_while_others_are_busy_and_change_little(
    monkeypatch: pytest.MonkeyPatch, load: Load, before: float, others: float, has_team: bool
) -> None:
    watch = Watch(load)
    load.others = before
    watch.look()
    load.others = others
    watch.look()
    assert (watch.team is not None) == has_team
    if watch.team is not None:
        watch.team.close()


def test_a_team_is_made_anew_when_another_libgomp_is_loaded(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(load)
    load.others = 1
    watch.look()
    first = watch.team
    watch.look()
    assert watch.team is first
    monkeypatch.setattr(openmp, "loaded_libgomps", lambda: [*loaded_libgomps()] * 2)
    watch.look()
    assert watch.team is not first and watch.team is not None
    watch.team.close()


def test_every_libgomp_is_found(tmp_path: Path) -> None:
    """torch's wheels on PyPI bring one under a name of its own, beside the system's that kernels are linked to."""
    (own,) = loaded_libgomps()
    copy = shutil.copy(own, tmp_path / "libgomp-a34b3233.so.1")
    CDLL(str(copy))
    assert set(loaded_libgomps()) == {own, str(copy)}


def test_the_work_of_others_is_what_is_not_ours() -> None:
    before, after = CoreTimes(0, 10, 5), CoreTimes(2, 13, 6)
    assert after.others_since(before) == 1
    assert before._replace(clock=1).others_since(before) == 0


def test_times_of_this_machine_go_on() -> None:
    before = CoreTimes.now()
    torch.zeros(1 << 22).add_(1)
    now = CoreTimes.now()
    assert now.clock > before.clock and now.own_work > before.own_work and now.all_work >= before.all_work


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_nothing_is_watched_with_one_thread_or_where_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    with cores_shared():
        assert "CPU load" not in names()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for name in openmp.FIXED_BY:
        monkeypatch.delenv(name, raising=False)
    with cores_shared():
        assert "CPU load" in names()
    assert "CPU load" not in names()
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    with cores_shared():
        assert "CPU load" not in names()


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_a_closed_team_takes_its_threads_along() -> None:
    before, deadline = num_threads(), time.monotonic() + 30
    IdleTeam().close()
    while num_threads() > before and time.monotonic() < deadline:  # threads end a moment after they are told to
        time.sleep(0.01)
    assert num_threads() <= before
