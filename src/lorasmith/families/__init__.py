"""The model families, and how a model is opened."""

import json
from pathlib import Path
from typing import Any

from lorasmith.families.sd import StableDiffusion

Family = StableDiffusion
FAMILIES = {"StableDiffusionPipeline": StableDiffusion}


def opened(model: Any) -> Family:
    """The family of a diffusers folder (a path) or pipeline; ValueError where it is neither."""
    if isinstance(model, str | Path):
        folder = Path(model).expanduser()
        return _family(_pipeline_name(folder), folder).from_folder(folder)
    return _family(type(model).__name__, model).from_pipeline(model)


def _family(name: str, source: Any) -> type[Family]:
    if name not in FAMILIES:
        what = source if isinstance(source, Path) else "model"
        raise ValueError(f"{what} must be a diffusers model of a kind among {', '.join(FAMILIES)}, got {name}")
    return FAMILIES[name]


def _pipeline_name(folder: Path) -> str:
    index = folder / "model_index.json"
    if not index.is_file():
        found = "no such folder" if not folder.exists() else "a file" if folder.is_file() else "a folder without it"
        raise ValueError(f"{folder} must be a diffusers folder with a model_index.json, got {found}")
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {index}: {error}") from error
    if not isinstance(content, dict) or "_class_name" not in content:
        raise ValueError(f"{index} must name the pipeline's _class_name, but it does not")
    return str(content["_class_name"])
