"""Tiny pipelines of every family, with random weights, from diffusers' and transformers' real classes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_encoders import (
    clip,
    clip_tokenizer,
    gemma,
    gemma_tokenizer,
    mistral,
    mistral_tokenizer,
    qwen3,
    qwen3_tokenizer,
    qwen_vl,
    qwen_vl_tokenizer,
    t5,
    t5_tokenizer,
    umt5,
)
from torch import Tensor
from transformers import Qwen3ForCausalLM, Qwen3Model

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import LoRA
from lorasmith.adapters.targets import Targets
from lorasmith.formats.architectures.registry import ARCHITECTURES
from lorasmith.models.families.denoisers import packed

ALL = Targets(preset="all")
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
    prompt: Callable[[Any, str], dict[str, Any]] = lambda pipe, prompt: {"prompt": prompt}  # as its call takes it
    tolerance: float = 2e-3  # between pictures of ours and of its own
    original_names: dict[str, str] = field(default_factory=dict)  # {a parameter outside layers: in the original code}
    picture: Callable[[Any], Tensor] = lambda output: output.images[0]  # what its call returns -> [3,H,W]


def several(*values: Any) -> Any:
    """A tuple, for the options of diffusers whose annotations allow one value alone."""
    return values


def autoencoder(channels: int = 4, shift: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=several(8, 16), down_block_types=several("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=several("UpDecoderBlock2D", "UpDecoderBlock2D"), latent_channels=channels, norm_num_groups=4,
        sample_size=32, scaling_factor=0.5, shift_factor=shift, use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    ).eval()  # fmt: skip


def sdxl() -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=several(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=several(1, 2), projection_class_embeddings_input_dim=64,
        cross_attention_dim=32, norm_num_groups=8,
    )  # fmt: skip
    scheduler: Any = DDIMScheduler(
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


def aura_flow() -> AuraFlowPipeline:
    transformer = AuraFlowTransformer2DModel(
        sample_size=16, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16,
        pos_embed_max_size=256,
    )  # fmt: skip
    for name, parameter in transformer.named_parameters():
        if "norm" in name:  # modulations without a bias: the blocks' gates would be nearly closed
            torch.nn.init.normal_(parameter)
    return AuraFlowPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73), vae=autoencoder(),
        text_encoder=umt5(16), tokenizer=t5_tokenizer(),
    )  # fmt: skip


def masked_prompt(pipe: Any, prompt: str) -> dict[str, Any]:
    """The prompt with a mask that is true or false: the pipeline's own, of numbers, hides nothing."""
    text, _, mask, *negative = pipe.encode_prompt(prompt, "")
    return {
        "prompt_embeds": text, "prompt_attention_mask": mask.bool(),
        "negative_prompt_embeds": negative[0], "negative_prompt_attention_mask": negative[2].bool(),
    }  # fmt: skip


def qwen_image() -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0],
    ).eval()  # fmt: skip
    tokenizer = qwen_vl_tokenizer()
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192),
        vae=vae, text_encoder=qwen_vl(16, len(tokenizer)), tokenizer=tokenizer, transformer=transformer,
    )  # fmt: skip


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
    scheduler: Any = UniPCMultistepScheduler(
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
        block_out_channels=several(8, 16), down_block_types=several("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=several("UpDecoderBlock2D", "UpDecoderBlock2D"), latent_channels=4, norm_num_groups=4,
        sample_size=32,
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
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder=qwen3(Qwen3ForCausalLM, 27),
        tokenizer=qwen3_tokenizer(), is_distilled=is_distilled, **flux2_parts(guidance_embeds=False),
    )  # fmt: skip


def z_image() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=48, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 8, 8], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=autoencoder(shift=0.1),
        text_encoder=qwen3(Qwen3Model, 2), tokenizer=qwen3_tokenizer(), transformer=transformer,
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
    "Flux2Pipeline": Tiny(flux2, latent=(16, 12, 8), steps=50, guidance=2.5, arguments={"guidance_scale": 2.5}),
    "Flux2KleinPipeline": Tiny(flux2_klein, latent=(16, 12, 8), guidance=2.5, arguments={"guidance_scale": 2.5}),
    "ZImagePipeline": Tiny(z_image, size=(32, 40), latent=(4, 20, 16), guidance=3.0, arguments={"guidance_scale": 2.0}),
    "AuraFlowPipeline": Tiny(
        aura_flow, guidance=3.0, arguments={"guidance_scale": 3.0, "sigmas": [1.0, 0.75, 0.5, 0.25]},
        original_names={"pos_embed.pos_embed": "positional_encoding"},
    ),
    "Lumina2Pipeline": Tiny(lumina2, guidance=3.0, arguments={"guidance_scale": 3.0, "cfg_normalization": False}),
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
FOLDERS_ALONE = {name for a in ARCHITECTURES if not a.model_signs for name in a.pipelines}
"""The pipelines that have no single files."""


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


def adapters_of(denoiser: Any, targets: Targets = ALL, size: float = 0.1) -> AdapterSet:
    """New ones with numbers of about this size everywhere, so that they change what the nets return."""
    adapters = AdapterSet.new(denoiser, LoRA(rank=2), targets, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapters.parameters():
        parameter.data = size * torch.randn(parameter.shape, generator=generator)
    return adapters
