"""Encoded samples -> the batches that the loop trains on. B batch, C channels, h w latent sides."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from lorasmith.data.order import Order, classes_by_shape
from lorasmith.storage.hashing import digest
from lorasmith.types import Batch, Cached, Cond

MUCH = 0.25  # of a picture, cropped off
PADDED = ("text", "mask")  # what has a row for each token


def shape_of(sample: Cached) -> tuple[object, ...]:
    """The shapes that samples of a batch must share; texts with a mask may differ in length."""
    shapes = {name: tuple(value.shape) for name, value in sample.cond.items()}
    if "mask" in shapes:
        shapes |= {name: shapes[name][1:] for name in PADDED}
    return (tuple(sample.latent.shape), *sorted(shapes.items()))


@dataclass(frozen=True)
class Dataset:
    """Samples and their order."""

    samples: Sequence[Cached]
    order: Order

    @classmethod
    def of(cls, samples: Sequence[Cached], repeats: Sequence[int], *, seed: int, group_size: int) -> "Dataset":
        classes = classes_by_shape([shape_of(sample) for sample in samples], repeats)
        return cls(samples, Order(seed, group_size, classes))

    def digest(self) -> str:
        """SHA-256 of the training data, including repeats, without names."""
        named = [
            (f"{index} {name}", value)
            for index, sample in enumerate(self.samples)
            for name, value in (("", sample.latent), *sorted(sample.cond.items()))
        ]
        return hashlib.sha256(f"{self.order.classes} {digest(named)}".encode()).hexdigest()

    def group_at(self, step: int) -> Batch:
        """The samples of optimizer step `step`, counted from 0, all of one shape; a pure function of (seed, step)."""
        first = step * self.order.group_size
        chosen = [self.samples[index] for index in self.order.group_at(step)]
        return batch_of(chosen, tuple(range(first, first + len(chosen))))


def batch_of(samples: Sequence[Cached], numbers: tuple[int, ...]) -> Batch:
    """Samples of one shape, stacked."""
    cond = stacked([sample.cond for sample in samples])
    return Batch(torch.stack([s.latent for s in samples]), cond, numbers, tuple(s.name for s in samples))


def stacked(conds: Sequence[Cond]) -> Cond:
    """B times {name: [L,D] or [D]} -> {name: [B,L,D] or [B,D]}; texts with a mask are padded with zeros."""
    return {
        name: pad_sequence([c[name] for c in conds], batch_first=True)
        if name in PADDED and "mask" in conds[0]
        else torch.stack([c[name] for c in conds])
        for name in conds[0]
    }
