"""What names and sizes of tensors look like: a LoRA or a model, and of which family."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from lorasmith.adapters.parts import UP
from lorasmith.adapters.registry import MARKS, kind_of
from lorasmith.formats.architectures.architecture import (
    DOUBLE,
    LUMINA2_OR_Z_IMAGE,
    SECOND_TEXTS,
    T5_TEXTS,
    TEXTS,
    TRANSFORMER,
    UNETS,
)
from lorasmith.formats.architectures.registry import ARCHITECTURES
from lorasmith.formats.architectures.sd3 import SD3
from lorasmith.formats.text_encoder_names import text_layer

Layers = Mapping[str, Mapping[str, Tensor]]
"""{layer as a file calls it: {part: tensor}}."""
TEXT_WIDTHS = {a.text_width: a.name for a in ARCHITECTURES if a.text_width}
UNKNOWN = "an unknown model"
SIGNS = (
    *((a.lora_signs, a.name) for a in ARCHITECTURES if a.lora_signs),
    *((a.weak_lora_signs, a.name) for a in ARCHITECTURES if a.weak_lora_signs),
    (r"(layers|refiner)_\d+_(attention|feed_forward)", LUMINA2_OR_Z_IMAGE),
    (r"(?<!\d_)transformer_blocks_\d+_(attn\d?|ff)_", TRANSFORMER),
)


def _widths() -> dict[str, dict[int, str]]:
    found = {SD3.name: {3072: DOUBLE}, TRANSFORMER: {3072: DOUBLE}}
    for architecture in ARCHITECTURES:
        for look, widths in architecture.widths.items():
            found.setdefault(look, {}).update(dict.fromkeys(widths, architecture.name))
    return found


WIDTHS = _widths()
"""{a family by its names, which others share: {the inputs of its attention: the family}}."""
ATTENTION = re.compile(r"(attn|attention)_(?!to_out)|linear1$")
LINEAR1 = re.compile(r"single_blocks_\d+_linear1$")
ROWS_OF_FLUX2 = 9  # of this layer, times its inputs; Flux.1 and Chroma have 7
FOLDER_PART = "a part of a diffusers folder"
DENOISER = r"(model\.diffusion_model\.)?"
MODEL_SIGNS = (
    (DENOISER + r"txt_in\.individual_token_refiner\.", "HunyuanVideo"),
    (DENOISER + r"vace_blocks\.", "Wan VACE"),
    *((f"{DENOISER}({a.model_signs})", a.name) for a in ARCHITECTURES if a.model_signs),
    *((f"{DENOISER}({a.weak_model_signs})", a.name) for a in ARCHITECTURES if a.weak_model_signs),
    (r"model\.diffusion_model\.input_blocks\.", UNETS),
    (r"(encoder\.)?down_blocks\.|text_model\.", FOLDER_PART),
)
LORA = re.compile(
    r"lora[12]?[._]|oft_|ia3_l|vera_lambda|hra_u"
    r"|\.([ab][12]\.weight|diff(_[bm])?|[wb]_norm|on_input|set_weight|reshape_weight)$"
)
"""Parts of LoRAs whose last word is no mark of an algorithm that is known here."""
UNET = re.compile(r"(down|up|input|output|mid|middle)_blocks?_")
TEXT = re.compile(r"attn2_to_[kv]$")


def is_lora(keys: Iterable[str]) -> bool:
    """Whether these are the names of a LoRA's tensors."""
    return any(key.rpartition(".")[2] in MARKS or LORA.search(key) for key in keys)


def model_family(keys: Iterable[str]) -> str:
    """The family of models, in words, whose weights have these names; "unknown" where there is none."""
    names = list(keys)
    return next((family for sign, family in MODEL_SIGNS if any(re.match(sign, name) for name in names)), "unknown")


def lora_family(layers: Layers) -> str:
    """The family, in words, that the names and sizes of a LoRA's layers show; "an unknown model" where none does."""
    names, encoders = _of_the_denoiser(layers)
    if not names and encoders:
        return T5_TEXTS if "t5" in encoders else SECOND_TEXTS if "2" in encoders else TEXTS
    is_unet = any(UNET.search(name) for name in names)
    if is_unet:
        widths = {n_in(parts) for name, parts in names.items() if TEXT.search(name)} - {None}
        if len(widths) == 1:
            (width,) = widths
            return TEXT_WIDTHS.get(width or 0, f"Stable Diffusion with a text width of {width}")
    shown = next((family for sign, family in SIGNS if any(re.search(sign, name) for name in names)), None)
    if shown is not None:
        return _by_size(names, shown) or shown
    if is_unet:
        return "SDXL" if "2" in encoders else UNETS
    return UNKNOWN


def transformer_width(layers: Layers) -> int | None:
    """The inputs of a transformer's attention; None where the layers show none, or several."""
    names, _ = _of_the_denoiser(layers)
    if any(UNET.search(name) for name in names):
        return None
    widths = {n_in(parts) for name, parts in names.items() if ATTENTION.search(name)} - {None}
    return widths.pop() if len(widths) == 1 else None


def _of_the_denoiser(layers: Layers) -> tuple[Layers, set[str]]:
    """The layers that are of no text encoder, with underscores for points, and the text encoders that others are of."""
    texts = {layer: text for layer in layers if (text := text_layer(layer))}
    names = {layer.replace(".", "_"): parts for layer, parts in layers.items() if layer not in texts}
    return names, {text.encoder for text in texts.values()}


def _by_size(names: Layers, shown: str) -> str | None:
    """The family that sizes show where its names are others' too; None where they show none."""
    for name, parts in names.items():
        if LINEAR1.search(name) and len(parts.get(UP, ())) == ROWS_OF_FLUX2 * (n_in(parts) or 0):
            return "Flux.2"
    return WIDTHS.get(shown, {}).get(transformer_width(names) or 0)


def n_in(parts: Mapping[str, Tensor]) -> int | None:
    """The inputs of the layer that these parts of an adapter fit; None where they do not say."""
    kind = kind_of(parts)
    sizes = kind.layer_sizes(parts) if kind else None
    return sizes[1] if sizes else None
