"""How OpenMP's threads wait for each other: spinning while the cores are free, asleep while other programs need them.

Between two parallel regions the threads of libgomp, which PyTorch and the native kernels use on Linux, spin for some
milliseconds. Where another program occupies a core, each of them then spins for a thread that has no core to run on,
and a small net becomes fifteen times slower. Asleep they lose little beside other programs, but 40 % alone.
libgomp sets this once, from the environment, with one exception that it documents under GOMP_SPINCOUNT: while there are
more OpenMP threads than cores, threads sleep almost at once. So a second team of idle threads, kept for as long as
other programs are busy, switches the waiting and nothing else: results stay the same bit for bit.
"""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

PERIOD = 0.5  # seconds between two looks at the load
BUSY, QUIET = 0.2, 0.1  # cores that other programs use: above the one, threads sleep; below the other, they spin
FIXED_BY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # whoever sets one of these has chosen
_STAT, _MAPS = Path("/proc/stat"), Path("/proc/self/maps")


class CoreTimes(NamedTuple):
    """Seconds so far: on the clock, of all work on the cores that this process may use, and of its own work."""

    clock: float
    all_work: float
    own_work: float

    @classmethod
    def now(cls) -> "CoreTimes":
        """Time that a hypervisor took away counts as work. Linux only."""
        cores, ticks = {f"cpu{core}" for core in os.sched_getaffinity(0)}, 0
        for line in _STAT.read_text().splitlines():
            name, *fields = line.split()
            if name in cores:
                user, nice, system, _idle, _iowait, irq, softirq, steal, *_guests = map(int, fields)
                ticks += user + nice + system + irq + softirq + steal
        return cls(time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time())

    def others_since(self, before: "CoreTimes") -> float:
        """How many cores other programs kept busy, on average."""
        work = (self.all_work - before.all_work) - (self.own_work - before.own_work)
        return max(0.0, work / (self.clock - before.clock))


class IdleTeam:
    """OpenMP threads with nothing to do, one more than there are cores, in every libgomp that is loaded."""

    def __init__(self) -> None:
        self.libraries = loaded_libgomps()
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="idle OpenMP team", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        """A team lives as long as the thread that began its first parallel region."""
        nothing_to_do = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)
        num_threads = ctypes.c_uint(len(os.sched_getaffinity(0)) + 1)
        for path in self.libraries:
            ctypes.CDLL(path).GOMP_parallel(nothing_to_do, None, num_threads, ctypes.c_uint(0))
        self._leave.wait()

    def close(self) -> None:
        self._leave.set()
        self._thread.join()


def loaded_libgomps() -> list[str]:
    """Paths of PyTorch's own libgomp, and of the system's where the native kernels were linked to that one."""
    fields = (line.split() for line in _MAPS.read_text().splitlines())
    return list(dict.fromkeys(line[5] for line in fields if len(line) == 6 and "/libgomp" in line[5]))


class Watch:
    """Looks at the load again and again, and keeps an idle team while other programs are busy."""

    def __init__(self, now: Callable[[], CoreTimes] = CoreTimes.now) -> None:
        self.team: IdleTeam | None = None
        self._now, self._before = now, now()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="CPU load", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()
        self._spin()

    def look(self) -> None:
        """Acts on what other programs did since the last look."""
        now = self._now()
        others, self._before = now.others_since(self._before), now
        if self.team is not None and (others < QUIET or self.team.libraries != loaded_libgomps()):
            self._spin()
        if self.team is None and others > BUSY:
            self.team = IdleTeam()

    def _follow(self) -> None:
        while not self._end.wait(PERIOD):
            self.look()

    def _spin(self) -> None:
        if self.team is not None:
            self.team.close()
            self.team = None


@contextmanager
def cores_shared() -> Iterator[None]:
    """While this is open, threads wait as suits the load. No effect with one thread, or where OpenMP is not libgomp."""
    if not sys.platform == "linux" or torch.get_num_threads() == 1 or any(name in os.environ for name in FIXED_BY):
        yield
        return
    watch = Watch()
    watch.start()
    try:
        yield
    finally:
        watch.close()
