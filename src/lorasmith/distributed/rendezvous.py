"""How processes that start together find each other in a store, and notice when one of them is gone."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from uuid import uuid4

from torch.distributed import PrefixStore, Store

POLL = 0.1  # seconds
COMING = 50.0  # seconds for all processes of a start to come
BEAT = 5.0  # seconds between two signs of life
SILENT_BEATS = 8  # without one, after which a process counts as lost
LEFT = "left"
NO_STORE = "the machine with torchrun's store does not answer"


def met(store: Store, rank: int, size: int, patience: float = COMING) -> str:
    """A prefix for what this start writes to the store; every process of the start calls this and gets the same.

    torchrun keeps one store over its restarts, with what processes left in it that have died since, and each machine
    counts its own restarts. So each process leaves a fresh random name. The first process answers every name that it
    sees with its own, which is the prefix, until all others have acknowledged it. Below the prefix each process's rank
    is a key then. ConnectionError where a process has not started in time.
    """
    name, others = uuid4().hex, list(range(1, size))
    if rank == 0:
        own, missing = PrefixStore(name, store), others
        for _ in _polls(patience):
            _answer(store, missing, name)
            if not (missing := _missing(own, others)):
                own.set("0", "")
                return name
        raise _not_started(missing, patience)

    answer = f"answer to {name}"
    store.set(_key(rank), name)
    if not any(store.check([answer]) for _ in _polls(patience)):
        raise _not_started([0], patience)
    prefix = store.get(answer).decode()
    own = PrefixStore(prefix, store)
    own.set(str(rank), "")
    if not any(own.check(["0"]) for _ in _polls(patience)):
        raise _not_started(_missing(own, others) or [0], patience)
    return prefix


def _key(rank: int) -> str:
    return f"name of process {rank}"


def _answer(store: Store, ranks: Iterable[int], answer: str) -> None:
    for rank in ranks:
        if store.check([_key(rank)]):
            store.set(f"answer to {store.get(_key(rank)).decode()}", answer)


def _missing(store: Store, ranks: Iterable[int]) -> list[int]:
    return [rank for rank in ranks if not store.check([str(rank)])]


def _polls(patience: float) -> Iterator[None]:
    end = time.monotonic() + patience
    yield
    while time.monotonic() < end:
        time.sleep(POLL)
        yield


def _not_started(ranks: Sequence[int], patience: float) -> ConnectionError:
    names = ", ".join(map(str, ranks))
    which = f"process {names} has" if len(ranks) == 1 else f"processes {names} have"
    return ConnectionError(f"{which} not started within {patience:g} seconds; torchrun says why on the other machine")


@contextmanager
def watched(store: Store, rank: int, size: int, lose: Callable[[str], None], *, beat: float = BEAT) -> Iterator[None]:
    """While this is open, a thread gives signs of life in the store and looks for those of the others.

    store: below the prefix of `met`, by a connection of its own, as one blocks while somebody waits for a key.
    lose: called once, in a thread, with what is lost, a process or the store. Nobody misses a process that has left
    without an error.
    """
    watch = Watch(store, rank, [other for other in range(size) if other != rank], lose, beat)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        yield
        watch.sign = LEFT
    finally:
        watch.is_over.set()
        thread.join(beat)  # no longer where the store does not answer


@dataclass
class Watch:
    store: Store
    rank: int
    others: list[int]
    lose: Callable[[str], None]
    beat: float
    sign: str = ""
    is_over: threading.Event = field(default_factory=threading.Event)
    seen: dict[int, bytes] = field(default_factory=dict)  # the others' last signs
    silent: Counter[int] = field(default_factory=Counter)  # beats since each of the others gave another one

    def run(self) -> None:
        """Counts beats rather than seconds, so that a computer that sleeps loses nobody."""
        for number in count(1):
            is_last = self.is_over.wait(self.beat)
            self.look(self.sign or str(number))
            if is_last or self.is_over.is_set():
                return

    def look(self, sign: str) -> None:
        """One beat: gives this sign, and notices who has given none for too long."""
        for other, own in zip(self.others, self._exchanged(sign), strict=False):
            is_silent = own == self.seen.get(other, b"") and own != LEFT.encode()
            self.silent[other] = self.silent[other] + 1 if is_silent else 0
            self.seen[other] = own
            if self.silent[other] >= SILENT_BEATS:
                self._lost(f"process {other} has given no sign of life for {SILENT_BEATS * self.beat:g} seconds")

    def _exchanged(self, sign: str) -> list[bytes]:
        """The others' signs after this one is given; none where the store is lost."""
        guard = threading.Timer(SILENT_BEATS * self.beat, self._lost, [NO_STORE])
        guard.daemon = True
        guard.start()
        try:
            self.store.set(str(self.rank), sign)
            return self.store.multi_get([str(other) for other in self.others])
        except RuntimeError:
            self._lost(NO_STORE)
            return []
        finally:
            guard.cancel()

    def _lost(self, what: str) -> None:
        if not self.is_over.is_set():
            self.is_over.set()
            self.lose(what)
