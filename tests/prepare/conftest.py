"""The nets that are made ready for training in these tests."""

from typing import Any

import pytest
import torch
from frozen_nets import Case
from torch import Tensor

from lorasmith.models.families.sd import StableDiffusion
from lorasmith.prepare.share import shared_copy

CPU = torch.device("cpu")


@pytest.fixture(params=["unet", "sd3", "wan"])
def case(
    request: pytest.FixtureRequest, family: StableDiffusion, flow_denoiser: Any, video_denoiser: Any, latents: Tensor,
    texts: Tensor,
) -> Case:  # fmt: skip
    if request.param == "unet":
        t = torch.tensor([10, 500, 700, 900])
        return Case(shared_copy(family.denoiser, CPU, torch.float32), latents, t, {"text": texts})
    t = torch.tensor([0.1, 0.7])
    if request.param == "sd3":
        cond = {"text": texts[:2, :, :16], "pooled": texts[:2, 0, :8]}
        return Case(shared_copy(flow_denoiser), latents[:2, :, :8, :8], t, cond)
    return Case(shared_copy(video_denoiser), latents[:2, :, None, :8, :8], t, {"text": texts[:2, :, :16]})
