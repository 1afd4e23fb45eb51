"""A picture's pixels: every format and mode, and what is said of those that cannot be read."""

import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from lorasmith.data import images
from lorasmith.data.images import is_animated, picture


def made(path: Path, size: tuple[int, int] = (4, 3)) -> Path:
    """A small picture."""
    Image.new("RGB", size, "red").save(path)
    return path


def pixels(path: Path) -> list[tuple[int, ...]]:
    """The colours of a picture's pixels, row by row, once it is certain that it is decoded RGB."""
    image = picture(path)
    assert image.mode == "RGB"
    path.unlink()  # nothing is left to read
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "a.avif"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied(tmp_path: Path, name: str, orientation: int) -> None:
    image, exif = Image.new("RGB", (48, 32), BLACK), Image.Exif()
    for place, colour in (((0, 0), RED), ((32, 0), GREEN), ((0, 16), BLUE)):
        image.paste(colour, (*place, place[0] + 16, place[1] + 16))
    exif[0x0112] = orientation
    image.save(tmp_path / name, exif=exif, quality=100)
    image.getexif()[0x0112] = orientation
    expected = ImageOps.exif_transpose(image)
    assert expected.size == ((32, 48) if 5 <= orientation <= 8 else (48, 32))
    found = picture(tmp_path / name)
    assert found.size == expected.size
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).mean() < 10


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (3, 1))
    for place, alpha in enumerate((0, 51, 255)):
        rgba.putpixel((place, 0), (0, 0, 0, alpha))
    expected = [WHITE, (204, 204, 204), BLACK]
    rgba.save(tmp_path / "rgba.png")
    assert pixels(tmp_path / "rgba.png") == expected
    rgba.convert("LA").save(tmp_path / "la.png")
    assert pixels(tmp_path / "la.png") == expected
    rgba.save(tmp_path / "lossless.webp", lossless=True, exact=True)
    assert pixels(tmp_path / "lossless.webp") == expected


@pytest.mark.parametrize("transparency", [1, b"\xff\x00\xff"])
def test_a_palette_s_transparent_colour_is_white(tmp_path: Path, transparency: int | bytes) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    for place in range(3):
        image.putpixel((place, 0), place)
    image.save(tmp_path / "a.png", transparency=transparency)
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.mode == "P"
    assert pixels(tmp_path / "a.png") == [RED, WHITE, BLUE]


def test_a_key_colour_is_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), GREEN)
    image.save(tmp_path / "a.png", transparency=GREEN)
    assert pixels(tmp_path / "a.png") == [RED, WHITE]


@pytest.mark.parametrize(("name", "mode"), [("a.png", "I;16"), ("a.tif", "I;16"), ("big.tif", "I;16B"), ("a.pgm", "I")])
def test_16_bit_grey_is_scaled(tmp_path: Path, name: str, mode: str) -> None:
    grey = np.array([[0, 128, 257, 32768, 65535]], dtype=np.uint16)
    if mode == "I;16B":
        Image.frombytes("I;16B", (5, 1), grey.astype(">u2").tobytes()).save(tmp_path / name)
    else:
        Image.fromarray(grey).save(tmp_path / name)
    with Image.open(tmp_path / name) as saved:
        assert saved.mode == mode
    assert pixels(tmp_path / name) == [(value, value, value) for value in (0, 0, 1, 128, 255)]


@pytest.mark.parametrize(("mode", "colour"), [("L", 255), ("1", 1), ("P", 0), ("CMYK", (0, 0, 0, 0))])
def test_other_modes_become_rgb(tmp_path: Path, mode: str, colour: int | tuple[int, ...]) -> None:
    image = Image.new(mode, (2, 1), colour)
    if mode == "P":
        image.putpalette(WHITE)
    image.save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as saved:
        assert saved.mode == mode
    assert pixels(tmp_path / "a.tif") == [WHITE, WHITE]


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.apng", "a.gif", "a.tif", "a.avif"])
def test_the_first_of_several_frames_counts(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN)]
    exact = {"a.avif": {"quality": 100, "subsampling": "4:4:4"}, "a.webp": {"lossless": True}}.get(name, {})
    kind = "PNG" if name == "a.apng" else None
    frames[0].save(tmp_path / name, kind, save_all=True, append_images=frames[1:], **exact)
    assert is_animated(tmp_path / name)
    assert np.abs(np.array(pixels(tmp_path / name)) - RED).max() <= 2
    frames[0].save(tmp_path / name, kind)
    assert not is_animated(tmp_path / name)


def test_a_photograph_with_its_thumbnail_is_not_animated(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), RED).save(
        tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))]
    )
    with Image.open(tmp_path / "a.jpg") as saved:
        assert saved.format == "MPO"
    assert not is_animated(tmp_path / "a.jpg")


