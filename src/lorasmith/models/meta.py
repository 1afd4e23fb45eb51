"""Denoisers whose nets have layers and shapes alone: of a folder's configs, a single file's head, or as published.

They are what is needed to find the layers of a LoRA. Their weights are on the meta device: nothing of them is loaded.
"""

import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lorasmith.adapters.registry import needs_weight
from lorasmith.adapters.targets import TEXT_NETS
from lorasmith.formats.architectures.architecture import Published
from lorasmith.formats.keys import split
from lorasmith.formats.module_names import ModuleNames
from lorasmith.models.checkpoints.load import shaped
from lorasmith.models.checkpoints.scaled import weights_only
from lorasmith.models.load import architecture_of, beside, family_of, folder_of, original_of
from lorasmith.models.sources.components import FolderComponents, OpenComponents
from lorasmith.models.sources.folder_layout import MODULES
from lorasmith.models.sources.kind import is_file, pipeline_name
from lorasmith.models.sources.single_file import FileComponents
from lorasmith.models.text_encoders import TextDenoiser
from lorasmith.storage.json_files import json_table
from lorasmith.storage.safetensors_header import Header
from lorasmith.types import Denoiser

NETS = ("unet", "transformer", "transformer_2")
"""The parts that adapters train on without text encoders."""


def skeleton(
    model: str | Path, *, with_texts: bool, with_weights: bool = False, encoders: str | Path | None = None
) -> tuple[Denoiser, Path]:
    """The denoiser of a diffusers folder, a single file or a hub id, and where its weights are.

    with_texts: with the text encoders, where they can have adapters. with_weights: of a hub id the weights are fetched
    too. encoders: for a single file, the folder or hub id of what it lacks. ValueError where it is no model of a
    family here.
    """
    path = Path(model).expanduser()
    if is_file(path):
        return _of_file(weights_only(Header.of(path)), with_texts=with_texts, encoders=encoders), path
    folder = folder_of(model, () if with_weights else MODULES)
    return _of_folder(folder, with_texts=with_texts), folder


def skeleton_for(
    model: str | Path, encoders: str | Path | None, lora: Header | None, *, with_texts: bool
) -> tuple[Denoiser, Path | None]:
    """The denoiser of a model, with its text encoders where they are asked for or a LoRA has layers of them.

    Also returns where its weights are, if the LoRA cannot be understood without them. ValueError where text encoders
    are asked for and cannot be trained.
    """
    needs_weights = lora is not None and needs_weight(split(key)[1] for key in lora.shapes)
    needs_names = with_texts or lora is not None
    denoiser, path = skeleton(model, with_texts=needs_names, with_weights=needs_weights, encoders=encoders)
    if with_texts and not isinstance(denoiser, TextDenoiser):
        raise ValueError("text_encoder.train must be false for this model: it has no text encoders to be trained")
    if isinstance(denoiser, TextDenoiser) and not with_texts and lora is not None:
        denoiser = denoiser if _has_texts(denoiser, lora.shapes) else denoiser.inner
    return denoiser, path if needs_weights else None


def _has_texts(denoiser: TextDenoiser, keys: Iterable[str]) -> bool:
    """Whether some keys of a LoRA file are of text encoders' layers."""
    names = ModuleNames(denoiser)
    for layer in {split(key)[0] for key in keys}:
        path, whole = names.path(layer), names.whole(layer)
        paths = (path,) if path else whole.paths if whole else ()
        if any(path.startswith(TEXT_NETS) for path in paths):
            return True
    return False


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
    parts = _parts(components, (*NETS, *_texts(name, with_texts=with_texts)))
    return _denoiser(name, parts, components.index)


def _parts(folder: FolderComponents, names: Sequence[str]) -> dict[str, Any]:
    """Those of these parts that a diffusers folder has."""
    parts = {}
    for part in names:
        if folder.has(part):
            library, kind = folder.index[part]
            path = folder.path / part
            parts[part] = _net(library, kind, json_table(path / "config.json"), path)
    return parts


def _of_file(header: Header, *, with_texts: bool, encoders: str | Path | None) -> Denoiser:
    architecture = architecture_of(header)
    original = original_of(architecture)
    name, folder = beside(encoders, architecture, without=MODULES)
    components = FileComponents(header, original, name, folder)
    parts = {original.part: original.shaped(header, components.keys(), components.part_config(original.part))}
    if folder is not None:
        parts |= _parts(folder, _texts(name, with_texts=with_texts))
    if with_texts:  # the folder's are used where the file's are not read
        own = original.shaped_encoders(header)
        parts = parts | own if original.holds_encoders(header) else own | parts
    return _denoiser(name, parts, {})


def _texts(pipeline: str, *, with_texts: bool) -> tuple[str, ...]:
    """The text encoders that can have adapters."""
    texts = family_of(pipeline, None).TEXTS
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
    kind = family_of(pipeline, None)
    denoiser = kind(OpenComponents(pipe)).denoiser
    encoders = {name: part for name, part in parts.items() if name not in NETS}
    return TextDenoiser(denoiser, encoders, kind.TEXTS) if encoders and kind.TEXTS else denoiser
