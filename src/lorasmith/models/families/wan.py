"""Wan 2.1 and 2.2 (Wan Team 2025), text to video, through diffusers.

B batch, C channels, f h w latent frames and sides, F H W frames and pixels, L tokens, D width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.diffusion.process import Flow
from lorasmith.models.checkpoints.transformer_configs import Config, Shapes, num_blocks
from lorasmith.models.checkpoints.transformers import OriginalTransformer
from lorasmith.models.families.base import PipelineFamily, VideoAutoencoder, warn_of_cuts
from lorasmith.models.families.denoisers import TransformerDenoiser, flow_of
from lorasmith.models.sources.components import Components
from lorasmith.types import Cond

NUM_TOKENS = 512  # of UMT5; padding is zeros, which are read too
RESOLUTION = 640  # a square about as large as 832 x 480, which all of them were made for


@dataclass(frozen=True)
class WanDenoiser(TransformerDenoiser):
    """A WanTransformer3DModel, for latents [B,C,f,h,w]; conditioning is {"text": [B,L,D]}."""

    num_times: int  # what the end of time is for the transformer
    is_told_tokens: bool  # whether it is told the time of each token (2.2's 5B)

    WIDTHS = {"text": "text_dim"}
    AXES = "f,h,w"

    def output(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        sides, patch = x_t.shape[2:], self.transformer.config["patch_size"]
        if any(side % along for side, along in zip(sides, patch, strict=True)):
            raise ValueError(f"latents' f, h, w must be multiples of {list(patch)} for this model, got {list(sides)}")
        dtype = self.transformer.patch_embedding.weight.dtype  # others may stay in float32
        times = t * self.num_times
        if self.is_told_tokens:
            times = times[:, None].expand(-1, math.prod(sides) // math.prod(patch))
        out = self.transformer(
            hidden_states=x_t.to(dtype), timestep=times, encoder_hidden_states=cond["text"].to(dtype)
        )
        return out.sample


@dataclass(frozen=True)
class WanExperts:
    """2.2's two transformers: one for noisy times, from the boundary on, and one for the others."""

    noisy: WanDenoiser
    clean: WanDenoiser
    boundary: float  # a time

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {"transformer": self.noisy.transformer, "transformer_2": self.clean.transformer}

    @property
    def process(self) -> Flow:
        return self.noisy.process

    def experts(self) -> dict[str, WanDenoiser]:
        """By the names that their LoRA files have."""
        return {"high_noise": self.noisy, "low_noise": self.clean}

    def routes(self, t: Tensor) -> list[str]:
        """t [B] -> the net of each sample."""
        return ["transformer" if time >= self.boundary else "transformer_2" for time in t.tolist()]

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t [B,C,f,h,w], t [B], cond {"text": [B,L,D]} -> eps - x0 [B,C,f,h,w], float32, by its expert each."""
        routes = self.routes(t)
        outs, places = [], []
        for name, expert in (("transformer", self.noisy), ("transformer_2", self.clean)):
            own = [place for place, route in enumerate(routes) if route == name]
            if own:
                outs.append(expert.predict(x_t[own], t[own], {key: value[own] for key, value in cond.items()}))
                places += own
        return torch.cat(outs)[torch.tensor(places).argsort()]

    def file_key(self, path: str) -> str:
        return path


class WanCodec:
    """The autoencoder of videos, of which a picture is one frame, and UMT5."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.autoencoder = pipe, VideoAutoencoder(pipe.vae)
        config = pipe.vae.config
        self.factor, self.frames = config["scale_factor_spatial"], config["scale_factor_temporal"]
        self.multiple = self.factor * max(pipe.transformer.config["patch_size"][1:])
        self.resolution = RESOLUTION
        self.channels = config["z_dim"]

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        width, height = size
        return (self.channels, 1, height // self.factor, width // self.factor)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] or videos [B,3,F,H,W] in -1 to 1 -> the posterior's mean, normal: [B,C,f,h,w], float32.

        ValueError where F is not 1 and a multiple of the frames that one latent frame holds.
        """
        videos = images[:, :, None] if images.ndim == 4 else images
        if videos.shape[2] % self.frames != 1:
            raise ValueError(f"a video must have 1 + a multiple of {self.frames} frames, got {videos.shape[2]}")
        return self.autoencoder.encode(videos)

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B,C,f,h,w] -> images [B,3,H,W] where f is 1, else videos [B,3,F,H,W], in -1 to 1, float32."""
        videos = self.autoencoder.decode(latents)
        return videos[:, :, 0] if latents.shape[2] == 1 else videos

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Cond:
        """B texts -> {"text": [B,512,D]}, float32."""
        warn_of_cuts(texts, self.pipe.tokenizer, NUM_TOKENS)
        text, _ = self.pipe.encode_prompt(
            list(texts), do_classifier_free_guidance=False, max_sequence_length=NUM_TOKENS,
            device=self.pipe.text_encoder.device,
        )  # fmt: skip
        return {"text": text.float()}


def config_of(shapes: Shapes, base: Config) -> Config:
    """The values of the transformer's config that vary among the published models."""
    width, channels, *patch = shapes["patch_embedding.weight"]
    head = base.get("attention_head_dim", 128)  # which no shape shows: norms go over all heads
    if width % head:
        raise ValueError(f"its width must be a multiple of a head's, {head}, got {width}")
    image, added = "condition_embedder.image_embedder.norm1.weight", "blocks.0.attn2.add_k_proj.weight"
    return {
        "patch_size": tuple(patch),
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // math.prod(patch),
        "num_attention_heads": width // head,
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": num_blocks(shapes, "blocks."),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "image_dim": shapes[image][0] if image in shapes else None,
        "added_kv_proj_dim": shapes[added][1] if added in shapes else None,
    }


class Wan(PipelineFamily):
    """Wan 2.1, and 2.2 with two experts or one transformer (5B)."""

    ORIGINAL = OriginalTransformer("WanTransformer3DModel", config_of, "head.modulation")

    def denoiser_of(self, components: Components) -> WanDenoiser | WanExperts:
        scheduler, boundary = components.scheduler, components.config("boundary_ratio")
        names = ("transformer",) if boundary is None else ("transformer", "transformer_2")
        num_times, is_told_tokens = (
            scheduler.get("num_train_timesteps", 1000),
            bool(components.config("expand_timesteps")),
        )
        nets = [WanDenoiser(components.net(name), flow_of(scheduler), num_times, is_told_tokens) for name in names]
        return nets[0] if boundary is None else WanExperts(nets[0], nets[1], boundary)

    def codec_of(self, pipe: Any) -> WanCodec:
        return WanCodec(pipe)

    def metadata(self) -> dict[str, str]:
        is_first = isinstance(self.denoiser, WanDenoiser) and not self.denoiser.is_told_tokens
        version = "2.1" if is_first else "2.2"
        return {"modelspec.architecture": f"wan{version}/lora", "ss_base_model_version": f"wan{version}"}
