"""Tiny pipelines of every family, with random weights, from diffusers' and transformers' real classes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
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
    prompt: Callable[[Any, str], dict[str, Any]] = lambda pipe, prompt: {"prompt": prompt}  # as its call takes it
    tolerance: float = 2e-3  # between pictures of ours and of its own
    picture: Callable[[Any], Tensor] = lambda output: output.images[0]  # what its call returns -> [3,H,W]


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


def sd3() -> StableDiffusion3Pipeline:
    """As 3.5 medium: queries and keys are normalised, and a block has two attentions."""
    transformer = SD3Transformer2DModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=16,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=autoencoder(shift=0.1),
        text_encoder=clip(16, projected=True), tokenizer=clip_tokenizer(), text_encoder_2=clip(16, projected=True),
        tokenizer_2=clip_tokenizer(), text_encoder_3=t5(32), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def chroma() -> ChromaPipeline:
    transformer = ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8), approximator_num_channels=16, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=autoencoder(shift=0.1),
        text_encoder=t5(16), tokenizer=t5_tokenizer(), transformer=transformer,
    )  # fmt: skip


def masked_prompt(pipe: Any, prompt: str) -> dict[str, Any]:
    """The prompt with a mask that is true or false: the pipeline's own, of numbers, hides nothing."""
    text, _, mask, *negative = pipe.encode_prompt(prompt, "")
    return {
        "prompt_embeds": text, "prompt_attention_mask": mask.bool(),
        "negative_prompt_embeds": negative[0], "negative_prompt_attention_mask": negative[2].bool(),
    }  # fmt: skip


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Letters, and the words of the template whole, so that it is as long as for the real one."""
    text = "Describe the image by detailing the color shape size texture quantity text spatial relationships of"
    first, *others = f"{text} the objects and background".split()
    words = ["system", "user", "assistant", first, *(f"Ġ{word}" for word in others)]
    merges = list(dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word))))
    pieces = dict.fromkeys([*LETTERS, *"D,:ĠĊ", *(start + letter for start, letter in merges)])
    return Qwen2Tokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges, unk_token="<|endoftext|>",
        eos_token="<|endoftext|>", pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip


def qwen(width: int, num_words: int) -> Any:
    text = {
        "vocab_size": num_words, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048, "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen_image() -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0],
    ).eval()  # fmt: skip
    tokenizer = qwen_tokenizer()
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192),
        vae=vae, text_encoder=qwen(16, len(tokenizer)), tokenizer=tokenizer, transformer=transformer,
    )  # fmt: skip


def umt5(width: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=30, d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return UMT5EncoderModel(config).eval()


def wan_transformer(channels: int) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=channels, out_channels=channels, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip


def wan(*, boundary: float | None = None, channels: int = 16) -> WanPipeline:
    """2.1, 2.2 with two experts, or with 48 channels 2.2's 5B."""
    is_small = channels == 48
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, is_residual=is_small,
        temperal_downsample=[False, True, True], latents_mean=[0.1 * n for n in range(channels)],
        latents_std=[0.5 + 0.1 * n for n in range(channels)], patch_size=2 if is_small else None,
        in_channels=12 if is_small else 3, out_channels=12 if is_small else 3,
        scale_factor_spatial=16 if is_small else 8,
    ).eval()  # fmt: skip
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=1,
        disable_corrector=list(range(10)),
    )  # fmt: skip
    return WanPipeline(
        tokenizer=t5_tokenizer(), text_encoder=umt5(16), vae=vae, scheduler=scheduler,
        transformer=wan_transformer(channels), transformer_2=wan_transformer(channels) if boundary else None,
        boundary_ratio=boundary, expand_timesteps=is_small,
    )  # fmt: skip


def first_frame(output: Any) -> Tensor:
    return output.frames[0, 0]


FRAME: dict[str, Any] = {"negative_prompt": "", "guidance_scale": 3.0, "num_frames": 1}
TINY = {
    "StableDiffusionXLPipeline": Tiny(sdxl, guidance=3.0, arguments={"negative_prompt": "", "guidance_scale": 3.0}),
    "FluxPipeline": Tiny(flux, guidance=2.5, arguments={"guidance_scale": 2.5}, noise=packed),
    "StableDiffusion3Pipeline": Tiny(
        sd3, guidance=3.0, arguments={"guidance_scale": 3.0, "sigmas": [1.0, 0.75, 0.5, 0.25]}
    ),
    "ChromaPipeline": Tiny(
        chroma, guidance=3.0, arguments={"guidance_scale": 3.0}, noise=packed, prompt=masked_prompt
    ),
    "QwenImagePipeline": Tiny(qwen_image, noise=packed),  # its guidance keeps the prediction's length, ours does not
    "Wan 2.1": Tiny(wan, latent=(16, 1, 6, 4), guidance=3.0, arguments=FRAME, picture=first_frame),
    "Wan 2.2": Tiny(
        partial(wan, boundary=0.6), latent=(16, 1, 6, 4), guidance=3.0, arguments=FRAME, picture=first_frame
    ),
    "Wan 2.2 5B": Tiny(
        partial(wan, channels=48), size=(64, 96), latent=(48, 1, 6, 4), guidance=3.0, arguments=FRAME,
        tolerance=1e-2, picture=first_frame,  # its scheduler rounds times
    ),
}  # fmt: skip
"""{a name: a tiny pipeline}."""


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
