"""A Stable Diffusion model in a diffusers folder: one subfolder a part."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from lorasmith.models.families.sd import Encoders
from lorasmith.models.sources.parts import loaded
from lorasmith.storage.json_files import json_table


@dataclass(frozen=True)
class Folder:
    """The UNet and the scheduler's config, loaded; the encoders when they are asked for."""

    path: Path
    unet: UNet2DConditionModel
    scheduler: Mapping[str, Any]

    @classmethod
    def opened(cls, path: Path) -> "Folder":
        """ValueError where a part is missing or broken."""
        scheduler = json_table(path / "scheduler" / "scheduler_config.json")
        return cls(path, _part(UNet2DConditionModel, path, "unet", None), scheduler)

    def encoders(self, device: torch.device) -> Encoders:
        vae = _part(AutoencoderKL, self.path, "vae", torch.float32)
        text_encoder = _part(CLIPTextModel, self.path, "text_encoder", torch.float32)
        return Encoders(vae.to(device), text_encoder.to(device), tokenizer_in(self.path / "tokenizer"))

    def pipeline(self, unet: UNet2DConditionModel) -> Any:
        """Without the safety checker where the folder does not hold it, as with a model fetched from the hub."""
        from diffusers import StableDiffusionPipeline  # takes seconds and is seldom needed
        from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

        checker, extractor = self.path / "safety_checker", self.path / "feature_extractor"
        others: dict[str, Any] = {} if extractor.is_dir() else {"feature_extractor": None}
        if others or not checker.is_dir():  # the one needs the other
            others |= {"safety_checker": None, "requires_safety_checker": False}
        else:
            others["safety_checker"] = loaded(StableDiffusionSafetyChecker, checker, unet.dtype)
        return StableDiffusionPipeline.from_pretrained(
            self.path,
            unet=unet,
            vae=_part(AutoencoderKL, self.path, "vae", unet.dtype),
            text_encoder=_part(CLIPTextModel, self.path, "text_encoder", unet.dtype),
            dtype=unet.dtype,
            local_files_only=True,
            **others,
        )


def _part(kind: Any, folder: Path, name: str, dtype: torch.dtype | None) -> Any:
    """One part of a diffusers folder, in this dtype (None: as stored); ValueError where it is missing or broken."""
    if not (folder / name).is_dir():
        raise ValueError(f"{folder} must hold {name}/ to be a Stable Diffusion model, but it does not")
    return loaded(kind, folder / name, dtype)


def tokenizer_in(folder: Path) -> CLIPTokenizer:
    """ValueError where a file is missing, without which the library would make an empty vocabulary."""
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise ValueError(f"{folder} must hold tokenizer.json or vocab.json, but it does not")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises nothing more exact
        raise ValueError(f"cannot load {folder}: {str(error).splitlines()[0]}") from error
