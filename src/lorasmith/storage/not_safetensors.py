"""What lies in the place of a file: a Git LFS pointer, a web page, a file of another format, half a download."""

import codecs
import json
import struct
from collections.abc import Mapping
from pathlib import Path

NUM_BYTES = 512  # that are looked at
MAX_HEADER = 100_000_000  # bytes, by the format
POINTER = b"version https://git-lfs.github.com/spec/"
MAX_POINTER = 1024  # bytes, by its specification
TEXTS = (".json", ".txt", ".model")
"""What the configs, indexes and vocabularies in a model's folder are called."""
GGUF = "is a GGUF file, which cannot be read: use the model's safetensors in bf16, fp16 or fp8"
BEGINNINGS: Mapping[bytes, str] = {
    b"GGUF": GGUF,
    b"PK\x03\x04": "is a zip archive or a pickle of torch.save, not a safetensors file",
    b"\x80\x02": "is a pickle, not a safetensors file",
    b"\x1f\x8b": "is compressed with gzip: unpack it first",
}
"""{how files of another kind begin: what they are}."""
PAGES = (b"<!doctype", b"<html", b"<?xml")


def what_it_is(path: Path) -> str | None:
    """What a file that is no sound safetensors file is, to be put after its name; None where nothing shows it."""
    with path.open("rb") as file:
        start = file.read(NUM_BYTES)
    another = (what for beginning, what in BEGINNINGS.items() if start.startswith(beginning))
    return stand_in(path) or next(another, None) or _of_another_kind(start) or _cut(path, path.stat().st_size)


def stand_in(path: Path) -> str | None:
    """What a file of whatever format is that was not fetched, to be put after its name; None where nothing shows it."""
    with path.open("rb") as file:
        start = file.read(NUM_BYTES)
    if not start:
        return "is empty"
    if start.startswith(POINTER):
        return "is a Git LFS pointer, not the file itself: fetch it with git lfs pull"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(PAGES):
        return "is a web page (HTML), not the file itself: download that"
    return None if any(start) else "begins with zeros: its download was not finished"


def refuse_pointer(path: Path) -> None:
    """ValueError where there is a Git LFS pointer in the place of a file."""
    if path.is_file() and path.stat().st_size <= MAX_POINTER and path.read_bytes().startswith(POINTER):
        raise ValueError(f"{path} {stand_in(path)}")


def refuse_pointers(folder: Path) -> None:
    """ValueError where a text in a diffusers folder is a Git LFS pointer; weights are looked at when they are read."""
    for path in sorted((*folder.glob("*"), *folder.glob("*/*"))):
        if path.suffix in TEXTS:
            refuse_pointer(path)


def other_weights(folder: Path) -> str:
    """What a folder without safetensors files holds, to be put after its name."""
    found = sorted(folder.glob("*.gguf"))
    if found:
        return f"holds {found[0].name}, which {GGUF}"
    return "must hold safetensors weights: pickles can run code when they are loaded"


def _of_another_kind(start: bytes) -> str | None:
    """What a file is that does not begin as every safetensors file does: 8 bytes of length, then a brace."""
    if start[8:9] == b"{":
        return None
    if _is_text(start):
        return "must be a safetensors file, got text"
    is_short = len(start) < 9
    return f"must be a safetensors file, but {'is too short' if is_short else 'does not begin as one'}"


def _is_text(start: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)  # a letter may be cut in two at the end
    except UnicodeDecodeError:
        return start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return all(letter.isprintable() or letter.isspace() for letter in text)


def _cut(path: Path, size: int) -> str | None:
    """How much is missing of a file that begins as a safetensors file does."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER:
            return None
        if 8 + length > size:
            return f"is cut off: it ends inside its header of {length:,} bytes"
        header = file.read(length)
    try:
        entries = json.loads(header)
        end = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
        missing = 8 + length + end - size
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):  # of a header that is broken
        return None
    return f"is cut off: {missing:,} of its {8 + length + end:,} bytes are missing" if missing > 0 else None
