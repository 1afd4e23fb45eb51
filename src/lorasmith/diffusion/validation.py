"""Validation losses: fixed noise, stratified timesteps, and the standard error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lorasmith.data.buckets import num_at_once
from lorasmith.data.dataset import batch_of, shape_of
from lorasmith.data.order import classes_by_shape
from lorasmith.devices import device_of
from lorasmith.diffusion.losses import MSE, by_sample
from lorasmith.reporting.progress import Advance, unwatched
from lorasmith.rng import Purpose, normal, permutation, uniform
from lorasmith.types import Cached, Denoiser, process_of

NUM_NOISES = 4
_SEED = 0


@dataclass(frozen=True)
class Measured:
    """A mean and its standard error over pictures."""

    mean: float
    stderr: float

    @classmethod
    def of(cls, values: Tensor) -> "Measured":
        """values [N]; with a single value, the standard error is NaN."""
        stderr = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(float(values.mean()), stderr)

    def __format__(self, sign: str) -> str:
        """ "0.624 ± 0.021"; with the format "+", always with a sign."""
        return f"{self.mean:{sign}.3f} ± {self.stderr:.3f}"


def held_out_losses(denoiser: Denoiser, samples: Sequence[Cached], advance: Advance = unwatched) -> Tensor:
    """Each sample's mean squared error [N] on the model's own target, averaged over NUM_NOISES noises.

    For each noise, the samples' timesteps are stratified: one in each of N equal parts of the range, in a fixed order.
    Noise and timesteps are the same in all runs, so losses can be compared between runs, and paired before and after.
    Samples of one shape are batched as far as memory surely allows. advance: called with the number of samples done.
    """
    losses = torch.empty(len(samples))
    with torch.inference_mode():
        for indices in classes_by_shape([shape_of(sample) for sample in samples], [1] * len(samples)):
            at_once = max(1, num_at_once(samples[indices[0]].latent.shape) // NUM_NOISES)
            for start in range(0, len(indices), at_once):
                chosen = indices[start : start + at_once]
                losses[list(chosen)] = _losses_of(denoiser, samples, chosen).mean(1)
                advance(len(chosen))
    return losses


def _losses_of(denoiser: Denoiser, samples: Sequence[Cached], indices: Sequence[int]) -> Tensor:
    """The losses of samples of one shape under each of their noises, [len(indices), NUM_NOISES]."""
    device = device_of(denoiser)
    draws = [(index, number) for index in indices for number in range(NUM_NOISES)]
    batch = batch_of([samples[index] for index, _ in draws], tuple(range(len(draws))))
    shape = tuple(batch.x0.shape[1:])
    eps = torch.stack([normal(_SEED, Purpose.HELD_OUT_NOISE, i * NUM_NOISES + number, shape) for i, number in draws])
    fractions = [_fraction(number, index, len(samples)) for index, number in draws]
    process = process_of(denoiser, shape)
    t = process.time(torch.tensor(fractions, dtype=torch.float32))
    x_t, target = process.noise(batch.x0, eps, t), process.target(batch.x0, eps, t)
    cond = {name: value.to(device) for name, value in batch.cond.items()}
    pred = denoiser.predict(x_t.to(device), t.to(device), cond)
    return by_sample(MSE(), pred, target.to(device)).cpu().view(len(indices), NUM_NOISES)


def _fraction(number: int, index: int, num_samples: int) -> float:
    """The time of a sample under noise `number`, as a fraction in [0, 1)."""
    return _fractions(number, num_samples)[index]


@cache  # by noise, as drawing them for each sample anew would take the square of their number
def _fractions(number: int, num_samples: int) -> list[float]:
    """The times of all samples under noise `number`, one in each of N equal parts, shuffled."""
    places = permutation(_SEED, Purpose.HELD_OUT_TIME, 2 * number, num_samples)
    within = uniform(_SEED, Purpose.HELD_OUT_TIME, 2 * number + 1, (num_samples,))
    return [(place + float(part)) / num_samples for place, part in zip(places, within, strict=True)]
