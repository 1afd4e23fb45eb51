"""Stable Diffusion 1.x and 2.x in one file: what the shapes say of the model, and the few facts that they do not."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from safetensors import safe_open

from lorasmith.storage.safetensors_header import Header

log = logging.getLogger(__name__)

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
BETAS = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
VAE_SCALE = 0.18215
NUM_HEADS_1, HEAD_SIZE_2, HEAD_SIZE_CLIP = 8, 64, 64
OPEN_CLIP_LAYERS = 24  # of which SD 2 reads the last but one
SIDE_EPS, SIDE_V = 64, 96  # latent sides of the models for 512 and 768 pixels
STEPS_2_BASE = 875_000  # what the SD 2 base model counts; diffusers takes every other SD 2 file for a v-prediction one


def version_of(header: Header) -> int:
    """Of Stable Diffusion: by its text encoder, or, without one, by the width that the UNet reads."""
    if header.holds(OPEN_CLIP) or header.holds(CLIP):
        return 2 if header.holds(OPEN_CLIP) else 1
    return 2 if _text_width(header) == 1024 else 1


def _text_width(header: Header) -> int:
    return header.shape(f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1]


def unet_config(header: Header, *, heads_are_wide: bool | None = None) -> dict[str, Any]:
    """A UNet2DConditionModel's config but for sample_size; ValueError where the tensors tell of no such UNet.

    heads_are_wide: whether heads have one width, as in SD 2 and SDXL, not one number, as in SD 1; None: by the version.
    """
    heads_are_wide = version_of(header) == 2 if heads_are_wide is None else heads_are_wide
    in_channels = header.shape(f"{UNET}input_blocks.0.0.weight")[1]
    if in_channels != 4:
        kind = " (an inpainting model, which is not supported)" if in_channels == 9 else ""
        raise ValueError(f"{header.path} must hold a UNet of 4 input channels, got {in_channels}{kind}")
    levels: list[list[tuple[int, bool]]] = [[]]  # width and attention of each layer
    for number in range(1, header.count(f"{UNET}input_blocks.")):
        block = f"{UNET}input_blocks.{number}"
        if f"{block}.0.op.weight" in header.shapes:
            levels.append([])
        else:
            width = header.shape(f"{block}.0.in_layers.2.weight")[0]
            levels[-1].append((width, f"{block}.1.proj_in.weight" in header.shapes))
    layers = [len(level) for level in levels]
    if len(set(layers)) > 1 or not layers[0]:
        raise ValueError(f"{header.path} must hold equally many layers in each level of the UNet, got {layers}")
    widths = [level[0][0] for level in levels]
    if heads_are_wide and any(width % HEAD_SIZE_2 for width in widths):
        raise ValueError(f"{header.path} must hold a UNet of widths in {HEAD_SIZE_2}s, got {widths}")
    ups = [f"{UNET}output_blocks.{i * (layers[0] + 1)}.1.proj_in.weight" in header.shapes for i in range(len(levels))]
    return {
        "in_channels": in_channels,
        "out_channels": header.shape(f"{UNET}out.2.weight")[0],
        "block_out_channels": widths,
        "layers_per_block": layers[0],
        "down_block_types": ["CrossAttnDownBlock2D" if level[0][1] else "DownBlock2D" for level in levels],
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in ups],
        "cross_attention_dim": _text_width(header),
        "use_linear_projection": len(header.shape(f"{UNET}middle_block.1.proj_in.weight")) == 2,
        # what diffusers calls a head's size is the number of heads
        "attention_head_dim": [width // HEAD_SIZE_2 for width in widths] if heads_are_wide else NUM_HEADS_1,
    }


def vae_config(header: Header, vae: str = VAE) -> dict[str, Any]:
    """An AutoencoderKL's config; vae: what its tensors' names begin with."""
    levels = header.count(f"{vae}encoder.down.")
    widths = [header.shape(f"{vae}encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    return {
        "in_channels": header.shape(f"{vae}encoder.conv_in.weight")[1],
        "out_channels": header.shape(f"{vae}decoder.conv_out.weight")[0],
        "latent_channels": header.shape(f"{vae}decoder.conv_in.weight")[1],
        "block_out_channels": widths,
        "layers_per_block": header.count(f"{vae}encoder.down.0.block."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "mid_block_add_attention": header.holds(f"{vae}encoder.mid.attn_1."),
        "use_quant_conv": header.holds(f"{vae}quant_conv."),
        "use_post_quant_conv": header.holds(f"{vae}post_quant_conv."),
        "scaling_factor": VAE_SCALE,
    }


def text_config(header: Header) -> dict[str, Any]:
    """A CLIPTextConfig's values. SD 2 reads the last layer but one, so that its last layer is left away."""
    if version_of(header) == 1:
        return clip_config(header, CLIP)
    config = open_clip_config(header, OPEN_CLIP)
    layers = config["num_hidden_layers"]
    # files made of diffusers folders lack the last layer already
    return config | {"num_hidden_layers": layers - (layers != OPEN_CLIP_LAYERS - 1)}