@pytest.mark.parametrize("name", ["a.jfif", "a.jpe"])
def test_other_suffixes_of_jpeg(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (8, 8), BLACK).save(tmp_path / name, "JPEG")
    assert set(pixels(tmp_path / name)) == {BLACK}


def test_a_gif_s_transparent_colour_is_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.gif", transparency=1)
    assert pixels(tmp_path / "a.gif") == [RED, WHITE]


def test_what_a_file_is_counts_and_not_its_suffix(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), RED).save(tmp_path / "a.webp", lossless=True)
    assert pixels((tmp_path / "a.webp").rename(tmp_path / "a.png")) == [RED]


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000)])
def test_thin_pictures(tmp_path: Path, size: tuple[int, int]) -> None:
    assert set(pixels(made(tmp_path / "a.png", size))) == {RED}


def test_16_bit_colour(tmp_path: Path) -> None:
    """A PNG by hand, as Pillow writes none: the most significant byte of each sample counts."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = struct.pack(">B6H", 0, 0xFFFF, 0x8000, 0, 0x1234, 0, 0xFFFF)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    )
    assert pixels(tmp_path / "a.png") == [(255, 128, 0), (0x12, 0, 255)]


def test_a_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = pixels(tmp_path / "a.jpg")[0]
    assert red > 250 and green < 5 and blue < 5


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """A PNG file of noise, which does not compress."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    return (tmp_path / "whole.png").read_bytes()


def refusal(path: Path, reason: str) -> str:
    return f"^cannot read picture {re.escape(str(path))}: {reason}$"


def test_unreadable_pictures_are_refused(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match=refusal(path, "No such file or directory")):
        picture(path)
    for content, reason in (
        (b"", "it is empty"),
        (b"<html>\n", r"it is a web page \(HTML\), not the file itself: download that"),
        (whole[: len(whole) // 2], "image file is truncated.*"),
        (whole[:-100], "image file is truncated.*"),
        (whole[:24], "Truncated File Read"),
        (whole[:60] + b"?" + whole[61:], "broken PNG file.*|broken data stream.*|unrecognized data stream.*"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=refusal(path, reason)):
            picture(path)


def test_a_truncated_jpeg_is_refused(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "a.jpg"
    with Image.open(tmp_path / "whole.png") as image:
        image.save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=refusal(path, "image file is truncated.*")):
        picture(path)


def test_pillow_s_limit_on_pixels_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)  # the picture has 12: Image.open refuses it, and warns from 6 on
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picture(path).size == (4, 3)
    assert Image.MAX_IMAGE_PIXELS == 5


def test_larger_pictures_than_memory_holds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 11)
    with pytest.raises(ValueError, match=refusal(path, "it has 4 x 3 = 12 pixels, the limit is 11: scale it down")):
        picture(path)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.new("F", (2, 2), 0.5).save(path)
    with pytest.raises(ValueError, match=refusal(path, "its pixels are floating-point numbers of unknown range")):
        picture(path)


def test_heif_is_read_with_pillow_heif(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "a.heic"
    image, exif = Image.new("RGB", (64, 32), RED), Image.Exif()
    image.paste(BLUE, (32, 0, 64, 32))
    exif[0x0112] = 6  # a quarter turn clockwise: red on top
    expected = np.asarray(image.transpose(Image.Transpose.ROTATE_270)).astype(int)
    file = pillow_heif.from_pillow(image)
    file.info["exif"] = exif.tobytes()  # writes the turn beside the pixels; set on the image, it turns those as well
    file.save(path, quality=100)
    assert np.abs(np.asarray(picture(path)) - expected).mean() < 5
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=refusal(path, ".+")):
        picture(path)


def test_jxl_is_read_with_its_plugin(tmp_path: Path) -> None:
    pytest.importorskip("pillow_jxl")
    path = tmp_path / "a.jxl"
    image, exif = Image.new("RGBA", (64, 32), RED), Image.Exif()
    image.paste((0, 0, 255, 0), (32, 0, 64, 32))
    exif[0x0112] = 6
    image.save(path, lossless=True, exif=exif.tobytes())
    assert not is_animated(path)
    found = picture(path)
    assert found.size == (64, 32)  # the format has a turn of its own, which the decoder applies
    assert found.getpixel((0, 0)) == RED and found.getpixel((63, 31)) == WHITE
    for content in (path.read_bytes()[:-5], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=refusal(path, ".+")):
            picture(path)


@pytest.mark.filterwarnings("ignore:Using JPEG reconstruction")
def test_a_jpeg_inside_a_jxl_is_turned_as_it_says(tmp_path: Path) -> None:
    pytest.importorskip("pillow_jxl")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32), RED).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as image:
        image.save(tmp_path / "a.jxl")
    assert picture(tmp_path / "a.jxl").size == (32, 64)
