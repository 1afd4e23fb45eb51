"""What the tests share: the embedded model, opened once a process, and tiny nets from the libraries' real classes."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from dataclasses import dataclass

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from lorasmith.demo import BASE
from lorasmith.families import opened
from lorasmith.families.sd import StableDiffusion, StableDiffusionCodec
from lorasmith.noise import Flow
from lorasmith.types import Cond

torch.set_num_threads(1)  # the tests run in parallel processes, and threads that wait for each other are slow


@pytest.fixture(scope="session")
def family() -> StableDiffusion:
    return opened(BASE)


@pytest.fixture(scope="session")
def codec(family: StableDiffusion) -> StableDiffusionCodec:
    return family.codec(torch.device("cpu"))


@pytest.fixture
def latents() -> Tensor:
    """Four samples [4,4,16,16]."""
    return torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def texts() -> Tensor:
    """Their conditioning [4,32,192]."""
    return torch.randn(4, 32, 192, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class FlowDenoiser:
    """A second kind of model behind the same seam: a flow-matching transformer with a pooled vector."""

    transformer: SD3Transformer2DModel
    process: Flow

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer}

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        dtype = self.transformer.dtype
        text, pooled = cond["text"].to(dtype), cond["pooled"].to(dtype)
        return self.transformer(x_t.to(dtype), text, pooled, t * 1000).sample.float()

    def file_key(self, path: str) -> str:
        return f"lora_{path}".replace(".", "_")


@pytest.fixture
def flow_denoiser() -> FlowDenoiser:
    """Random weights, the same in every test."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
        )  # fmt: skip
        nn.init.normal_(net.proj_out.weight, std=0.1)
    return FlowDenoiser(net, Flow(shift=3.0))
