"""The lengths of DoRA as ComfyUI reads them: it divides by |W|, where the paper and all others divide by |W + s B A|.

So a file for ComfyUI holds m |W| / |W + s B A| as its dora_scale, and says so in its metadata; reading takes that back.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from lorasmith.adapters.dora import SCALE, DoRAAdapter
from lorasmith.adapters.layer import Layer
from lorasmith.layouts import ModuleNames, by_layer
from lorasmith.targets import adaptable_layers
from lorasmith.types import Denoiser

KEY = "lorasmith.dora_scale"
PAPER, COMFYUI = {KEY: "paper"}, {KEY: "ComfyUI"}
"""What a file's metadata say of its dora_scale."""


def are_for_comfyui(metadata: Mapping[str, str]) -> bool:
    """Whether a file's lengths are ComfyUI's; those of files that do not say so are the paper's."""
    return metadata.get(KEY) == COMFYUI[KEY]


def for_comfyui(lora: Mapping[str, Tensor], denoiser: Denoiser) -> dict[str, Tensor]:
    """A LoRA with the paper's lengths -> with ComfyUI's, for this denoiser's weights."""
    return _changed(lora, denoiser, lambda own, updated: own / updated)


def from_comfyui(lora: Mapping[str, Tensor], denoiser: Denoiser) -> dict[str, Tensor]:
    """The reverse: a LoRA with ComfyUI's lengths -> with the paper's. What fits no layer is left as it is."""
    return _changed(lora, denoiser, lambda own, updated: updated / own)


def _changed(
    lora: Mapping[str, Tensor], denoiser: Denoiser, factor: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Each dora_scale times what the lengths [n_out] of a layer's rows, without and with the update, make."""
    names, adaptable, state = ModuleNames(denoiser), adaptable_layers(denoiser.nets), dict(lora)
    for layer, parts in by_layer(lora).items():
        path = names.path(layer)
        if SCALE not in parts or path not in adaptable:
            continue
        base = adaptable[path]
        try:
            adapter = DoRAAdapter.from_file(Layer.of(path, base), parts, base)
        except ValueError:  # which whoever makes adapters of them says, with all the others
            continue
        lengths, updated = adapter.squares.sqrt(), adapter.norms(base)
        scale = parts[SCALE].to(lengths.dtype)
        state[f"{layer}.{SCALE}"] = scale * factor(lengths, updated).view(-1, *[1] * (scale.ndim - 1))
    return state
