"""What names and sizes of tensors look like: a LoRA or a model, and of which family."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

Layers = Mapping[str, Mapping[str, Tensor]]
"""{layer as a file calls it: {part: tensor}}."""
TEXT_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
SIGNS = (
    (r"lora_te2_|text_encoder_2|add_embedding|label_emb", "SDXL"),
    (r"single_transformer_blocks|single_blocks", "Flux"),
    (r"joint_blocks|context_embedder|attn_add_q_proj.*joint", "Stable Diffusion 3"),
    (r"img_mlp|txt_mlp|img_mod", "Qwen-Image"),
    (r"noise_refiner|context_refiner", "Lumina or Z-Image"),
    (r"(^transformer_|(?<!transformer_))blocks_\d+_(self_attn|cross_attn|ffn_\d|attn1_to|attn2_to|ffn_net)", "Wan"),
    (r"transformer_blocks_\d+_(attn_add|ff_context|norm1_context)", "Stable Diffusion 3"),
    (r"(?<!\d_)transformer_blocks_\d+_(attn1|attn2|ff)_", "a transformer of diffusers"),
)
FOLDER_PART = "a part of a diffusers folder"
DENOISER = r"(model\.diffusion_model\.)?"
MODEL_SIGNS = (
    (r"conditioner\.|add_embedding\.", "SDXL"),
    (DENOISER + r"(joint_blocks\.|pos_embed\.pos_embed$)", "Stable Diffusion 3"),
    (DENOISER + r"distilled_guidance_layer\.", "Chroma"),
    (DENOISER + r"single_stream_modulation\.", "Flux.2"),
    (DENOISER + r"txt_in\.individual_token_refiner\.", "HunyuanVideo"),
    (DENOISER + r"(double_blocks|single_transformer_blocks)\.", "Flux"),
    (DENOISER + r"transformer_blocks\.\d+\.img_mlp\.", "Qwen-Image"),
    (DENOISER + r"(cap_pad_token$|all_x_embedder\.|layers\.0\.adaLN_modulation\.0\.)", "Z-Image"),
    (DENOISER + r"(cap_embedder|time_caption_embed)\.", "Lumina 2"),
    (DENOISER + r"vace_blocks\.", "Wan VACE"),
    (DENOISER + r"(blocks\.\d+\.self_attn\.q\.|condition_embedder\.time_proj\.)", "Wan"),
    (r"cond_stage_model\.model\.", "Stable Diffusion 2.x"),
    (r"cond_stage_model\.transformer\.", "Stable Diffusion 1.x"),
    (DENOISER + r"label_emb\.", "SDXL"),
    (r"model\.diffusion_model\.input_blocks\.", "a UNet of the Stable Diffusion kind"),
    (r"(encoder\.)?down_blocks\.|text_model\.", FOLDER_PART),
)
LORA = re.compile(r"lora[._]|hada_w|lokr_w|oft_|dora_scale")
UNET = re.compile(r"(down|up|input|output|mid|middle)_blocks?_")
TEXT = re.compile(r"attn2_to_[kv]$")


def is_lora(keys: Iterable[str]) -> bool:
    """Whether these are the names of a LoRA's tensors."""
    return any(LORA.search(key) for key in keys)


def model_family(keys: Iterable[str]) -> str:
    """The family of models, in words, whose weights have these names; "unknown" where there is none."""
    names = list(keys)
    return next((family for sign, family in MODEL_SIGNS if any(re.match(sign, name) for name in names)), "unknown")


def lora_family(layers: Layers) -> str:
    """The family, in words, that the names and sizes of a LoRA's layers show; "an unknown model" where none does."""
    names = {layer.replace(".", "_"): parts for layer, parts in layers.items()}
    if any(UNET.search(name) for name in names):
        widths = {n_in(parts) for name, parts in names.items() if TEXT.search(name)} - {None}
        if len(widths) == 1:
            (width,) = widths
            return TEXT_WIDTHS.get(width or 0, f"Stable Diffusion with a text width of {width}")
    for sign, family in SIGNS:
        if any(re.search(sign, name) for name in names):
            return family
    if any(UNET.search(name) for name in names):
        return "a UNet of the Stable Diffusion kind"
    if names and all(re.search(r"(^|_)te(xt)?_|text_encoder|text_model", name) for name in names):
        return "a text encoder"
    return "an unknown model"


def n_in(parts: Mapping[str, Tensor]) -> int | None:
    """The inputs of the layer that these parts of an adapter fit; None where they do not say."""
    for part in ("lora_down.weight", "hada_w1_b"):
        if part in parts:
            return _columns(parts[part])
    halves = [_columns(parts.get(half, parts.get(f"{half}_b"))) for half in ("lokr_w1", "lokr_w2")]
    first, second = halves
    return None if first is None or second is None else first * second


def _columns(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.ndim < 2 else tensor.shape[1]
