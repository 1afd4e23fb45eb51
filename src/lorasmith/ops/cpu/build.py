"""Kernels in C, compiled once on the machine they run on: for what PyTorch is slow at on some processors.

They are chosen by what the processor has; without it, or without a compiler, PyTorch's own operations do the work.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.c")))
HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
FLAGS = (
    "-O3", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq",
    "-mavx512vl", "-mavx512bf16",
)  # fmt: skip
AMX_FLAGS = ("-mamx-tile", "-mamx-bf16")


class View(ctypes.Structure):
    """Where the numbers of a tensor [B, H, N, D] are; the last axis lies close."""

    _fields_ = [("data", ctypes.c_void_p), *((axis, ctypes.c_int64) for axis in ("batch", "head", "row"))]

    @classmethod
    def of(cls, x: Tensor) -> "View":
        return cls(x.data_ptr(), *x.stride()[:3])


def address(x: Tensor | None) -> ctypes.c_void_p:
    """Where the numbers of a tensor begin; nowhere for None."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


@cache
def library() -> ctypes.CDLL | None:
    """The kernels; None where the processor has no products of bf16 (AVX-512), or where they cannot be built."""
    if not (sys.platform == "linux" and torch.cpu._is_avx512_bf16_supported()):
        return None
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        log.info("no kernels of our own (%s): PyTorch's are used, which are slower here", _reason(error))
        return None


def _flags() -> tuple[str, ...]:
    """With the matrix unit for bf16 (AMX) where the processor has one and the system grants it."""
    has_tiles = torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()
    return (*FLAGS, *AMX_FLAGS) if has_tiles else FLAGS


class _Use:
    """How many are training with kernels of our own."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0

    def change(self, by: int) -> None:
        with self.lock:
            self.users += by


_USE = _Use()


@contextmanager
def in_use() -> Iterator[None]:
    """`kernels` gives the library as long as this is open."""
    _USE.change(1)
    try:
        yield
    finally:
        _USE.change(-1)


def kernels() -> ctypes.CDLL | None:
    """The library, while somebody trains with it and where there is one."""
    return library() if _USE.users else None


def _reason(error: Exception) -> str:
    told = getattr(error, "stderr", None) or str(error)
    return next((line for line in told.splitlines() if "error" in line.lower()), told.strip())[:200]


def _built() -> Path:
    """The library's file in the user's cache; it is named after what it is made of and after its own hash.

    Loading one that is cut off would end the process, so a file that has not the hash that it states is made again.
    """
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise OSError("there is no C compiler: cc, gcc or clang")
    flags = _flags()
    made_of = hashlib.sha256(repr((compiler, flags)).encode())
    for source in (*SOURCES, *HEADERS):
        made_of.update(source.read_bytes())
    cache, name = _cache(), f"kernels-{made_of.hexdigest()[:16]}"
    for path in cache.glob(f"{name}-*.so"):
        if path.stem == f"{name}-{_hash(path)}":
            return path
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        new = Path(folder, "kernels.so")
        command = [compiler, *flags, "-o", str(new), *map(str, SOURCES), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        return new.replace(cache / f"{name}-{_hash(new)}.so")


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _cache() -> Path:
    """A folder that the user alone writes to."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lorasmith")
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # a home that is read-only, or none
        pass
    return Path(tempfile.mkdtemp(prefix="lorasmith-"))
