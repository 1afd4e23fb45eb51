"""The processes that train one LoRA together, started by torchrun (torch.distributed)."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lorasmith.distributed.rendezvous import COMING, met, watched

log = logging.getLogger(__name__)

T = TypeVar("T")
PATIENCE = timedelta(hours=1)  # of the others, while the first process generates or writes


@dataclass(frozen=True)
class World:
    """This process among `size`; a single process does not communicate."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of this machine

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's share of `count` items; shares are contiguous and in order."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def add_up(self, flat: Tensor) -> None:
        """Replaces the tensor, in place, by its sum over the processes; bitwise the same in all of them.

        ConnectionError if another process has died, as in all communication.
        """
        if self.size > 1:
            with _together(self.rank):
                dist.all_reduce(flat)

    def from_first(self, value: T) -> T:
        """The first process's value."""
        if self.size == 1:
            return value
        held: list[Any] = [value]
        with _together(self.rank):
            dist.broadcast_object_list(held, device=torch.device("cpu"))
        return held[0]

    def of_all(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            with _together(self.rank):
                dist.all_gather_object(values, value)
        return values


ALONE = World()


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world of torchrun's environment variables, while the context is open; without them a single process.

    device: "auto", "cpu", "cuda" …; gradients are sent by nccl between GPUs, otherwise by gloo.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    world = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    on_gpu = torch.cuda.is_available() and device.partition(":")[0] in ("auto", "cuda")
    if on_gpu:
        torch.cuda.set_device(world.local_rank)
    with _together(world.rank):
        store, apart = (next(dist.rendezvous("env://", timeout=timedelta(seconds=COMING)))[0] for _ in range(2))
        prefix = met(store, world.rank, size)
    with watched(dist.PrefixStore(prefix, apart), world.rank, size, partial(_end, world.rank)):
        store.set_timeout(PATIENCE)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        own = dist.PrefixStore(prefix, store)
        with _together(world.rank):
            dist.init_process_group(backend, store=own, rank=world.rank, world_size=size, timeout=PATIENCE)
        try:
            yield world
        finally:
            dist.destroy_process_group()


@contextmanager
def _together(rank: int) -> Iterator[None]:
    """ConnectionError in the place of torch's own."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConnectionError(f"process {rank} has lost another process: {reason}") from error


def _end(rank: int, reason: str) -> None:
    """Ends this process at once, as it may wait in a library for another one that will never come."""
    log.error("process %d ends: %s", rank, reason)
    os._exit(1)
