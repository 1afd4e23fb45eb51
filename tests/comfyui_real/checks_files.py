"""Checks of the files that the command line writes: ComfyUI's own loader reads those that it is said to read."""

import sys
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_base
import comfy.supported_models
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))

from file_table import READS  # noqa: E402
from file_tools import ALGORITHMS, adapted, merged_weights, written  # noqa: E402
from tiny_nets import NETS, Holder, holder_of  # noqa: E402

from lorasmith.formats.module_names import originals  # noqa: E402
from lorasmith.formats.write import WRITERS  # noqa: E402

MODELS = comfy.supported_models
UNET = {
    "image_size": 32, "out_channels": 4, "in_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
    "channel_mult": (1, 2), "use_spatial_transformer": True, "legacy": False, "use_temporal_attention": False,
    "context_dim": 12, "adm_in_channels": None,
}  # fmt: skip
FLUX = {
    "in_channels": 8, "out_channels": 8, "context_in_dim": 12, "hidden_size": 16, "mlp_ratio": 4.0, "num_heads": 2,
    "depth": 2, "depth_single_blocks": 2, "axes_dim": [2, 2, 4], "theta": 10000, "patch_size": 1, "qkv_bias": True,
    "txt_ids_dims": [], "vec_in_dim": 10,
}  # fmt: skip
LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 4, "dim": 16, "n_layers": 2, "n_refiner_layers": 1,
    "n_heads": 2, "n_kv_heads": 1, "multiple_of": 8, "qk_norm": True, "cap_feat_dim": 12, "axes_dims": [4, 2, 2],
    "axes_lens": [16, 16, 16], "ffn_dim_multiplier": 4.0,
}  # fmt: skip
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SD": (
        MODELS.SD15,
        {
            **UNET, "transformer_depth": [1, 0], "transformer_depth_output": [1, 1, 0, 0],
            "transformer_depth_middle": 1, "use_linear_in_transformer": False, "num_heads": 2, "num_head_channels": -1,
        },
    ),
    "SDXL": (
        MODELS.SDXL,
        {
            **UNET, "transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 2],
            "transformer_depth_middle": 2, "use_linear_in_transformer": True, "num_heads": -1, "num_head_channels": 8,
            "adm_in_channels": 32, "num_classes": "sequential",
        },
    ),
    "Flux.1": (MODELS.Flux, {**FLUX, "image_model": "flux", "guidance_embed": True}),
    "Chroma": (
        MODELS.Chroma,
        {**FLUX, "image_model": "chroma", "in_dim": 8, "out_dim": 16, "hidden_dim": 10, "n_layers": 1},
    ),
    "Flux.2": (
        MODELS.Flux2,
        {
            **FLUX, "image_model": "flux2", "axes_dim": [2, 2, 2, 2], "mlp_ratio": 3.0, "theta": 2000,
            "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False,
            "guidance_embed": True, "vec_in_dim": None, "txt_ids_dims": [3], "default_ref_method": "index",
            "ref_index_scale": 10.0,
        },
    ),
    "SD 3": (
        MODELS.SD3,
        {
            "in_channels": 4, "out_channels": 4, "patch_size": 2, "depth": 2, "adm_in_channels": 10, "input_size": None,
            "num_patches": 64, "pos_embed_max_size": 8, "pos_embed_scaling_factor": None, "qk_norm": "rms",
            "x_block_self_attn_layers": [0], "context_size": 12,
            "context_embedder_config": {
                "target": "torch.nn.Linear", "params": {"in_features": 12, "out_features": 128},
            },
        },
    ),
    "Qwen-Image": (
        MODELS.QwenImage,
        {
            "image_model": "qwen_image", "in_channels": 8, "num_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 2, "joint_attention_dim": 12, "axes_dims_rope": (2, 2, 4),
        },
    ),
    "Wan": (
        MODELS.WAN21_T2V,
        {
            "image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "in_dim": 4, "dim": 16,
            "ffn_dim": 24, "freq_dim": 8, "text_dim": 12, "out_dim": 4, "num_heads": 2, "num_layers": 2,
        },
    ),
    "Z-Image": (
        MODELS.ZImage,
        {
            **LUMINA, "dim": 256, "n_layers": 1, "n_kv_heads": 2, "axes_dims": [32, 48, 48],
            "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "multiple_of": 1, "pad_tokens_multiple": 32,
        },
    ),
    "Lumina 2": (MODELS.Lumina2, LUMINA),
}  # fmt: skip
RESIZED = "t_embedder."
"""Layers of Z-Image that are 1024 wide in diffusers, however wide the net is."""


