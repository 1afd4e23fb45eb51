"""Latents and conditioning -> samples: each value under its own name, however they are handed over."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorasmith.data.dataset import Dataset
from lorasmith.models.families.sd import StableDiffusion, StableDiffusionCodec
from lorasmith.training.in_memory import samples_of
from lorasmith.types import Cached

SIZES = st.lists(st.integers(1, 5), min_size=2, max_size=3)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def samples(latents: Any, positive: Any, several_sizes: bool = False) -> list[Cached]:
    return samples_of(latents, positive, None, several_sizes=several_sizes)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), SIZES, st.integers(1, 5), st.booleans())
def test_latents_of_any_size_keep_their_values_and_their_conditioning(
    channels: int, size: list[int], num: int, one_for_all: bool
) -> None:
    """Axes [C,h,w] or [C,f,h,w]."""
    latents, texts = numbers(num, channels, *size), numbers(num, 2, 3)
    found = samples({"samples": latents}, [texts[0]] if one_for_all else list(texts))
    assert [sample.name for sample in found] == [str(i) for i in range(num)]
    for i, sample in enumerate(found):
        assert torch.equal(sample.latent, latents[i])
        assert torch.equal(sample.cond["text"], texts[0 if one_for_all else i])


BUCKETS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(BUCKETS, st.integers(1, 4), st.integers(0, 2**64 - 1))
def test_buckets_of_any_number_and_size_are_seen_evenly_and_apart(
    shapes: list[tuple[int, int, int]], group_size: int, seed: int
) -> None:
    """Over a cycle of as many steps as there are samples; two buckets may have the same size."""
    latents = [numbers(num, 2, h, w) for num, h, w in shapes]
    counts = [num for num, *_ in shapes]
    texts = numbers(sum(counts), 1, 2)
    nested = [list(part) for part in texts.split(counts)]
    found = samples(latents, nested, True)
    flat = samples(latents, list(texts), True)
    assert all(
        a.name == b.name and torch.equal(a.latent, b.latent) and torch.equal(a.cond["text"], b.cond["text"])
        for a, b in zip(found, flat, strict=True)
    )
    dataset = Dataset.of(found, [1] * len(found), seed=seed, group_size=group_size)
    seen: list[str] = []
    for step in range(len(found)):
        group = dataset.group_at(step)
        assert len(group) == group_size and group.x0.shape[0] == group_size
        for name, x0, text in zip(group.names, group.x0, group.cond["text"], strict=True):
            assert torch.equal(x0, found[int(name)].latent) and torch.equal(text, texts[int(name)])
        seen += group.names
    assert sorted(seen) == sorted(name for i in range(len(found)) for name in [str(i)] * group_size)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(0, 6))
def test_any_mismatch_states_both_numbers(num_latents: int, num_conds: int) -> None:
    latents, texts = numbers(num_latents, 4, 2, 2), list(numbers(num_conds, 1, 2))
    if num_conds in (1, num_latents):
        assert len(samples(latents, texts)) == num_latents
        return
    expected = f"got {num_conds} conditionings for {num_latents} latents" if num_conds else "got list of length 0"
    with pytest.raises(ValueError, match=f"^positive must .*{expected}$"):
        samples(latents, texts)


def test_the_caller_s_tensors_are_copied() -> None:
    latents, text = numbers(1, 4, 2, 2).requires_grad_(), numbers(3, 2)
    (found,) = samples(latents, [text])
    assert not found.latent.requires_grad and found.latent.dtype == torch.float32
    with torch.no_grad():
        latents.zero_()
        text.zero_()
    assert found.latent.all() and found.cond["text"].all()


def test_names_of_conditioning_are_kept_and_pooled_and_mask_are_vectors() -> None:
    cond = {"text": numbers(1, 3, 2), "pooled": numbers(1, 5), "second": numbers(7, 2), "mask": torch.ones(1, 3)}
    (found,) = samples(numbers(1, 4, 2, 2), [cond])
    assert {name: tuple(value.shape) for name, value in found.cond.items()} == {
        "text": (3, 2), "pooled": (5,), "second": (7, 2), "mask": (3,)
    }  # fmt: skip


def test_conditioning_of_several_lengths_is_kept_apart() -> None:
    found = samples(numbers(3, 4, 2, 2), [numbers(3, 2), numbers(5, 2), numbers(3, 2)])
    dataset = Dataset.of(found, [1] * 3, seed=0, group_size=2)
    assert {frozenset(dataset.group_at(step).names) for step in range(3)} == {frozenset("02"), frozenset("1")}


def test_a_mask_is_said_not_to_count(caplog: pytest.LogCaptureFixture) -> None:
    latents = {"samples": numbers(1, 4, 2, 2), "noise_mask": torch.ones(1)}
    samples([latents, {"samples": numbers(1, 4, 2, 2), "noise_mask": None}], [numbers(3, 2)])
    assert [record.getMessage() for record in caplog.records] == [
        "latents[0]: noise_mask is not used: the whole latent is trained on"
    ]


def test_captions_are_encoded_alone_and_in_any_nesting(family: StableDiffusion, codec: StableDiffusionCodec) -> None:
    captions, latents = ["red apple", "a much longer caption"], numbers(2, 4, 2, 2)
    with torch.no_grad():
        expected = [codec.encode_texts([caption])["text"][0] for caption in captions]
    buckets: list[tuple[Any, Any]] = [
        (latents, captions),
        (latents, [captions]),
        (list(latents.split(1)), [[caption] for caption in captions]),
    ]
    for given_latents, positive in buckets:
        found = samples_of(given_latents, positive, family, several_sizes=False)
        assert all(torch.equal(s.cond["text"], text) for s, text in zip(found, expected, strict=True))


@pytest.mark.parametrize("several", ["yes", 1, None])
def test_several_sizes_is_a_flag(several: Any) -> None:
    with pytest.raises(ValueError, match=f"^bucket_mode must be true or false, got {several!r}$"):
        samples(numbers(1, 4, 2, 2), [numbers(3, 2)], several)
