"""The node pack for ComfyUI, which this package carries, and its way into a ComfyUI."""

import os
import shutil
from pathlib import Path

from lorasmith.storage.atomic import errors_name

NAME = "lorasmith"  # of the folder in custom_nodes
MARK = "pyproject.toml"
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc")


def pack_path() -> Path:
    """Where the pack is: in the installed package, or beside its source."""
    inside, beside = Path(__file__).parents[1] / "comfyui", Path(__file__).parents[3] / "comfyui"
    return inside if inside.is_dir() else beside


def install(comfyui: Path) -> Path:
    """Copies the pack into a ComfyUI's custom_nodes, in the place of an older one, and returns its folder.

    ValueError where that is no ComfyUI, or where something else has the pack's name; OSError that names a path.
    """
    nodes = comfyui.expanduser() / "custom_nodes"
    if not nodes.is_dir():
        raise ValueError(f"PATH must be a ComfyUI folder, with custom_nodes in it, got {comfyui}")
    target = nodes / NAME
    if target.is_symlink() or (target.exists() and not _is_pack(target)):
        raise ValueError(f"{target} must be an earlier lorasmith or nothing, but it is something else: move it away")
    new, old = (nodes / f".{NAME}.{os.getpid()}.{word}" for word in ("new", "old"))
    try:
        with errors_name(target):
            shutil.copytree(pack_path(), new, ignore=IGNORED)
            if target.exists():
                target.rename(old)
            new.rename(target)
    finally:
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
    return target


def _is_pack(folder: Path) -> bool:
    mark = folder / MARK
    return mark.is_file() and f'name = "{NAME}"' in mark.read_text(encoding="utf-8", errors="replace")
