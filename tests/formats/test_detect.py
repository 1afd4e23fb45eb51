"""What a LoRA's layers look like: the sign of every family, and sizes that tell one from another."""

import re
from functools import cache

import pytest
import torch
from tiny import TINY, made
from torch import Tensor

from lorasmith.adapters.targets import adaptable_layers
from lorasmith.formats.architectures.registry import ARCHITECTURES
from lorasmith.formats.detect import (
    FOLDER_PART,
    MODEL_SIGNS,
    SIGNS,
    TEXT_WIDTHS,
    is_lora,
    lora_family,
    model_family,
    n_in,
)

FAMILIES = {  # a layer as its programs name it: the family
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": "SDXL or Stable Diffusion 3",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1": "SDXL or Stable Diffusion 3",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": "Flux or Stable Diffusion 3",
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q": "Flux or Stable Diffusion 3",
    "unet.add_embedding.linear_1": "SDXL",
    "diffusion_model.label_emb.0.0": "SDXL",
    "transformer.single_transformer_blocks.0.attn.to_q": "Flux",
    "lora_unet_single_blocks_0_linear1": "Flux",
    "lora_unet_joint_blocks_0_x_block_attn_qkv": "Stable Diffusion 3",
    "transformer.context_embedder": "Stable Diffusion 3",
    "transformer.transformer_blocks.0.attn.add_q_proj": "Stable Diffusion 3",
    "transformer.transformer_blocks.0.ff_context.net.0.proj": "Stable Diffusion 3",
    "transformer.transformer_blocks.0.img_mlp.net.2": "Qwen-Image",
    "lora_unet_double_blocks_0_img_mlp_0": "Flux",
    "diffusion_model.distilled_guidance_layer.in_proj": "Chroma",
    "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj": "Flux.2",
    "transformer.transformer_blocks.0.ff_context.linear_in": "Flux.2",
    "diffusion_model.double_stream_modulation_img.lin": "Flux.2",
    "diffusion_model.noise_refiner.0.attention.qkv": "Lumina 2 or Z-Image",
    "lora_unet_layers_0_feed_forward_w1": "Lumina 2 or Z-Image",
    "transformer.layers.0.attention.to_q": "Z-Image",
    "transformer.context_refiner.0.attn.to_q": "Lumina 2",
    "transformer.layers.0.feed_forward.linear_1": "Lumina 2",
    "diffusion_model.blocks.0.self_attn.q": "Wan",
    "diffusion_model.blocks.0.ffn.0": "Wan",
    "transformer.blocks.0.attn1.to_q": "Wan",
    "lora_unet_blocks_0_cross_attn_k": "Wan",
    "transformer.transformer_blocks.0.attn1.to_q": "a transformer of diffusers",
    "transformer.transformer_blocks.0.attn.to_q": "a transformer of diffusers",
    "base_model.model.transformer_blocks.0.ff.net.0.proj": "a transformer of diffusers",
    "unet.down_blocks.0.resnets.0.conv1": "a UNet of the Stable Diffusion kind",
    "diffusion_model.input_blocks.1.0.in_layers.2": "a UNet of the Stable Diffusion kind",
    "lora_unet_mid_block_attentions_0_proj_in": "a UNet of the Stable Diffusion kind",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "a UNet of the Stable Diffusion kind",
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q": "a UNet of the Stable Diffusion kind",
    "lora_te_text_model_encoder_layers_0_mlp_fc1": "a text encoder",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": "a text encoder",
    "somewhere": "an unknown model",
}

