"""What the tests share: the embedded model, loaded once a process, and tiny nets from the libraries' real classes."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import signal
import sys

import pytest
import torch
from diffusers import SD3Transformer2DModel, WanTransformer3DModel
from flow_denoiser import FlowDenoiser
from torch import Tensor, nn

from lorasmith.demo import BASE
from lorasmith.diffusion.process import Flow
from lorasmith.models.families.sd import StableDiffusion, StableDiffusionCodec
from lorasmith.models.load import load_model

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's jobs in the background ignore
if sys.platform != "win32":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
torch.set_num_threads(1)  # the tests run in parallel processes, and threads that wait for each other are slow


@pytest.fixture(scope="session")
def family() -> StableDiffusion:
    family = load_model(BASE)
    assert isinstance(family, StableDiffusion)
    return family


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


@pytest.fixture
def video_denoiser() -> FlowDenoiser:
    """Wan 2.1's transformer with random weights, the same in every test; x_t [B,4,f,h,w], text [B,L,16]."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
            ffn_dim=32, num_layers=2,
        )  # fmt: skip
    return FlowDenoiser(net, Flow(shift=3.0))
