"""The models that LoRAs are published for: what their configs state otherwise than the classes' defaults.

The values are those of diffusers' conversion scripts (`scripts/convert_*_to_diffusers.py`) and of the configs beside
the published weights. What no layer's name or shape depends on is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lorasmith.formats.detect import DOUBLE, SD3, SECOND_TEXTS, T5_TEXTS, TEXT_WIDTHS, TEXTS, TRANSFORMER, UNKNOWN
from lorasmith.formats.detect import UNETS as OF_UNETS
from lorasmith.models.checkpoints.transformer_configs import Config

Part = tuple[str, str, Config]
"""Library, class, and config of a part."""


@dataclass(frozen=True)
class Published:
    """A model."""

    name: str
    pipeline: str  # its class in diffusers
    parts: Mapping[str, Part]
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the pipeline's own config


def _unet(name: str, pipeline: str, config: Config, **encoders: Part) -> Published:
    return Published(name, pipeline, {"unet": ("diffusers", "UNet2DConditionModel", config), **encoders})


def _clip(width: int, num_layers: int, kind: str = "CLIPTextModel") -> Part:
    sizes = {
        "hidden_size": width, "projection_dim": width, "intermediate_size": 4 * width, "num_hidden_layers": num_layers,
        "num_attention_heads": width // 64,
    }  # fmt: skip
    return "transformers", kind, sizes


def _transformer(name: str, pipeline: str, kind: str, **config: Any) -> Published:
    return Published(name, pipeline, {"transformer": ("diffusers", kind, config)})


def _with(published: Published, **encoders: Part) -> Published:
    return replace(published, parts={**published.parts, **encoders})


def _sd3(name: str, num_layers: int, **config: Any) -> Published:
    without = _transformer(
        name, "StableDiffusion3Pipeline", "SD3Transformer2DModel", num_layers=num_layers,
        num_attention_heads=num_layers, caption_projection_dim=64 * num_layers, **config,
    )  # fmt: skip
    first = _clip(768, 12, "CLIPTextModelWithProjection")
    return _with(without, text_encoder=first, text_encoder_2=CLIP_G, text_encoder_3=T5_XXL)


def _klein(name: str, num_layers: int, num_single_layers: int, num_heads: int, text_width: int) -> Published:
    return _transformer(
        name, "Flux2KleinPipeline", "Flux2Transformer2DModel", num_layers=num_layers,
        num_single_layers=num_single_layers, num_attention_heads=num_heads, joint_attention_dim=text_width,
        guidance_embeds=False,
    )  # fmt: skip


def _wan(name: str, **config: Any) -> Published:
    return _transformer(name, "WanPipeline", "WanTransformer3DModel", **config)


CLIP_L, CLIP_G = _clip(768, 12), _clip(1280, 32, "CLIPTextModelWithProjection")
T5_XXL: Part = (
    "transformers", "T5EncoderModel",
    {
        "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    },
)  # fmt: skip
SD1 = _unet("Stable Diffusion 1.5", "StableDiffusionPipeline", {"cross_attention_dim": 768}, text_encoder=CLIP_L)
SD2 = _unet(
    "Stable Diffusion 2.1", "StableDiffusionPipeline",
    {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    text_encoder=_clip(1024, 23),
)  # fmt: skip
SDXL = _unet(
    "SDXL", "StableDiffusionXLPipeline",
    {
        "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    text_encoder=CLIP_L, text_encoder_2=CLIP_G,
)  # fmt: skip
SD3_KINDS = (
    _sd3("SD 3.5 medium", 24, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)), pos_embed_max_size=384),
    _sd3("SD 3 medium", 24, pos_embed_max_size=192),
    _sd3("SD 3.5 large", 38, qk_norm="rms_norm", pos_embed_max_size=192),
)
FLUX = _with(
    _transformer("FLUX.1", "FluxPipeline", "FluxTransformer2DModel", guidance_embeds=True),
    text_encoder=CLIP_L, text_encoder_2=T5_XXL,
)  # fmt: skip
CHROMA = _transformer("Chroma1", "ChromaPipeline", "ChromaTransformer2DModel")
FLUX2 = (
    _transformer("FLUX.2 dev", "Flux2Pipeline", "Flux2Transformer2DModel"),
    _klein("FLUX.2 klein 4B", 5, 20, 24, 7680),
    _klein("FLUX.2 klein 9B", 8, 24, 32, 12288),
)
QWEN_IMAGE = _transformer("Qwen-Image", "QwenImagePipeline", "QwenImageTransformer2DModel")
Z_IMAGE = _transformer("Z-Image", "ZImagePipeline", "ZImageTransformer2DModel")
LUMINA2 = _transformer("Lumina Image 2.0", "Lumina2Pipeline", "Lumina2Transformer2DModel", cap_feat_dim=2304)
WAN_14B = _wan("Wan 14B")
WAN = (
    WAN_14B,
    _wan("Wan 2.1 1.3B", num_attention_heads=12, ffn_dim=8960, num_layers=30),
    _wan("Wan 2.1 14B for images", in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
    _wan("Wan 2.2 5B", num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48),
    Published(
        "Wan 2.2 14B, both experts", "WanPipeline",
        {name: WAN_14B.parts["transformer"] for name in ("transformer", "transformer_2")}, {"boundary_ratio": 0.875},
    ),
)  # fmt: skip
SMALLEST_KLEIN = FLUX2[1]  # as wide as Flux.1
UNETS = (SD1, SD2, SDXL)
PUBLISHED: Mapping[str, tuple[Published, ...]] = {
    TEXT_WIDTHS[768]: (SD1,),
    TEXT_WIDTHS[1024]: (SD2,),
    "SDXL": (SDXL,),
    OF_UNETS: UNETS,
    TEXTS: UNETS,
    SECOND_TEXTS: (SDXL, SD3_KINDS[0]),
    T5_TEXTS: (FLUX, SD3_KINDS[0]),
    SD3: SD3_KINDS,
    "Flux": (FLUX, CHROMA, SMALLEST_KLEIN),
    "Flux.2": FLUX2,
    "Chroma": (CHROMA,),
    "Qwen-Image": (QWEN_IMAGE,),
    DOUBLE: (FLUX, CHROMA, QWEN_IMAGE, SMALLEST_KLEIN),
    TRANSFORMER: (*SD3_KINDS, FLUX, CHROMA, QWEN_IMAGE, *FLUX2),
    "Z-Image": (Z_IMAGE,),
    "Lumina 2": (LUMINA2,),
    "Lumina 2 or Z-Image": (LUMINA2, Z_IMAGE),
    "Wan": WAN,
}
"""{what a LoRA looks like, as `looks.lora_family` says it: the models that it may be for}."""


def may_be_one(family: str, other: str) -> bool:
    """Whether two LoRAs that look like these may be for one model: there is a published one that both may be for."""
    if family == other or UNKNOWN in (family, other):
        return True
    models, others = ({model.name for model in PUBLISHED.get(name, ())} for name in (family, other))
    if not models or not others:  # a UNet of another text width than published ones
        return OF_UNETS in (family, other)
    return not models.isdisjoint(others)
