"""What a family declares of its denoiser for files: names, signs, layouts and published models. No torch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Blocks = Mapping[str, tuple[str, ...]]
"""{a layer of the original code: diffusers' modules whose rows it has}; {} is a block's number."""
Part = tuple[str, str, Mapping[str, Any]]
"""Library, class, and config of a part."""
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
TRANSFORMER, DOUBLE = "a transformer of diffusers", "Flux, Chroma or Qwen-Image"
UNETS, LUMINA2_OR_Z_IMAGE = "a UNet of the Stable Diffusion kind", "Lumina 2 or Z-Image"
TEXTS, SECOND_TEXTS, T5_TEXTS = "a text encoder", "SDXL or Stable Diffusion 3", "Flux or Stable Diffusion 3"
"""What LoRAs look like whose names are those of several architectures."""


@dataclass(frozen=True)
class Published:
    """A published model that LoRAs are made for: what its configs state otherwise than the classes' defaults.

    The values are those of diffusers' conversion scripts (`scripts/convert_*_to_diffusers.py`) and of the configs
    beside the published weights. What no layer's name or shape depends on is left out.
    """

    name: str
    pipeline: str  # its class in diffusers
    parts: Mapping[str, Part]
    looks: Collection[str] = ()  # what its LoRAs may look like besides the architecture
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the pipeline's own config


@dataclass(frozen=True)
class OnHub:
    """A model that people name in place of a file, a folder or a hub id."""

    name: str
    hub_id: str
    short: str  # what it is called for short, in lower case, without spaces and signs; words between spaces


@dataclass(frozen=True)
class Architecture:
    """An architecture; its family in `models/families` says how it is trained."""

    name: str
    pipelines: Mapping[str, str]
    """{class of a pipeline in diffusers: its family, as module.Class in `models/families`}."""
    lora_signs: str | None = None
    """A pattern in a layer's name, with underscores for points, that its LoRAs alone have; None: widths tell them."""
    model_signs: str | None = None
    """A pattern at the start of a tensor's name that its models alone have, `model.diffusion_model.` left out."""
    weak_lora_signs: str | None = None
    """The same as lora_signs, where no architecture's own signs are there."""
    weak_model_signs: str | None = None
    """The same as model_signs, where no architecture's own signs are there."""
    text_width: int | None = None
    """Of a UNet: the width of the texts that it reads."""
    widths: Mapping[str, Collection[int]] = field(default_factory=dict)
    """{what its LoRAs look like by names alone: the inputs of attention that it alone has among those}."""
    transformer: str | None = None
    """The class of its transformer in diffusers; None: it has a UNet."""
    layers: Blocks = field(default_factory=dict)
    """The transformer's layers that the original code names otherwise than diffusers."""
    original_names: Literal["never", "others", "always"] = "never"
    """When most programs read its LoRAs by the original code's names alone; others: what diffusers does not read."""
    published: tuple[Published, ...] = ()
    on_hub: tuple[OnHub, ...] = ()
    comfyui: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """{ComfyUI's class of a model: what modelspec and kohya's tools call it}."""


def one_to_one(names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """{original name: diffusers' name} -> Blocks."""
    return {original: (name,) for original, name in names.items()}


def numbered(original: str, block: str, names: Blocks) -> dict[str, tuple[str, ...]]:
    """The names of what is in a block, after the block's own."""
    return {f"{original}.{name}": tuple(f"{block}.{path}" for path in paths) for name, paths in names.items()}


def unet(name: str, pipeline: str, looks: Collection[str], config: Mapping[str, Any], **encoders: Part) -> Published:
    """A published UNet, and its text encoders."""
    return Published(name, pipeline, {"unet": ("diffusers", "UNet2DConditionModel", config), **encoders}, looks)


def transformer(
    name: str, pipeline: str, kind: str, looks: Collection[str] = (), encoders: Mapping[str, Part] | None = None,
    **config: Any,
) -> Published:  # fmt: skip
    """A published transformer of this class of diffusers, and its text encoders."""
    return Published(name, pipeline, {"transformer": ("diffusers", kind, config), **(encoders or {})}, looks)


def clip(width: int, num_layers: int, kind: str = "CLIPTextModel") -> Part:
    sizes = {
        "hidden_size": width, "projection_dim": width, "intermediate_size": 4 * width, "num_hidden_layers": num_layers,
        "num_attention_heads": width // 64,
    }  # fmt: skip
    return "transformers", kind, sizes


CLIP_L, CLIP_G = clip(768, 12), clip(1280, 32, "CLIPTextModelWithProjection")
T5_XXL: Part = (
    "transformers", "T5EncoderModel",
    {
        "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    },
)  # fmt: skip