def clip_config(header: Header, prefix: str) -> dict[str, Any]:
    """A CLIPTextConfig's values for CLIP under transformers' names, some of which lack the level text_model."""
    model = f"{prefix}text_model." if header.holds(f"{prefix}text_model.") else prefix
    return _text_config(
        header.shape(f"{model}embeddings.token_embedding.weight"),
        header.shape(f"{model}embeddings.position_embedding.weight"),
        header.shape(f"{model}encoder.layers.0.mlp.fc1.weight"),
    ) | {"num_hidden_layers": header.count(f"{model}encoder.layers."), "hidden_act": "quick_gelu"}


def open_clip_config(header: Header, prefix: str) -> dict[str, Any]:
    """A CLIPTextConfig's values for OpenCLIP under its own names."""
    return _text_config(
        header.shape(f"{prefix}token_embedding.weight"),
        header.shape(f"{prefix}positional_embedding"),
        header.shape(f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"),
    ) | {"num_hidden_layers": header.count(f"{prefix}transformer.resblocks."), "hidden_act": "gelu"}


def _text_config(words: tuple[int, ...], places: tuple[int, ...], mlp: tuple[int, ...]) -> dict[str, Any]:
    num_words, width = words
    return {
        "vocab_size": num_words,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": mlp[0],
        "num_attention_heads": max(1, width // HEAD_SIZE_CLIP),
        "max_position_embeddings": places[0],
        "bos_token_id": num_words - 2,
        "eos_token_id": num_words - 1,
    }


def scheduler_config(header: Header) -> dict[str, Any]:
    """The noise that the model was trained with, and what it predicts."""
    config = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return {**config, "prediction_type": _prediction(header), "rescale_betas_zero_snr": "ztsnr" in header.shapes}


def sample_size(header: Header, scheduler: Mapping[str, Any]) -> int:
    """The latent side of the pictures that the model was trained on."""
    factor = 2 ** (header.count(f"{VAE}encoder.down.") - 1) if header.holds(VAE) else 8
    side = _resolution(header)
    if side is not None:
        return side // factor
    return SIDE_V if version_of(header) == 2 and scheduler["prediction_type"] == "v_prediction" else SIDE_EPS


def _resolution(header: Header) -> int | None:
    """The side in pixels that the metadata states of square pictures."""
    stated = re.fullmatch(r"(\d+)x(\d+)", header.metadata.get("modelspec.resolution", ""))
    return int(stated[1]) if stated and stated[1] == stated[2] else None


def stated_prediction(header: Header) -> str | None:
    """The scheduler's prediction_type where the file states it; ValueError where it states another."""
    if "v_pred" in header.shapes:
        return "v_prediction"
    stated = header.metadata.get("modelspec.prediction_type")
    known = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
    if stated is not None and stated not in known:
        raise ValueError(f"modelspec.prediction_type of {header.path} must be epsilon or v, got {stated!r}")
    return None if stated is None else known[stated]


def _prediction(header: Header) -> str:
    """As the file states it, else by diffusers' rule."""
    stated = stated_prediction(header)
    if stated is not None or version_of(header) == 1:
        return stated or "epsilon"
    is_base = _global_step(header) == STEPS_2_BASE or _resolution(header) == SIDE_EPS * 8
    return "epsilon" if is_base else "v_prediction"


def warn_of_guessed_prediction(header: Header) -> None:
    """Logs what is assumed of an SD 2 file that does not say what it predicts."""
    if stated_prediction(header) is not None or version_of(header) == 1:
        return
    is_base = _prediction(header) == "epsilon"
    log.warning(
        "%s does not say what it predicts: %s is assumed; a metadata entry modelspec.prediction_type, epsilon or v, "
        "says it", header.path.name, "the noise, as of SD 2 base," if is_base else "v, as of SD 2 for 768 pixels,",
    )  # fmt: skip


def _global_step(header: Header) -> int | None:
    """The steps that the file says it was trained for."""
    if "global_step" not in header.shapes:
        return None
    with safe_open(header.path, framework="pt") as file:
        return int(file.get_tensor("global_step"))
