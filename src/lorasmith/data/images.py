"""A picture's pixels: which formats are read, and how any of them becomes 8-bit RGB."""

import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from lorasmith.data.colours import in_srgb
from lorasmith.storage.not_safetensors import stand_in

HEIF_SUFFIXES = (".heic", ".heif", ".hif")
PICTURE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".apng", ".avif", ".tif", ".tiff", ".jxl",
    *HEIF_SUFFIXES,
)  # fmt: skip
MAX_PIXELS = 500_000_000  # decoded and converted, about 4 GB

Opener = Callable[[Path], AbstractContextManager[Image.Image]]

# What Pillow and its plugins raise on damaged files, besides OSError.
_DAMAGE = (SyntaxError, ValueError, RuntimeError, EOFError, IndexError, TypeError, struct.error)

# EXIF orientation -> what undoes it. ImageOps.exif_transpose also rewrites the EXIF data, and fails on odd ones.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def picture(path: Path) -> Image.Image:
    """The picture, decoded, as 8-bit sRGB: turned as its EXIF data say, on white where transparent, the first frame.

    ValueError that names the file and the reason when it cannot be read, or needs an extra that is not installed.
    """
    opened = opener(path.suffix)
    try:
        with opened(path) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height} = {image.width * image.height:,} pixels"
                raise ValueError(f"it has {size}, the limit is {MAX_PIXELS:,}: scale it down")
            image.load()  # first, since it turns a TIFF, and then takes the orientation out of its EXIF data
            turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
            profile = image.info.get("icc_profile") or b""
            return _rgb(image if turn is None else image.transpose(turn), profile, path.name)
    except UnidentifiedImageError:
        reason = f"it {stand_in(path) or 'is not in a picture format'}"
    except OSError as error:
        reason = error.strerror or str(error)
    except _DAMAGE as error:
        reason = str(error)
    raise ValueError(f"cannot read picture {path}: {' '.join(reason.split())}")


def is_animated(path: Path) -> bool:
    """Whether a picture that can be read has more than the frame, or page, that is read of it."""
    if path.suffix.lower() in (*HEIF_SUFFIXES, ".jxl"):  # whose readers know no frames
        return False
    with opener(path.suffix)(path) as image:
        if image.format == "MPO":  # a photograph with its thumbnail or its depth behind it
            return False
        try:
            image.seek(1)
        except (OSError, *_DAMAGE):
            return False
        return True


def opener(suffix: str) -> Opener:
    """What opens files with this suffix; ValueError where it needs an extra that is not installed."""
    if suffix.lower() in HEIF_SUFFIXES:
        return _heif_opener(suffix)
    return _jxl_opener(suffix) if suffix.lower() == ".jxl" else _opened


def _heif_opener(suffix: str) -> Opener:
    try:
        import pillow_heif  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise _missing(suffix, "heif") from None
    return lambda path: pillow_heif.open_heif(path).to_pillow()  # upright already, and its EXIF data say so


def _jxl_opener(suffix: str) -> Opener:
    try:
        from pillow_jxl.JpegXLImagePlugin import JXLImageFile  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise _missing(suffix, "jxl") from None

    def opened(path: Path) -> Image.Image:
        image = JXLImageFile(path)
        if not image.jpeg:  # decoded upright; of a JPEG packed without loss, the JPEG's own pixels and turn
            image.info.pop("exif", None)
        return image

    return opened


def _missing(suffix: str, extra: str) -> ValueError:
    return ValueError(f"{suffix.lower()} pictures need the extra '{extra}': pip install 'lorasmith[{extra}]'")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    with path.open("rb") as file:
        yield _identified(file, str(path))


def _identified(file: IO[bytes], name: str) -> Image.Image:
    """As Image.open does it, but for its limit on pixels, which is a global of the whole process."""
    start = file.read(16)
    Image.init()
    for factory, accepts in sorted(Image.OPEN.values(), key=lambda entry: entry[1] is None):
        try:
            if accepts is None or accepts(start) is True:
                file.seek(0)
                return factory(file, name)
        except (SyntaxError, IndexError, TypeError, struct.error):  # of another format, or too short to say
            continue
    raise UnidentifiedImageError


def _rgb(image: Image.Image, profile: bytes, name: str) -> Image.Image:
    """A picture of any mode -> RGB, in sRGB if it has a colour profile."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 0 to 255
        grey = np.asarray(image).clip(0, 65535)
        image = Image.fromarray(np.rint(grey / 257).astype(np.uint8))
    colours = in_srgb(image, profile, name) if profile else None
    if not image.has_transparency_data:
        return colours or image.convert("RGB")
    rgba = image.convert("RGBA")
    if colours:
        colours.putalpha(rgba.getchannel("A"))
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, colours or rgba).convert("RGB")
