"""Processes against diffusers' schedulers and against their own algebra; laws of times against closed forms."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from lorasmith.diffusion.process import Diffusion, Flow
from lorasmith.diffusion.timesteps import LogitNormal, Uniform

SCHEDULERS: dict[str, Any] = {
    "eps": DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    "v": DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "x0": DDPMScheduler(prediction_type="sample"),
}


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 4, 8, 8, generator=generator)
    return x0, eps, torch.tensor([0, 250, 700, 998])


@pytest.mark.parametrize("prediction", SCHEDULERS)
def test_diffusion_is_the_schedulers(prediction: Any) -> None:
    scheduler, (x0, eps, t) = SCHEDULERS[prediction], batch()
    process = Diffusion(scheduler.alphas_cumprod, prediction)
    x_t = process.noise(x0, eps, t)
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, eps, t))
    target = process.target(x0, eps, t)
    expected = {"eps": eps, "v": scheduler.get_velocity(x0, eps, t), "x0": x0}[prediction]
    torch.testing.assert_close(target, expected)
    for i, time in enumerate(t.tolist()):
        stepped = scheduler.step(target[i : i + 1], time, x_t[i : i + 1]).pred_original_sample
        clipped = process.x0(x_t, target, t)[i : i + 1].clamp(-1, 1)
        torch.testing.assert_close(clipped, stepped.clamp(-1, 1), atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "process", [Diffusion(SCHEDULERS["eps"].alphas_cumprod, p) for p in ("eps", "v", "x0")] + [Flow()]
)
def test_what_the_net_should_return_gives_back_x0_and_eps(process: Diffusion | Flow) -> None:
    x0, eps, _ = batch()
    t = process.time(torch.tensor([0.05, 0.3, 0.6, 0.95]))
    x_t, target = process.noise(x0, eps, t), process.target(x0, eps, t)
    torch.testing.assert_close(process.x0(x_t, target, t), x0, atol=2e-4, rtol=0)
    torch.testing.assert_close(process.eps(x_t, target, t), eps, atol=2e-4, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_the_schedulers(shift: float) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    x0, eps, _ = batch()
    indices = torch.tensor([10, 300, 600, 990])
    t = Flow(shift).time(1 - indices / 1000)
    torch.testing.assert_close(t, scheduler.sigmas[indices])
    torch.testing.assert_close(
        Flow(shift).noise(x0, eps, t), scheduler.scale_noise(x0, scheduler.timesteps[indices], eps)
    )


def test_snr() -> None:
    process, t = Diffusion(SCHEDULERS["eps"].alphas_cumprod, "eps"), torch.tensor([500])
    ones, zeros = torch.ones(1, 1), torch.zeros(1, 1)
    signal, sigma = process.noise(ones, zeros, t), process.noise(zeros, ones, t)
    torch.testing.assert_close(process.snr(t), ((signal / sigma) ** 2)[0])
    assert float(Flow().snr(torch.tensor([0.25]))) == pytest.approx(9)


def test_diffusion_times_cover_every_step_equally() -> None:
    process = Diffusion(SCHEDULERS["eps"].alphas_cumprod, "eps")
    t = process.time((torch.arange(5000, dtype=torch.float64) + 0.5) / 5000)
    assert torch.equal(t.bincount(), torch.full((1000,), 5))


def test_logit_normal_quantiles() -> None:
    """A logit-normal's median is sigmoid(mean), its quantile at one deviation sigmoid(mean + std)."""
    one_deviation = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    fraction = LogitNormal(mean=0.3, std=1.5).fraction(torch.tensor([0.5, one_deviation], dtype=torch.float64))
    torch.testing.assert_close(fraction, torch.sigmoid(torch.tensor([0.3, 1.8], dtype=torch.float64)))
    u = torch.rand(5)
    assert torch.equal(Uniform().fraction(u), u)
