"""Processes that meet in one store over several starts, as threads, and notice when one of them is gone."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import pytest
import torch
from torch.distributed import HashStore, PrefixStore, ProcessGroupGloo, Store

from lorasmith.distributed.rendezvous import LEFT, SILENT_BEATS, Watch, met, watched

SIZE = 3
T = TypeVar("T")


def by_rank(act: Callable[[int], T], late: int | None = None) -> list[T]:
    """What each rank's thread returned; the late one begins after the others have looked around."""

    def begun(rank: int) -> T:
        time.sleep(0.3 if rank == late else 0)
        return act(rank)

    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(begun, range(SIZE)))


@pytest.mark.parametrize("late", range(SIZE))
def test_each_start_meets_apart_from_those_before_it(late: int) -> None:
    """Sums over gloo are right in three starts by one store, which keeps the addresses of the first ones."""
    store = HashStore()

    def summed(rank: int) -> tuple[str, float]:
        prefix = met(store, rank, SIZE)
        group: Any = ProcessGroupGloo(PrefixStore(prefix, store), rank, SIZE, timedelta(seconds=5))
        value = torch.tensor([2.0**rank])
        group.allreduce([value]).wait()
        return prefix, value.item()

    starts = [by_rank(summed, late) for _ in range(3)]
    prefixes = [{prefix for prefix, _ in start} for start in starts]
    assert all(len(one) == 1 for one in prefixes) and len(set.union(*prefixes)) == 3
    assert {value for start in starts for _, value in start} == {7.0}


def test_who_has_not_started_is_named() -> None:
    def refused(store: Store, rank: int, size: int) -> str:
        with pytest.raises(ConnectionError) as error:
            met(store, rank, size, patience=0.3)
        return str(error.value)

    rest = "not started within 0.3 seconds; torchrun says why on the other machine"
    assert refused(HashStore(), 0, 3) == f"processes 1, 2 have {rest}"
    assert refused(HashStore(), 1, 3) == f"process 0 has {rest}"
    store = HashStore()  # the third is missing
    assert by_rank(lambda rank: "" if rank == 2 else refused(store, rank, 3))[:2] == [f"process 2 has {rest}"] * 2


class Unreachable(HashStore):
    """A store whose machine is gone: it refuses, or never answers."""

    def __init__(self, refusing: bool) -> None:
        super().__init__()
        self.refusing = refusing
        self.over = threading.Event()

    def set(self, key: str, value: str) -> None:
        if self.refusing:
            raise RuntimeError("Broken pipe")
        self.over.wait()


def store_of(size: int) -> HashStore:
    """One in which that many processes have met."""
    store = HashStore()
    for rank in range(size):
        store.set(str(rank), "")
    return store


def test_who_is_silent_is_named() -> None:
    """Processes that go on, and one that leaves, are not missed; the one that is killed is, by both others."""
    store, told = store_of(4), {0: list[str](), 1: list[str]()}
    with watched(store, 3, 4, told[0].append, beat=0.02):
        pass
    watches = [Watch(store, rank, [r for r in range(4) if r != rank], told[rank].append, beat=0.5) for rank in told]
    for number in range(1, SILENT_BEATS + 1):
        assert not told[0] and not told[1]
        for watch in watches:
            watch.look(str(number))
    assert told == {rank: ["process 2 has given no sign of life for 4 seconds"] for rank in range(2)}


@pytest.mark.parametrize("refusing", [True, False])
def test_a_store_that_is_gone_is_named(refusing: bool) -> None:
    told, heard, store = list[str](), threading.Event(), Unreachable(refusing)

    def tell(reason: str) -> None:
        told.append(reason)
        heard.set()

    with watched(store, 0, 2, tell, beat=0.02):
        assert heard.wait(10)
        store.over.set()
    assert told == ["the machine with torchrun's store does not answer"]


def test_processes_that_live_are_never_lost() -> None:
    """Also while one of them is slow, and after one has left without an error; beat by beat, whatever the load."""
    store, told = store_of(2), list[str]()
    one, other = (Watch(store, rank, [1 - rank], told.append, beat=1.0) for rank in range(2))
    for number in range(1, 40):
        one.look(str(number))
        if number % (SILENT_BEATS - 1) == 0:
            other.look(str(number))
    other.look(LEFT)
    for number in range(40, 60):
        one.look(str(number))
    assert not told
