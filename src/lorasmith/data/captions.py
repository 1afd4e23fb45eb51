"""Captions as files hold them: a text beside each image, or a table as Hugging Face's datasets read it."""

import codecs
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorasmith.storage.not_safetensors import refuse_pointer

TABLES = ("metadata.jsonl", "metadata.csv")  # in order of preference
NAME, CAPTIONS = "file_name", ("text", "caption", "prompt")  # the columns, those of captions in order of preference


def lines(text: str) -> list[str]:
    """The lines that are not empty."""
    return [stripped for line in text.splitlines() if (stripped := line.strip())]


def text_of(path: Path) -> str:
    """What a file of text says: UTF-8, or UTF-16 with its mark; ValueError where it is neither."""
    refuse_pointer(path)
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    try:
        text = content.decode(encoding).removeprefix("\ufeff")  # not utf-8-sig: its errors count from behind the mark
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#04x} at offset {error.start}"
        raise ValueError(f"caption {path} must be UTF-8, got {got}") from None
    if "\0" in text:
        raise ValueError(f"caption {path} must be UTF-8, got a NUL at character {text.index(chr(0))}")
    return text


def captions_in(path: Path) -> dict[str, str]:
    """{an image's path relative to the table's folder: its caption}; rows without either are left out.

    ValueError where the table is cut off or is none.
    """
    captions: dict[str, str] = {}
    for row in _rows(path):
        texts = [text for column in CAPTIONS if isinstance(text := row.get(column), str)]
        if isinstance(name := row.get(NAME), str) and texts:
            captions[name] = texts[0]
    return captions


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    text = text_of(path)
    if path.suffix.lower() == ".csv":
        try:
            yield from csv.DictReader(io.StringIO(text, newline=""), strict=True)
        except csv.Error as error:
            raise ValueError(f"{path} must be a CSV table: {error}") from None
        return
    for number, line in enumerate(io.StringIO(text), 1):  # splitlines() also cuts at characters that JSON allows
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} must be a JSON object a line, line {number} is none: {error.msg}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path} must be a JSON object a line, line {number} is a {type(row).__name__}")
            yield row
