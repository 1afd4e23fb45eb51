"""Colour profiles (ICC), which cameras, phones and print shops put into pictures -> sRGB, which models expect."""

import io
import logging

import numpy as np
from PIL import Image, ImageCms

MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # a profile's colour space -> Pillow's name
SAME = 2  # levels of 256 that profiles of sRGB itself, of which there are dozens, differ by

log = logging.getLogger(__name__)


def in_srgb(image: Image.Image, profile: bytes, name: str) -> Image.Image:
    """An 8-bit image of any mode -> RGB, by what its profile says of its colours; transparency is dropped.

    Relative colorimetric with black point compensation, as image editors do it. Colours that are sRGB stay bit for bit.
    A profile that is damaged, or not for such pixels, is warned of and ignored.
    """
    plain = _plain(image)
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space: str = source.profile.xcolor_space  # pyright: ignore[reportAttributeAccessIssue]: of a file's type, it says
        mode = MODES.get(space, "")
        if mode == "RGB" and plain.mode == "L":
            plain = plain.convert("RGB")
        if mode != plain.mode:
            raise ImageCms.PyCMSError(f"it is for {space.strip()}, not for {plain.mode}")
        transform = _transform(source, mode)
    except (ImageCms.PyCMSError, OSError) as error:
        log.warning("the colour profile of picture %s is ignored: %s", name, error)
        return plain.convert("RGB")
    if _changes_nothing(transform, mode):
        return plain.convert("RGB")
    if mode == "L":
        ramp = transform.apply(Image.frombytes("L", (256, 1), bytes(range(256))))
        plain.putpalette(ramp.tobytes())
        return plain.convert("RGB")
    return transform.apply(plain)


def _transform(source: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    if mode == "L":  # of 256 values: else they are read off a coarse table, some 10 levels wrong in the dark
        flags |= ImageCms.Flags.NOOPTIMIZE
    srgb, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC
    return ImageCms.buildTransform(source, srgb, mode, "RGB", intent, flags)


def _plain(image: Image.Image) -> Image.Image:
    """The image without its transparency, as L, CMYK or RGB."""
    if image.mode in ("1", "L", "LA", "CMYK"):
        return image.convert("CMYK" if image.mode == "CMYK" else "L")
    return image.convert("RGBA").convert("RGB")


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether colours all over the cube stay what they are."""
    num_bands = len(mode)  # RGB, L, CMYK
    grid = np.indices((9,) * num_bands, dtype=np.uint8).reshape(num_bands, -1) * 31
    colours = Image.frombytes(mode, (grid.shape[1], 1), grid.T.tobytes())
    before = np.asarray(colours.convert("RGB"), dtype=np.int16)
    after = np.asarray(transform.apply(colours), dtype=np.int16)
    return np.abs(after - before).max() <= SAME
