"""What the tests share: the embedded model, opened once a process, and tiny nets from the libraries' real classes."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch import Tensor

from lorasmith.demo import BASE
from lorasmith.families import opened
from lorasmith.families.sd import StableDiffusion, StableDiffusionCodec

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
