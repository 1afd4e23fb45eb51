"""The held-out loss: a closed form, stratified times, figures that repeat, standard errors."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorasmith.diffusion.process import Flow
from lorasmith.diffusion.validation import NUM_NOISES, Measured, held_out_losses
from lorasmith.types import Cached, Cond


@dataclass(frozen=True)
class Watching:
    """Predicts zero and notes the times that it is asked at."""

    net: nn.Module = field(default_factory=lambda: nn.Linear(1, 1))
    process: Flow = Flow()
    times: list[float] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.times.extend(t.tolist())
        self.batches.append(len(t))
        return torch.zeros_like(x_t)

    def file_key(self, path: str) -> str:
        return path


def samples(num: int) -> list[Cached]:
    return [Cached(str(i), torch.full((4, 16, 16), float(i)), {"text": torch.zeros(2, 3)}) for i in range(num)]


def test_the_loss_is_the_mean_square_of_the_target() -> None:
    """Predicting zero, the loss of x0 = c is E (eps - c)^2 = 1 + c^2."""
    losses = held_out_losses(Watching(), samples(3))
    expected = torch.tensor([1.0, 2.0, 5.0])
    deviation = (2 + 4 * torch.arange(3.0) ** 2).sqrt() / math.sqrt(NUM_NOISES * 1024)
    assert ((losses - expected).abs() < 4 * deviation).all()


def test_times_are_stratified_and_every_call_draws_the_same() -> None:
    denoiser: Any = Watching()
    first = held_out_losses(denoiser, samples(10))
    by_noise = torch.tensor(denoiser.times).view(10, NUM_NOISES)
    strata = (by_noise * 10).long().sort(0).values
    assert torch.equal(strata, torch.arange(10)[:, None].expand(10, NUM_NOISES))
    assert len({tuple(column.tolist()) for column in by_noise.T}) == NUM_NOISES
    assert torch.equal(held_out_losses(denoiser, samples(10)), first)


def test_samples_of_one_shape_are_measured_together_and_losses_come_in_their_order() -> None:
    """Every loss is the sample's own, whatever else is in its batch."""
    mixed = [Cached(s.name, s.latent[:, : 16 - 8 * (i % 2)], s.cond) for i, s in enumerate(samples(6))]
    denoiser: Any = Watching()
    losses = held_out_losses(denoiser, mixed)
    assert denoiser.batches == [3 * NUM_NOISES] * 2
    assert [(loss > sample.latent.mean() ** 2).item() for loss, sample in zip(losses, mixed, strict=True)] == [True] * 6
    assert losses.diff().min() > 0


def test_standard_error_and_format() -> None:
    measured = Measured.of(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert measured.mean == 2.5 and measured.stderr == pytest.approx(math.sqrt(5 / 3) / 2)
    assert f"{measured}" == "2.500 ± 0.645" and f"{Measured(-0.25, 0.01):+}" == "-0.250 ± 0.010"
    assert math.isnan(Measured.of(torch.tensor([1.0])).stderr)
