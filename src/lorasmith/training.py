"""The loop: groups of samples in, optimizer steps out. It knows a Denoiser, not a model.

B batch, C channels, h w latent height and width.
"""

import math
import time
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from lorasmith.attach import AdapterSet
from lorasmith.config import Config
from lorasmith.devices import device_of
from lorasmith.draws import Purpose, normal, uniform
from lorasmith.losses import by_sample
from lorasmith.optimizers import LossScale, Masters
from lorasmith.types import Batch, Denoiser, Step


class NonFiniteError(ArithmeticError):
    """A loss or gradient was NaN or infinite; the adapters are as the last finite step left them."""


class Groups(Protocol):
    """Where the loop gets its samples."""

    def group_at(self, step: int) -> Batch:
        """The samples of optimizer step `step`, counted from 0: a pure function."""
        ...


def train(
    denoiser: Denoiser,
    adapters: AdapterSet,
    groups: Groups,
    config: Config,
    *,
    steps: int,
    done: int = 0,
    first: int = 0,
) -> Iterator[Step]:
    """Trains adapters that are attached to the denoiser; yields after each optimizer step.

    `steps` more are made after the `done` ones of a LoRA that is continued. `first` is the number of the first group:
    those before it were drawn already.
    """
    device = device_of(denoiser)
    masters = Masters(adapters.parameters())
    optimizer = config.optimizer.build(masters.tensors, config.learning_rate)
    scale = LossScale(any(p.dtype == torch.float16 for net in denoiser.nets.values() for p in net.parameters()))
    for step in range(steps):
        began = time.perf_counter()
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            group = groups.group_at(first + step)
            while True:  # a group whose gradient overflows is run again at half the scale: no step is skipped
                loss = _backward(denoiser, masters, group, config, scale.value)
                if not scale.overflowed(masters.tensors):
                    break
        if step == 0:
            adapters.refuse_unused(masters.gradient)
        grad_norm = _clipped(masters.tensors, config.max_grad_norm)
        _refuse_non_finite(grad_norm, "gradient", group, done + step)
        lr = config.learning_rate * config.schedule.factor(step, steps)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        masters.write()
        yield Step(done + step + 1, loss, lr, grad_norm, time.perf_counter() - began)


def noised(denoiser: Denoiser, batch: Batch, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """batch -> x_t [B,C,h,w], t [B], target [B,C,h,w]; each sample's draws depend on (seed, its number) alone."""
    process = denoiser.process
    u = torch.cat([uniform(config.seed, Purpose.TIME, number, (1,)) for number in batch.numbers])
    t = process.time(config.times.fraction(u).clamp(0, 1 - 2**-24))
    shape = tuple(batch.x0.shape[1:])
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
    return by_sample(config.loss, pred, target.to(device))


def _backward(denoiser: Denoiser, masters: Masters, group: Batch, config: Config, scale: float) -> float:
    """Gives the masters the gradient of the group's mean loss, times scale and back; returns that loss.

    Micro-batches add up in fp32, so that both are the same however the group is cut.
    """
    losses = []
    for start in range(0, len(group), config.batch_size):
        part = group.part(start, start + config.batch_size)
        part_losses = sample_losses(denoiser, part, config)
        (part_losses.sum() * (scale / len(group))).backward()
        masters.take_gradients()
        losses += part_losses.tolist()
    masters.unscale(scale)
    for name, number, loss in zip(group.names, group.numbers, losses, strict=True):
        if not math.isfinite(loss):
            raise NonFiniteError(f"the loss of sample {name} (number {number}) is {loss}")
    return sum(losses) / len(losses)


def _clipped(params: list[Tensor], max_norm: float) -> float:
    """Scales the gradients together down to max_norm (0: leaves them); returns their norm before."""
    grads = [p.grad for p in params if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return float(norm)


def _refuse_non_finite(value: float, what: str, group: Batch, step: int) -> None:
    if not math.isfinite(value):
        raise NonFiniteError(f"the {what} of step {step + 1} is {value}, from samples {', '.join(group.names)}")
