"""What a file says of itself, changed without a look at its tensors."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lorasmith.files.outputs import refuse_output
from lorasmith.header import Header, header_bytes
from lorasmith.tensor_file import copied
from lorasmith.whole import write_pieces

PRIVATE = (
    "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_datasets", "ss_tag_frequency", "ss_bucket_info",
    "ss_output_name", "ss_session_id", "ss_training_comment", "ss_training_started_at", "ss_training_finished_at",
    "ss_sample_prompts", "ss_wandb_run_name", "prompt", "workflow", "parameters", "lorasmith.config",
    "lorasmith.history", "modelspec.author", "modelspec.date", "modelspec.thumbnail", "training_info",
    "user", "hostname",
)  # fmt: skip
"""The keys that tell of captions, prompts, folders, people and times."""
PATH = re.compile(
    r"(?:^|[\s\"'=:,(\[])(?:/(?:home|Users|root|mnt|media|data|workspace|content|kaggle|tmp|var|opt|srv)/|~/|[A-Za-z]:\\|\\\\\w)"
)
"""What a path of somebody's machine looks like in a value."""
NAME = re.compile(r"[^=\s][^=]*")


def private_keys(metadata: Mapping[str, str]) -> list[str]:
    """The keys that are private by their name, or whose value holds a path of a machine."""
    return sorted(key for key, value in metadata.items() if key in PRIVATE or PATH.search(value))


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
    source: Path, output: Path, *, changes: Mapping[str, str], strip: bool, overwrite: bool = False
) -> tuple[Mapping[str, str], list[str]]:
    """Writes the file with other metadata, its tensors byte for byte the same; returns them, and the keys taken out."""
    refuse_output(output, overwrite=overwrite)
    header = Header.of(source)
    removed = private_keys(header.metadata) if strip else []
    metadata = {key: value for key, value in header.metadata.items() if key not in removed} | dict(changes)
    write_pieces(output, _pieces(header, metadata))
    return metadata, removed


def _pieces(header: Header, metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The new head, with the tensors in the order in which they lie, then their bytes as they are."""
    order = sorted(header.places, key=lambda key: header.places[key])
    entries = [(key, header.dtypes[key], header.shapes[key], header.num_bytes(key)) for key in order]
    yield header_bytes(entries, metadata)
    if order:
        yield from copied(header.path, header.places[order[0]][0], header.places[order[-1]][1])


def shown(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    """Sorted, JSON in values laid out plainly."""
    return [(key, _plain(value)) for key, value in sorted(metadata.items())]


def _plain(value: str) -> str:
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return json.dumps(found, indent=1, ensure_ascii=False) if isinstance(found, dict | list) else value
