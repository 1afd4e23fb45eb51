"""LoRAs of a smaller rank: each layer's nearest one, from its factors alone."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from lorasmith.adapters.parts import size_of
from lorasmith.adapters.registry import ADAPTERS, kind_of
from lorasmith.formats.dora_magnitude import COMFYUI, KEY
from lorasmith.formats.keys import DOWN, UP
from lorasmith.reporting.progress import SILENT, Progress, tracked
from lorasmith.storage.safetensors import Named, write_streamed
from lorasmith.tools.lora_layers import LoRAFile
from lorasmith.tools.outputs import derived, network_dim, refuse_output
from lorasmith.tools.svd import Cut, Decomposition, Losses, squared_error


def resize(source: Path, output: Path, cut: Cut, *, overwrite: bool = False, progress: Progress = SILENT) -> Losses:
    """Writes a LoRA with fewer ranks; alpha and dtypes are kept, and so are layers that have no more than is asked for.

    ValueError where a layer is of another algorithm, or none would change.
    """
    refuse_output(output, overwrite=overwrite)
    lora = LoRAFile.opened(source)
    _refuse_what_has_no_rank(lora)
    if cut.rank is not None:
        greatest = max((size_of(parts, DOWN, 0) for parts in lora.layers.values() if DOWN in parts), default=0)
        if 0 < greatest <= cut.rank:
            raise ValueError(f"rank must be below that of {source}, {greatest}, got {cut.rank}")
    losses, layers = Losses(), sorted(lora.layers)
    shown = tracked(layers, "resizing", progress, len(layers))
    write_streamed(
        output,
        (named for layer in shown for named in _resized(lora, layer, cut, losses)),
        lambda: {
            **derived(lora.metadata, f"resize to {cut}, relative error {losses.overall:.3g}"),
            **network_dim(losses.ranks.values()),
        },
    )
    return losses


def _refuse_what_has_no_rank(lora: LoRAFile) -> None:
    lora.refuse_strange_parts()
    for layer in lora.layers:
        kind = kind_of(lora.layers[layer])
        if kind is not None and not kind.IS_LOW_RANK:
            names = " or ".join(one.algorithm for one in ADAPTERS if one.IS_LOW_RANK)
            raise ValueError(f"{lora.path} must hold {names} alone to be resized, got {kind.algorithm} in {layer}")
        if kind is not None and kind.DEPENDS_ON_LAYOUT and lora.metadata.get(KEY) == COMFYUI[KEY]:
            raise ValueError(
                f"{lora.path} must hold the paper's dora_scale, got ComfyUI's, which depends on the factors"
            )


def _resized(lora: LoRAFile, layer: str, cut: Cut, losses: Losses) -> Iterator[Named]:
    """A layer's tensors under the file's own names; where the file states no alpha, the scale is 1."""
    parts = dict(lora.layers[layer])
    if kind_of(parts) is not None:
        before_up, before_down, scale = lora.factors(layer)
        parts[UP], parts[DOWN], rank = _smaller(before_up, before_down, cut)
        before = before_up.flatten(1).double(), before_down.flatten(1).double() * scale
        factor = scale * len(before_down) / rank  # the file's alpha over the new rank
        if "alpha" not in lora.keys[layer]:  # none, or PEFT's, which the metadata no longer state
            parts[UP], factor = (parts[UP].double() * factor).to(before_up.dtype), 1.0
            parts.pop("alpha", None)
        after = parts[UP].flatten(1).double(), parts[DOWN].flatten(1).double() * factor
        losses.add(layer, rank, *squared_error(before, after))
    for part, tensor in sorted(parts.items()):
        yield lora.key(layer, part), tensor


def _smaller(up: Tensor, down: Tensor, cut: Cut) -> tuple[Tensor, Tensor, int]:
    """up, down of rank r -> of rank q, in their dtypes, so that alpha / q up down is alpha / r of what they were."""
    if cut.rank is not None and len(down) <= cut.rank:
        return up, down, len(down)
    whole = Decomposition.of_product(up.flatten(1), down.flatten(1))
    rank = cut.kept(whole.values)
    if rank == len(down):
        return up, down, rank
    new_up, new_down = whole.factors(rank, rank / len(down))
    return (
        new_up.to(up.dtype).view(len(up), rank, *up.shape[2:]),
        new_down.to(down.dtype).view(rank, *down.shape[1:]),
        rank,
    )
