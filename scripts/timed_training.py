"""Training for a given number of minutes: optimizer steps, their report, the order of samples, averaged weights."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn


@dataclass(frozen=True)
class Step:
    """One optimizer step that was taken."""

    number: int  # from 1
    seconds: float  # since training began
    loss: float


def learning_rate(progress: float, peak: float) -> float:
    """progress [0, 1] -> a linear rise over the first 2 %, then along half a cosine down to 2 % of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * min(1.0, progress / 0.02) * (0.02 + 0.98 * cosine)


def timed_steps(
    weights: list[nn.Parameter], loss: Callable[[], Tensor], *, minutes: float, peak_lr: float
) -> Iterator[Step]:
    """AdamW on `loss()`, a fresh batch's loss each time, for so many minutes."""
    optimizer = torch.optim.AdamW(weights, lr=peak_lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start, number = time.monotonic(), 0
    while (seconds := time.monotonic() - start) < minutes * 60:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(seconds / (minutes * 60), peak_lr)
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        number += 1
        yield Step(number, time.monotonic() - start, value.item())


def reported(name: str, steps: Iterable[Step]) -> Iterator[Step]:
    """The same steps; the running mean of their loss is printed at the first, every hundredth and the last."""
    step, mean = Step(0, 0.0, math.nan), math.nan
    for step in steps:
        mean = step.loss if step.number == 1 else 0.99 * mean + 0.01 * step.loss
        if step.number == 1 or step.number % 100 == 0:
            print(f"{name}: step {step.number}, {step.seconds:.0f} s, loss {mean:.4f}", flush=True)
        yield step
    print(f"{name}: {step.number} steps in {step.seconds:.0f} s, loss {mean:.4f}", flush=True)


@torch.no_grad()
def follow(average: Iterable[nn.Parameter], weights: Iterable[nn.Parameter], step: Step) -> None:
    """Moves the averaged weights towards the present ones at every fourth step; they span 200 steps in the end."""
    if step.number % 4 == 0:
        decay = min(0.98, (1 + step.number) / (10 + step.number))
        for mean, present in zip(average, weights, strict=True):
            mean.lerp_(present, 1 - decay)


def batches(num: int, size: int, generator: Generator) -> Iterator[Tensor]:
    """Indices [size] of each batch, without end: every epoch a new order, its incomplete last batch left out."""
    if num < size:
        raise ValueError(f"there must be at least {size} samples, one batch, got {num}")
    while True:
        yield from torch.randperm(num, generator=generator)[: num - num % size].split(size)
