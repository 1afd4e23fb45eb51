"""The model families, and how a model is opened."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lorasmith.formats.detect import FOLDER_PART, model_family
from lorasmith.models.checkpoints.load import tensors_that
from lorasmith.models.checkpoints.original import Original
from lorasmith.models.checkpoints.scaled import weights_only
from lorasmith.models.checkpoints.transformers import ORIGINALS
from lorasmith.models.families.base import PipelineFamily
from lorasmith.models.families.chroma import Chroma
from lorasmith.models.families.flux import Flux
from lorasmith.models.families.flux2 import Flux2, Flux2Klein
from lorasmith.models.families.lumina2 import Lumina2
from lorasmith.models.families.qwen_image import QwenImage
from lorasmith.models.families.sd import StableDiffusion
from lorasmith.models.families.sd3 import SD3
from lorasmith.models.families.sdxl import SDXL
from lorasmith.models.families.wan import Wan
from lorasmith.models.families.z_image import ZImage
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
FAMILIES: dict[str, type[PipelineFamily]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": SDXL,
    "StableDiffusion3Pipeline": SD3,
    "FluxPipeline": Flux,
    "ChromaPipeline": Chroma,
    "QwenImagePipeline": QwenImage,
    "WanPipeline": Wan,
    "Flux2Pipeline": Flux2,
    "Flux2KleinPipeline": Flux2Klein,
    "Lumina2Pipeline": Lumina2,
    "ZImagePipeline": ZImage,
}
"""{the pipeline's class in diffusers: its family}."""


def opened(model: Any, encoders: str | Path | None = None, *, with_texts: bool = False) -> Family:
    """The family of a diffusers folder, a single-file checkpoint, a hub id or a diffusers pipeline.

    encoders: for a single file, the diffusers folder or hub id of what it lacks. with_texts: its denoiser holds the
    text encoders too, so that they can be trained. ValueError where one of these is not fit.
    """
    family = _opened(model, encoders)
    return WithTexts.of(family) if with_texts else family


def located(model: str, encoders: str | None, progress: Progress = SILENT) -> tuple[Path, Path | None]:
    """Where a model and the encoders beside it are on this machine; what hub ids name is fetched.

    ValueError where one of them cannot be.
    """
    path = Path(model).expanduser()
    if encoders is None:
        return (path if is_file(path) else folder_of(model, progress=progress)), None
    own = original_of(weights_only(Header.of(path))).part
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


def _opened(model: Any, encoders: str | Path | None) -> PipelineFamily:
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
    original = original_of(header)
    supported = pipelines_of(original)
    folder = folder_beside(encoders, supported, model_family(header.shapes), without=(original.part,))
    name = supported[0] if folder is None else pipeline_name(folder.path)
    return FAMILIES[name](FileComponents(header, original, name, folder))


def original_of(header: Header) -> Original:
    """What a single file is; ValueError where it is no model of a family here."""
    path, family = header.path, model_family(header.shapes)
    refuse_lora(header)
    if family == FOLDER_PART:
        raise ValueError(f"{path} must be a whole model, got a part of a diffusers folder: give the folder instead")
    original = ORIGINALS.get(family)
    if original is None or not pipelines_of(original):
        what = f"tensors such as {next(iter(header.shapes), 'none')}" if family == "unknown" else family
        raise ValueError(f"{path} must be a model of a family among {', '.join(ORIGINALS)}, got {what}")
    return original


def pipelines_of(original: Original) -> list[str]:
    """The pipelines with such a denoiser that there is a family for."""
    return [name for name in original.pipelines if name in FAMILIES]


def folder_beside(
    encoders: str | Path | None, pipelines: Sequence[str], family: str, *, without: Collection[str]
) -> FolderComponents | None:
    """The folder, of one of these pipelines, or what is fetched from the hub; without: parts that are not needed."""
    if encoders is None:
        return None
    folder = folder_of(encoders, without)
    name = pipeline_name(folder)
    if name not in pipelines:
        raise ValueError(f"encoders must be a folder of {' or '.join(pipelines)} for a file of {family}, got {name}")
    refuse_pointers(folder)
    return FolderComponents(folder)


def folder_of(model: str | Path, without: Collection[str] = (), progress: Progress = SILENT) -> Path:
    """A folder here, or one that is fetched from the hub; without: parts whose weights are not needed there."""
    path = Path(model).expanduser()
    return fetched(model, without, progress) if isinstance(model, str) and is_id(model) and not path.exists() else path


def family_of(name: str, source: Any) -> type[PipelineFamily]:
    if name not in FAMILIES:
        what = source if isinstance(source, Path) else "model"
        raise ValueError(f"{what} must be a diffusers model of a kind among {', '.join(FAMILIES)}, got {name}")
    return FAMILIES[name]
