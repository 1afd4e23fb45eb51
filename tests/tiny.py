"""Tiny pipelines of every family, with random weights, from diffusers' and transformers' real classes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    LlamaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
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
    steps: int = 4
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


def qwen_tokenizer() -> Qwen2Tokenizer:
    """With a chat template that shows what it is asked for."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% if not enable_thinking %} think{% endif %}{% endif %}"
    )
    return Qwen2Tokenizer(
        vocab={word: n for n, word in enumerate(("<|endoftext|>", "Ġ", *LETTERS))}, merges=[],
        extra_special_tokens=["<|im_start|>", "<|im_end|>"], chat_template=template,
    )  # fmt: skip


def qwen(kind: Any, num_layers: int) -> Any:
    config = Qwen3Config(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=num_layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return kind(config).eval()


def mistral_tokenizer() -> LlamaTokenizer:
    """In the place of Pixtral's processor, which needs torchvision; its messages are lists of contents."""
    template = "{% for m in messages %}[{{ m.role }}]{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
    return LlamaTokenizer(
        vocab={word: n for n, word in enumerate(("<unk>", "<s>", "</s>", "▁", *LETTERS))}, merges=[],
        extra_special_tokens=["[system]", "[user]"], pad_token="</s>", chat_template=template,
    )  # fmt: skip


def mistral() -> Mistral3ForConditionalGeneration:
    text = MistralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=30, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    vision = PixtralVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)).eval()


def gemma_tokenizer() -> GemmaTokenizer:
    words = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS)
    return GemmaTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[], add_bos_token=True)


def gemma() -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return Gemma2Model(config).eval()


def flux2_parts(*, guidance_embeds: bool) -> dict[str, Any]:
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    for name, parameter in transformer.named_parameters():
        if "modulation" in name:  # has no bias: the blocks' gates would be nearly closed
            torch.nn.init.normal_(parameter)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=32,
    ).eval()  # fmt: skip
    statistics: Any = vae.bn
    statistics.running_mean.normal_()
    statistics.running_var.uniform_(0.5, 2.0)
    return {"transformer": transformer, "vae": vae}


def flux2() -> Flux2Pipeline:
    return Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), text_encoder=mistral(),
        tokenizer=mistral_tokenizer(), **flux2_parts(guidance_embeds=True),
    )  # fmt: skip


def flux2_klein(*, is_distilled: bool = False) -> Flux2KleinPipeline:
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder=qwen(Qwen3ForCausalLM, 27),
        tokenizer=qwen_tokenizer(), is_distilled=is_distilled, **flux2_parts(guidance_embeds=False),
    )  # fmt: skip


def z_image() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=48, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 8, 8], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=autoencoder(shift=0.1),
        text_encoder=qwen(Qwen3Model, 2), tokenizer=qwen_tokenizer(), transformer=transformer,
    )  # fmt: skip


def lumina2() -> Lumina2Pipeline:
    transformer = Lumina2Transformer2DModel(
        sample_size=16, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(300, 64, 64), cap_feat_dim=16,
    )  # fmt: skip
    return Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0), vae=autoencoder(shift=0.1), text_encoder=gemma(),
        tokenizer=gemma_tokenizer(), transformer=transformer,
    )  # fmt: skip


TINY = {
    "StableDiffusionXLPipeline": Tiny(sdxl, guidance=3.0, arguments={"negative_prompt": "", "guidance_scale": 3.0}),
    "FluxPipeline": Tiny(flux, guidance=2.5, arguments={"guidance_scale": 2.5}, noise=packed),
    "Flux2Pipeline": Tiny(flux2, latent=(16, 12, 8), steps=50, guidance=2.5, arguments={"guidance_scale": 2.5}),
    "Flux2KleinPipeline": Tiny(flux2_klein, latent=(16, 12, 8), guidance=2.5, arguments={"guidance_scale": 2.5}),
    "ZImagePipeline": Tiny(z_image, size=(32, 40), latent=(4, 20, 16), guidance=3.0, arguments={"guidance_scale": 2.0}),
    "Lumina2Pipeline": Tiny(lumina2, guidance=3.0, arguments={"guidance_scale": 3.0, "cfg_normalization": False}),
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
