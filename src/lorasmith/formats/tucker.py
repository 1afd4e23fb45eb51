"""LoRAs of convolutions in Tucker's form, LyCORIS's use_tucker (Hyeon-Woo et al. 2022, "FedPara", proposition 3).

A core stands between two factors, delta[o,i,k…] = sum of up[o,p] core[p,q,k…] down[q,i], and is one more of their
numbers: core and down make a down [p, i, k…] of the plain form with the same delta. LoRA has
up as [o, p] and down in the plain form as [p, i, k…], all others as [p, o] and [p, i K].
"""

import torch
from torch import Tensor

from lorasmith.adapters.frozen_weight import PLAIN
from lorasmith.adapters.parts import UP, Parts
from lorasmith.adapters.registry import CORES
from lorasmith.formats.lora_weights import LoRAWeights


def without_cores(lora: LoRAWeights) -> LoRAWeights:
    """In the plain form, in float32 or wider where it was not; a core that fits nothing stays."""
    cored = {layer: parts for layer, parts in lora.layers.items() if not CORES.keys().isdisjoint(parts)}
    return lora.changed({layer: _plain(parts) for layer, parts in cored.items()})


def _plain(parts: Parts) -> dict[str, Tensor]:
    """One layer's parts."""
    plain = dict(parts)
    for core, (up, down) in CORES.items():
        found = [parts[name] for name in (core, up, down) if name in parts]
        if len(found) == 3 and _fits(up, *found):
            dtype = torch.promote_types(torch.float32, found[0].dtype)
            middle, one, other = (tensor.to(dtype) for tensor in found)
            product = torch.einsum("pq...,qi->pi...", middle, other.flatten(1))
            is_lora = up == UP
            plain |= {up: one if is_lora else one.flatten(1).t(), down: product if is_lora else product.flatten(1)}
            del plain[core]
    return plain


def _fits(name: str, core: Tensor, up: Tensor, down: Tensor) -> bool:
    """Whether core [p, q, k…] stands between up [o, p] (but [p, o] where it is not LoRA's) and down [q, i]."""
    if core.ndim < 3 or min(up.ndim, down.ndim) < 2 or any(t.dtype not in PLAIN for t in (core, up, down)):
        return False
    ones = (*up.shape[2:], *down.shape[2:])
    return (up.shape[name == UP], down.shape[0]) == core.shape[:2] and all(size == 1 for size in ones)
