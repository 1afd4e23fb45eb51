"""The model families, and how a model is opened."""

import json
from pathlib import Path
from typing import Any

from lorasmith.families.components import FolderComponents, OpenComponents
from lorasmith.families.flux import Flux
from lorasmith.families.folder import Folder
from lorasmith.families.hub import fetched, is_id
from lorasmith.families.pipeline import PipelineFamily
from lorasmith.families.sd import OpenPipeline, StableDiffusion
from lorasmith.families.sdxl import SDXL
from lorasmith.families.single_file import SingleFile
from lorasmith.families.texts import WithTexts
from lorasmith.families.wan import Wan
from lorasmith.header import PICKLES

Family = StableDiffusion | PipelineFamily | WithTexts
FAMILIES: dict[str, type[StableDiffusion | PipelineFamily]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": SDXL,
    "FluxPipeline": Flux,
    "WanPipeline": Wan,
}
"""{the pipeline's class in diffusers: its family}."""
FILES = (".safetensors", *PICKLES)


def opened(model: Any, *, with_texts: bool = False) -> Family:
    """The family of a diffusers folder, a single-file checkpoint, a hub id or a diffusers pipeline.

    with_texts: its denoiser holds the text encoders too, so that they can be trained. ValueError where it is none of
    them, or where its text encoders are not trained.
    """
    family = _opened(model)
    return WithTexts.of(family) if with_texts else family


def _opened(model: Any) -> StableDiffusion | PipelineFamily:
    if isinstance(model, str | Path):
        path = Path(model).expanduser()
        if path.is_file() or (path.suffix in FILES and not path.exists()):
            return StableDiffusion(SingleFile.opened(path))
        folder = fetched(model) if isinstance(model, str) and is_id(model) and not path.exists() else path
        kind = _family(_pipeline_name(folder), folder)
        return kind(FolderComponents(folder)) if issubclass(kind, PipelineFamily) else kind(Folder.opened(folder))
    kind = _family(type(model).__name__, model)
    return kind(OpenComponents(model)) if issubclass(kind, PipelineFamily) else kind(OpenPipeline(model))


def _family(name: str, source: Any) -> type[StableDiffusion | PipelineFamily]:
    if name not in FAMILIES:
        what = source if isinstance(source, Path) else "model"
        raise ValueError(f"{what} must be a diffusers model of a kind among {', '.join(FAMILIES)}, got {name}")
    return FAMILIES[name]


def _pipeline_name(folder: Path) -> str:
    index = folder / "model_index.json"
    if not index.is_file():
        found = "a folder without it" if folder.exists() else "no such folder"
        raise ValueError(f"{folder} must be a diffusers folder with a model_index.json, got {found}")
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {index}: {error}") from error
    if not isinstance(content, dict) or "_class_name" not in content:
        raise ValueError(f"{index} must name the pipeline's _class_name, but it does not")
    return str(content["_class_name"])
