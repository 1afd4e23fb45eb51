"""What the shapes of a transformer's tensors, under diffusers' names, say of its config; the rest is as published.

Each function here returns the values of its class's config that vary among the published models.
"""

import math
from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
"""{name of a tensor: its shape}."""
Config = Mapping[str, Any]


def _count(shapes: Shapes, prefix: str) -> int:
    """How many numbered blocks there are: `prefix0.`, `prefix1.` …"""
    return len({key[len(prefix) :].partition(".")[0] for key in shapes if key.startswith(prefix)})


def _holds(shapes: Shapes, part: str) -> bool:
    return any(part in key for key in shapes)


def sd3(shapes: Shapes, base: Config) -> Config:
    width, channels, patch, _ = shapes["pos_embed.proj.weight"]
    first = "transformer_blocks.0.attn.norm_q.weight"
    head = shapes[first][0] if first in shapes else base.get("attention_head_dim", 64)
    doubled = (key.split(".")[1] for key in shapes if ".attn2.to_q.weight" in key)
    return {
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // patch**2,
        "patch_size": patch,
        "num_layers": _count(shapes, "transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "pos_embed_max_size": math.isqrt(shapes["pos_embed.pos_embed"][1]),
        "dual_attention_layers": tuple(sorted(map(int, doubled))),
        "qk_norm": "rms_norm" if first in shapes else None,
    }


def _flux_like(shapes: Shapes) -> dict[str, Any]:
    width, channels = shapes["x_embedder.weight"]
    head, out = shapes["transformer_blocks.0.attn.norm_q.weight"][0], shapes["proj_out.weight"][0]
    return {
        "in_channels": channels,
        "out_channels": None if out == channels else out,
        "num_layers": _count(shapes, "transformer_blocks."),
        "num_single_layers": _count(shapes, "single_transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
    }


def flux(shapes: Shapes, base: Config) -> Config:
    return {
        **_flux_like(shapes),
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": _holds(shapes, "guidance_embedder"),
    }


def chroma(shapes: Shapes, base: Config) -> Config:
    hidden, channels = shapes["distilled_guidance_layer.in_proj.weight"]
    return {
        **_flux_like(shapes),
        "approximator_num_channels": channels,
        "approximator_hidden_dim": hidden,
        "approximator_layers": _count(shapes, "distilled_guidance_layer.layers."),
    }


def flux2(shapes: Shapes, base: Config) -> Config:
    width, hidden = shapes["x_embedder.weight"][0], shapes["transformer_blocks.0.ff.linear_in.weight"][0]
    return {
        **_flux_like(shapes),
        "timestep_guidance_channels": shapes["time_guidance_embed.timestep_embedder.linear_1.weight"][1],
        "mlp_ratio": hidden / 2 / width,  # half of it is the gate
        "guidance_embeds": _holds(shapes, "guidance_embedder"),
    }


def qwen_image(shapes: Shapes, base: Config) -> Config:
    (width, channels), head = shapes["img_in.weight"], shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    return {
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // base.get("patch_size", 2) ** 2,
        "num_layers": _count(shapes, "transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "use_additional_t_cond": _holds(shapes, "addition_t_embedding"),
    }


def z_image(shapes: Shapes, base: Config) -> Config:
    width, channels = shapes["all_x_embedder.2-1.weight"]
    head = shapes["layers.0.attention.norm_q.weight"][0]
    return {
        "in_channels": channels // 4,
        "dim": width,
        "n_layers": _count(shapes, "layers."),
        "n_refiner_layers": _count(shapes, "noise_refiner."),
        "n_heads": width // head,
        "n_kv_heads": shapes["layers.0.attention.to_k.weight"][0] // head,
        "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
    }


def lumina2(shapes: Shapes, base: Config) -> Config:
    width, channels = shapes["x_embedder.weight"]
    head, patch = shapes["layers.0.attn.norm_q.weight"][0], base.get("patch_size", 2)
    out = shapes["norm_out.linear_2.weight"][0] // patch**2
    return {
        "in_channels": channels // patch**2,
        "out_channels": None if out == channels // patch**2 else out,
        "hidden_size": width,
        "num_layers": _count(shapes, "layers."),
        "num_refiner_layers": _count(shapes, "noise_refiner."),
        "num_attention_heads": width // head,
        "num_kv_heads": shapes["layers.0.attn.to_k.weight"][0] // head,
        "cap_feat_dim": shapes["time_caption_embed.caption_embedder.1.weight"][1],
    }


def wan(shapes: Shapes, base: Config) -> Config:
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
        "num_layers": _count(shapes, "blocks."),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "image_dim": shapes[image][0] if image in shapes else None,
        "added_kv_proj_dim": shapes[added][1] if added in shapes else None,
    }
