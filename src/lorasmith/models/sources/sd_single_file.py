"""A Stable Diffusion 1.x or 2.x model in one safetensors file, in the layout of the original code."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTokenizer

from lorasmith.models.checkpoints.clip import clip_encoder, open_clip_encoder
from lorasmith.models.checkpoints.clip_tokenizer import END, NUM_WORDS, clip_tokenizer
from lorasmith.models.checkpoints.ldm import below, ldm_unet, ldm_vae
from lorasmith.models.checkpoints.ldm_configs import (
    CLIP,
    OPEN_CLIP,
    UNET,
    VAE,
    sample_size,
    scheduler_config,
    text_config,
    unet_config,
    vae_config,
    version_of,
)
from lorasmith.models.families.sd import Encoders
from lorasmith.models.sources.components import FolderComponents
from lorasmith.models.sources.sd_folder import tokenizer_in
from lorasmith.storage.safetensors_header import Header


@dataclass(frozen=True)
class SingleFile:
    """The UNet and the scheduler's config, loaded; the encoders when they are asked for."""

    header: Header
    unet: UNet2DConditionModel
    scheduler: Mapping[str, Any]
    folder: FolderComponents | None = None  # which holds what the file lacks

    @classmethod
    def opened(cls, header: Header, folder: FolderComponents | None = None) -> "SingleFile":
        """ValueError where the file is not such a model."""
        check_kind(header)
        config, scheduler = unet_config(header), scheduler_config(header)
        config["sample_size"] = sample_size(header, scheduler)
        return cls(header, ldm_unet(header, below(header, UNET), config), scheduler, folder)

    def encoders(self, device: torch.device) -> Encoders:
        vae, text_encoder = self._vae(torch.float32), self._text_encoder(torch.float32)
        missing = [what for what, part in (("a VAE", vae), ("a text encoder", text_encoder)) if part is None]
        if missing:
            what = " and ".join(missing)
            raise ValueError(
                f"{self.header.path} must hold {what} to encode pictures and captions, but it does not: "
                f"encoders must be a folder that does"
            )
        return Encoders(vae.to(device), text_encoder.to(device), self._tokenizer(text_encoder))

    def pipeline(self, unet: UNet2DConditionModel) -> Any:
        """Without the parts that the file has not; without a tokenizer where the text encoder knows other words."""
        from diffusers import DDIMScheduler, StableDiffusionPipeline  # takes seconds and is seldom needed

        text_encoder: Any = self._text_encoder(unet.dtype)
        has_words = text_encoder is not None and (not self._holds_text or text_encoder.config.vocab_size == NUM_WORDS)
        parts: dict[str, Any] = {
            "vae": self._vae(unet.dtype),
            "text_encoder": text_encoder,
            "tokenizer": self._tokenizer(text_encoder) if has_words else None,
            "scheduler": DDIMScheduler.from_config(dict(self.scheduler)),
            "safety_checker": None,
            "feature_extractor": None,
        }
        return StableDiffusionPipeline(unet=unet, requires_safety_checker=False, **parts)

    def _vae(self, dtype: torch.dtype) -> Any:
        """None where there is no VAE."""
        if self.header.holds(VAE):
            return ldm_vae(self.header, below(self.header, VAE), vae_config(self.header), dtype)
        return None if self.folder is None else self.folder.part("vae", dtype)

    def _text_encoder(self, dtype: torch.dtype) -> Any:
        """None where there is no text encoder."""
        if self._holds_text:
            return _text_encoder(self.header, dtype)
        return None if self.folder is None else self.folder.part("text_encoder", dtype)

    def _tokenizer(self, text_encoder: Any) -> CLIPTokenizer:
        if self.folder is not None and not self._holds_text:
            return tokenizer_in(self.folder.path / "tokenizer")
        length = text_encoder.config.max_position_embeddings
        return clip_tokenizer(END if version_of(self.header) == 1 else "!", length)

    @property
    def _holds_text(self) -> bool:
        return self.header.holds(CLIP) or self.header.holds(OPEN_CLIP)


def check_kind(header: Header) -> None:
    """ValueError where the file is not an SD 1.x or 2.x model in the original layout."""
    if not header.holds(f"{UNET}input_blocks."):
        got = next(iter(header.shapes), "none")
        raise ValueError(f"{header.path} must hold an SD 1.x or 2.x model below {UNET}, got tensors such as {got}")


def _text_encoder(header: Header, dtype: torch.dtype) -> Any:
    """In this dtype; ValueError where the weights do not fit."""
    config = text_config(header)
    if version_of(header) == 1:
        return clip_encoder(header, CLIP, config, dtype)
    return open_clip_encoder(header, OPEN_CLIP, config, dtype, projected=False)
