"""Nodes for tests in ComfyUI: a tiny SD 1 model, a text encoder and a VAE made of arithmetic, and damage."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from .tiny_models import tiny

TOKENS, WIDTH, CHANNELS, SIDE = 6, 20, 4, 8


class Clip:
    """Texts -> numbers that differ by the text."""

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list[Any]:
        seed = int.from_bytes(hashlib.sha256(tokens.encode()).digest()[:4], "little")
        return [[torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)), {}]]


class Vae:
    """Means of 8 by 8 pixels."""

    def encode(self, pixels: Tensor) -> Tensor:
        means = torch.nn.functional.avg_pool2d(pixels[..., :3].movedim(-1, 1), SIDE)
        return torch.cat([means, means.mean(1, keepdim=True)], 1)[:, :CHANNELS]

    def decode(self, latents: Tensor) -> Tensor:
        grown = torch.nn.functional.interpolate(latents[:, :3], scale_factor=SIDE)
        return grown.movedim(1, -1).clamp(0, 1)


def patcher(disable_dynamic: bool = False) -> Any:
    """The model, and how ComfyUI makes it anew, as its own loaders note it."""
    made = tiny("sd1").patcher
    made.cached_patcher_init = (patcher, ())
    return made


class TinyModel:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP", "VAE"), "made", "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def made(self) -> tuple[Any, Clip, Vae]:
        return patcher(), Clip(), Vae()


class TinyDamage:
    """Latents with a number that is none."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "damaged", "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"latents": ("LATENT",)}}

    def damaged(self, latents: dict[str, Tensor]) -> tuple[dict[str, Tensor]]:
        samples = latents["samples"].clone()
        samples[0, 0, 0, 0] = float("nan")
        return ({"samples": samples},)


class TinySink:
    """Makes anything an output, so that what comes before it runs."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "sunk", "tests", True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def sunk(self, model: Any) -> dict[str, Any]:
        return {"ui": {"patches": [len(model.patches)]}}


NODE_CLASS_MAPPINGS = {"TinyModel": TinyModel, "TinyDamage": TinyDamage, "TinySink": TinySink}
