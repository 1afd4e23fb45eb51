"""What training minimises: a batch's noised latents and targets, and the loss of each of its samples.

B batch, C channels, h w latent height and width.
"""

import torch
from torch import Tensor

from lorasmith.config.schema import Config
from lorasmith.devices import device_of
from lorasmith.diffusion.losses import by_sample
from lorasmith.rng import Purpose, normal, uniform
from lorasmith.types import Batch, Denoiser, process_of


def noised(denoiser: Denoiser, batch: Batch, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """batch -> x_t [B,C,h,w], t [B], target [B,C,h,w]; each sample's draws depend on (seed, its number) alone."""
    shape = tuple(batch.x0.shape[1:])
    process = process_of(denoiser, shape)
    u = torch.cat([uniform(config.seed, Purpose.TIME, number, (1,)) for number in batch.numbers])
    t = process.time(config.times.fraction(u).clamp(0, 1 - 2**-24))
    eps = torch.stack([normal(config.seed, Purpose.NOISE, number, shape) for number in batch.numbers])
    return process.noise(batch.x0, eps, t), t, process.target(batch.x0, eps, t)


def sample_losses(denoiser: Denoiser, batch: Batch, config: Config) -> Tensor:
    """batch -> each sample's loss [B], float32, where the net is."""
    x_t, t, target = noised(denoiser, batch, config)
    device = device_of(denoiser)
    cond = {name: value.to(device) for name, value in batch.cond.items()}
    pred = denoiser.predict(x_t.to(device), t.to(device), cond)
    if pred.shape != target.shape:
        raise ValueError(f"model must predict the latents' shape {list(target.shape)}, got {list(pred.shape)}")
    if config.loss_space == "x0":
        pred, target = denoiser.process.x0(x_t.to(device), pred, t), batch.x0
    return by_sample(config.loss, pred, target.to(device))
