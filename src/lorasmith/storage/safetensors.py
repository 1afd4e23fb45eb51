"""Safetensors files read and written tensor by tensor: no more than one of them is in memory at a time."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from lorasmith.storage.atomic import PARTIAL, copied, errors_name, write_pieces
from lorasmith.storage.safetensors_header import Header, header_bytes

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""{the format's name: torch's}, of those that are read."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Named = tuple[str, Tensor]


class TensorFile:
    """An open safetensors file. Tensors are read, not mapped: a mapped file that another program cuts ends the process.

    Nothing is read before it is asked for.
    """

    def __init__(self, header: Header) -> None:
        self.header = header
        with errors_name(header.path, "read"):
            self._file = header.path.open("rb")

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def tensor(self, key: str) -> Tensor:
        """ValueError where it is of a dtype that torch has not, or was cut off since the head was read."""
        dtype = DTYPES.get(self.header.dtypes[key])
        if dtype is None:
            raise ValueError(
                f"{self.header.path}: {key} must be of a dtype among {', '.join(DTYPES)}, got {self.header.dtypes[key]}"
            )
        tensor = torch.empty(self.header.shapes[key], dtype=dtype)
        memory = bytes_of(tensor)
        with errors_name(self.header.path, "read"):
            self._file.seek(self.header.places[key][0])
            num_read = self._file.readinto(memory)
        if num_read != len(memory):
            raise ValueError(f"{self.header.path} must not change while it is read, but it ends inside {key}")
        return tensor

    def pieces(self, key: str) -> Iterator[bytes]:
        """The bytes of a tensor, of whatever dtype."""
        begin, end = self.header.places[key]
        yield from copied(self.header.path, begin, end)


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's memory; of a copy where it does not lie in one piece on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class _Kept:
    """A tensor that waits in the file beside."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    @property
    def place(self) -> tuple[int, bool, str]:
        """Widest dtypes first, as the format asks; then by name, so that equal content makes equal bytes."""
        width = DTYPES[self.dtype].itemsize
        return (-width, self.dtype == "F16", self.key)


def write_streamed(path: Path, tensors: Iterable[Named], metadata: Callable[[], Mapping[str, str]]) -> None:
    """Writes tensors as they come, whole or not at all; metadata, which may tell of them, are asked for last.

    The tensors wait in a file beside, as the head, which comes first, is known last. ValueError where a name comes
    twice or a number is not finite, and whatever making the tensors raises.
    """
    waiting = path.with_name(f".{path.name}.{os.getpid()}.tensors{PARTIAL}")
    kept: dict[str, _Kept] = {}
    end = 0
    try:
        with errors_name(path), waiting.open("wb") as file:
            for key, tensor in tensors:
                if key in kept:
                    raise ValueError(f"{key} must be written once, but two layers have this name")
                if not tensor.isfinite().all():
                    raise ValueError(f"{key} must be finite to be saved, got NaN or infinity")
                kept[key] = _Kept(key, NAMES[tensor.dtype], tuple(tensor.shape), end, tensor.nbytes)
                file.write(bytes_of(tensor))
                end += tensor.nbytes
        order = sorted(kept.values(), key=lambda it: it.place)
        head = header_bytes([(it.key, it.dtype, it.shape, it.nbytes) for it in order], metadata())
        write_pieces(path, _joined(head, order, waiting))
    finally:
        with suppress(OSError):
            waiting.unlink(missing_ok=True)


def _joined(head: bytes, order: Iterable[_Kept], waiting: Path) -> Iterator[bytes]:
    yield head
    for it in order:
        yield from copied(waiting, it.begin, it.begin + it.nbytes)
