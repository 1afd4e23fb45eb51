"""Tiny pipelines of every family, with random weights, from diffusers' and transformers' real classes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from lorasmith.families.pipeline import packed

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPTS = ("a cat", "two green birds on a wire", "dog", "a red house")


@dataclass(frozen=True)
class Tiny:
    """A pipeline of a family, and how it is called to draw."""

    pipe: Callable[[], Any]
    size: tuple[int, int] = (32, 48)  # W, H in pixels
    latent: tuple[int, ...] = (4, 24, 16)
    guidance: float = 1.0
    arguments: dict[str, Any] = field(default_factory=dict)  # of the pipeline's own call
    noise: Callable[[Tensor], Tensor] = lambda latents: latents  # [1,C,h,w] -> as its call takes it


def clip_tokenizer(length: int = 16) -> CLIPTokenizer:
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={w: n for n, w in enumerate(words)}, merges=[], model_max_length=length)
    tokenizer.pad_token = "<|endoftext|>"
    return tokenizer


def clip(width: int, *, projected: bool) -> Any:
    config = CLIPTextConfig(
        vocab_size=54, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=width, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def t5(width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=30, d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def autoencoder(channels: int = 4, shift: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, norm_num_groups=4, sample_size=32,
        scaling_factor=0.5, shift_factor=shift, use_quant_conv=shift is None, use_post_quant_conv=shift is None,
    ).eval()  # fmt: skip


def sdxl() -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=64,
        cross_attention_dim=32, norm_num_groups=8,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing",
        clip_sample=False, set_alpha_to_one=True,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=autoencoder(), text_encoder=clip(16, projected=False), text_encoder_2=clip(16, projected=True),
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), unet=unet, scheduler=scheduler,
        force_zeros_for_empty_prompt=False,
    )  # fmt: skip


def flux() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), vae=autoencoder(shift=0.1),
        text_encoder=clip(16, projected=False), tokenizer=clip_tokenizer(), text_encoder_2=t5(16),
        tokenizer_2=t5_tokenizer(), transformer=transformer,
    )  # fmt: skip


TINY = {
    "StableDiffusionXLPipeline": Tiny(sdxl, guidance=3.0, arguments={"negative_prompt": "", "guidance_scale": 3.0}),
    "FluxPipeline": Tiny(flux, guidance=2.5, arguments={"guidance_scale": 2.5}, noise=packed),
}
"""{the pipeline's class: a tiny one}."""


def made(name: str) -> Any:
    """The tiny pipeline, the same in every test; what is zero in a new net is random, so that all of it counts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = TINY[name].pipe()
        for part in pipe.components.values():
            for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.1)
    pipe.set_progress_bar_config(disable=True)
    return pipe
