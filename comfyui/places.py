"""Names from users that become paths: they stay inside ComfyUI's own folders."""

import itertools
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
    """The first free output/PREFIX_00001_ENDING; ValueError where the prefix leads out of the output folder.

    ComfyUI's own words in it, such as %date%, are read as by its other nodes.
    """
    root = folder_paths.get_output_directory()
    inside(root, prefix)
    folder, name, *_ = folder_paths.get_save_image_path(prefix, root)
    paths = (Path(folder) / f"{name}{ending.format(counter=counter)}" for counter in itertools.count(1))
    return next(path for path in paths if not path.exists())
