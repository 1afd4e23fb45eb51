"""The head of a safetensors file: names, shapes, dtypes, places and metadata, without the tensors."""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lorasmith.storage.not_safetensors import what_it_is

METADATA = "__metadata__"
PEFT_CONFIG = "lora_adapter_metadata"  # where diffusers keeps PEFT's configuration, among the metadata
MAX_AXES = 64  # of a tensor in torch
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]  # "F16", "BF16" and so on
    metadata: Mapping[str, str]
    places: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # first byte of each tensor, and the one behind
    scales: Mapping[str, str] = field(default_factory=dict)  # {weight: the tensor it is multiplied by}, where known

    @classmethod
    def of(cls, path: Path) -> "Header":
        """ValueError where it is no sound safetensors file."""
        if path.suffix.lower() in PICKLES:
            raise ValueError(
                f"{path} must be a safetensors file: a pickle ({path.suffix}) can run code when it is loaded"
            )
        try:
            if not path.is_file():
                found = ", got a folder" if path.is_dir() else ": file not found"
                raise ValueError(f"{path} must be a safetensors file{found}")
            with safe_open(path, framework="np"):  # which checks all of it: sizes, offsets, dtypes, UTF-8, depth
                return cls._parsed(path)
        except OSError as error:
            raise ValueError(f"{path} must be a safetensors file, but it cannot be read: {error}") from error
        except SafetensorError as error:
            found = what_it_is(path)
            reason = (
                f"{path} {found}" if found else f"{path} must be a safetensors file, but it cannot be read: {error}"
            )
            raise ValueError(reason) from error

    @classmethod
    def _parsed(cls, path: Path) -> "Header":
        """That of a sound file; ValueError where a name stands twice, of which readers see one."""
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(length), object_pairs_hook=lambda pairs: _once(path, pairs))
        metadata = entries.pop(METADATA, None) or {}
        shapes = {key: tuple(entry["shape"]) for key, entry in entries.items()}
        deep = next((key for key, shape in shapes.items() if len(shape) > MAX_AXES), None)
        if deep is not None:
            raise ValueError(f"{path}: {deep} must have at most {MAX_AXES} axes, got {len(shapes[deep])}")
        start = 8 + length
        places = {key: (start + e["data_offsets"][0], start + e["data_offsets"][1]) for key, e in entries.items()}
        return cls(path, shapes, {key: entry["dtype"] for key, entry in entries.items()}, metadata, places)

    def num_bytes(self, key: str) -> int:
        """Of a tensor."""
        begin, end = self.places[key]
        return end - begin

    @property
    def num_bytes_of_all(self) -> int:
        """Of all tensors together."""
        return sum(map(self.num_bytes, self.shapes))

    def shape(self, key: str) -> tuple[int, ...]:
        """ValueError where there is no such tensor."""
        if key not in self.shapes:
            raise ValueError(f"{self.path} must hold the tensor {key}, but it does not")
        return self.shapes[key]

    def holds(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.shapes)

    def count(self, prefix: str) -> int:
        """How many numbered parts there are: `prefix0.`, `prefix1.` …"""
        return len({key[len(prefix) :].partition(".")[0] for key in self.shapes if key.startswith(prefix)})


def _once(path: Path, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object as a dict; ValueError where a name stands twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{path} must name each tensor once, got {key} twice")
        found[key] = value
    return found


def header_bytes(entries: Sequence[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """The head of a file with tensors (name, dtype, shape, bytes) in this order; metadata sorted, as all files here."""
    header: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))}
    end = 0
    for key, dtype, shape, nbytes in entries:
        begin, end = end, end + nbytes
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
