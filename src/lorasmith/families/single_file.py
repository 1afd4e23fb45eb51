"""A Stable Diffusion 1.x or 2.x model in one safetensors file, in the layout of the original code."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as converters
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lorasmith.families.clip_words import END, NUM_WORDS, clip_tokenizer
from lorasmith.families.ldm_sizes import (
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
from lorasmith.families.sd import Encoders
from lorasmith.header import Header
from lorasmith.ldm_names import ldm_names
from lorasmith.looks import FOLDER_PART, is_lora, model_family

UNSUPPORTED = ("SDXL", "Stable Diffusion 3", "Flux")
UNFIT = (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OSError, SafetensorError)
CONVERTERS: dict[type, tuple[str, Any]] = {
    UNet2DConditionModel: (UNET, converters.convert_ldm_unet_checkpoint),
    AutoencoderKL: (VAE, converters.convert_ldm_vae_checkpoint),
}
Net = TypeVar("Net", UNet2DConditionModel, AutoencoderKL)


@dataclass(frozen=True)
class SingleFile:
    """The UNet and the scheduler's config, loaded; the encoders when they are asked for."""

    header: Header
    unet: UNet2DConditionModel
    scheduler: Mapping[str, Any]

    @classmethod
    def opened(cls, path: Path) -> "SingleFile":
        """ValueError where the file is not such a model."""
        header = Header.of(path)
        _check_kind(header)
        config, scheduler = unet_config(header), scheduler_config(header)
        config["sample_size"] = sample_size(header, scheduler)
        unet = _net(UNet2DConditionModel, config, header, None)
        known = {f"{UNET}{name}" for name in ldm_names(unet.config).values()}
        strange = [key for key in header.shapes if key.startswith(UNET) and key.rpartition(".")[0] not in known]
        if strange:
            raise ValueError(f"{path} must hold a UNet of SD 1.x or 2.x, which has no {strange[0]}")
        return cls(header, unet, scheduler)

    def encoders(self, device: torch.device) -> Encoders:
        vae, text_encoder = self._vae(torch.float32), self._text_encoder(torch.float32)
        missing = [what for what, part in (("a VAE", vae), ("a text encoder", text_encoder)) if part is None]
        if missing:
            what = " and ".join(missing)
            raise ValueError(f"{self.header.path} must hold {what} to encode pictures and captions, but it does not")
        return Encoders(vae.to(device), text_encoder.to(device), self._tokenizer(text_encoder))

    def pipeline(self, unet: UNet2DConditionModel) -> Any:
        """Without the parts that the file has not; without a tokenizer where the text encoder knows other words."""
        from diffusers import DDIMScheduler, StableDiffusionPipeline  # takes seconds and is seldom needed

        text_encoder: Any = self._text_encoder(unet.dtype)
        knows_clip = text_encoder is not None and text_encoder.config.vocab_size == NUM_WORDS
        parts: dict[str, Any] = {
            "vae": self._vae(unet.dtype),
            "text_encoder": text_encoder,
            "tokenizer": self._tokenizer(text_encoder) if knows_clip else None,
            "scheduler": DDIMScheduler.from_config(dict(self.scheduler)),
            "safety_checker": None,
            "feature_extractor": None,
        }
        return StableDiffusionPipeline(unet=unet, requires_safety_checker=False, **parts)

    def _vae(self, dtype: torch.dtype) -> Any:
        """None where the file holds no VAE."""
        there = self.header.holds(VAE)
        return _net(AutoencoderKL, vae_config(self.header), self.header, dtype) if there else None

    def _text_encoder(self, dtype: torch.dtype) -> Any:
        """None where the file holds no text encoder."""
        there = self.header.holds(CLIP) or self.header.holds(OPEN_CLIP)
        return _text_encoder(self.header, dtype) if there else None

    def _tokenizer(self, text_encoder: Any) -> CLIPTokenizer:
        length = text_encoder.config.max_position_embeddings
        return clip_tokenizer(END if version_of(self.header) == 1 else "!", length)


def _check_kind(header: Header) -> None:
    """ValueError that names what the file is where it is not an SD 1.x or 2.x model in the original layout."""
    path, keys = header.path, header.shapes
    if is_lora(keys):
        raise ValueError(f"{path} must be a model, got a LoRA: the model that it was trained on is needed")
    family = model_family(keys)
    if family in UNSUPPORTED:
        raise ValueError(f"{path} must be an SD 1.x or 2.x model, but looks like {family}, which is not supported yet")
    if family == FOLDER_PART:
        raise ValueError(f"{path} must be a whole model, got a part of a diffusers folder: give the folder instead")
    if not header.holds(f"{UNET}input_blocks."):
        got = next(iter(keys), "none")
        raise ValueError(f"{path} must hold an SD 1.x or 2.x model below {UNET}, got tensors such as {got}")


def _tensors(header: Header, prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, under the file's names."""
    with safe_open(header.path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in header.shapes if key.startswith(prefix)}


def _net(kind: type[Net], config: Mapping[str, Any], header: Header, dtype: torch.dtype | None) -> Net:
    """The UNet or VAE with the file's weights, in this dtype (None: as stored); ValueError where they do not fit it."""
    prefix, converted = CONVERTERS[kind]
    try:
        with torch.device("meta"):
            net = kind(**config)
        state = converted(_tensors(header, prefix), dict(net.config))
        dtype = dtype or next(iter(state.values())).dtype
        found = net.load_state_dict({key: value.to(dtype) for key, value in state.items()}, strict=False, assign=True)
    except UNFIT as error:
        raise ValueError(f"cannot load the {kind.__name__} of {header.path}: {_line(error)}") from error
    _check_fit(header, kind.__name__, found.missing_keys, found.unexpected_keys)
    return net.eval()


def _text_encoder(header: Header, dtype: torch.dtype) -> CLIPTextModel:
    """In this dtype; ValueError where the weights do not fit."""
    config = CLIPTextConfig(**text_config(header))
    try:
        if version_of(header) == 1:
            state = converters.convert_ldm_clip_checkpoint(_tensors(header, CLIP))
        else:
            last = f"{OPEN_CLIP}transformer.resblocks.{config.num_hidden_layers}."
            read = {key: value for key, value in _tensors(header, OPEN_CLIP).items() if not key.startswith(last)}
            read.pop(f"{OPEN_CLIP}text_projection", None)  # after the last layer, which is not read
            state = converters.convert_open_clip_checkpoint(SimpleNamespace(config=config), read)
        loaded: Any = CLIPTextModel.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except UNFIT as error:
        raise ValueError(f"cannot load the text encoder of {header.path}: {_line(error)}") from error
    _check_fit(header, "text encoder", sorted(loaded[1]["missing_keys"]), [])
    return loaded[0]


def _check_fit(header: Header, what: str, missing: list[str], unexpected: list[str]) -> None:
    for keys, rule in ((missing, "are missing"), (unexpected, "have no place in it")):
        if keys:
            raise ValueError(f"cannot load the {what} of {header.path}: {len(keys)} tensors {rule}, such as {keys[0]}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
