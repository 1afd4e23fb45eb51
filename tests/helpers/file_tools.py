"""The files of file_table, and what the weights become in training."""

import torch
from tiny_nets import Holder
from torch import Tensor, nn

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import OFT, Algorithm, DoRA, LoHa, LoKr, LoRA
from lorasmith.adapters.targets import Targets
from lorasmith.formats.write import in_layout
from lorasmith.types import LayoutName

ALGORITHMS: dict[str, Algorithm] = {
    "LoRA": LoRA(rank=2, alpha=3.0), "LoHa": LoHa(rank=2, alpha=3.0), "LoKr": LoKr(rank=2, alpha=3.0, factor=2),
    "OFT": OFT(rank=2), "DoRA": DoRA(rank=2, alpha=3.0),
}  # fmt: skip


def adapted(holder: Holder, algorithm: str) -> AdapterSet:
    """Adapters that change every layer of attention and MLPs."""
    adapters = AdapterSet.new(holder, ALGORITHMS[algorithm], Targets(), 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapters.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapters


def written(adapters: AdapterSet, holder: Holder, layout: LayoutName) -> dict[str, Tensor]:
    """What a file holds, in memory of its own; ValueError where there can be none."""
    return {key: tensor.clone() for key, tensor in in_layout(adapters, holder, torch.float32, layout).items()}


def merged_weights(holder: Holder, adapters: AdapterSet) -> dict[str, Tensor]:
    """{a parameter of the net: what the adapters make of it}: a layer's outputs for unit vectors, less its bias."""
    found = {}
    for path, adapter in adapters.adapters.items():
        name = path.partition(".")[2]
        base = holder.net.get_submodule(name)
        assert isinstance(base, nn.Linear)
        with torch.no_grad():
            x = torch.eye(base.in_features)
            y = adapter(x, base(x), base.bias, base)
            found[f"{name}.weight"] = (y if base.bias is None else y - base.bias).T.contiguous()
    return found
