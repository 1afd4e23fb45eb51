"""Sizes that pictures are trained at, and the order in which samples come.

S samples, a repeated one counted as often as it repeats; G samples in a group, the samples of one optimizer step.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageOps

from lorasmith.draws import Purpose, permutation, uniform

AT_ONCE = 2 * 128 * 128
"""Places of latents that one batch holds without gradients: those of two pictures of 1024 pixels a side, mostly."""


def num_at_once(latent: Sequence[int]) -> int:
    """How many latents [C,h,w] or [C,f,h,w] of this shape go through a net together where no gradient is taken."""
    return max(1, AT_ONCE // math.prod(latent[1:]))


def bucket_size(width: int, height: int, resolution: int, multiple: int) -> tuple[int, int]:
    """The (width, height) to train a picture of this size at: multiples of multiple, at most resolution^2 in area.

    The long side goes from resolution, rounded down to a multiple, to twice that, and the short side is the longest
    that the area allows; of these sizes, the one whose aspect ratio is nearest to the picture's, as a factor. A picture
    longer than about 4:1 is thus cropped. ValueError for a resolution below multiple.
    """
    square = resolution // multiple
    if square < 1:
        raise ValueError(f"resolution must be at least the model's multiple of {multiple} pixels, got {resolution}")
    sizes = [(long, square**2 // long) for long in range(square, min(2 * square, square**2) + 1)]
    picture_long, picture_short = max(width, height), min(width, height)

    def factor(size: tuple[int, int]) -> float:
        # Divisions of integers round alike on every platform; logarithms need not.
        ratio = (size[0] * picture_short) / (size[1] * picture_long)
        return max(ratio, 1 / ratio)

    long, short = min(sizes, key=factor)
    return (long * multiple, short * multiple) if width >= height else (short * multiple, long * multiple)


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture scaled until it covers size (width, height), in pixels, and cropped to it about its centre."""
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def corner_of(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Where `fitted` crops: (x, y) of the crop's corner in the scaled picture, in pixels."""
    scale = max(size[0] / image_size[0], size[1] / image_size[1])
    x, y = ((round(side * scale) - crop) // 2 for side, crop in zip(image_size, size, strict=True))
    return x, y


def cropped_share(image_size: tuple[int, int], size: tuple[int, int]) -> float:
    """How much of a picture's area `fitted` crops off, 0 to 1."""
    x, y = (crop / side for side, crop in zip(image_size, size, strict=True))
    return 1 - min(x, y) / max(x, y)


def classes_by_shape(shapes: Sequence[Hashable], repeats: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The indices of the samples of each shape, an index as often as it repeats; shapes in order of appearance."""
    classes: dict[Hashable, list[int]] = {}
    for index, (shape, count) in enumerate(zip(shapes, repeats, strict=True)):
        classes.setdefault(shape, []).extend([index] * count)
    return tuple(tuple(indices) for indices in classes.values())


@dataclass(frozen=True)
class Order:
    """Which samples each optimizer step trains on: a pure function of the seed and the step.

    The samples of a class come in an endless stream of permutations, a pass each, cut into groups of G. A cycle of S
    steps holds as many groups of a class as the class has samples, so that it sees each sample G times.
    """

    seed: int
    group_size: int
    classes: tuple[tuple[int, ...], ...]  # indices of the samples of each shape, none empty

    def group_at(self, step: int) -> list[int]:
        """The G indices, all of one class, of this step, counted from 0."""
        cycle, place = divmod(step, sum(map(len, self.classes)))
        turns = _turns(self.seed, cycle, tuple(map(len, self.classes)))
        number = turns[place]
        indices = self.classes[number]
        group = cycle * len(indices) + turns[:place].count(number)
        return [indices[self._place(number, group * self.group_size + at)] for at in range(self.group_size)]

    def _place(self, number: int, at: int) -> int:
        """The place in its class of the at-th sample of the stream of class `number`, counted from 0."""
        size = len(self.classes[number])
        return _pass(self.seed, number, at // size, size)[at % size]


@lru_cache(maxsize=2)  # the steps of a cycle ask one after another
def _turns(seed: int, cycle: int, sizes: tuple[int, ...]) -> list[int]:
    """The number of the class of each of a cycle's S steps, for classes of these sizes.

    The k-th of n groups falls due at (k + u) / n of the cycle, u in [0, 1) drawn for each class and cycle: that
    spreads a class evenly, and puts the only group of a class of one at any step with the same chance.
    """
    shifts = uniform(seed, Purpose.BUCKET, cycle, (len(sizes),)).numpy().astype(np.float64)
    due = [(np.arange(size) + shift) / size for size, shift in zip(sizes, shifts, strict=True)]
    turns = np.repeat(np.arange(len(sizes)), sizes)
    return turns[np.argsort(np.concatenate(due), kind="stable")].tolist()


@lru_cache(maxsize=64)  # of as many shapes at once
def _pass(seed: int, number: int, pass_number: int, size: int) -> list[int]:
    """The places in its class of the samples of a pass, in their order."""
    return permutation(seed, Purpose.ORDER, number << 40 | pass_number, size)
