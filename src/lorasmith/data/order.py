"""The seeded order of samples: steps of one shape, and a permutation for each pass."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lorasmith.rng import Purpose, permutation, uniform


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
