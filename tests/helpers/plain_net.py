"""A denoiser around any net, and which of its layers are packed."""

from dataclasses import dataclass

from torch import Tensor, nn

from lorasmith.diffusion.process import Flow
from lorasmith.ops.prepacked import Packed
from lorasmith.types import Cond, Denoiser


@dataclass(frozen=True)
class Plain:
    """A denoiser around any net."""

    net: nn.Module
    process: Flow = Flow()

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.net(x_t.to(next(self.net.parameters()).dtype)).float()

    def file_key(self, path: str) -> str:
        return f"lora_{path}".replace(".", "_")


def packed_in(denoiser: Denoiser) -> list[str]:
    return [path for net in denoiser.nets.values() for path, m in net.named_modules() if isinstance(m, Packed)]