def _original(holder: Holder, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers net's parameters by the original names."""
    left, found = dict(state), {}
    for layer in originals(holder.net):
        for leaf in ("weight", "bias"):
            parts = [left.pop(f"{path}.{leaf}") for path in layer.paths if f"{path}.{leaf}" in left]
            if parts:
                whole = torch.cat(parts)
                found[f"{layer.name}.{leaf}"] = torch.cat(whole.chunk(2)[::-1]) if layer.swapped else whole
    assert not [key for key in left if key.endswith((".weight", ".bias"))], list(left)
    return found


def _model(family: str, holder: Holder) -> Any:
    """ComfyUI's model of the family, with the net's weights; AssertionError where its layers are not those."""
    kind, unet = CONFIGS[family]
    config = kind(unet)
    config.unet_config |= {key: unet[key] for key in ("num_heads", "num_head_channels") if key in unet}
    config.set_inference_dtype(torch.float32, None)
    config.unet_config["dtype"] = torch.float32
    model = config.get_model({})
    net: nn.Module = model.diffusion_model
    state, own = _original(holder, dict(holder.net.state_dict())), net.state_dict()
    layers = {name for name, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)}
    missing = {key for key in own if key.rpartition(".")[0] in layers} - state.keys()
    assert not missing, f"ComfyUI's model has {sorted(missing)[:5]}, which the names do not"
    assert not state.keys() - own.keys(), f"ComfyUI's model lacks {sorted(state.keys() - own.keys())[:5]}"
    wrong = [(key, tensor.shape, own[key].shape) for key, tensor in state.items() if own[key].shape != tensor.shape]
    assert all(key.startswith(RESIZED) for key, *_ in wrong), wrong[:3]
    for key, *_ in wrong:
        module, _, leaf = key.rpartition(".")
        setattr(net.get_submodule(module), leaf, nn.Parameter(state[key]))
    net.load_state_dict(state, strict=False)
    return model


def _patched(model: Any, lora: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """{weight: as ComfyUI patches it}, and how many of the file's keys it used."""
    used: set[str] = set()
    keys = comfy.lora.model_lora_keys_unet(model, {})
    patches: dict[Any, list[Any]] = {}
    for target, patch in comfy.lora.load_lora(dict(lora), keys, log_missing=False).items():
        key, offset, function = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
        patches.setdefault(key, []).append((1.0, patch, 1.0, offset, function))
        used |= patch.loaded_keys
    state = model.state_dict()
    return {
        key.removeprefix("diffusion_model."): comfy.lora.calculate_weight(found, state[key].clone(), key)
        for key, found in patches.items()
    }, len(used)


def check_files_of(named: str) -> None:
    family = named
    assert CONFIGS.keys() == NETS.keys()
    wrong = []
    for algorithm in ALGORITHMS:
        holder = holder_of(family)
        adapters = adapted(holder, algorithm)
        expected = _original(holder, dict(holder.net.state_dict()) | merged_weights(holder, adapters))
        model = _model(family, holder)
        before = model.diffusion_model.state_dict()
        changed = {key for key in expected if not torch.equal(expected[key], before[key])}
        for layout in WRITERS:
            if (family, algorithm, layout) not in READS:
                continue
            lora = written(adapters, holder, layout)
            found, used = _patched(model, lora)
            reads = f"{used} of {len(lora)} keys, {len(found)} of {len(changed)} weights"
            if found.keys() == changed and used == len(lora):
                error = max(float((found[key] - expected[key]).abs().max()) for key in changed)
                reads = "yes" if error < 1e-3 else f"off by {error:.2g}"
            if (reads == "yes") != ("ComfyUI" in READS[family, algorithm, layout]):
                wrong.append(f"{algorithm} {layout}: {reads}")
    assert not wrong, "\n".join(wrong)
