"""Pictures of prompts, without and with a LoRA."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.hooks import attached
from lorasmith.config.schema import Config
from lorasmith.devices import compute_dtype, model_dtype
from lorasmith.diffusion.sampling import pictures_of
from lorasmith.formats import lora_file
from lorasmith.formats.read import adapters_from
from lorasmith.models.load import bytes_to_load, load_model, located, with_adapted_texts
from lorasmith.models.meta import skeleton_for
from lorasmith.models.sources.reading import loading_shown
from lorasmith.prepare.share import num_bytes, shared_copy
from lorasmith.reporting.comparison import save_comparison
from lorasmith.reporting.progress import SILENT, Progress, megabytes
from lorasmith.storage.safetensors_header import Header
from lorasmith.tools.lazy_weights import with_stored_weights
from lorasmith.training.loop import native_kernels
from lorasmith.types import Codec, Denoiser, Encoding


def pictures(
    denoiser: Denoiser, codec: Codec, prompts: Sequence[str], config: Config, progress: Progress = SILENT
) -> list[Image.Image]:
    """A picture for each prompt, numbered in that order, at the model's own resolution."""
    sampling, side = config.sampling, codec.resolution
    pieces = (sampling.steps + 1) * len(prompts)  # with the decoding
    with native_kernels(denoiser, config), progress.stage("generating samples", pieces) as done:
        found = pictures_of(
            denoiser, codec, dict(enumerate(prompts)), size=(side, side), seed=sampling.seed,
            steps=sampling.steps, guidance=sampling.guidance, advance=done,
        )  # fmt: skip
        return [_as_image(pixels) for pixels in found]


def draw_comparison(
    config: Config, lora: Path | None, output: Path, device: torch.device, progress: Progress = SILENT
) -> None:
    """Draws the sampling prompts without and, where there is one, with the LoRA, into one labelled picture.

    The LoRA is tried on the model's layers before weights are loaded: ValueError where it does not fit.
    """
    assert config.model is not None and config.sampling.prompts
    header = None if lora is None else Header.of(lora)
    outline, path = skeleton_for(config.model, config.encoders, header, with_texts=False)
    adapters = None if lora is None else _adapters(lora, with_stored_weights(outline, path), config)
    model, encoders = located(config.model, config.encoders, progress)
    with loading_shown(bytes_to_load(model, encoders), progress):
        family = load_model(model, encoders, with_texts=isinstance(outline, Encoding))
        family = with_adapted_texts(family, adapters.nets if adapters else ())
        codec = family.codec(device)
        if lora is not None and adapters is not None and adapters.needing_weights:
            adapters = _adapters(lora, family.denoiser, config)
    with megabytes("preparing the weights", num_bytes(family.denoiser), progress) as advance:
        dtype = model_dtype(config.training_dtype, device)
        denoiser = shared_copy(family.denoiser, device, dtype, advance=advance)
    rows = [("without LoRA", pictures(denoiser, codec, config.sampling.prompts, config, progress))]
    if adapters is not None:
        adapters.to(device, compute_dtype(config.lora_dtype, device))
        with attached(denoiser, adapters):
            rows.append(("with LoRA", pictures(denoiser, codec, config.sampling.prompts, config, progress)))
    save_comparison(rows, config.sampling.prompts, output)


def _adapters(lora: Path, denoiser: Denoiser, config: Config) -> AdapterSet:
    state, metadata = lora_file.read(lora)
    return adapters_from(state, denoiser, metadata, ignore_unknown=config.ignore_unknown)


def _as_image(pixels: Tensor) -> Image.Image:
    """pixels [3,H,W] in -1 to 1 -> picture; NaN, where a run went wrong, is grey."""
    return Image.fromarray(((pixels.nan_to_num(0) + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8))
