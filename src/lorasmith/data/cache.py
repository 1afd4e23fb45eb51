"""Examples -> latents and conditioning -> the groups that the loop reads. B batch, C channels, h w latent sides."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lorasmith.data.buckets import Order, bucket_size, classes_by_shape, corner_of, cropped_share, fitted
from lorasmith.data.folder import tell_of
from lorasmith.data.pictures import is_animated, picture
from lorasmith.digests import digest
from lorasmith.types import Batch, Cached, Codec, Cond, Example, SizeCodec

MUCH = 0.25  # of a picture, cropped off
PADDED = ("text", "mask")  # what has a row for each token


def pixels(example: Example, resolution: int, multiple: int) -> Tensor:
    """The picture, scaled and cropped to its bucket: [3,H,W] in -1 to 1."""
    image = picture(example.image_path)
    return _pixels(image, bucket_size(image.width, image.height, resolution, multiple))


def _pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    return torch.from_numpy(np.array(fitted(image, size), dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def encoded(examples: Sequence[Example], codec: Codec, resolution: int) -> Iterator[Cached]:
    """Every example through the model's own encoders, one by one; logs which pictures are changed much for it."""
    enlarged: list[str] = []
    cropped: list[tuple[float, str]] = []
    animated: list[str] = []
    for example in examples:
        image = picture(example.image_path)
        size = bucket_size(image.width, image.height, resolution, codec.multiple)
        if image.width < size[0] or image.height < size[1]:
            enlarged.append(example.image_path.name)
        if (share := cropped_share(image.size, size)) > MUCH:
            cropped.append((share, example.image_path.name))
        if is_animated(example.image_path):
            animated.append(example.image_path.name)
        with torch.inference_mode():
            latent = codec.encode_images(_pixels(image, size)[None])[0]
            cond = {name: value[0] for name, value in codec.encode_texts([example.caption]).items()}
        if isinstance(codec, SizeCodec):
            cond |= codec.encode_size(image.size, corner_of(image.size, size), size)
        yield checked(Cached(example.image_path.name, latent.clone(), {k: v.clone() for k, v in cond.items()}))
    tell_of(f"pictures smaller than they are trained at, and enlarged for that (resolution {resolution})", enlarged)
    worst = [f"{name} {100 * share:.0f} %" for share, name in sorted(cropped, key=lambda one: (-one[0], one[1]))]
    tell_of("pictures too long or too tall, of which more than a quarter is cropped off", worst)
    tell_of("pictures with several frames or pages, of which the first is read", animated)


def checked(sample: Cached) -> Cached:
    """The sample itself; ValueError that names it where a number is not finite."""
    for what, tensor in (("latent", sample.latent), *sample.cond.items()):
        if not tensor.isfinite().all():
            raise ValueError(f"sample {sample.name}: {what} must be finite, got NaN or infinity")
    return sample


def shape_of(sample: Cached) -> tuple[object, ...]:
    """What samples of one batch share: texts with a mask may differ in length."""
    shapes = {name: tuple(value.shape) for name, value in sample.cond.items()}
    if "mask" in shapes:
        shapes |= {name: shapes[name][1:] for name in PADDED}
    return (tuple(sample.latent.shape), *sorted(shapes.items()))


@dataclass(frozen=True)
class Dataset:
    """Samples and the order that they are seen in."""

    samples: Sequence[Cached]
    order: Order

    @classmethod
    def of(cls, samples: Sequence[Cached], repeats: Sequence[int], *, seed: int, group_size: int) -> "Dataset":
        classes = classes_by_shape([shape_of(sample) for sample in samples], repeats)
        return cls(samples, Order(seed, group_size, classes))

    def digest(self) -> str:
        """SHA-256 of what is trained on, repeats included; names do not count."""
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
