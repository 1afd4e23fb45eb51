"""Encoding and batches: pixels, diffusers' own encoders, and groups of one shape."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from lorasmith.data.dataset import Dataset, batch_of
from lorasmith.data.encode import checked, encoded, pixels
from lorasmith.demo import BASE
from lorasmith.models.families.sd import StableDiffusionCodec
from lorasmith.types import Batch, Cached, Example


def made(path: Path, width: int, height: int) -> Example:
    """A picture of noise."""
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return Example(path, f"a picture of {path.stem}")


def test_pixels_go_from_minus_1_to_1(tmp_path: Path) -> None:
    example = made(tmp_path / "a.png", 64, 64)
    image = np.asarray(Image.open(example.image_path)).astype(np.float64)
    found = pixels(example, 64, 16)
    assert found.shape == (3, 64, 64) and found.dtype == torch.float32
    expected = torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-7)
    assert found.min() == -1 and found.max() == 1


@pytest.mark.parametrize(
    ("size", "shape"),
    [((128, 64), (3, 48, 80)), ((64, 128), (3, 80, 48)), ((40, 10), (3, 32, 128)), ((1, 1), (3, 64, 64))],
)
def test_pixels_have_their_bucket_s_shape(tmp_path: Path, size: tuple[int, int], shape: tuple[int, ...]) -> None:
    found = pixels(made(tmp_path / "a.png", *size), 64, 16)
    assert found.shape == shape
    assert found.isfinite().all() and found.abs().max() <= 1


def test_encoded_is_what_diffusers_encodes(tmp_path: Path, codec: StableDiffusionCodec) -> None:
    examples = [made(tmp_path / "tall.png", 48, 80), made(tmp_path / "square.png", 70, 64)]
    vae: Any = AutoencoderKL.from_pretrained(BASE / "vae", dtype=torch.float32)
    text_encoder = CLIPTextModel.from_pretrained(BASE / "text_encoder", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    found = list(encoded(examples, codec, 64))
    assert [sample.name for sample in found] == ["tall.png", "square.png"]
    for example, sample in zip(examples, found, strict=True):
        tokens = tokenizer(example.caption, padding="max_length", max_length=32, truncation=True, return_tensors="pt")
        with torch.no_grad():
            posterior = vae.encode(pixels(example, 64, codec.multiple)[None]).latent_dist
            hidden = text_encoder(tokens.input_ids).last_hidden_state
        torch.testing.assert_close(sample.latent, posterior.mode()[0] * vae.config["scaling_factor"])
        assert list(sample.cond) == ["text"]
        torch.testing.assert_close(sample.cond["text"], hidden[0])
        assert sample.latent.dtype == sample.cond["text"].dtype == torch.float32
        assert not sample.latent.is_inference() and not sample.cond["text"].is_inference()
    assert [tuple(sample.latent.shape) for sample in found] == [(4, 20, 12), (4, 16, 16)]


def test_pictures_that_are_enlarged_are_said(
    tmp_path: Path, codec: StableDiffusionCodec, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"large": (200, 100), "exact": (64, 64), "low": (70, 40), "small": (32, 32)}
    list(encoded([made(tmp_path / f"{name}.png", *size) for name, size in sizes.items()], codec, 64))
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == (
        "pictures smaller than they are trained at, and enlarged for that (resolution 64): 2 (low.png, small.png)"
    )


def test_pictures_that_lose_much_to_cropping_are_named(
    tmp_path: Path, codec: StableDiffusionCodec, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"banner": (2000, 200), "tall": (64, 640), "square": (64, 64), "wide": (256, 64), "long": (1, 1000)}
    list(encoded([made(tmp_path / f"{name}.png", *size) for name, size in sizes.items()], codec, 64))
    # The longest bucket of 64 is 128 x 32, so that a picture of n:1 keeps 4 / n of its length.
    assert caplog.messages[-1] == (
        "pictures too long or too tall, of which more than a quarter is cropped off: "
        "3 (long.png 100 %, banner.png 60 %, tall.png 60 %)"
    )


def test_pictures_of_several_frames_are_said(
    tmp_path: Path, codec: StableDiffusionCodec, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    moving, still = encoded([Example(tmp_path / "a.gif", ""), made(tmp_path / "b.png", 64, 64)], codec, 64)
    assert caplog.messages == ["pictures with several frames or pages, of which the first is read: 1 (a.gif)"]
    assert moving.latent.shape == still.latent.shape


def test_examples_are_encoded_one_by_one(tmp_path: Path, codec: StableDiffusionCodec) -> None:
    samples = encoded([made(tmp_path / "a.png", 64, 64), Example(tmp_path / "missing.png", "")], codec, 64)
    assert next(samples).name == "a.png"
    with pytest.raises(ValueError, match=r"^cannot read picture .*missing\.png: No such file or directory$"):
        next(samples)


def sample(name: str, *shape: int, value: float = 0.0) -> Cached:
    """A sample of this latent shape, told from others by its value."""
    cond = {"text": torch.zeros(3, 2) + value, "pooled": torch.zeros(2) + value}
    return Cached(name, torch.zeros(shape) + value, cond)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["latent", "text", "pooled"])
def test_numbers_that_are_not_finite_are_refused(what: str, value: float) -> None:
    good = sample("a.png", 4, 2, 2)
    tensors: dict[str, Tensor] = {"latent": good.latent, **good.cond}
    tensors[what].view(-1)[-1] = value
    with pytest.raises(ValueError, match=rf"^sample a\.png: {what} must be finite, got NaN or infinity$"):
        checked(good)


def test_a_codec_that_makes_nan_is_refused(
    tmp_path: Path, codec: StableDiffusionCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "encode_images", lambda images: torch.full((1, 4, 16, 16), math.nan))
    with pytest.raises(ValueError, match=r"^sample a\.png: latent must be finite, got NaN or infinity$"):
        list(encoded([made(tmp_path / "a.png", 64, 64)], codec, 64))


SAMPLES = [
    *(sample(f"square-{i}.png", 4, 2, 2, value=i) for i in range(3)),
    *(sample(f"tall-{i}.png", 4, 4, 1, value=10 + i) for i in range(2)),
]


def described(group: Batch) -> tuple[list[float], tuple[int, ...], tuple[str, ...]]:
    return group.x0.flatten(1).mean(1).tolist(), group.numbers, group.names


def test_groups_are_a_pure_function_of_seed_and_step() -> None:
    one = Dataset.of(SAMPLES, [1] * 5, seed=7, group_size=2)
    other = Dataset.of(SAMPLES, [1] * 5, seed=7, group_size=2)
    forward = [described(one.group_at(step)) for step in range(30)]
    backward = [described(other.group_at(step)) for step in reversed(range(30))]
    assert forward == backward[::-1] == [described(one.group_at(step)) for step in range(30)]
    assert forward != [described(Dataset.of(SAMPLES, [1] * 5, seed=8, group_size=2).group_at(i)) for i in range(30)]


@pytest.mark.parametrize("group_size", [1, 2, 7])
def test_groups_have_one_shape_and_numbers_of_their_own(group_size: int) -> None:
    dataset = Dataset.of(SAMPLES, [1] * 5, seed=2**64 - 1, group_size=group_size)
    seen = set()
    for step in range(20):
        group = dataset.group_at(step)
        assert group.numbers == tuple(range(step * group_size, (step + 1) * group_size))
        assert len({name.partition("-")[0] for name in group.names}) == 1
        assert tuple(group.x0.shape[1:]) in ((4, 2, 2), (4, 4, 1))
        assert {name: len(value) for name, value in group.cond.items()} == {"text": group_size, "pooled": group_size}
        values = [next(s for s in SAMPLES if s.name == name).latent.mean().item() for name in group.names]
        assert group.x0.flatten(1).mean(1).tolist() == values == group.cond["pooled"].mean(1).tolist()
        seen |= set(group.names)
    assert seen == {item.name for item in SAMPLES}


def test_samples_with_conditioning_of_other_shapes_are_kept_apart() -> None:
    latent = torch.zeros(4, 2, 2)
    mixed = [Cached(str(length), latent, {"text": torch.zeros(length, 2)}) for length in (3, 5, 3, 5)]
    dataset = Dataset.of(mixed, [1] * 4, seed=0, group_size=3)
    assert {frozenset(dataset.group_at(step).names) for step in range(8)} == {frozenset({"3"}), frozenset({"5"})}


def test_repeats_are_seen_more_often() -> None:
    dataset = Dataset.of(SAMPLES[:2], [1, 3], seed=0, group_size=4)
    assert sorted(dataset.group_at(0).names) == ["square-0.png", *["square-1.png"] * 3]


def test_a_batch_stacks_its_samples() -> None:
    batch = batch_of(SAMPLES[:2], (5, 6))
    assert batch.x0.shape == (2, 4, 2, 2) and batch.cond["text"].shape == (2, 3, 2)
    assert batch.cond["pooled"].tolist() == [[0, 0], [1, 1]]
    assert batch.numbers == (5, 6) and batch.names == ("square-0.png", "square-1.png")
