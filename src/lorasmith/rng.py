"""Randomness from counters: every draw is a pure function of (seed, purpose, number).

Philox 4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") keyed by the seed's 64 bits and the
purpose, its counter's upper half set to the number, so that no two draws overlap and nothing global is read or set.
"""

import hashlib
import math
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a number is drawn for; the values are part of every seed's meaning and never change."""

    INIT = 1  # numbered by the layer's path
    NOISE = 2  # numbered by the sample
    TIME = 3  # numbered by the sample
    ORDER = 4  # numbered by class << 40 | pass
    BUCKET = 5  # numbered by the cycle
    PICTURE = 6  # numbered by the picture drawn
    HELD_OUT_NOISE = 7  # numbered by picture and repeat
    HELD_OUT_TIME = 8  # numbered by the repeat


def generator(seed: int, purpose: Purpose, number: int) -> np.random.Generator:
    """The generator of (seed, purpose, number), each 0 to 2^64 - 1."""
    return np.random.Generator(np.random.Philox(key=seed | (int(purpose) << 64), counter=number << 128))


def normal(seed: int, purpose: Purpose, number: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers of this shape, float32."""
    return torch.from_numpy(generator(seed, purpose, number).standard_normal(shape, dtype=np.float32))


def uniform(seed: int, purpose: Purpose, number: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers uniform in [0, 1), of this shape, float32."""
    return torch.from_numpy(generator(seed, purpose, number).random(shape, dtype=np.float32))


def kaiming(seed: int, path: str, shape: tuple[int, int]) -> Tensor:
    """A new factor, float32, uniform in ±1 / sqrt(columns) (He et al. 2015, with a gain of sqrt(1/3)), by its path."""
    return (2 * uniform(seed, Purpose.INIT, path_number(path), shape) - 1) / math.sqrt(shape[1])


def permutation(seed: int, purpose: Purpose, number: int, size: int) -> list[int]:
    """A permutation of 0 to size - 1."""
    return generator(seed, purpose, number).permutation(size).tolist()


def path_number(path: str) -> int:
    """A layer's path -> a number of 64 bits, the same everywhere."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "little")