MODELS = {  # a tensor of a model's file: the family
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": "SDXL",
    "model.diffusion_model.label_emb.0.0.weight": "SDXL",
    "label_emb.0.0.weight": "SDXL",
    "add_embedding.linear_1.weight": "SDXL",
    "joint_blocks.0.x_block.attn.qkv.weight": "Stable Diffusion 3",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "Stable Diffusion 3",
    "pos_embed.pos_embed": "Stable Diffusion 3",
    "distilled_guidance_layer.in_proj.weight": "Chroma",
    "model.diffusion_model.single_stream_modulation.lin.weight": "Flux.2",
    "single_stream_modulation.linear.weight": "Flux.2",
    "txt_in.individual_token_refiner.blocks.0.norm1.weight": "HunyuanVideo",
    "double_blocks.0.img_attn.qkv.weight": "Flux",
    "single_transformer_blocks.0.attn.to_q.weight": "Flux",
    "model.diffusion_model.transformer_blocks.0.img_mlp.net.2.weight": "Qwen-Image",
    "cap_pad_token": "Z-Image",
    "all_x_embedder.2-1.weight": "Z-Image",
    "layers.0.adaLN_modulation.0.weight": "Z-Image",
    "model.diffusion_model.cap_embedder.0.weight": "Lumina 2",
    "time_caption_embed.caption_embedder.0.weight": "Lumina 2",
    "vace_blocks.0.after_proj.bias": "Wan VACE",
    "model.diffusion_model.blocks.0.self_attn.q.weight": "Wan",
    "condition_embedder.time_proj.weight": "Wan",
    "cond_stage_model.model.ln_final.weight": "Stable Diffusion 2.x",
    "cond_stage_model.transformer.text_model.final_layer_norm.bias": "Stable Diffusion 1.x",
    "model.diffusion_model.input_blocks.0.0.weight": "a UNet of the Stable Diffusion kind",
    "down_blocks.0.resnets.0.conv1.weight": FOLDER_PART,
    "text_model.final_layer_norm.bias": FOLDER_PART,
    "layers.0.adaLN_modulation.1.weight": "unknown",
}


@pytest.mark.parametrize("key", MODELS)
def test_the_names_of_every_family_s_models(key: str) -> None:
    assert model_family([key]) == MODELS[key]


def test_no_sign_of_models_stands_in_vain() -> None:
    for index, (sign, family) in enumerate(MODEL_SIGNS):
        earlier = [pattern for pattern, _ in MODEL_SIGNS[:index]]
        new = [k for k in MODELS if re.match(sign, k) and not any(re.match(pattern, k) for pattern in earlier)]
        assert any(MODELS[key] == family for key in new), sign


def lora(rows: int, columns: int) -> dict[str, Tensor]:
    return {"lora_down.weight": torch.zeros(rows, columns), "lora_up.weight": torch.zeros(1, rows)}


@pytest.mark.parametrize("layer", FAMILIES)
def test_every_family_s_names(layer: str) -> None:
    assert lora_family({layer: lora(4, 8)}) == FAMILIES[layer]


@cache
def layers_of_tiny_nets() -> dict[str, set[str]]:
    """{an architecture with a transformer: its layers, as diffusers names them}."""
    names = {pipeline: a.name for a in ARCHITECTURES if a.transformer for pipeline in a.pipelines}
    pipes = [made(name) for name in TINY]
    return {
        names[type(pipe).__name__]: set(adaptable_layers({"transformer": pipe.transformer}))
        for pipe in pipes
        if type(pipe).__name__ in names
    }


def test_every_transformer_is_known_by_its_layers() -> None:
    found = layers_of_tiny_nets()
    assert found.keys() == {a.name for a in ARCHITECTURES if a.transformer}
    for name, layers in found.items():
        assert lora_family({layer: lora(4, 8) for layer in layers}) == name


def test_no_sign_stands_in_vain() -> None:
    every = FAMILIES | {layer: name for name, layers in layers_of_tiny_nets().items() for layer in layers}
    names = [layer.replace(".", "_") for layer in every]
    for index, (sign, family) in enumerate(SIGNS):
        earlier = [pattern for pattern, _ in SIGNS[:index]]
        new = [n for n in names if re.search(sign, n) and not any(re.search(pattern, n) for pattern in earlier)]
        assert any(every[layer] == family for layer in every if layer.replace(".", "_") in new), sign


@pytest.mark.parametrize(
    ("width", "family"), [*TEXT_WIDTHS.items(), (192, "Stable Diffusion with a text width of 192")]
)
@pytest.mark.parametrize(
    "layer", ["lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k", "unet.mid_block.attentions.0.attn2.to_v"]
)
def test_the_width_of_texts_tells_unets_apart(layer: str, width: int, family: str) -> None:
    assert lora_family({layer: lora(4, width), "unet.down_blocks.0.conv": lora(4, 320)}) == family
    assert TEXT_WIDTHS == {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}


