"""A Stable Diffusion model in a diffusers folder: one subfolder a part."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextModel, CLIPTokenizer

from lorasmith.families.sd import Encoders

UNREADABLE = (OSError, SafetensorError, ValueError, RuntimeError, KeyError, TypeError, AttributeError)
WEIGHTS = re.compile(r"(?:diffusion_pytorch_)?model(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.safetensors")
Part = TypeVar("Part", UNet2DConditionModel, AutoencoderKL, CLIPTextModel)


@dataclass(frozen=True)
class Folder:
    """The UNet and the scheduler's config, loaded; the encoders when they are asked for."""

    path: Path
    unet: UNet2DConditionModel
    scheduler: Mapping[str, Any]

    @classmethod
    def opened(cls, path: Path) -> "Folder":
        """ValueError where a part is missing or broken."""
        try:
            scheduler = json.loads((path / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read scheduler/scheduler_config.json of {path}: {error}") from error
        if not isinstance(scheduler, dict):
            raise ValueError(f"scheduler/scheduler_config.json of {path} must be a table, got {scheduler!r:.50}")
        return cls(path, _part(UNet2DConditionModel, path, "unet", None), scheduler)

    def encoders(self, device: torch.device) -> Encoders:
        vae: Any = _part(AutoencoderKL, self.path, "vae", torch.float32)
        text_encoder: Any = _part(CLIPTextModel, self.path, "text_encoder", torch.float32)
        return Encoders(vae.to(device), text_encoder.to(device), tokenizer_in(self.path / "tokenizer"))

    def pipeline(self, unet: UNet2DConditionModel) -> Any:
        """Without the safety checker where the folder does not hold it, as with a model fetched from the hub."""
        from diffusers import StableDiffusionPipeline  # takes seconds and is seldom needed

        checker, extractor = self.path / "safety_checker", self.path / "feature_extractor"
        without: dict[str, Any] = {} if extractor.is_dir() else {"feature_extractor": None}
        if without or not checker.is_dir():  # the one needs the other
            without |= {"safety_checker": None, "requires_safety_checker": False}
        return StableDiffusionPipeline.from_pretrained(
            self.path,
            unet=unet,
            vae=_part(AutoencoderKL, self.path, "vae", unet.dtype),
            text_encoder=_part(CLIPTextModel, self.path, "text_encoder", unet.dtype),
            variant=variant_of([file.name for file in checker.glob("*.safetensors")]),
            dtype=unet.dtype,
            local_files_only=True,
            **without,
        )


def variant_of(names: list[str]) -> str | None:
    """The variant to load of these weight files: none where there are plain ones, else "fp16" or what there is."""
    variants = {match["variant"] for name in names if (match := WEIGHTS.fullmatch(name))}
    return None if None in variants or not variants else "fp16" if "fp16" in variants else min(variants)


def _part(kind: type[Part], folder: Path, name: str, dtype: torch.dtype | None) -> Part:
    """One part of a diffusers folder, in this dtype (None: as stored); ValueError where it is missing or broken."""
    weights = folder / name
    if not weights.is_dir():
        raise ValueError(f"{folder} must hold {name}/ to be a Stable Diffusion model, but it does not")
    files = sorted(weights.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{weights} must hold safetensors weights: pickles can run code when they are loaded")
    variant = variant_of([file.name for file in files])
    try:
        part = kind.from_pretrained(
            weights, dtype=dtype or stored_dtype(files, variant), variant=variant, use_safetensors=True,
            local_files_only=True,
        )  # fmt: skip
    except UNREADABLE as error:
        raise ValueError(f"cannot load {weights}: {str(error).splitlines()[0]}") from error
    missing = [key for key, parameter in part.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(f"cannot load {weights}: {len(missing)} tensors are missing, such as {missing[0]}")
    return part


def stored_dtype(files: list[Path], variant: str | None) -> torch.dtype:
    """The dtype of a tensor of floating point in the first of the files that are loaded; float32 where it has none."""
    chosen = (file for file in files if (match := WEIGHTS.fullmatch(file.name)) and match["variant"] == variant)
    with safe_open(next(chosen, files[0]), framework="pt") as file:
        dtypes = (file.get_tensor(key).dtype for key in file.keys())
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def tokenizer_in(folder: Path) -> CLIPTokenizer:
    """ValueError where a file is missing, without which the library would make an empty vocabulary."""
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise ValueError(f"{folder} must hold tokenizer.json or vocab.json, but it does not")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises nothing more exact
        raise ValueError(f"cannot load {folder}: {str(error).splitlines()[0]}") from error
