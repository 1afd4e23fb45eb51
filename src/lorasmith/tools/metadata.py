"""What a file says of itself, changed without a look at its tensors."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.reporting.progress import SILENT, Progress
from lorasmith.storage.atomic import copied, write_pieces
from lorasmith.storage.safetensors_header import Header, header_bytes
from lorasmith.tools.outputs import in_view, refuse_output
from lorasmith.tools.shareable import harmless

NAME = re.compile(r"[^=\s][^=]*")


@dataclass(frozen=True)
class Rewritten:
    """What a file says now, and which keys it no longer has, or has in part."""

    metadata: Mapping[str, str]
    left_out: Sequence[str]
    reduced: Sequence[str]


def changes_of(settings: Sequence[str]) -> dict[str, str]:
    """`key=value` each; ValueError where one is not."""
    changes = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not NAME.fullmatch(key):
            raise ValueError(f"set must be key=value, got {setting!r}")
        changes[key] = value
    return changes


def rewrite(
    source: Path,
    output: Path,
    *,
    changes: Mapping[str, str],
    strip: bool,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Rewritten:
    """Writes the file with other metadata, its tensors byte for byte the same.

    strip: nothing stays but what may be published (`harmless`); the changes are written as they are given.
    """
    refuse_output(output, overwrite=overwrite)
    header = Header.of(source)
    kept = harmless(header.metadata, header.shapes.keys()) if strip else header.metadata
    rewritten = Rewritten(
        {**kept, **changes},
        sorted(header.metadata.keys() - kept.keys()),
        sorted(key for key in kept if _parsed(kept[key]) != _parsed(header.metadata[key])),
    )
    pieces = _pieces(header, rewritten.metadata)
    write_pieces(output, in_view(pieces, source.stat().st_size, "copying", progress))
    return rewritten


def _pieces(header: Header, metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The new head, with the tensors in the order in which they lie, then their bytes as they are."""
    order = sorted(header.places, key=lambda key: header.places[key])
    entries = [(key, header.dtypes[key], header.shapes[key], header.num_bytes(key)) for key in order]
    yield header_bytes(entries, metadata)
    if order:
        yield from copied(header.path, header.places[order[0]][0], header.places[order[-1]][1])


def shown(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    """For people: sorted, JSON in values over several lines."""
    return [(key, _spread(value)) for key, value in sorted(metadata.items())]


def _spread(value: str) -> str:
    found = _parsed(value)
    return json.dumps(found, indent=1, ensure_ascii=False) if isinstance(found, dict | list) else value


def _parsed(value: str) -> Any:
    """JSON as what it stands for, other text as it is."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
