"""Denoisers whose nets have layers and shapes alone: of a folder's configs, a single file's head, or as published.

They are what is needed to find the layers of a LoRA. Their weights are on the meta device: nothing of them is loaded.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lorasmith.families import (
    FAMILIES,
    family_of,
    folder_of,
    is_file,
    original_of,
    pipeline_name,
    pipelines_of,
)
from lorasmith.families.components import MODULES, FolderComponents, OpenComponents, json_table
from lorasmith.families.file_components import FileComponents
from lorasmith.families.ldm_sizes import CLIP, OPEN_CLIP, text_config, unet_config
from lorasmith.families.pipeline import PipelineFamily
from lorasmith.families.published import Published
from lorasmith.families.sd import OpenPipeline
from lorasmith.families.single_file import check_kind
from lorasmith.families.texts import TextDenoiser
from lorasmith.families.weights import shaped
from lorasmith.header import Header
from lorasmith.types import Denoiser

NETS = ("unet", "transformer", "transformer_2")
"""The parts that adapters train on without text encoders."""


def skeleton(model: str | Path, *, with_texts: bool, with_weights: bool = False) -> tuple[Denoiser, Path]:
    """The denoiser of a diffusers folder, a single file or a hub id, and where its weights are.

    with_texts: with the text encoders, where they can have adapters. with_weights: of a hub id the weights are fetched
    too. ValueError where it is no model of a family here.
    """
    path = Path(model).expanduser()
    if is_file(path):
        return _of_file(Header.of(path), with_texts=with_texts), path
    folder = folder_of(model, () if with_weights else MODULES)
    return _of_folder(folder, with_texts=with_texts), folder


def published_skeleton(published: Published, *, with_texts: bool) -> Denoiser:
    """The denoiser of a published model."""
    texts = _texts(published.pipeline, with_texts=with_texts)
    parts = {
        name: _net(library, kind, config, published.name)
        for name, (library, kind, config) in published.parts.items()
        if name in (*NETS, *texts)
    }
    return _denoiser(published.pipeline, parts, published.settings)


def _of_folder(folder: Path, *, with_texts: bool) -> Denoiser:
    components, name = FolderComponents(folder), pipeline_name(folder)
    family_of(name, folder)
    parts = {}
    for part in (*NETS, *_texts(name, with_texts=with_texts)):
        if components.has(part):
            library, kind = components.index[part]
            parts[part] = _net(library, kind, json_table(folder / part / "config.json"), folder / part)
    return _denoiser(name, parts, components.index)


def _of_file(header: Header, *, with_texts: bool) -> Denoiser:
    original = original_of(header)
    if original is None:
        return _of_ldm(header, with_texts=with_texts)
    name = pipelines_of(original)[0]
    parts = {original.part: original.shaped(header, FileComponents(header, original, name).keys())}
    encoders = original.shaped_encoders(header) if with_texts else {}
    return _denoiser(name, {**parts, **encoders}, {})


def _of_ldm(header: Header, *, with_texts: bool) -> Denoiser:
    """Stable Diffusion 1.x and 2.x."""
    check_kind(header)
    parts = {"unet": _net("diffusers", "UNet2DConditionModel", unet_config(header), header.path)}
    if with_texts and (header.holds(CLIP) or header.holds(OPEN_CLIP)):
        parts["text_encoder"] = _net("transformers", "CLIPTextModel", text_config(header), header.path)
    return _denoiser("StableDiffusionPipeline", parts, {})


def _texts(pipeline: str, *, with_texts: bool) -> tuple[str, ...]:
    """The text encoders that can have adapters."""
    texts = FAMILIES[pipeline].TEXTS
    return tuple(texts.prefixes) if with_texts and texts else ()


def _net(library: str, kind: str, config: Mapping[str, Any], path: Path | str) -> Any:
    """ValueError where there is no such class, or the config makes none."""
    found = getattr(importlib.import_module(library), kind, None) if library in ("diffusers", "transformers") else None
    if found is None:
        raise ValueError(f"{path} must be of a class of diffusers or transformers, got {library}.{kind}")
    return shaped(found, config, path=path)


def _denoiser(pipeline: str, parts: Mapping[str, Any], settings: Mapping[str, Any]) -> Denoiser:
    """settings: the pipeline's own config. Its scheduler does not matter for layers."""
    pipe = SimpleNamespace(**dict.fromkeys(NETS), scheduler=SimpleNamespace(config={}), config=settings)
    pipe.__dict__.update(parts)
    kind = FAMILIES[pipeline]
    family = kind(OpenComponents(pipe)) if issubclass(kind, PipelineFamily) else kind(OpenPipeline(pipe))
    encoders = {name: part for name, part in parts.items() if name not in NETS}
    return TextDenoiser(family.denoiser, encoders, kind.TEXTS) if encoders and kind.TEXTS else family.denoiser
