"""The published models: as many parameters as they are known for, and layers as programs' LoRA files name them."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiers import table
from torch import Tensor

from lorasmith.models.meta import published_skeleton
from lorasmith.models.reference_configs import PUBLISHED
from lorasmith.tools.convert import convert
from lorasmith.types import LayoutName

MODELS = {model.name: model for models in PUBLISHED.values() for model in models}
BILLIONS = {
    "Stable Diffusion 1.5": 0.86, "Stable Diffusion 2.1": 0.87, "SDXL": 2.6, "SD 3 medium": 2.0, "SD 3.5 medium": 2.5,
    "SD 3.5 large": 8.1, "FLUX.1": 12, "Chroma1": 8.9, "FLUX.2 dev": 32, "FLUX.2 klein 4B": 4, "FLUX.2 klein 9B": 9,
    "Qwen-Image": 20, "Z-Image": 6, "Lumina Image 2.0": 2.6, "Wan 14B": 14, "Wan 2.1 1.3B": 1.3,
    "Wan 2.1 14B for images": 16, "Wan 2.2 5B": 5, "Wan 2.2 14B, both experts": 28,
}  # fmt: skip
"""What their cards say of the nets that denoise."""
Sizes = dict[str, tuple[int, int]]
CROSS = "attentions_0_transformer_blocks_0_attn2_to_k"
FILES: dict[str, tuple[LayoutName, LayoutName, Sizes]] = {
    "Stable Diffusion 1.5": ("kohya", "diffusers", {
        f"lora_unet_down_blocks_0_{CROSS}": (320, 768), "lora_unet_up_blocks_1_attentions_2_proj_in": (1280, 1280),
        "lora_te_text_model_encoder_layers_11_mlp_fc1": (3072, 768),
    }),
    "Stable Diffusion 2.1": ("kohya", "comfyui", {
        f"lora_unet_down_blocks_0_{CROSS}": (320, 1024), "lora_te_text_model_encoder_layers_22_mlp_fc1": (4096, 1024),
    }),
    "SDXL": ("kohya", "diffusers", {
        "lora_unet_down_blocks_2_attentions_1_transformer_blocks_9_attn2_to_k": (1280, 2048),
        "lora_te1_text_model_encoder_layers_11_mlp_fc1": (3072, 768),
        "lora_te2_text_model_encoder_layers_31_self_attn_q_proj": (1280, 1280),
    }),
    "SDXL in ComfyUI": ("comfyui", "kohya", {
        "diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_k": (1280, 2048),
    }),
    "SD 3 medium": ("kohya", "diffusers", {
        "lora_unet_joint_blocks_23_x_block_attn_qkv": (4608, 1536),
        "lora_unet_joint_blocks_0_x_block_adaLN_modulation_1": (9216, 1536),
    }),
    "SD 3.5 medium": ("kohya", "diffusers", {
        "lora_unet_joint_blocks_12_x_block_attn2_qkv": (4608, 1536),
        "lora_unet_joint_blocks_12_x_block_adaLN_modulation_1": (13824, 1536),
    }),
    "SD 3.5 large": ("kohya", "comfyui", {
        "lora_unet_joint_blocks_37_x_block_attn_qkv": (7296, 2432),
        "lora_unet_joint_blocks_36_context_block_mlp_fc1": (9728, 2432),
    }),
    "FLUX.1": ("kohya", "diffusers", {
        "lora_unet_double_blocks_18_img_attn_qkv": (9216, 3072), "lora_unet_single_blocks_37_linear1": (21504, 3072),
        "lora_unet_single_blocks_37_modulation_lin": (9216, 3072),
    }),
    "FLUX.1 in diffusers": ("diffusers", "kohya", {
        f"transformer.single_transformer_blocks.37.{name}": (rows, 3072)
        for name, rows in (("attn.to_q", 3072), ("attn.to_k", 3072), ("attn.to_v", 3072), ("proj_mlp", 12288))
    }),
    "Chroma1": ("kohya", "diffusers", {
        "lora_unet_distilled_guidance_layer_layers_4_in_layer": (5120, 5120),
        "lora_unet_single_blocks_37_linear1": (21504, 3072),
    }),
    "FLUX.2 dev": ("comfyui", "diffusers", {
        "diffusion_model.single_blocks.47.linear1": (55296, 6144),
        "diffusion_model.double_blocks.7.img_attn.qkv": (18432, 6144),
    }),
    "FLUX.2 klein 4B": ("comfyui", "diffusers", {
        "diffusion_model.single_blocks.19.linear1": (27648, 3072),
        "diffusion_model.double_blocks.4.img_mlp.0": (18432, 3072),
    }),
    "FLUX.2 klein 9B": ("comfyui", "diffusers", {
        "diffusion_model.single_blocks.23.linear1": (36864, 4096),
        "diffusion_model.double_blocks.7.txt_mlp.2": (4096, 12288),
    }),
    "Qwen-Image": ("diffusers", "comfyui", {
        "transformer.transformer_blocks.59.img_mlp.net.0.proj": (12288, 3072),
        "transformer.transformer_blocks.0.attn.add_q_proj": (3072, 3072),
    }),
    "Z-Image": ("comfyui", "diffusers", {
        "diffusion_model.layers.29.attention.qkv": (11520, 3840),
        "diffusion_model.noise_refiner.1.feed_forward.w1": (10240, 3840),
    }),
    "Lumina Image 2.0": ("comfyui", "diffusers", {
        "diffusion_model.layers.25.attention.qkv": (3840, 2304),
        "diffusion_model.layers.25.feed_forward.w1": (9216, 2304),
    }),
    "Wan 14B": ("comfyui", "diffusers", {
        "diffusion_model.blocks.39.self_attn.q": (5120, 5120), "diffusion_model.blocks.39.ffn.0": (13824, 5120),
    }),
    "Wan 2.1 1.3B": ("comfyui", "kohya", {
        "diffusion_model.blocks.29.cross_attn.k": (1536, 1536), "diffusion_model.blocks.29.ffn.0": (8960, 1536),
    }),
    "Wan 2.1 14B for images": ("comfyui", "diffusers", {
        "diffusion_model.blocks.39.cross_attn.k_img": (5120, 5120), "diffusion_model.blocks.39.ffn.0": (13824, 5120),
    }),
    "Wan 2.2 5B": ("kohya", "diffusers", {
        "lora_unet_blocks_29_self_attn_q": (3072, 3072), "lora_unet_blocks_29_ffn_0": (14336, 3072),
    }),
    "Wan 2.2 14B, both experts": ("diffusers", "diffusers", {
        "transformer.blocks.0.attn1.to_q": (5120, 5120), "transformer_2.blocks.0.attn1.to_q": (5120, 5120),
    }),
}  # fmt: skip
"""{a model: the layout of a file for it, another, and the layers of the file: [n_out, n_in]}."""


def test_every_model_is_tested() -> None:
    assert MODELS.keys() == BILLIONS.keys() and MODELS.keys() <= FILES.keys()


@pytest.mark.parametrize("name", MODELS)
def test_it_has_the_published_number_of_parameters(name: str) -> None:
    nets = published_skeleton(MODELS[name], with_texts=False).nets
    parameters = [parameter for net in nets.values() for parameter in net.parameters()]
    assert all(parameter.is_meta for parameter in parameters)
    assert math.isclose(sum(p.numel() for p in parameters) / 1e9, BILLIONS[name], rel_tol=0.12)


def written(path: Path, layout: LayoutName, layers: Sizes) -> Path:
    generator = torch.Generator().manual_seed(0)
    down, up = ("lora_A", "lora_B") if layout == "diffusers" else ("lora_down", "lora_up")
    state = {}
    for layer, (n_out, n_in) in layers.items():
        state[f"{layer}.{up}.weight"] = torch.randn(n_out, 1, generator=generator)
        state[f"{layer}.{down}.weight"] = torch.randn(1, n_in, generator=generator)
        if layout != "diffusers":
            state[f"{layer}.alpha"] = torch.tensor(2.0)
    save_file(state, path)
    return path


def deltas(path: Path) -> dict[str, Tensor]:
    """{layer: what it adds to one random input}."""
    state, found = load_file(path), {}
    for key in state:
        for down, up in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
            if key.endswith(f".{down}.weight"):
                layer, rank = key.removesuffix(f".{down}.weight"), len(state[key])
                x = torch.randn(state[key].shape[1], generator=torch.Generator().manual_seed(1)).double()
                scale = float(state.get(f"{layer}.alpha", torch.tensor(rank))) / rank
                rows, columns = (state[f"{layer}.{p}.weight"].flatten(1).double() for p in (up, down))
                found[layer] = scale * (rows @ (columns @ x))
    return found


@table("name", FILES, quick=["SDXL in ComfyUI", "FLUX.1", "Chroma1"])
def test_a_file_is_converted_without_the_model(name: str, tmp_path: Path) -> None:
    layout, other, layers = FILES[name]
    source = written(tmp_path / "a.safetensors", layout, layers)
    convert(source, tmp_path / "b.safetensors", None, other)
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", None, layout)
    before, after = deltas(source), deltas(tmp_path / "c.safetensors")
    assert before.keys() == after.keys() == layers.keys()
    for layer, delta in before.items():
        torch.testing.assert_close(after[layer], delta, rtol=1e-5, atol=1e-5)
