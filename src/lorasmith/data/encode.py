"""Images and captions to latents and conditioning."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lorasmith.data.buckets import bucket_size, corner_of, cropped_share, fitted
from lorasmith.data.dataset import MUCH
from lorasmith.data.folder import tell_of
from lorasmith.data.images import is_animated, picture
from lorasmith.types import Cached, Codec, Example, SizeCodec


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
