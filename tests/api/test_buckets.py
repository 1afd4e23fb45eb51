"""bucket_mode: groups of one size, every sample seen as often as the next, each with its own conditioning."""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from commands import Notes
from torch import Tensor, nn

from lorasmith.adapters.targets import Targets
from lorasmith.api import train_lora
from lorasmith.diffusion.process import Flow
from lorasmith.storage.hashing import digest
from lorasmith.types import Cond

SIZES = [(3, 16, 16), (2, 8, 16), (1, 16, 8)]
NUM = sum(count for count, *_ in SIZES)


class Call(NamedTuple):
    """What one prediction was asked for."""

    size: tuple[int, ...]
    contents: list[int]
    texts: list[int]


@dataclass(frozen=True)
class Spy:
    """Reads which samples it is shown: sample i is filled with 1000 (i + 1), far above the noise, its text with i."""

    net: nn.Module
    process: Flow = Flow()
    calls: Notes = field(default_factory=Notes)

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        x0 = x_t.flatten(1).mean(1) / (1 - t)
        texts = cond["text"].flatten(1).mean(1)
        self.calls.append(
            Call(tuple(x_t.shape[2:]), (x0 / 1000 - 1).round().int().tolist(), texts.round().int().tolist())
        )
        x_t = x_t / 1000 + texts.view(-1, 1, 1, 1)
        return self.net(x_t.movedim(1, -1)).movedim(-1, 1).float()

    def file_key(self, path: str) -> str:
        return f"lora_{path}".replace(".", "_")


@pytest.fixture
def spy() -> Spy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Spy(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))


def buckets() -> list[Tensor]:
    numbers = iter(range(NUM))
    return [
        torch.stack([torch.full((4, h, w), 1000.0 * (next(numbers) + 1)) for _ in range(count)])
        for count, h, w in SIZES
    ]


def texts() -> list[Tensor]:
    return [torch.full((2, 3), float(i)) for i in range(NUM)]


def nested() -> list[list[Tensor]]:
    flat = iter(texts())
    return [[next(flat) for _ in range(count)] for count, *_ in SIZES]


def train(spy: Spy, latents: Any = None, positive: Any = None, **inputs: Any) -> dict[str, Tensor]:
    defaults = {"steps": NUM, "bucket_mode": True, "targets": Targets(preset="all"), "training_dtype": "fp32"}
    latents = buckets() if latents is None else latents
    return train_lora(spy, latents, texts() if positive is None else positive, **{**defaults, **inputs}).lora


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (2, 1), (1, 2), (5, 1), (2, 3)])
def test_a_cycle_sees_every_sample_as_often_and_never_mixes_sizes(spy: Spy, batch_size: int, accumulation: int) -> None:
    """A cycle is as many steps as there are samples; a group is what one step is trained on."""
    train(spy, batch_size=batch_size, grad_accumulation_steps=accumulation, steps=2 * NUM)
    size_of = [(h, w) for count, h, w in SIZES for _ in range(count)]
    assert len(spy.calls) == 2 * NUM * accumulation
    for call in spy.calls:
        assert [size_of[content] for content in call.contents] == [call.size] * batch_size
        assert call.texts == call.contents
    groups = [spy.calls[start : start + accumulation] for start in range(0, len(spy.calls), accumulation)]
    assert all(len({call.size for call in group}) == 1 for group in groups)
    for cycle in (groups[:NUM], groups[NUM:]):
        seen = Counter(content for group in cycle for call in group for content in call.contents)
        assert seen == {number: batch_size * accumulation for number in range(NUM)}


def test_nested_and_flat_conditioning_and_any_cut_of_a_bucket_give_the_same_file(spy: Spy) -> None:
    square, flat, tall = buckets()
    comfy = [[[text[None], {}] for text in part] for part in nested()]
    ways: list[tuple[Any, Any]] = [
        (buckets(), texts()),
        (buckets(), nested()),
        (buckets(), comfy),
        ([{"samples": bucket} for bucket in buckets()], nested()),
        ([square[:1], square[1:], flat, tall], texts()),
        ([*square.split(1), flat, tall], texts()),
    ]
    assert len({digest(train(spy, *way, batch_size=2).items()) for way in ways}) == 1


def test_one_conditioning_serves_all_or_each_bucket(spy: Spy) -> None:
    train(spy, None, [texts()[4]])
    assert {text for call in spy.calls for text in call.texts} == {4}
    spy.calls.clear()
    train(spy, None, [[text] for text in texts()[:3]])
    assert {(call.size, text) for call in spy.calls for text in call.texts} == {
        ((16, 16), 0), ((8, 16), 1), ((16, 8), 2)
    }  # fmt: skip


def test_a_group_is_one_however_many_micro_batches_make_it(spy: Spy) -> None:
    losses, files = [], []
    for batch_size in (1, 2, 4):
        inputs: dict[str, Any] = {"batch_size": batch_size, "grad_accumulation_steps": 4 // batch_size}
        result = train_lora(
            spy, buckets(), texts(), steps=NUM, optimizer="SGD", learning_rate=0.1, bucket_mode=True,
            targets=Targets(preset="all"), training_dtype="fp32", lora_dtype="fp32", **inputs,
        )  # fmt: skip
        losses.append(result.loss["loss"])
        files.append(result.lora)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)
    for other in files[1:]:
        torch.testing.assert_close(other, files[0], atol=1e-6, rtol=1e-4)


def test_the_order_of_sizes_is_drawn_from_the_seed(spy: Spy) -> None:
    orders = []
    for seed in range(4):
        spy.calls.clear()
        train(spy, seed=seed)
        orders.append(tuple(call.size for call in spy.calls))
    assert len(set(orders)) > 1


def test_one_size_needs_no_buckets(spy: Spy) -> None:
    """A list of one size is one data set, with bucket_mode or without it."""
    square = buckets()[0]
    files = [
        digest(train(spy, latents, texts()[:3], bucket_mode=mode).items())
        for latents in (square, list(square.split(1)))
        for mode in (True, False)
    ]
    assert len(set(files)) == 1


@pytest.mark.parametrize(
    ("latents", "positive", "mode", "message"),
    [
        (buckets(), texts(), False, r"latents must be of one size unless bucket_mode is True, got .*16, 16\) and .*"),
        ([buckets()[0], torch.zeros(1, 3, 8, 8)], texts()[:4], True, "latents must have the same channels and axes.*"),
        ([buckets()[0], torch.zeros(1, 4, 1, 8, 8)], texts()[:4], True, "latents must have the same channels .*"),
        (buckets(), texts(), "yes", "bucket_mode must be true or false, got 'yes'"),
        (buckets(), texts()[:5], True, "positive must have .*, got 5 conditionings for 6 latents"),
        (buckets(), nested()[:2], True, "positive must have a list for each .*, got 2 lists for 3 latents"),
        (buckets(), [texts()[:2], *nested()[1:]], True, r"positive\[0\] must have .*, got 2 conditionings for 3 .*"),
        (buckets(), [*nested()[:2], [torch.zeros(2)]], True, r"positive\[2\]\[0\] text must be .*, got \[2\]"),
        (buckets(), [*nested()[:2], texts()[5]], True, "positive must have lists alone or none, got Tensor at 2"),
    ],
)
def test_what_does_not_go_together_is_named(spy: Spy, latents: Any, positive: Any, mode: Any, message: str) -> None:
    with pytest.raises(ValueError) as info:
        train(spy, latents, positive, bucket_mode=mode)
    assert re.fullmatch(message, str(info.value)) and not spy.calls
