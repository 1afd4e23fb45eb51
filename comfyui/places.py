"""Names from users that become paths: they stay inside ComfyUI's own folders."""

from pathlib import Path

import folder_paths


def inside(root: str, name: str) -> Path:
    """The path of this name below the folder; ValueError where it would lead out of it."""
    base = Path(root).resolve()
    path = (base / name).resolve()
    if not name.strip() or not path.is_relative_to(base) or path == base:
        raise ValueError(f"a name must stay inside {base.name}, got {name!r}")
    return path


def output_path(prefix: str, ending: str) -> Path:
    """The next free output/PREFIX_00001_ENDING; ValueError where the prefix leads out of the output folder."""
    root = folder_paths.get_output_directory()
    inside(root, prefix)
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, root)
    while True:
        path = Path(folder) / f"{name}{ending.format(counter=counter)}"
        if not path.exists():
            return path
        counter += 1
