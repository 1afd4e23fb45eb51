"""Picture folders: what counts as a sample, captions, repeats, and pixels of every kind of picture."""

import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from lorasmith.data.folder import examples, picture
from lorasmith.types import Example


def made(path: Path, text: str | None = None) -> Path:
    """A small picture, or a file with this text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if text is None:
        Image.new("RGB", (4, 3), "red").save(path, "PNG")
    else:
        path.write_text(text, encoding="utf-8")
    return path


def captions(folder: Path) -> dict[str, str]:
    return {example.image_path.relative_to(folder).as_posix(): example.caption for example in examples(folder)}


def test_pictures_are_found_below_the_folder_sorted_by_relative_path(tmp_path: Path) -> None:
    for name in ("b.png", "B2.PNG", "a/z.JpEg", "a.webp", "a-1/x.tiff", "c/d/e.heic", "10.bmp", "9.avif"):
        made(tmp_path / name)
    for hidden in (".git/a.png", "._a.png", "c/.hidden.png", "c/.cache/deep/a.png"):
        made(tmp_path / hidden)
    made(tmp_path / "clip.mp4", "")
    # By the characters of the path: "-" before "." before "/", capitals before small letters.
    expected = ["10.bmp", "9.avif", "B2.PNG", "a-1/x.tiff", "a.webp", "a/z.JpEg", "b.png", "c/d/e.heic"]
    assert list(captions(tmp_path)) == expected


def test_a_folder_is_named_like_a_picture(tmp_path: Path) -> None:
    made(tmp_path / "cat.png" / "a.png")
    assert examples(tmp_path) == [Example(tmp_path / "cat.png" / "a.png", "")]


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_links_to_pictures_count_even_to_missing_ones(tmp_path: Path) -> None:
    target = made(tmp_path / "elsewhere" / "a.png")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").symlink_to(target)
    (folder / "b.png").symlink_to(tmp_path / "missing.png")
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    assert list(captions(folder)) == ["a.png", "b.png"]


def test_captions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = {
        "a.txt": " a red  cat \n",
        "b.caption": "from .caption",
        "both.txt": "from .txt",
        "both.caption": "not this",
        "bom.txt": "\ufeffwith a mark",
        "dotted.name.txt": "dots",
        "empty.txt": "",
        "lines.txt": "one,\r\n\r\n  two\nthree",
        "upper.TXT": "capitals",
        "umlaut.txt": "grün 猫",
    }
    for name, text in texts.items():
        made(tmp_path / name, text)
        made(tmp_path / f"{Path(name).stem}.png")
    made(tmp_path / "sub" / "a.png")
    made(tmp_path / "sub" / "a.txt", "another a")
    assert captions(tmp_path) == {
        "a.png": "a red  cat",
        "b.png": "from .caption",
        "bom.png": "with a mark",
        "both.png": "from .txt",
        "dotted.name.png": "dots",
        "empty.png": "",
        "lines.png": "one, two three",
        "sub/a.png": "another a",
        "umlaut.png": "grün 猫",
        "upper.png": "capitals",
    }
    assert not caplog.records


def test_missing_captions_and_pictures_give_one_warning_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b", "c", "sub/d", "sub/e"):
        made(tmp_path / f"{name}.png")
    made(tmp_path / "a.txt", "a caption")
    made(tmp_path / "readme.txt", "words")
    made(tmp_path / "sub" / "a.caption", "of no picture: a.png is in another folder")
    assert set(captions(tmp_path).values()) == {"a caption", ""}
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, "pictures without a caption: 4 (b.png, c.png, sub/d.png, ...)"),
        (logging.WARNING, "caption files without a picture: 2 (readme.txt, sub/a.caption)"),
    ]


def test_kohya_folders_give_repeats_and_captions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "7_root"  # what the folder itself is called means nothing
    for name in ("plain/a", "010_sks_big cat/a", "010_sks_big cat/b", "10_x/3_y/a", "10_x/sub/a", "5_/a", "cat_10/a"):
        made(folder / f"{name}.png")
    made(folder / "010_sks_big cat" / "b.txt", "its own")
    made(folder / "plain" / "a.txt", "plain")
    made(folder / "cat_10" / "a.txt", "not kohya's")
    found = {item.image_path.relative_to(folder).as_posix(): (item.repeats, item.caption) for item in examples(folder)}
    assert found == {
        "010_sks_big cat/a.png": (10, "sks_big cat"),
        "010_sks_big cat/b.png": (10, "its own"),
        "10_x/3_y/a.png": (3, "y"),
        "10_x/sub/a.png": (10, "x"),
        "5_/a.png": (5, ""),
        "cat_10/a.png": (1, "not kohya's"),
        "plain/a.png": (1, "plain"),
    }
    assert [record.getMessage() for record in caplog.records] == ["pictures without a caption: 1 (5_/a.png)"]


def test_zero_repeats_are_refused(tmp_path: Path) -> None:
    made(tmp_path / "0_cat" / "a.png")
    with pytest.raises(ValueError, match="^repeats must be 1 to 10000, got 0 from the name of folder 0_cat$"):
        examples(tmp_path)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    missing, file = tmp_path / "missing", made(tmp_path / "a.png")
    with pytest.raises(ValueError, match=f"^picture folder {re.escape(str(missing))} does not exist$"):
        examples(missing)
    with pytest.raises(ValueError, match=f"^picture folder {re.escape(str(file))} must be a folder, it is a file$"):
        examples(file)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], "an empty folder"),
        ([".DS_Store"], "only hidden files"),
        (
            ["a.mp4", "a.txt", "b.TXT", "sub/c.txt", "sub/deep/README"],
            r"3 \.txt, 1 \.mp4, 1 without a suffix, 2 folders",
        ),
        (["sub/.a.png"], "1 folder"),
    ],
)
def test_no_pictures_says_what_is_there(tmp_path: Path, names: list[str], found: str) -> None:
    for name in names:
        made(tmp_path / name, "")
    where = re.escape(f"in or below {tmp_path}")
    with pytest.raises(ValueError, match=rf"^no pictures \(\.png \.jpg .*\.heif\) {where}: found {found}$"):
        examples(tmp_path)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"gr\xfcn", "byte 0xfc at offset 2"),
        (b"\xef\xbb\xbfgr\xfcn", "byte 0xfc at offset 5"),
        ("grün".encode("utf-16"), "byte 0xff at offset 0"),
    ],
)
def test_a_caption_that_is_not_utf8_is_refused(tmp_path: Path, content: bytes, got: str) -> None:
    made(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^caption {re.escape(str(tmp_path / 'a.txt'))} must be UTF-8, got {got}$"):
        examples(tmp_path)


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


def test_an_animation_s_first_frame_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (1, 1), colour) for colour in (RED, GREEN)]
    for name in ("a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        with Image.open(tmp_path / name) as saved:
            saved.seek(1)  # there are two
        assert pixels(tmp_path / name) == [RED]


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
        (b"<html>\n", "it is not in a picture format"),
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


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)  # Pillow refuses twice as many: the picture has 12
    with pytest.raises(ValueError, match=refusal(path, r"Image size \(12 pixels\) exceeds limit of 10 pixels.*")):
        picture(path)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.new("F", (2, 2), 0.5).save(path)
    with pytest.raises(ValueError, match=refusal(path, "its pixels are floating-point numbers of unknown range")):
        picture(path)


def test_heif_names_the_extra_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = made(tmp_path / "a.HEIC")
    message = re.escape(f"{path} needs the extra 'heif': pip install 'lorasmith[heif]'")
    with pytest.raises(ValueError, match=f"^{message}$"):
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
