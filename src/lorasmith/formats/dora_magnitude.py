"""The lengths of DoRA as ComfyUI reads them: it divides by |W|, where the paper and all others divide by |W + s B A|.

So a file for ComfyUI holds m |W| / |W + s B A| as its dora_scale, and says so in its metadata; reading takes that back.
"""

import logging
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from lorasmith.adapters.base import Adapter, Layer
from lorasmith.adapters.dora import DoRAAdapter
from lorasmith.adapters.frozen_weight import loaded
from lorasmith.adapters.parts import SCALE
from lorasmith.formats.lora_weights import LoRAWeights
from lorasmith.formats.module_names import ModuleNames
from lorasmith.types import Denoiser

log = logging.getLogger(__name__)

KEY = "lorasmith.dora_scale"
PAPER, COMFYUI = {KEY: "paper"}, {KEY: "ComfyUI"}
"""What a file's metadata say of its dora_scale."""


def as_in_the_paper(lora: LoRAWeights, names: ModuleNames) -> LoRAWeights:
    """With the paper's lengths, for this model's weights; what fits no layer is left as it is.

    A file that does not say which it holds has the paper's.
    """
    if lora.metadata.get(KEY) == COMFYUI[KEY]:
        return _changed(lora, names, lambda own, updated: updated / own)
    return lora


def warn_of_doubt(keys: Iterable[str], metadata: Mapping[str, str]) -> None:
    """Logs that a file of these keys, by ComfyUI's names, may hold lengths of either kind and does not say which."""
    if KEY not in metadata and any(key.startswith("diffusion_model.") and key.endswith(f".{SCALE}") for key in keys):
        log.warning("the LoRA does not say whether its %s is ComfyUI's: taken as the paper's", SCALE)


def for_comfyui(lora: Mapping[str, Tensor], denoiser: Denoiser) -> dict[str, Tensor]:
    """A LoRA with the paper's lengths -> with ComfyUI's, for this denoiser's weights."""
    return _changed(LoRAWeights.of(lora), ModuleNames(denoiser), lambda own, updated: own / updated).state


def take_papers_lengths(adapter: Adapter, base: nn.Module, metadata: Mapping[str, str]) -> None:
    """Gives an adapter of a layer that was read from a file of ComfyUI's the paper's lengths."""
    if isinstance(adapter, DoRAAdapter) and metadata.get(KEY) == COMFYUI[KEY]:
        lengths = adapter.squares.sqrt()  # of W, by which ComfyUI divides, where the paper has those of W + s B A
        adapter.change = nn.Parameter(adapter.magnitudes() / lengths * adapter.norms(base) - lengths)


def _changed(lora: LoRAWeights, names: ModuleNames, factor: Callable[[Tensor, Tensor], Tensor]) -> LoRAWeights:
    """Each dora_scale times what the lengths [n_out] of a layer's rows, without and with the update, make."""
    found = {}
    for layer, parts in lora.layers.items():
        path = names.path(layer)
        if SCALE not in parts or path not in names.adaptable:
            continue
        base = loaded(names.adaptable[path])
        try:
            adapter = DoRAAdapter.from_file(Layer.of(path, names.adaptable[path]), parts, base)
        except ValueError:  # which whoever makes adapters of them says, with all the others
            continue
        if not isinstance(adapter, DoRAAdapter):  # lengths of the inputs, which are the same in all programs
            continue
        adapter.to(next(base.parameters()).device)
        norms = adapter.norms(base).cpu()
        factors = factor(adapter.squares.cpu().sqrt(), norms)
        scale = parts[SCALE].to(factors.dtype)
        found[layer] = {**parts, SCALE: scale * factors.view(-1, *[1] * (scale.ndim - 1))}
    return lora.changed(found)
