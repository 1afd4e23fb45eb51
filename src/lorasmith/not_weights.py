"""What lies in the place of a safetensors file: a pointer, a web page, a file of another format, half a download."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

NUM_BYTES = 512  # that are looked at
MAX_HEADER = 100_000_000  # bytes, by the format
BEGINNINGS: Mapping[bytes, str] = {
    b"version https://git-lfs.github.com/spec/": (
        "is a Git LFS pointer, not the weights: fetch them with git lfs pull"
    ),
    b"GGUF": "is a GGUF file, which cannot be read: use the model's safetensors in bf16, fp16 or fp8",
    b"PK\x03\x04": "is a zip archive or a pickle of torch.save, not a safetensors file",
    b"\x80\x02": "is a pickle, not a safetensors file",
    b"\x1f\x8b": "is compressed with gzip: unpack it first",
}
"""{how files of another kind begin: what they are}."""
PAGES = (b"<!doctype", b"<html", b"<?xml")


def what_it_is(path: Path) -> str | None:
    """What a file that is no sound safetensors file is, to be put after its name; None where nothing shows it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(NUM_BYTES)
    if not size:
        return "is empty"
    for beginning, what in BEGINNINGS.items():
        if start.startswith(beginning):
            return what
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(PAGES):
        return "is a web page (HTML), not the weights: download the file itself"
    if not any(start):
        return "begins with zeros: its download was not finished"
    return _cut(path, size)


def _cut(path: Path, size: int) -> str | None:
    """How much is missing of a file that begins as a safetensors file does."""
    with path.open("rb") as file:
        beginning = file.read(9)
        if len(beginning) < 9 or beginning[8:] != b"{":
            return None
        (length,) = struct.unpack("<Q", beginning[:8])
        if length > MAX_HEADER:
            return None
        if 8 + length > size:
            return f"is cut off: it ends inside its header of {length:,} bytes"
        header = b"{" + file.read(length - 1)
    try:
        entries = json.loads(header)
        end = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
        missing = 8 + length + end - size
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):  # of a header that is broken
        return None
    return f"is cut off: {missing:,} of its {8 + length + end:,} bytes are missing" if missing > 0 else None