@pytest.mark.parametrize(
    ("layer", "columns", "rows", "family"),
    [
        ("transformer.transformer_blocks.0.attn.add_q_proj", 1536, 1536, "Stable Diffusion 3"),
        ("transformer.transformer_blocks.0.attn.to_q", 2432, 2432, "Stable Diffusion 3"),
        ("transformer.transformer_blocks.0.attn.add_q_proj", 3072, 3072, "Flux, Chroma or Qwen-Image"),
        ("transformer.transformer_blocks.59.attn.to_q", 3072, 3072, "Flux, Chroma or Qwen-Image"),
        ("lora_unet_double_blocks_0_img_attn_qkv", 6144, 18432, "Flux.2"),
        ("lora_unet_double_blocks_0_img_attn_qkv", 3072, 9216, "Flux"),
        ("diffusion_model.single_blocks.0.linear1", 3072, 27648, "Flux.2"),
        ("diffusion_model.single_blocks.0.linear1", 3072, 21504, "Flux"),
        ("lora_unet_layers_0_attention_qkv", 2304, 3840, "Lumina 2"),
        ("lora_unet_layers_0_attention_qkv", 3840, 11520, "Z-Image"),
        ("lora_unet_layers_0_attention_qkv", 16, 48, "Lumina 2 or Z-Image"),
    ],
)
def test_sizes_tell_apart_what_has_the_same_names(layer: str, columns: int, rows: int, family: str) -> None:
    parts = {"lora_down.weight": torch.zeros(4, columns), "lora_up.weight": torch.zeros(rows, 4)}
    assert lora_family({layer: parts}) == family


def test_widths_that_disagree_tell_nothing() -> None:
    layers = {f"unet.mid_block.{i}.attn2.to_k": lora(4, width) for i, width in enumerate((768, 1024))}
    assert lora_family(layers) == "a UNet of the Stable Diffusion kind"
    assert lora_family({"unet.mid_block.attn2.to_k": {"alpha": torch.tensor(1.0)}}) == (
        "a UNet of the Stable Diffusion kind"
    )


@pytest.mark.parametrize(
    "part",
    [
        "lora_up.weight", "lora_A.default.weight", "lora.down.weight", "processor.to_q_lora.up.weight", "hada_w1_a",
        "lokr_w2", "oft_blocks", "oft_R.default.weight", "boft_R", "dora_scale", "a1.weight", "diff", "diff_b",
        "diff_m", "w_norm", "b_norm", "on_input", "ia3_l", "set_weight", "reshape_weight", "vera_lambda_b",
    ],
)  # fmt: skip
def test_a_single_part_of_any_adapter_makes_a_lora(part: str) -> None:
    assert is_lora([f"diffusion_model.blocks.0.self_attn.norm_k.{part}"])


def test_no_part_of_a_model_makes_a_lora() -> None:
    assert not is_lora([*MODELS, "blocks.0.modulation", "diffuse.weight", "x.diff.weight", "a1.bias", "norm.w"])


def test_nothing_looks_like_nothing() -> None:
    assert lora_family({}) == "an unknown model"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (lora(4, 320), 320),
        ({"hada_w1_a": torch.zeros(8, 4), "hada_w1_b": torch.zeros(4, 320)}, 320),
        ({"lokr_w1": torch.zeros(2, 16), "lokr_w2": torch.zeros(4, 20)}, 320),
        ({"lokr_w1": torch.zeros(2, 16), "lokr_w2_a": torch.zeros(4, 3), "lokr_w2_b": torch.zeros(3, 20)}, 320),
        ({"lokr_w1_b": torch.zeros(2, 16), "lokr_w2_b": torch.zeros(3, 20)}, 320),
        ({"lokr_w1": torch.zeros(2, 16)}, None),
        ({"oft_blocks": torch.zeros(2, 4, 4)}, None),
        ({"alpha": torch.tensor(1.0)}, None),
        ({}, None),
    ],
)
def test_the_inputs_of_a_layer(parts: dict[str, Tensor], expected: int | None) -> None:
    assert n_in(parts) == expected


@pytest.mark.parametrize("part", ["lora_down.weight", "hada_w1_b", "lokr_w1"])
def test_a_tensor_without_a_second_axis_says_nothing(part: str) -> None:
    """Broken files are to be described too."""
    assert n_in({part: torch.ones(3), "lokr_w2": torch.ones(())}) is None
