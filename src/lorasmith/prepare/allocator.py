"""Freed memory that the C library keeps between steps."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """On the processor, memory that is freed stays with the process for the next step, until this is closed.

    glibc gives large pieces back to the system at once, and each page that is fetched again costs a fault. Elsewhere
    nothing changes.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if device.type != "cpu" or not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, 32 * 2**20)  # the greatest there is
    libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(TRIM_THRESHOLD, 64 * 2**20)
        libc.malloc_trim(0)
