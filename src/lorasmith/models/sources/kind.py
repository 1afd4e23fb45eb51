"""What names a model: a single file, a diffusers folder or an id on the hub; found out without opening the model."""

import re
from pathlib import Path

from lorasmith.formats.detect import is_lora, model_family
from lorasmith.formats.model_names import HUB_IDS, family_named
from lorasmith.models.sources.folder_layout import MODEL_INDEX, MODULES
from lorasmith.storage.json_files import json_table
from lorasmith.storage.not_safetensors import refuse_pointers
from lorasmith.storage.safetensors_header import PICKLES, Header

FILES = (".safetensors", *PICKLES)
ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_id(model: str) -> bool:
    """Whether it looks like owner/name."""
    return ID.fullmatch(model) is not None


def is_file(path: Path) -> bool:
    """Whether a model's path means a single file."""
    return path.is_file() or (path.suffix in FILES and not path.exists())


def refuse_lora(header: Header) -> None:
    """ValueError where a LoRA is given for a model."""
    if is_lora(header.shapes):
        raise ValueError(f"{header.path} must be a model, got a LoRA: the model that it was trained on is needed")


def refuse_no_lora(header: Header) -> None:
    """ValueError where something else is given for a LoRA."""
    if is_lora(header.shapes):
        return
    family = model_family(header.shapes)
    others = f"tensors such as {min(header.shapes)}" if header.shapes else "no tensors"
    raise ValueError(f"{header.path} must be a LoRA, got {others if family == 'unknown' else f'a model of {family}'}")


def pipeline_name(folder: Path) -> str:
    """The class in diffusers of a folder's pipeline; ValueError where it is no such folder."""
    index = folder / MODEL_INDEX
    if not index.is_file():
        found = "a folder without it" if folder.exists() else "no such folder"
        raise ValueError(f"{folder} must be a diffusers folder with a {MODEL_INDEX}, got {found}")
    content = json_table(index)
    if "_class_name" not in content:
        raise ValueError(f"{index} must name the pipeline's _class_name, but it does not")
    return str(content["_class_name"])


def refuse_unfit_source(model: str, encoders: str | None) -> None:
    """ValueError where there is no such file, folder or hub id, or where it is plainly no model."""
    path = Path(model).expanduser()
    if is_file(path):
        refuse_missing(model)
        if encoders is not None:
            _refuse_unfit_folder(encoders)
    elif encoders is not None:
        raise ValueError(f"encoders must be none where model is no single file, got {encoders}")
    else:
        _refuse_unfit_folder(model)


def refuse_missing(model: str) -> None:
    """ValueError where a model is neither there nor a hub id, or where what is there is a LoRA or no such folder."""
    path = Path(model).expanduser()
    if is_file(path):
        refuse_lora(Header.of(path))
    else:
        _refuse_no_folder(model)


def local_header(model: Path) -> Header | None:
    """Of a model that must be on this machine: a single file's head, None of a folder; ValueError where it is none."""
    if model.is_dir():
        return None
    if is_file(model):
        return Header.of(model)
    family = family_named(str(model))
    hub_id = HUB_IDS[family] if family else str(model) if is_id(str(model)) else None
    hint = f": download {hub_id} from the hub first" if hub_id else ""
    raise ValueError(f"{model} must be a diffusers folder or a safetensors file, got no such folder or file{hint}")


def _refuse_unfit_folder(source: str) -> None:
    _refuse_no_folder(source)
    refuse_pointers(Path(source).expanduser())


def _refuse_no_folder(source: str) -> None:
    """Of a hub id what says which pipeline it is is fetched, and no weights."""
    path = Path(source).expanduser()
    if is_id(source) and not path.exists():
        from lorasmith.models.sources.hub import fetched  # imported where there is an id alone

        path = fetched(source, MODULES)
    pipeline_name(path)
