"""The layouts of the original code of each family: what diffusers' conversions undo. Written by hand."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorasmith.formats.unet_names import ldm_names

State = dict[str, Tensor]
Names = Mapping[str, str]
"""{module in diffusers: module in the original}; "module|0" is the first of those that are one there."""
QKV = ("q", "k", "v")
LINEAR = {"linear_1": "0", "linear_2": "2"}


def _of_flux(side: str, added: str, ff: tuple[str, str, str]) -> dict[str, str]:
    name, first, last = ff
    to, norm, out = ("add_{}_proj", "norm_added_{}", "to_add_out") if added else ("to_{}", "norm_{}", "to_out.0")
    return {
        **{f"attn.{to.format(q)}": f"{side}_attn.qkv|{number}" for number, q in enumerate(QKV)},
        f"attn.{norm.format('q')}": f"{side}_attn.norm.query_norm",
        f"attn.{norm.format('k')}": f"{side}_attn.norm.key_norm",
        f"attn.{out}": f"{side}_attn.proj",
        f"{name}.{first}": f"{side}_mlp.0",
        f"{name}.{last}": f"{side}_mlp.2",
    }


FLUX_DOUBLE = {
    **_of_flux("img", "", ("ff", "net.0.proj", "net.2")),
    **_of_flux("txt", "added", ("ff_context", "net.0.proj", "net.2")),
    "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
}  # fmt: skip
FLUX_SINGLE = {
    **{f"attn.to_{q}": f"linear1|{number}" for number, q in enumerate(QKV)}, "proj_mlp": "linear1|3",
    "attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm", "proj_out": "linear2",
    "norm.linear": "modulation.lin",
}  # fmt: skip
FLUX_TOP = {
    "context_embedder": "txt_in", "x_embedder": "img_in", "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    **{
        f"{embed}.{ours}.linear_{number}": f"{theirs}.{layer}_layer"
        for embed in ("time_text_embed", "time_guidance_embed")
        for ours, theirs in (
            ("timestep_embedder", "time_in"), ("text_embedder", "vector_in"), ("guidance_embedder", "guidance_in"),
        )
        for number, layer in ((1, "in"), (2, "out"))
    },
}  # fmt: skip
SD3_BLOCK = {
    **{f"attn.to_{q}": f"x_block.attn.qkv|{n}" for n, q in enumerate(QKV)},
    **{f"attn2.to_{q}": f"x_block.attn2.qkv|{n}" for n, q in enumerate(QKV)},
    **{f"attn.add_{q}_proj": f"context_block.attn.qkv|{n}" for n, q in enumerate(QKV)},
    **{f"{attn}.norm_{q}": f"x_block.{attn}.ln_{q}" for attn in ("attn", "attn2") for q in "qk"},
    **{f"attn.norm_added_{q}": f"context_block.attn.ln_{q}" for q in "qk"},
    "attn.to_out.0": "x_block.attn.proj", "attn2.to_out.0": "x_block.attn2.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
}  # fmt: skip
SD3_TOP = {
    "pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj", "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    **{f"time_text_embed.timestep_embedder.{ours}": f"t_embedder.mlp.{n}" for ours, n in LINEAR.items()},
    **{f"time_text_embed.text_embedder.{ours}": f"y_embedder.mlp.{n}" for ours, n in LINEAR.items()},
}  # fmt: skip
FLUX2_TOP = FLUX_TOP | {
    f"{name}.linear": f"{name}.lin"
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
}
FLUX2_DOUBLE = {
    **_of_flux("img", "", ("ff", "linear_in", "linear_out")),
    **_of_flux("txt", "added", ("ff_context", "linear_in", "linear_out")),
}
FLUX2_SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm",
}  # fmt: skip
Z_BLOCK = {
    **{f"attention.to_{q}": f"attention.qkv|{n}" for n, q in enumerate(QKV)}, "attention.to_out.0": "attention.out",
    "attention.norm_q": "attention.q_norm", "attention.norm_k": "attention.k_norm",
}  # fmt: skip
Z_TOP = {
    "all_x_embedder.2-1": "x_embedder", "all_final_layer.2-1.linear": "final_layer.linear",
    "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
}  # fmt: skip
LUMINA_BLOCK = {
    **{ours.replace("attention", "attn"): theirs for ours, theirs in Z_BLOCK.items()},
    "norm1": "attention_norm1", "norm1.norm": "attention_norm1", "norm2": "attention_norm2",
    "norm1.linear": "adaLN_modulation.1", **{f"feed_forward.linear_{n}": f"feed_forward.w{n}" for n in (1, 2, 3)},
}  # fmt: skip
LUMINA_TOP = {
    "norm_out.linear_1": "final_layer.adaLN_modulation.1", "norm_out.linear_2": "final_layer.linear",
    **{f"time_caption_embed.caption_embedder.{n}": f"cap_embedder.{n}" for n in (0, 1)},
    **{f"time_caption_embed.timestep_embedder.{ours}": f"t_embedder.mlp.{n}" for ours, n in LINEAR.items()},
}  # fmt: skip
WAN_BLOCK = {
    **{f"attn{n}.to_{q}": f"{attn}.{q}" for n, attn in ((1, "self_attn"), (2, "cross_attn")) for q in QKV},
    **{f"attn{n}.norm_{q}": f"{attn}.norm_{q}" for n, attn in ((1, "self_attn"), (2, "cross_attn")) for q in "qk"},
    "attn1.to_out.0": "self_attn.o", "attn2.to_out.0": "cross_attn.o", "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "scale_shift_table": "modulation",
}  # fmt: skip
WAN_TOP = {
    **{f"condition_embedder.time_embedder.{ours}": f"time_embedding.{n}" for ours, n in LINEAR.items()},
    **{f"condition_embedder.text_embedder.{ours}": f"text_embedding.{n}" for ours, n in LINEAR.items()},
    "condition_embedder.time_proj": "time_projection.1", "scale_shift_table": "head.modulation",
    "proj_out": "head.head",
}  # fmt: skip
CHROMA_LAYER = {"linear_1": "in_layer", "linear_2": "out_layer"}
Z_BLOCKS = {name: (name, Z_BLOCK) for name in ("layers", "noise_refiner", "context_refiner")}
LUMINA_BLOCKS = {name: (name, LUMINA_BLOCK) for name in Z_BLOCKS}
FLUX_BLOCKS = {
    "transformer_blocks": ("double_blocks", FLUX_DOUBLE),
    "single_transformer_blocks": ("single_blocks", FLUX_SINGLE),
}
LAYOUTS: dict[str, tuple[Names, Mapping[str, tuple[str, Names]]]] = {
    "SD3Transformer2DModel": (SD3_TOP, {"transformer_blocks": ("joint_blocks", SD3_BLOCK)}),
    "FluxTransformer2DModel": (FLUX_TOP, FLUX_BLOCKS),
    "ChromaTransformer2DModel": (
        FLUX_TOP, {**FLUX_BLOCKS, "distilled_guidance_layer.layers": ("distilled_guidance_layer.layers", CHROMA_LAYER)},
    ),
    "Flux2Transformer2DModel": (
        FLUX2_TOP,
        {
            "transformer_blocks": ("double_blocks", FLUX2_DOUBLE),
            "single_transformer_blocks": ("single_blocks", FLUX2_SINGLE),
        },
    ),
    "QwenImageTransformer2DModel": ({}, {}),
    "ZImageTransformer2DModel": (Z_TOP, Z_BLOCKS),
    "Lumina2Transformer2DModel": (LUMINA_TOP, LUMINA_BLOCKS),
    "WanTransformer3DModel": (WAN_TOP, {"blocks": ("blocks", WAN_BLOCK)}),
}  # fmt: skip


def original(net: Any) -> State:
    """A denoiser's tensors in the layout of its original code, without a prefix."""
    kind = type(net).__name__
    if kind == "UNet2DConditionModel":
        names = ldm_names(net.config)
        return {
            ".".join((names[key.rpartition(".")[0]], key.rpartition(".")[2])): t for key, t in net.state_dict().items()
        }
    pieces: dict[str, dict[int, Tensor]] = {}
    for key, tensor in net.state_dict().items():
        module, leaf = re.fullmatch(r"(.*?)((?:\.weight|\.bias)?)", key).groups()  # type: ignore[union-attr]
        name = _renamed(module, *LAYOUTS[kind])
        module, _, number = name.partition("|")
        if re.search(r"(query|key)_norm$|guidance_layer\.norms\.\d+$", module):
            leaf = ".scale"
        pieces.setdefault(module + leaf, {})[int(number or 0)] = _turned(tensor, module, kind, net)
    return {key: torch.cat([parts[n] for n in sorted(parts)]) for key, parts in pieces.items()}


