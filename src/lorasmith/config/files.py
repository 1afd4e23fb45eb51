"""Files of settings: TOML is read, and what is wrong in it named with its line."""

import codecs
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasmith.config.settings import Setting, settings
from lorasmith.config.translation import listed
from lorasmith.config.unknown import Unknown, answered
from lorasmith.errors import Faults

TABLE = re.compile(r"\s*\[{1,2}\s*([^\[\]]+?)\s*\]{1,2}\s*(#.*)?")
ASSIGNMENT = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's values; ValueError where it is none, or has keys that are no settings: all of them at once."""
    text = read_text(path)
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    known = settings()
    _refuse_unknown(path, values, lines_of(text), known)
    _refuse_flags(values, "", known)
    return values


def read_text(path: Path) -> str:
    """A file's text without its byte order mark; ValueError where it cannot be read or is not UTF-8."""
    try:
        return path.read_bytes().decode().removeprefix("\ufeff")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        is_utf16 = error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        got = "UTF-16" if is_utf16 else f"byte {error.object[error.start]:#04x} at offset {error.start}"
        raise ValueError(f"{path} must be UTF-8 text, got {got}") from None


def lines_of(text: str) -> dict[str, int]:
    """{dotted key: the first line that gives it} of a TOML file, and of its texts of several lines."""
    found: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if match := TABLE.fullmatch(line):
            table = f"{_bare(match[1])}."
        elif match := ASSIGNMENT.match(line):
            found.setdefault(f"{table}{_bare(match[1])}", number)
    return found


def _bare(key: str) -> str:
    """A dotted key without quotes and spaces."""
    return ".".join(part.strip().strip("\"'") for part in key.split("."))


def located(message: str, path: Path, above: Mapping[str, Any]) -> str:
    """A message that begins with a key, with the file and line that give it; `above`: nested values on top of it."""
    key = message.partition(" ")[0]
    line = lines_of(read_text(path)).get(key)
    is_above = key in dict(_leaves(above))
    return message if line is None or is_above else f"{path} line {line}: {message}"


def _refuse_unknown(
    path: Path, values: Mapping[str, Any], lines: Mapping[str, int], known: Mapping[str, Setting]
) -> None:
    unknown = [Unknown(key, text_of(value), lines.get(key, 0)) for key, value in _leaves(values) if _is_new(key, known)]
    texts = [answered(one, known, as_toml=True).text for one in unknown]
    places = [f"line {one.line}: " if one.line else "" for one in unknown]
    if len(unknown) == 1:
        raise ValueError(f"{path} {places[0]}{texts[0]}")
    if unknown:
        found = (f"  {place}{text}" for place, text in zip(places, texts, strict=True))
        raise Faults(f"{path} has {len(unknown)} settings that are not lorasmith's:", *found)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values, lists of tables among them -> (dotted key, value)."""
    for name, value in values.items():
        tables = value if isinstance(value, list) and value and isinstance(value[0], dict) else [value]
        for inner in tables:
            if isinstance(inner, Mapping) and inner:
                yield from _leaves(inner, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", inner


def _is_new(key: str, known: Mapping[str, Setting]) -> bool:
    """Whether a key is no setting; a table that is none is left to the schema."""
    return (
        key not in known and key.removesuffix(".name") not in known and not any(k.startswith(f"{key}.") for k in known)
    )


def text_of(value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return listed([text_of(part) for part in value])
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None or isinstance(value, Mapping) else str(value)


def _refuse_flags(values: Mapping[str, Any], prefix: str, known: Mapping[str, Setting]) -> None:
    """ValueError where a number is given as true or false, which would count as 1 or 0."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            _refuse_flags(value, f"{key}.", known)
        elif isinstance(value, bool) and key in known and known[key].kind is not bool:
            raise ValueError(f"{key} must be {known[key].rule}, got {str(value).lower()}")
