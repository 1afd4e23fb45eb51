"""Flow-matching transformers of diffusers behind the Denoiser protocol."""

from dataclasses import dataclass
from typing import Any

from diffusers import SD3Transformer2DModel, WanTransformer3DModel
from torch import Tensor, nn

from lorasmith.diffusion.process import Flow
from lorasmith.types import Cond

KEYWORDS = {"text": "encoder_hidden_states", "pooled": "pooled_projections"}


@dataclass(frozen=True)
class FlowDenoiser:
    """Other kinds of models behind the same seam: flow-matching transformers of diffusers, of pictures or video."""

    transformer: SD3Transformer2DModel | WanTransformer3DModel
    process: Flow

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer}

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        dtype = self.transformer.dtype
        inputs: Any = {KEYWORDS[name]: value.to(dtype) for name, value in cond.items()}
        return self.transformer(hidden_states=x_t.to(dtype), timestep=t * 1000, **inputs).sample.float()

    def file_key(self, path: str) -> str:
        return f"lora_{path}".replace(".", "_")