def _renamed(module: str, top: Names, blocks: Mapping[str, tuple[str, Names]]) -> str:
    found = re.fullmatch(r"(.+?)\.(\d+)(?:\.(.+))?", module)
    if found and found[1] in blocks:
        place, names = blocks[found[1]]
        return f"{place}.{found[2]}.{names.get(found[3], found[3])}"
    return top.get(module, module)


def _turned(tensor: Tensor, module: str, kind: str, net: Any) -> Tensor:
    """Shift and scale of the last layer's norm, and in SD 3 of the last block's texts, stand the other way round."""
    last = module == "final_layer.adaLN_modulation.1" and kind[:4] in ("SD3T", "Flux")
    if last or (
        kind[:3] == "SD3" and module.endswith(f"{net.config['num_layers'] - 1}.context_block.adaLN_modulation.1")
    ):
        return torch.cat(tensor.chunk(2)[::-1])
    return tensor


def original_vae(vae: Any) -> State:
    """The names of the original autoencoder, whose decoder counts its levels from the finest."""
    last, state = len(vae.config.block_out_channels) - 1, {}
    for key, value in vae.state_dict().items():
        key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
        key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", key)
        key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", key)
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "mid_block.attentions.0" in key:
            key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            key = key.replace("to_out.0", "proj_out").replace("to_", "")
            value = value[:, :, None, None] if value.ndim == 2 else value  # convolutions of size 1
        state[key] = value
    return state


def open_clip(text: State) -> State:
    """OpenCLIP's names of a CLIPTextModel's tensors, which are without the level text_model."""
    state = {
        "token_embedding.weight": text["embeddings.token_embedding.weight"],
        "positional_embedding": text["embeddings.position_embedding.weight"],
        "ln_final.weight": text["final_layer_norm.weight"],
        "ln_final.bias": text["final_layer_norm.bias"],
    }
    for layer in sorted({key.split(".")[2] for key in text if key.startswith("encoder.layers.")}):
        ours, theirs = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for leaf in ("weight", "bias"):
            qkv = torch.cat([text[f"{ours}.self_attn.{name}_proj.{leaf}"] for name in "qkv"])
            state[f"{theirs}.attn.in_proj_{leaf}"] = qkv
            for here, there in (
                ("self_attn.out_proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
                ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
            ):  # fmt: skip
                state[f"{theirs}.{there}.{leaf}"] = text[f"{ours}.{here}.{leaf}"]
    return state
