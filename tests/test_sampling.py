"""Sampling through a flow, against diffusers' Euler steps; guidance; seeds. Diffusion is compared in families."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from lorasmith.noise import Flow
from lorasmith.sampling import drawn
from lorasmith.types import Cond


def conds() -> tuple[Cond, Cond, Tensor]:
    generator = torch.Generator().manual_seed(0)
    cond, uncond = (
        {"text": torch.randn(1, 5, 16, generator=generator), "pooled": torch.randn(1, 8, generator=generator)}
        for _ in range(2)
    )
    return cond, uncond, torch.randn(1, 4, 8, 8, generator=generator)


def test_a_flow_takes_eulers_steps(flow_denoiser: Any) -> None:
    """20 steps down the scheduler's own shifted times; they start at 1, ours a millionth below."""
    cond, uncond, noise = conds()
    with torch.no_grad():
        ours = drawn(flow_denoiser, cond, uncond, noise, steps=20, guidance=1)
        scheduler = FlowMatchEulerDiscreteScheduler()
        sigmas = flow_denoiser.process.time(1 - torch.arange(20) / 20)
        scheduler.set_timesteps(sigmas=sigmas.tolist())
        x_t = noise
        for t in scheduler.timesteps:
            out = flow_denoiser.predict(x_t, t[None] / 1000, cond)
            x_t = scheduler.step(out, t, x_t).prev_sample
    torch.testing.assert_close(ours, x_t, atol=1e-3, rtol=0)


@dataclass(frozen=True)
class Constant:
    """Predicts what the conditioning says, everywhere."""

    process: Flow = Flow()
    nets: Any = None

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return cond["text"].expand_as(x_t)

    def file_key(self, path: str) -> str:
        return path


def test_guidance_goes_beyond_the_conditional_prediction() -> None:
    """A constant velocity v ends at noise - v, and guidance 3 makes v = u + 3 (c - u)."""
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    cond, uncond = {"text": torch.tensor(2.0)}, {"text": torch.tensor(0.5)}
    for guidance, velocity in ((1.0, 2.0), (3.0, 5.0)):
        x0 = drawn(Constant(), cond, uncond, noise, steps=7, guidance=guidance)
        torch.testing.assert_close(x0, noise - velocity, atol=1e-4, rtol=0)
