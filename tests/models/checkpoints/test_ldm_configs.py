"""The sizes read off the published models' shapes are those of their published configs; no weights are made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny import several

from lorasmith.formats.unet_names import ldm_names
from lorasmith.models.checkpoints.ldm_configs import (
    sample_size,
    scheduler_config,
    text_config,
    unet_config,
    vae_config,
    version_of,
)  # fmt: skip
from lorasmith.storage.safetensors_header import Header

UNETS: dict[int, dict[str, Any]] = {
    1: {"cross_attention_dim": 768, "attention_head_dim": 8, "use_linear_projection": False},
    2: {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
}
TEXTS = {
    1: ("cond_stage_model.transformer.text_model.", 768, 12, "encoder.layers.{}.mlp.fc1.weight"),
    2: ("cond_stage_model.model.", 1024, 24, "transformer.resblocks.{}.mlp.c_fc.weight"),
}
VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}


def header(version: int, metadata: Mapping[str, str], *, text: bool = True) -> Header:
    """Of a file as large as the published one, as far as its sizes are read."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[version])
        vae = AutoencoderKL(
            **VAE,
            down_block_types=several(*("DownEncoderBlock2D",) * 4),
            up_block_types=several(*("UpDecoderBlock2D",) * 4),
        )
    names = ldm_names(unet.config)
    keys = {(*key.rpartition("."), tuple(value.shape)) for key, value in unet.state_dict().items()}
    shapes = {f"model.diffusion_model.{names[module]}.{leaf}": shape for module, _, leaf, shape in keys}
    for key, value in vae.state_dict().items():
        key = (
            key.replace("down_blocks", "down")
            .replace("resnets", "block")
            .replace("mid_block.attentions.0", "mid.attn_1")
        )
        shapes[f"first_stage_model.{key}"] = tuple(value.shape)
    prefix, width, layers, mlp = TEXTS[version]
    if text:
        words, places = ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight")
        if version == 2:
            words, places = "token_embedding.weight", "positional_embedding"
        shapes |= {f"{prefix}{words}": (49408, width), f"{prefix}{places}": (77, width)}
        shapes |= {f"{prefix}{mlp.format(layer)}": (4 * width, width) for layer in range(layers)}
    return Header(Path("model.safetensors"), shapes, {}, metadata)


@pytest.mark.parametrize("version", [1, 2])
def test_the_published_models(version: int) -> None:
    it = header(version, {"modelspec.prediction_type": "v"})
    config = unet_config(it)
    assert config == {
        **UNETS[version], "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2, "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }  # fmt: skip
    vae = vae_config(it)
    assert {key: vae[key] for key in VAE} == VAE
    assert vae["mid_block_add_attention"] and vae["use_quant_conv"] and vae["use_post_quant_conv"]
    text = text_config(it)
    assert (text["num_hidden_layers"], text["num_attention_heads"]) == ((12, 12) if version == 1 else (23, 16))
    assert (text["vocab_size"], text["max_position_embeddings"]) == (49408, 77)
    assert text["intermediate_size"] == 4 * text["hidden_size"] == 4 * config["cross_attention_dim"]
    assert sample_size(it, scheduler_config(it)) == (64 if version == 1 else 96)


@pytest.mark.parametrize(
    ("resolution", "side"), [("512x512", 64), ("768x768", 96), ("768x512", 96), ("big", 96), ("", 96)]
)
def test_a_stated_resolution_counts_where_it_is_square(resolution: str, side: int) -> None:
    it = header(2, {"modelspec.resolution": resolution, "modelspec.prediction_type": "v"})
    assert sample_size(it, scheduler_config(it)) == side


@pytest.mark.parametrize("version", [1, 2])
def test_without_a_text_encoder_the_unets_width_says_the_version(version: int) -> None:
    assert version_of(header(version, {}, text=False)) == version


def test_an_sd2_unet_has_heads_of_64() -> None:
    it = header(2, {})
    narrow = {key: (96, *shape[1:]) if ".0.in_layers.2." in key else shape for key, shape in it.shapes.items()}
    with pytest.raises(ValueError, match=r"UNet of widths in 64s, got \[96, 96, 96, 96\]"):
        unet_config(Header(it.path, narrow, {}, {}))


def test_levels_of_different_lengths_are_refused() -> None:
    it = header(1, {})
    longer = {key: shape for key, shape in it.shapes.items() if ".input_blocks.11." not in key}
    with pytest.raises(ValueError, match=r"equally many layers in each level of the UNet, got \[2, 2, 2, 1\]"):
        unet_config(Header(it.path, longer, {}, {}))
