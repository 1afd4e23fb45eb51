"""Tiny denoising nets of every class in diffusers that LoRA files have names for, with random weights."""

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from lorasmith.diffusion.process import Flow
from lorasmith.types import Cond

HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}
FLUX = {"in_channels": 8, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 12, **HEADS}
NETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "SD": (
        "UNet2DConditionModel",
        "StableDiffusionPipeline",
        {
            "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 32, "attention_head_dim": 2,
            "cross_attention_dim": 12, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
    ),
    "SDXL": (
        "UNet2DConditionModel",
        "StableDiffusionXLPipeline",
        {
            "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 32, "attention_head_dim": (4, 8),
            "cross_attention_dim": 12, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 32,
        },
    ),
    "Flux.1": (
        "FluxTransformer2DModel",
        "FluxPipeline",
        {**FLUX, "pooled_projection_dim": 10, "axes_dims_rope": (2, 2, 4), "guidance_embeds": True},
    ),
    "Chroma": (
        "ChromaTransformer2DModel",
        "ChromaPipeline",
        {
            **FLUX, "axes_dims_rope": (2, 2, 4), "approximator_num_channels": 8, "approximator_hidden_dim": 10,
            "approximator_layers": 1,
        },
    ),
    "Flux.2": (
        "Flux2Transformer2DModel",
        "Flux2Pipeline",
        {**FLUX, "axes_dims_rope": (2, 2, 2, 2)},
    ),
    "SD 3": (
        "SD3Transformer2DModel",
        "StableDiffusion3Pipeline",
        {
            "attention_head_dim": 64, "num_attention_heads": 2, "sample_size": 8, "num_layers": 2,
            "joint_attention_dim": 12, "caption_projection_dim": 128, "pooled_projection_dim": 10,
            "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm", "in_channels": 4,
            "out_channels": 4,
        },
    ),
    "Qwen-Image": (
        "QwenImageTransformer2DModel",
        "QwenImagePipeline",
        {**HEADS, "in_channels": 8, "num_layers": 2, "joint_attention_dim": 12, "axes_dims_rope": (2, 2, 4)},
    ),
    "Wan": (
        "WanTransformer3DModel",
        "WanPipeline",
        {
            **HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 12, "freq_dim": 8, "ffn_dim": 24, "num_layers": 2,
            "rope_max_seq_len": 16,
        },
    ),
    "Z-Image": (
        "ZImageTransformer2DModel",
        "ZImagePipeline",
        {
            "in_channels": 4, "dim": 256, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
            "cap_feat_dim": 12, "axes_dims": [32, 48, 48], "axes_lens": [16, 16, 16],
        },
    ),
    "Lumina 2": (
        "Lumina2Transformer2DModel",
        "Lumina2Pipeline",
        {
            "sample_size": 8, "in_channels": 4, "hidden_size": 16, "num_layers": 2, "num_refiner_layers": 1,
            "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8, "axes_dim_rope": (4, 2, 2),
            "axes_lens": (16, 16, 16), "cap_feat_dim": 12,
        },
    ),
}  # fmt: skip
"""{family: its net's class, its pipeline's, the net's config}."""


@dataclass(frozen=True)
class Holder:
    """A denoiser that is a net and its names."""

    net: nn.Module
    root: str
    process: Flow = Flow()  # noqa: RUF009

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {self.root: self.net}

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        raise NotImplementedError

    def file_key(self, path: str) -> str:
        return f"lora_{path}".replace(".", "_") if self.root == "unet" else path


def net_of(family: str, device: str = "cpu", **config: Any) -> nn.Module:
    """The net of a family, the same each time; on "meta" without weights."""
    kind, _, tiny = NETS[family]
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        net = getattr(diffusers, kind)(**{**tiny, **config})
        for parameter in net.parameters() if device != "meta" else ():
            nn.init.normal_(parameter, std=0.3)
    return net.eval()


def holder_of(family: str, device: str = "cpu", **config: Any) -> Holder:
    return Holder(net_of(family, device, **config), "unet" if NETS[family][0].startswith("UNet") else "transformer")


def pipeline_of(family: str, net: nn.Module) -> Any:
    """A pipeline of the family that has this net, and nothing else."""
    import inspect

    kind = getattr(diffusers, NETS[family][1])
    root = "unet" if NETS[family][0].startswith("UNet") else "transformer"
    needed = [
        name
        for name, p in inspect.signature(kind.__init__).parameters.items()
        if name != "self" and p.default is p.empty
    ]
    extra = {"requires_safety_checker": False} if family == "SD" else {}
    return kind(**{**dict.fromkeys(needed, None), root: net, **extra})
