"""Draws: pure, all 64 bits of the seed count, streams do not overlap, and the distributions are right."""

import math

import numpy as np
import torch

from lorasmith.config.schema import SEED_MAX
from lorasmith.rng import Purpose, normal, path_number, permutation, uniform


def test_equal_arguments_give_equal_numbers_and_global_generators_stay() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), repr(np.random.get_state())
    assert torch.equal(normal(3, Purpose.NOISE, 7, (4, 4)), normal(3, Purpose.NOISE, 7, (4, 4)))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert repr(np.random.get_state()) == before[1]


def test_every_bit_of_the_seed_the_purpose_and_the_number_counts() -> None:
    seeds = [0, *(1 << bit for bit in range(64)), SEED_MAX]
    draws = [normal(seed, Purpose.NOISE, 0, (8,)) for seed in seeds]
    draws += [normal(0, purpose, 0, (8,)) for purpose in Purpose if purpose != Purpose.NOISE]
    draws += [normal(0, Purpose.NOISE, number, (8,)) for number in (1, 2**32, SEED_MAX)]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)


def test_philox_is_the_published_one() -> None:
    """Known answers of Philox4x64-10 from the Random123 distribution: counter and key 0, then all ones."""
    zero = np.random.Philox(key=0, counter=2**256 - 1).random_raw(4)
    assert [hex(x) for x in zero] == [
        "0x16554d9eca36314c", "0xdb20fe9d672d0fdc", "0xd7e772cee186176b", "0x7e68b68aec7ba23b",
    ]  # fmt: skip


def test_normal_numbers_are_normal() -> None:
    sample = normal(1, Purpose.NOISE, 0, (100_000,)).double()
    assert abs(sample.mean()) < 5 / math.sqrt(1e5)
    assert abs(sample.var() - 1) < 5 * math.sqrt(2 / 1e5)
    expected = torch.distributions.Normal(0.0, 1.0).cdf(torch.linspace(-2, 2, 9, dtype=torch.float64))
    measured = torch.stack([(sample <= x).double().mean() for x in torch.linspace(-2, 2, 9)])
    assert (measured - expected).abs().max() < 5 * 0.5 / math.sqrt(1e5)


def test_noises_of_neighbouring_samples_are_uncorrelated() -> None:
    a, b = normal(0, Purpose.NOISE, 1, (50_000,)), normal(0, Purpose.NOISE, 2, (50_000,))
    assert abs(float((a * b).mean())) < 5 / math.sqrt(5e4)


def test_uniform_and_permutation() -> None:
    u = uniform(0, Purpose.INIT, 5, (10_000,))
    assert 0 <= float(u.min()) and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 5 / math.sqrt(12e4)
    assert sorted(permutation(9, Purpose.ORDER, 2, 50)) == list(range(50))


def test_path_numbers_differ_and_stay() -> None:
    assert path_number("unet.conv_in") == 0x0167F36EBD52B054
    assert path_number("unet.a") != path_number("unet.b")
