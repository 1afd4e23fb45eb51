"""The original UNet's names against diffusers' own converter, bit for bit."""

import json
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import nn

from lorasmith.demo import BASE
from lorasmith.formats.unet_names import ldm_names

SMALL: dict[str, Any] = {"sample_size": 8, "norm_num_groups": 8, "attention_head_dim": 2, "cross_attention_dim": 8}
CROSS_DOWN, CROSS_UP, DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "DownBlock2D", "UpBlock2D"
SHAPES: dict[str, dict[str, Any]] = {
    "SD1": {
        "block_out_channels": (8, 16, 24, 24), "layers_per_block": 2,
        "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
        "up_block_types": (UP, CROSS_UP, CROSS_UP, CROSS_UP),
    },
    "SD2": {
        "block_out_channels": (8, 16, 32), "layers_per_block": 1, "use_linear_projection": True,
        "attention_head_dim": (1, 2, 4), "down_block_types": (CROSS_DOWN, CROSS_DOWN, DOWN),
        "up_block_types": (UP, CROSS_UP, CROSS_UP),
    },
    "SDXL": {
        "block_out_channels": (8, 16, 24), "layers_per_block": 2, "transformer_layers_per_block": (1, 2, 3),
        "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN), "up_block_types": (CROSS_UP, CROSS_UP, UP),
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 32,
    },
    "unCLIP": {
        "block_out_channels": (8, 8), "layers_per_block": 3, "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 16, "down_block_types": (CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP),
    },
    "upscaler": {
        "block_out_channels": (8, 16), "layers_per_block": 1, "num_class_embeds": 10,
        "transformer_layers_per_block": 2, "down_block_types": (DOWN, CROSS_DOWN), "up_block_types": (CROSS_UP, UP),
    },
}  # fmt: skip


def modules_with_weights(unet: nn.Module) -> set[str]:
    return {path for path, module in unet.named_modules() if list(module.parameters(recurse=False))}


@pytest.mark.parametrize("kind", [*SHAPES, "embedded"])
def test_the_names_are_those_that_diffusers_converts(kind: str) -> None:
    config = json.loads((BASE / "unet" / "config.json").read_text()) if kind == "embedded" else SMALL | SHAPES[kind]
    with torch.random.fork_rng():
        unet: Any = UNet2DConditionModel.from_config(config)
    names = ldm_names(unet.config)
    assert names.keys() == modules_with_weights(unet)
    assert len(set(names.values())) == len(names)
    state = unet.state_dict()
    original = {
        f"model.diffusion_model.{names[path]}.{leaf}": tensor
        for path, _, leaf, tensor in ((*key.rpartition("."), tensor) for key, tensor in state.items())
    }
    converted = convert_ldm_unet_checkpoint(original, dict(unet.config))
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], state[key]) for key in state)


def test_layers_and_depths_may_differ_from_block_to_block() -> None:
    """diffusers' converter knows one number of layers only: here the modules themselves are the reference."""
    shape = {
        **SHAPES["SDXL"], "layers_per_block": (1, 2, 3), "transformer_layers_per_block": ((1,), (2, 1), (1, 2, 1)),
        "reverse_transformer_layers_per_block": ((1, 2, 1, 3), (2, 1, 1), (1, 1)),
    }  # fmt: skip
    with torch.random.fork_rng():
        unet = UNet2DConditionModel(**SMALL, **shape)
    names = ldm_names(unet.config)
    assert names.keys() == modules_with_weights(unet)
    assert names["up_blocks.1.upsamplers.0.conv"] == "output_blocks.6.2.conv"
    assert names["up_blocks.2.resnets.0.conv1"] == "output_blocks.7.0.in_layers.2"


def test_known_names() -> None:
    with torch.device("meta"):
        sd1 = ldm_names(UNet2DConditionModel(cross_attention_dim=768).config)
        sdxl = ldm_names(UNet2DConditionModel(**SMALL, **SHAPES["SDXL"]).config)
    block = "transformer_blocks.0.attn1.to_q"
    assert sd1[f"down_blocks.0.attentions.0.{block}"] == f"input_blocks.1.1.{block}"
    assert sd1["conv_in"] == "input_blocks.0.0" and sd1["time_embedding.linear_1"] == "time_embed.0"
    assert sd1["mid_block.resnets.0.conv1"] == "middle_block.0.in_layers.2"
    assert sd1["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"
    assert sd1["up_blocks.1.upsamplers.0.conv"] == "output_blocks.5.2.conv"
    assert sdxl["add_embedding.linear_1"] == "label_emb.0.0"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mid_block_type", None, "mid_block_type must be UNetMidBlock2DCrossAttn, got None"),
        (
            "down_block_types",
            ("AttnDownBlock2D", DOWN, DOWN, DOWN),
            "down_block_types must be among .* AttnDownBlock2D",
        ),
        ("up_block_types", (UP, UP, UP, "ResnetUpsampleBlock2D"), "up_block_types must be among .* ResnetUpsample"),
    ],
)
def test_what_the_original_has_not_is_refused(key: str, value: Any, message: str) -> None:
    with torch.device("meta"):
        config = dict(UNet2DConditionModel().config)
    with pytest.raises(ValueError, match=message):
        ldm_names({**config, key: value})
