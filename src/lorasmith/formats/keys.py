"""The names in LoRA files: which layer a key means, and which part of its adapter, in every program's way of writing.

Kohya's `lora_unet_down_blocks_0….lora_down.weight`, diffusers' and PEFT's `unet.down_blocks.0….lora_A.weight`, LyCORIS'
`lycoris_down_blocks_0….hada_w1_a`, ComfyUI's `diffusion_model.input_blocks.1….lora_up.weight`. Kohya's and ComfyUI's of
transformers are by the original code, which makes one layer of several.
"""

import re
from collections.abc import Iterator, Mapping
from typing import TypeVar

from torch import Tensor

from lorasmith.adapters.parts import DOWN, UP

DOWN_BIAS, UP_BIAS = "lora_down.bias", "lora_up.bias"
SPELLINGS = (
    (r"\.lora_(A|down)(\.\w+)*\.bias", DOWN_BIAS),
    (r"\.lora_(B|up)(\.\w+)*\.bias", UP_BIAS),
    (r"\.lora_(A|down)(\.(?!bias)\w+)*", DOWN),
    (r"\.lora_(B|up)(\.(?!bias)\w+)*", UP),
    (r"[._]lora\.down\.weight", DOWN),
    (r"[._]lora\.up\.weight", UP),
    (r"\.lora_linear_layer\.down\.weight", DOWN),
    (r"\.lora_linear_layer\.up\.weight", UP),
    (r"\.lora_magnitude_vector(\.\w+)*", "lora_magnitude_vector"),
    (r"\.w_norm", "diff"),
    (r"\.b_norm", "diff_b"),
    (r"(\.lora_linear_layer|[._]lora)\.alpha", "alpha"),
    (r"\.oft_R(\.\w+)*", "oft_R.weight"),
    (r"\.(lora_E|ia3_l|boft_[Rs]|vera_lambda_[bd]|hra_u)\.\w+", None),
    (r"\.(lora_mid\.weight|[ab][12]\.weight)", None),
    (r"\.([^.]+)", None),
)
"""How a key may end, and what that part of an adapter is called here, by kohya and LyCORIS; None: as it is spelt."""
LAYOUT = "lorasmith.file_layout"
"""The key in a file's metadata that says which layout its names are of, where they are not the denoiser's own."""
XLABS = re.compile(
    r"((?:.*\.)?(?P<block>double|single)_blocks\.\d+)\.processor\.(?P<layer>\w+_lora[12]?)\.(?P<part>down|up)\.weight"
)
XLABS_LAYERS = {
    ("double", "qkv_lora1"): "img_attn.qkv", ("double", "proj_lora1"): "img_attn.proj",
    ("double", "qkv_lora2"): "txt_attn.qkv", ("double", "proj_lora2"): "txt_attn.proj",
    ("single", "qkv_lora"): "linear1", ("single", "proj_lora"): "linear2",
}  # fmt: skip
"""{(kind of block, XLabs' name of a layer of Flux.1): the original code's}; of linear1 they adapt q, k and v alone."""
PREFIXES = (
    "_orig_mod_", "module_", "pipe_dit_", "base_model_model_", "lora_unet_", "lora_transformer_", "lora_prior_unet_",
    "lora_", "lycoris_", "unet_", "transformer_", "model_diffusion_model_", "diffusion_model_",
)  # fmt: skip


def split(key: str) -> tuple[str, str]:
    """A key -> the layer as the file calls it, and the part under kohya's or LyCORIS' name ("" where there is none).

    XLabs' layers are called by the original code's names.
    """
    own = XLABS.fullmatch(key)
    if own and (own["block"], own["layer"]) in XLABS_LAYERS:
        return f"{own[1]}.{XLABS_LAYERS[own['block'], own['layer']]}", DOWN if own["part"] == "down" else UP
    for ending, part in SPELLINGS:
        match = re.search(f"(?<=.){ending}$", key)
        if match:
            return key[: match.start()], part or match[1]
    return key, ""


def by_layer(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A LoRA's tensors -> {layer as the file calls it: {part: tensor}}; ValueError where two keys mean the same."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        layer, part = split(key)
        parts = layers.setdefault(layer, {})
        if part in parts:
            raise ValueError(f"{key} must be the only {part} of {layer}, but there is another")
        parts[part] = tensor
    return layers


Found = TypeVar("Found")


def without_prefixes(name: str) -> Iterator[str]:
    """The name, and what is left of it without programs' prefixes, one after another."""
    yield name
    for prefix in PREFIXES:
        if name.startswith(prefix):
            yield from without_prefixes(name.removeprefix(prefix))
