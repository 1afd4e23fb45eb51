"""JSON files that hold a table, as configs and indexes do."""

import json
from pathlib import Path
from typing import Any

from lorasmith.storage.not_safetensors import stand_in


def json_table(path: Path) -> dict[str, Any]:
    """ValueError where there is something else, such as a pointer or a web page."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found = stand_in(path) if path.is_file() else None
        raise ValueError(f"{path} {found}" if found else f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a table, got {content!r:.50}")
    return content
