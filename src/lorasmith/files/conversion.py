"""A LoRA under the names of another program, for the model that it belongs to."""

import re
from functools import reduce
from pathlib import Path

import torch

from lorasmith import lorafile
from lorasmith.adapters.dora import SCALE, VECTOR
from lorasmith.config import LayoutName
from lorasmith.dora_scales import KEY
from lorasmith.experts import named_part
from lorasmith.families import opened
from lorasmith.file_layouts import in_layout, metadata_of
from lorasmith.files.factors import LoRAFile
from lorasmith.files.outputs import derived, refuse_output
from lorasmith.layouts import LAYOUT, normal
from lorasmith.loading import adapters_from

LENGTHS = ("alpha", SCALE, VECTOR)
"""What is kept in float32 in a file of 16 bits."""
TEXT = re.compile(r"(^|_)te\d?_|text_encoder|text_model")


def convert(source: Path, output: Path, model: str | Path, layout: LayoutName, *, overwrite: bool = False) -> int:
    """Writes the LoRA in a layout, in the widest dtype of its weights; returns how many layers it holds.

    ValueError where it does not fit the model, or the layout has no way to say it.
    """
    refuse_output(output, overwrite=overwrite)
    lora = LoRAFile.opened(source)
    lora.refuse_strange_parts()
    denoiser = opened(model, with_texts=any(TEXT.search(normal(layer)) for layer in lora.layers)).denoiser
    denoiser = named_part(denoiser, lora.layers, lora.metadata)
    state = {f"{layer}.{part}": tensor for layer, parts in lora.layers.items() for part, tensor in parts.items()}
    adapters = adapters_from(state, denoiser, lora.metadata)
    dtypes = [tensor.dtype for parts in lora.layers.values() for part, tensor in parts.items() if part not in LENGTHS]
    converted = in_layout(adapters, denoiser, reduce(torch.promote_types, dtypes), layout)
    before = {key: value for key, value in lora.metadata.items() if key not in (KEY, LAYOUT)}
    metadata = {**derived(before, f"convert to {layout}'s names"), **metadata_of(adapters, denoiser, layout)}
    lorafile.write(output, converted, metadata)
    return len(adapters.adapters)
