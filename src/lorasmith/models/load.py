"""The model families, and how a model is loaded."""

import importlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from lorasmith.formats.architectures.architecture import UNETS, Architecture
from lorasmith.formats.architectures.registry import ARCHITECTURES
from lorasmith.formats.architectures.sd import SD1
from lorasmith.formats.detect import FOLDER_PART, model_family
from lorasmith.models.checkpoints.load import tensors_that
from lorasmith.models.checkpoints.original import Original
from lorasmith.models.checkpoints.scaled import weights_only
from lorasmith.models.families.base import PipelineFamily
from lorasmith.models.sources.components import FolderComponents, OpenComponents
from lorasmith.models.sources.folder_layout import MODULES, weight_files
from lorasmith.models.sources.hub import fetched
from lorasmith.models.sources.kind import is_file, is_id, pipeline_name, refuse_lora
from lorasmith.models.sources.single_file import VAES, FileComponents
from lorasmith.models.text_encoders import WithTexts
from lorasmith.reporting.progress import SILENT, Progress
from lorasmith.storage.not_safetensors import refuse_pointers
from lorasmith.storage.safetensors_header import Header

Family = PipelineFamily | WithTexts
FAMILIES = {name: family for architecture in ARCHITECTURES for name, family in architecture.pipelines.items()}
"""{the pipeline's class in diffusers: its family, as module.Class in `models/families`}."""


def load_model(model: Any, encoders: str | Path | None = None, *, with_texts: bool = False) -> Family:
    """The family of a diffusers folder, a single-file checkpoint, a hub id or a diffusers pipeline.

    encoders: for a single file, a diffusers folder or hub id with the components it lacks. with_texts: the denoiser
    includes the text encoders, so that they can be trained. ValueError if one of these is unsuitable.
    """
    family = _load_family(model, encoders)
    return WithTexts.of(family) if with_texts else family


def located(model: str, encoders: str | None, progress: Progress = SILENT) -> tuple[Path, Path | None]:
    """Where a model and the encoders beside it are on this machine; what hub ids name is fetched.

    ValueError where one of them cannot be.
    """
    path = Path(model).expanduser()
    if encoders is None:
        return (path if is_file(path) else folder_of(model, progress=progress)), None
    own = original_of(architecture_of(weights_only(Header.of(path)))).part
    return path, folder_of(encoders, (own,), progress)


def bytes_to_load(path: Path, encoders: Path | None) -> int:
    """About how large the weights are that a model on this machine is loaded from; ValueError where it is no sound one.

    encoders: the folder of what a single file lacks.
    """
    if not is_file(path):
        return _bytes_in(FolderComponents(path), MODULES)
    header = Header.of(path)
    if encoders is None:
        return header.num_bytes_of_all
    has_vae = any(header.holds(prefix) for prefix in VAES)
    others = [name for name in MODULES if name.startswith("text_encoder") or (name == "vae" and not has_vae)]
    return header.num_bytes_of_all + _bytes_in(FolderComponents(encoders), others)


def _bytes_in(folder: FolderComponents, names: Collection[str]) -> int:
    parts = [folder.path / name for name in names if folder.has(name)]
    return sum(Header.of(path).num_bytes_of_all for part in parts for path in weight_files(part))


def with_adapted_texts(family: Family, nets: Collection[str]) -> Family:
    """The same, but large text encoders without adapters, which are on these nets, encode captions once."""
    return family.only(nets) if isinstance(family, WithTexts) else family


def _load_family(model: Any, encoders: str | Path | None) -> PipelineFamily:
    path = Path(model).expanduser() if isinstance(model, str | Path) else None
    if path is not None and is_file(path):
        return _of_file(weights_only(Header.of(path)), encoders)
    if encoders is not None:
        raise ValueError(f"encoders must be none where model is no single file, got {encoders}")
    if path is not None:
        folder = folder_of(model)
        kind = family_of(pipeline_name(folder), folder)
        refuse_pointers(folder)
        return kind(FolderComponents(folder))
    if not isinstance(model, DiffusionPipeline):
        raise ValueError(
            f"model must be a path, a hub id, a diffusers pipeline or a Denoiser, got {type(model).__name__}"
        )
    kind = family_of(type(model).__name__, model)
    _refuse_without_weights(model)
    return kind(OpenComponents(model))


def _refuse_without_weights(pipe: Any) -> None:
    """ValueError where a part of an open pipeline has shapes alone."""
    for name in MODULES:
        part = getattr(pipe, name, None)  # which not every pipeline has
        empty = [key for key, tensor in part.state_dict().items() if tensor.is_meta] if part is not None else []
        if empty:
            raise ValueError(
                f"model must hold its weights, but {tensors_that(empty, 'is', 'are')} missing of its {name}, such as "
                f"{empty[0]} (on the meta device)"
            )


def _of_file(header: Header, encoders: str | Path | None) -> PipelineFamily:
    """The family of a single file, beside a folder or hub id with what it lacks."""
    architecture = architecture_of(header)
    original = original_of(architecture)
    name, folder = beside(encoders, architecture, without=(original.part,))
    return family_of(name, header.path)(FileComponents(header, original, name, folder))


def architecture_of(header: Header) -> Architecture:
    """What a single file is; ValueError where it is no model of a family here."""
    path, family = header.path, model_family(header.shapes)
    refuse_lora(header)
    if family == FOLDER_PART:
        raise ValueError(f"{path} must be a whole model, got a part of a diffusers folder: give the folder instead")
    known = {architecture.name: architecture for architecture in ARCHITECTURES if architecture.model_signs}
    architecture = SD1 if family == UNETS else known.get(family)
    if architecture is None:
        what = f"tensors such as {next(iter(header.shapes), 'none')}" if family == "unknown" else family
        raise ValueError(f"{path} must be a model of a family among {', '.join(known)}, got {what}")
    return architecture


def original_of(architecture: Architecture) -> Original:
    """How single files of it are read."""
    return family_of(next(iter(architecture.pipelines)), None).ORIGINAL


def beside(
    encoders: str | Path | None, architecture: Architecture, *, without: Collection[str]
) -> tuple[str, FolderComponents | None]:
    """The pipeline of a single file, and the folder, or what is fetched from the hub, of what the file lacks.

    without: parts that are not needed. ValueError where the folder is of another architecture.
    """
    if encoders is None:
        return next(iter(architecture.pipelines)), None
    folder = folder_of(encoders, without)
    name = pipeline_name(folder)
    if name not in architecture.pipelines:
        kinds = " or ".join(architecture.pipelines)
        raise ValueError(f"encoders must be a folder of {kinds} for a file of {architecture.name}, got {name}")
    refuse_pointers(folder)
    return name, FolderComponents(folder)


def folder_of(model: str | Path, without: Collection[str] = (), progress: Progress = SILENT) -> Path:
    """A folder here, or one that is fetched from the hub; without: parts whose weights are not needed there."""
    path = Path(model).expanduser()
    return fetched(model, without, progress) if isinstance(model, str) and is_id(model) and not path.exists() else path


def family_of(name: str, source: Any) -> type[PipelineFamily]:
    """The family of a pipeline's class in diffusers; ValueError, which names the source, where there is none."""
    if name not in FAMILIES:
        what = source if isinstance(source, Path) else "model"
        raise ValueError(f"{what} must be a diffusers model of a kind among {', '.join(FAMILIES)}, got {name}")
    module, _, kind = FAMILIES[name].partition(".")
    return getattr(importlib.import_module(f"lorasmith.models.families.{module}"), kind)
