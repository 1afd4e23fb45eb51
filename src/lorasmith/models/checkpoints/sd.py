"""Stable Diffusion 1.x and 2.x in one safetensors file: the UNet, and the text encoder where the file holds it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from lorasmith.models.checkpoints.clip import clip_encoder, open_clip_encoder
from lorasmith.models.checkpoints.clip_tokenizer import END, NUM_WORDS, clip_tokenizer
from lorasmith.models.checkpoints.ldm import below, ldm_unet
from lorasmith.models.checkpoints.ldm_configs import (
    CLIP,
    OPEN_CLIP,
    UNET,
    VAE_SCALE,
    sample_size,
    scheduler_config,
    text_config,
    unet_config,
    version_of,
    warn_of_guessed_prediction,
)
from lorasmith.models.checkpoints.load import dtype_in, shaped
from lorasmith.models.checkpoints.transformer_configs import Config
from lorasmith.storage.safetensors_header import Header


@dataclass(frozen=True)
class OriginalSD:
    """Stable Diffusion's UNet in single files."""

    part: str = "unet"
    scheduler_kind: str = "DDIMScheduler"
    vae: Config | None = field(default_factory=lambda: {"scaling_factor": VAE_SCALE})

    def net(self, header: Header, keys: Mapping[str, str], base: Config) -> nn.Module:
        warn_of_guessed_prediction(header)
        return ldm_unet(header, keys, self._config(header, base))

    def shaped(self, header: Header, keys: Mapping[str, str], base: Config) -> Any:
        return shaped(UNet2DConditionModel, self._config(header, base), path=header.path)

    def _config(self, header: Header, base: Config) -> dict[str, Any]:
        if not header.holds(f"{UNET}input_blocks."):
            got = next(iter(header.shapes), "none")
            raise ValueError(f"{header.path} must hold an SD 1.x or 2.x model below {UNET}, got tensors such as {got}")
        config = {**base, **unet_config(header)}
        return {**config, "sample_size": sample_size(header, scheduler_config(header))}

    def scheduler(self, header: Header, base: Config | None) -> Config:
        return {**(base or {}), **scheduler_config(header)}

    def holds_encoders(self, header: Header) -> bool:
        return header.holds(CLIP) or header.holds(OPEN_CLIP)

    def encoders(self, header: Header, dtype: torch.dtype | None) -> dict[str, Any]:
        """Without a tokenizer where the text encoder knows other words than CLIP."""
        if not self.holds_encoders(header):
            return {}
        is_first, config = version_of(header) == 1, text_config(header)
        prefix = CLIP if is_first else OPEN_CLIP
        dtype = dtype or dtype_in(header, below(header, prefix).values())
        parts: dict[str, Any] = {
            "text_encoder": clip_encoder(header, prefix, config, dtype)
            if is_first
            else open_clip_encoder(header, prefix, config, dtype, projected=False)
        }
        if config["vocab_size"] == NUM_WORDS:
            parts["tokenizer"] = clip_tokenizer(END if is_first else "!", config["max_position_embeddings"])
        return parts

    def shaped_encoders(self, header: Header) -> dict[str, Any]:
        if not self.holds_encoders(header):
            return {}
        return {"text_encoder": shaped(CLIPTextModel, text_config(header), path=header.path)}
