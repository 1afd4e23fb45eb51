"""The layers of transformers as the code that came with their weights has them: other names, q, k and v in one layer.

ComfyUI and kohya's tools name LoRA files by these. {} is a block's number.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Original:
    """A layer of the original code."""

    name: str
    paths: tuple[str, ...]  # diffusers' modules whose rows it has, one after another
    swapped: bool = False  # its rows are shift and scale, diffusers' scale and shift


Blocks = dict[str, tuple[str, ...]]
"""{original name: diffusers' names of what it holds}."""


def _one_to_one(names: Mapping[str, str]) -> Blocks:
    return {original: (name,) for original, name in names.items()}


def _numbered(original: str, block: str, names: Blocks) -> Blocks:
    return {f"{original}.{name}": tuple(f"{block}.{path}" for path in paths) for name, paths in names.items()}


QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
EMBEDDERS = _one_to_one(
    {
        f"{original}.{layer}_layer": f"time_text_embed.{name}_embedder.linear_{number}"
        for original, name in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance"))
        for number, layer in ((1, "in"), (2, "out"))
    }
)
FLUX_ENDS = _one_to_one(
    {
        "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    }
)  # fmt: skip
FLUX_DOUBLE = {
    "img_attn.qkv": QKV,
    "txt_attn.qkv": ADDED_QKV,
    **_one_to_one(
        {
            "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out",
            "img_attn.norm.query_norm": "attn.norm_q", "img_attn.norm.key_norm": "attn.norm_k",
            "txt_attn.norm.query_norm": "attn.norm_added_q", "txt_attn.norm.key_norm": "attn.norm_added_k",
        }
    ),
}  # fmt: skip
FLUX_SINGLE = {
    "linear1": (*QKV, "proj_mlp"),
    **_one_to_one(
        {
            "linear2": "proj_out", "modulation.lin": "norm.linear", "norm.query_norm": "attn.norm_q",
            "norm.key_norm": "attn.norm_k",
        }
    ),
}  # fmt: skip
FLUX_MLPS = _one_to_one(
    {
        "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear", "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2", "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
    }
)  # fmt: skip
FLUX2_MLPS = _one_to_one(
    {
        "img_mlp.0": "ff.linear_in", "img_mlp.2": "ff.linear_out", "txt_mlp.0": "ff_context.linear_in",
        "txt_mlp.2": "ff_context.linear_out",
    }
)  # fmt: skip
FLUX = {
    **EMBEDDERS,
    **FLUX_ENDS,
    **_numbered("double_blocks.{}", "transformer_blocks.{}", FLUX_DOUBLE | FLUX_MLPS),
    **_numbered("single_blocks.{}", "single_transformer_blocks.{}", FLUX_SINGLE),
}
CHROMA = FLUX | _numbered(
    "distilled_guidance_layer",
    "distilled_guidance_layer",
    _one_to_one({"layers.{}.in_layer": "layers.{}.linear_1", "layers.{}.out_layer": "layers.{}.linear_2"}),
)
FLUX2 = {
    **FLUX_ENDS,
    **{name: (path.replace("time_text_embed", "time_guidance_embed"),) for name, (path,) in EMBEDDERS.items()},
    **_one_to_one(
        {
            f"{modulation}.lin": f"{modulation}.linear"
            for modulation in (*(f"double_stream_modulation_{s}" for s in ("img", "txt")), "single_stream_modulation")
        }
    ),
    **_numbered("double_blocks.{}", "transformer_blocks.{}", FLUX_DOUBLE | FLUX2_MLPS),
    **_numbered(
        "single_blocks.{}",
        "single_transformer_blocks.{}",
        _one_to_one(
            {
                "linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out", "norm.query_norm": "attn.norm_q",
                "norm.key_norm": "attn.norm_k",
            }
        ),
    ),
}  # fmt: skip
SD3_BLOCK = {
    "x_block.attn.qkv": QKV,
    "context_block.attn.qkv": ADDED_QKV,
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    **_one_to_one(
        {
            "x_block.attn.proj": "attn.to_out.0", "x_block.attn.ln_q": "attn.norm_q",
            "x_block.attn.ln_k": "attn.norm_k",
            "x_block.attn2.proj": "attn2.to_out.0", "x_block.attn2.ln_q": "attn2.norm_q",
            "x_block.attn2.ln_k": "attn2.norm_k", "x_block.mlp.fc1": "ff.net.0.proj", "x_block.mlp.fc2": "ff.net.2",
            "x_block.adaLN_modulation.1": "norm1.linear", "context_block.attn.proj": "attn.to_add_out",
            "context_block.attn.ln_q": "attn.norm_added_q", "context_block.attn.ln_k": "attn.norm_added_k",
            "context_block.mlp.fc1": "ff_context.net.0.proj", "context_block.mlp.fc2": "ff_context.net.2",
            "context_block.adaLN_modulation.1": "norm1_context.linear",
        }
    ),
}  # fmt: skip
SD3 = {
    **_one_to_one(
        {
            "x_embedder.proj": "pos_embed.proj", "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
            "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2", "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
        }
    ),
    **_numbered("joint_blocks.{}", "transformer_blocks.{}", SD3_BLOCK),
}  # fmt: skip
WAN_ATTENTION = {
    "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "k_img": "add_k_proj", "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}  # fmt: skip
WAN = _one_to_one(
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
Z_IMAGE_ATTENTION = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    **_one_to_one(
        {
            "attention.out": "attention.to_out.0", "attention.q_norm": "attention.norm_q",
            "attention.k_norm": "attention.norm_k",
        }
    ),
}  # fmt: skip
Z_IMAGE = {
    **_one_to_one(
        {
            "x_embedder": "all_x_embedder.2-1", "final_layer.linear": "all_final_layer.2-1.linear",
            "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        }
    ),
    **{
        name: paths
        for stack in ("layers.{}", "noise_refiner.{}", "context_refiner.{}", "siglip_refiner.{}")
        for name, paths in _numbered(stack, stack, Z_IMAGE_ATTENTION).items()
    },
}  # fmt: skip
LUMINA2_BLOCK = {
    "attention.qkv": QKV,
    **_one_to_one(
        {
            "attention.out": "attn.to_out.0", "attention.q_norm": "attn.norm_q", "attention.k_norm": "attn.norm_k",
            "feed_forward.w1": "feed_forward.linear_1", "feed_forward.w2": "feed_forward.linear_2",
            "feed_forward.w3": "feed_forward.linear_3", "attention_norm2": "norm2",
        }
    ),
}  # fmt: skip
MODULATED = _one_to_one({"attention_norm1": "norm1.norm", "adaLN_modulation.1": "norm1.linear"})
LUMINA2 = {
    **_one_to_one(
        {
            "cap_embedder.0": "time_caption_embed.caption_embedder.0",
            "cap_embedder.1": "time_caption_embed.caption_embedder.1",
            "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
            "final_layer.adaLN_modulation.1": "norm_out.linear_1", "final_layer.linear": "norm_out.linear_2",
        }
    ),
    **_numbered("layers.{}", "layers.{}", LUMINA2_BLOCK | MODULATED),
    **_numbered("noise_refiner.{}", "noise_refiner.{}", LUMINA2_BLOCK | MODULATED),
    **_numbered("context_refiner.{}", "context_refiner.{}", LUMINA2_BLOCK | _one_to_one({"attention_norm1": "norm1"})),
}  # fmt: skip
TRANSFORMERS: Mapping[str, Blocks] = {
    "FluxTransformer2DModel": FLUX,
    "ChromaTransformer2DModel": CHROMA,
    "Flux2Transformer2DModel": FLUX2,
    "SD3Transformer2DModel": SD3,
    "QwenImageTransformer2DModel": {},
    "WanTransformer3DModel": WAN,
    "ZImageTransformer2DModel": Z_IMAGE,
    "Lumina2Transformer2DModel": LUMINA2,
}
"""{class in diffusers: what is named otherwise there than in the original code}."""


def original_layers(kind: str, paths: Collection[str]) -> list[Original]:
    """Every layer of the original code that a net of this class of TRANSFORMERS has, its modules' paths being these."""
    known = set(paths)
    found = [
        Original(name, members, _is_swapped(members[0], known))
        for name, members in _filled(TRANSFORMERS[kind], known)
        if known.issuperset(members)
    ]
    named = {path for layer in found for path in layer.paths}
    return [*found, *(Original(path, (path,)) for path in paths if path not in named)]


def _filled(table: Blocks, paths: Collection[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The table's names for every number that a path has."""
    numbers = sorted({word for path in paths for word in path.split(".") if word.isdigit()}, key=int)
    for name, members in table.items():
        for number in numbers if "{}" in name else [""]:
            yield name.format(number), tuple(member.format(number) for member in members)


def _is_swapped(path: str, paths: Collection[str]) -> bool:
    """Whether it modulates as diffusers' AdaLayerNormContinuous does; of contexts, the last block alone."""
    block, _, layer = path.rpartition("norm1_context.")
    return path == "norm_out.linear" or (layer == "linear" and f"{block}attn.to_add_out" not in paths)
