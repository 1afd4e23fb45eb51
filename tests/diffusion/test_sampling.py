"""Sampling through a flow, against diffusers' Euler steps; guidance; seeds. Diffusion is compared in families."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from lorasmith.diffusion.process import Flow
from lorasmith.diffusion.sampling import drawn, pictures_of
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
        scheduler: Any = FlowMatchEulerDiscreteScheduler()
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
        return cond["text"][..., None].expand_as(x_t)

    def file_key(self, path: str) -> str:
        return path


def test_guidance_goes_beyond_the_conditional_prediction() -> None:
    """A constant velocity v ends at noise - v, and guidance 3 makes v = u + 3 (c - u)."""
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    cond, uncond = ({"text": torch.full((2, 1, 1), value)} for value in (2.0, 0.5))
    for guidance, velocity in ((1.0, 2.0), (3.0, 5.0)):
        x0 = drawn(Constant(), cond, uncond, noise, steps=7, guidance=guidance)
        torch.testing.assert_close(x0, noise - velocity, atol=1e-4, rtol=0)


@dataclass(frozen=True)
class Counting:
    """Notes how many latents go through the net at once; conditioning is its prompt's length."""

    batches: list[int]
    multiple: int = 8
    resolution: int = 512
    process: Flow = Flow()
    nets: Any = field(default_factory=lambda: {"net": torch.nn.Linear(1, 1)})

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.batches.append(len(x_t))
        return x_t * cond["text"][..., None] * cond["mask"].sum(1)[:, None, None, None]

    def file_key(self, path: str) -> str:
        return path

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        return (1, size[1] // 8, size[0] // 8)

    def encode_images(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def encode_texts(self, texts: Sequence[str]) -> Cond:
        (text,) = texts
        return {"text": torch.full((1, 1, 1), 0.1), "mask": torch.ones(1, 1 + len(text))}

    def decode(self, latents: Tensor) -> Tensor:
        return latents.expand(-1, 3, -1, -1)


@pytest.mark.parametrize(("side", "batches"), [(512, [8, 2]), (1024, [2] * 5), (2048, [2] * 5)])
def test_pictures_go_through_the_net_together_as_far_as_memory_lets(side: int, batches: list[int]) -> None:
    """Those of prompts of several lengths are what each is alone; the last of five comes in a batch of its own."""
    model, prompts = Counting([]), {number: "a" * number for number in range(5)}
    drawing: Any = {"size": (side, side), "seed": 7, "steps": 1, "guidance": 2.0}
    told: list[int] = []
    together = list(pictures_of(model, model, prompts, advance=told.append, **drawing))
    assert sum(told) == 5 * 2, "a step and the decoding of each"
    assert model.batches == batches
    alone = [next(pictures_of(model, model, {number: text}, **drawing)) for number, text in prompts.items()]
    torch.testing.assert_close(together, alone)
    assert not torch.equal(*together[:2])
