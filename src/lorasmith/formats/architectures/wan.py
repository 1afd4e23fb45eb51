"""Wan 2.1 and 2.2: transformers of videos."""

from dataclasses import replace
from typing import Any

from lorasmith.formats.architectures.architecture import Architecture, OnHub, Published, one_to_one, transformer

WAN_ATTENTION = {
    "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "k_img": "add_k_proj", "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}  # fmt: skip
LAYERS = one_to_one(
    {
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj", "head.head": "proj_out",
        "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
        "blocks.{}.ffn.0": "blocks.{}.ffn.net.0.proj", "blocks.{}.ffn.2": "blocks.{}.ffn.net.2",
        "blocks.{}.norm3": "blocks.{}.norm2",
        **{
            f"blocks.{{}}.{original}_attn.{layer}": f"blocks.{{}}.{attention}.{name}"
            for original, attention in (("self", "attn1"), ("cross", "attn2"))
            for layer, name in (*WAN_ATTENTION.items(), ("norm_q", "norm_q"), ("norm_k", "norm_k"))
        },
    }
)  # fmt: skip


def _published(name: str, **config: Any) -> Published:
    return transformer(name, "WanPipeline", "WanTransformer3DModel", **config)


WAN_14B = _published("Wan 14B")
WAN = Architecture(
    name="Wan",
    pipelines={"WanPipeline": "wan.Wan"},
    lora_signs=r"(^transformer_|(?<!transformer_))blocks_\d+_(self_attn|cross_attn|ffn_\d|attn1_to|attn2_to|ffn_net)",
    model_signs=r"blocks\.\d+\.self_attn\.q\.|condition_embedder\.time_proj\.",
    transformer="WanTransformer3DModel",
    layers=LAYERS,
    original_names="always",
    published=(
        WAN_14B,
        _published("Wan 2.1 1.3B", num_attention_heads=12, ffn_dim=8960, num_layers=30),
        _published("Wan 2.1 14B for images", in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
        _published(
            "Wan 2.2 5B", num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48
        ),
        replace(
            WAN_14B, name="Wan 2.2 14B, both experts", settings={"boundary_ratio": 0.875},
            parts={name: WAN_14B.parts["transformer"] for name in ("transformer", "transformer_2")},
        ),
    ),
    on_hub=(
        OnHub("Wan 2.1", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan wan21 wan2 wan21t2v"),
        OnHub("Wan 2.2", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "wan22 wan22t2v wan225b"),
    ),
)  # fmt: skip
