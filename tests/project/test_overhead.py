"""The overhead of a step: what is outside the net, whatever the net takes."""

import time
from typing import Any

import torch
from overhead import WARMUP, followed
from torch import Tensor

from lorasmith.config.values import configured
from lorasmith.data.dataset import Dataset
from lorasmith.models.families.sd import StableDiffusion
from lorasmith.training.job import Job
from lorasmith.types import Cached

PAUSE = 0.05


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        time.sleep(PAUSE)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        time.sleep(PAUSE)
        return grad


def test_both_passes_of_the_net_are_not_in_it(family: StableDiffusion, latents: Tensor, texts: Tensor) -> None:
    pairs = zip(latents, texts, strict=True)
    samples = [Cached(f"s{number}", latent, {"text": text}) for number, (latent, text) in enumerate(pairs)]
    config = configured({"steps": WARMUP + 3, "gradient_checkpointing": False})
    dataset = Dataset.of(samples, [1] * len(samples), seed=0, group_size=1)
    job = Job.of(family.denoiser, dataset, config, device=torch.device("cpu"))
    unet: Any = job.denoiser.nets["unet"]
    unet.conv_out.register_forward_hook(lambda layer, inputs, y: _Slow.apply(y))
    found = followed(job, job.steps())
    assert len(found) == 2
    assert all(0 < outside < whole - 2 * PAUSE for whole, outside in found)
