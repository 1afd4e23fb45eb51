"""Stable Diffusion XL in one safetensors file: the UNet, and the text encoders and the VAE where it holds them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lorasmith.models.checkpoints.clip import clip_encoder, open_clip_encoder
from lorasmith.models.checkpoints.clip_tokenizer import NUM_WORDS, clip_tokenizer
from lorasmith.models.checkpoints.ldm import below, ldm_unet
from lorasmith.models.checkpoints.ldm_configs import (
    BETAS,
    UNET,
    clip_config,
    open_clip_config,
    stated_prediction,
    unet_config,
)
from lorasmith.models.checkpoints.load import dtype_in, fitted, line, shaped, tensors
from lorasmith.models.checkpoints.transformer_configs import Config
from lorasmith.storage.safetensors_header import Header

CLIP, OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
REFINER = "conditioner.embedders.0.model."
SIZE_WIDTH = 256  # of the vector of each of the six sizes


def sdxl_unet_config(header: Header, base: Config) -> dict[str, Any]:
    """A UNet2DConditionModel's config; the names of the header's tensors begin with `model.diffusion_model.`.

    base: a config whose values hold where no shape says otherwise.
    """
    config = unet_config(header, heads_are_wide=True)
    blocks = [0, *(number for number in range(header.count(f"{UNET}input_blocks.")) if _is_down(header, number))]
    depths = [header.count(f"{UNET}input_blocks.{number + 1}.1.transformer_blocks.") or 1 for number in blocks]
    found = {
        **config,
        "transformer_layers_per_block": depths,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": base.get("addition_time_embed_dim", SIZE_WIDTH),
        "projection_class_embeddings_input_dim": header.shape(f"{UNET}label_emb.0.0.weight")[1],
    }
    if "attention_head_dim" in base:  # which no shape shows
        found["attention_head_dim"] = base["attention_head_dim"]
    return {"sample_size": 128, **base, **found}


def _is_down(header: Header, number: int) -> bool:
    return f"{UNET}input_blocks.{number}.0.op.weight" in header.shapes


@dataclass(frozen=True)
class OriginalSDXL:
    """SDXL's UNet in single files."""

    part: str = "unet"
    scheduler_kind: str = "EulerDiscreteScheduler"
    vae: Config | None = field(default_factory=lambda: {"scaling_factor": 0.13025})

    def net(self, header: Header, keys: Mapping[str, str], base: Config) -> nn.Module:
        _refuse_others(header)
        if "down_blocks.0.resnets.0.conv1.weight" in keys:
            return self._of_diffusers(header, keys, base)
        return ldm_unet(header, keys, self._config(header, keys, base))

    def shaped(self, header: Header, keys: Mapping[str, str], base: Config) -> Any:
        from diffusers import UNet2DConditionModel

        _refuse_others(header)
        return shaped(UNet2DConditionModel, self._config(header, keys, base), path=header.path)

    def _config(self, header: Header, keys: Mapping[str, str], base: Config) -> dict[str, Any]:
        renamed = replace(header, shapes={f"{UNET}{name}": header.shapes[key] for name, key in keys.items()})
        try:
            return sdxl_unet_config(renamed, base)
        except IndexError as error:
            raise ValueError(f"cannot load the UNet2DConditionModel of {header.path}: {line(error)}") from error

    def _of_diffusers(self, header: Header, keys: Mapping[str, str], base: Config) -> nn.Module:
        from diffusers import UNet2DConditionModel

        if not base:
            raise ValueError(
                f"{header.path} is a UNet under diffusers' names: encoders must be a folder with its unet/config.json"
            )
        read = tensors(header, keys.values())
        state = {name: read.pop(key) for name, key in keys.items()}
        return fitted(UNet2DConditionModel, base, state, dtype_in(header, keys.values()), path=header.path)

    def scheduler(self, header: Header, base: Config | None) -> Config:
        prediction = stated_prediction(header)
        return {
            **(base or {**BETAS, "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 1}),
            **({"prediction_type": prediction} if prediction else {}),
            **({"rescale_betas_zero_snr": True} if "ztsnr" in header.shapes else {}),
        }

    def holds_encoders(self, header: Header) -> bool:
        return header.holds(CLIP) and header.holds(OPEN_CLIP)

    def encoders(self, header: Header, dtype: torch.dtype | None) -> dict[str, Any]:
        if not self.holds_encoders(header):
            return {}
        dtype = dtype or dtype_in(header, below(header, OPEN_CLIP).values())
        first, second = _text_configs(header)
        for config in (first, second):
            if config["vocab_size"] != NUM_WORDS:
                raise ValueError(
                    f"the text encoders of {header.path} must know CLIP's {NUM_WORDS} words, got {config['vocab_size']}"
                )
        return {
            "text_encoder": clip_encoder(header, CLIP, first, dtype),
            "text_encoder_2": open_clip_encoder(header, OPEN_CLIP, second, dtype, projected=True),
            "tokenizer": clip_tokenizer(length=first["max_position_embeddings"]),
            "tokenizer_2": clip_tokenizer("!", second["max_position_embeddings"]),
        }

    def shaped_encoders(self, header: Header) -> dict[str, Any]:
        if not self.holds_encoders(header):
            return {}
        first, second = _text_configs(header)
        return {
            "text_encoder": shaped(CLIPTextModel, first, path=header.path),
            "text_encoder_2": shaped(CLIPTextModelWithProjection, second, path=header.path),
        }


def _text_configs(header: Header) -> tuple[dict[str, Any], dict[str, Any]]:
    """CLIPTextConfigs' values of both text encoders."""
    second = open_clip_config(header, OPEN_CLIP)
    return clip_config(header, CLIP), {**second, "projection_dim": header.shape(f"{OPEN_CLIP}text_projection")[1]}


def _refuse_others(header: Header) -> None:
    """ValueError where it is another kind of SDXL."""
    if header.holds(REFINER):
        raise ValueError(f"{header.path} must be SDXL's base, got its refiner, which is told an aesthetic score")
    if "edm_mean" in header.shapes:
        raise ValueError(f"{header.path} must be an SDXL of noise or v prediction, got one of EDM's (edm_mean)")
