"""Sizes that pictures are trained at, and the order in which samples come.

S samples, a repeated one counted as often as it repeats; G samples in a group, the samples of one optimizer step.
"""

import math
from collections.abc import Sequence

from PIL import Image, ImageOps

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
