"""Colour profiles written by hand, against the formulas that they stand for."""

import logging
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from lorasmith.data.images import picture

Array = np.ndarray
D50 = (0.9642, 1.0, 0.8249)
TO_XYZ = {  # columns: the primaries' XYZ under D50
    "srgb": np.array(
        [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
    ),
    "adobe": np.array(
        [[0.6097559, 0.2052401, 0.1492240], [0.3111242, 0.6256560, 0.0632197], [0.0194811, 0.0608902, 0.7448387]]
    ),
}


def fixed(*values: float) -> bytes:
    """ICC's s15Fixed16Number."""
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc(space: bytes, kind: bytes, tags: dict[bytes, bytes], between: bytes = b"XYZ ") -> bytes:
    """A profile of version 2.4 (ICC.1:2001-04, section 6)."""
    start, table, body = 132 + 12 * len(tags), b"", b""
    for tag, content in tags.items():
        content += bytes(-len(content) % 4)
        table += tag + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s12s4s", start + len(body), b"", 0x02400000, kind, space, between, bytes(12), b"acsp")
    return (head + bytes(28) + fixed(*D50)).ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + fixed(*values)


def rgb_profile(to_xyz: Array, gamma: float) -> bytes:
    tags = {b"wtpt": xyz(*D50)}
    for index, letter in enumerate("rgb"):
        tags |= {f"{letter}XYZ".encode(): xyz(*to_xyz[:, index]), f"{letter}TRC".encode(): curve(gamma)}
    return icc(b"RGB ", b"mntr", tags)


def grey_profile(gamma: float) -> bytes:
    return icc(b"GRAY", b"mntr", {b"wtpt": xyz(*D50), b"kTRC": curve(gamma)})


def cmyk_profile() -> bytes:
    """Paper is white, and any ink the same mid grey: L* = 50 (a table of 2 points an axis, lut8Type)."""
    identity = bytes(range(256))
    corners = bytes([255, 128, 128]) + bytes([128, 128, 128]) * 15
    lut = (
        b"mft1"
        + bytes(4)
        + bytes([4, 3, 2, 0])
        + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
        + identity * 4
        + corners
        + identity * 3
    )
    return icc(b"CMYK", b"prtr", {b"wtpt": xyz(*D50), b"A2B0": lut}, b"Lab ")


def srgb_of(linear: Array) -> Array:
    """IEC 61966-2-1, in 0 to 255."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def saved(path: Path, image: Image.Image, profile: bytes) -> Array:
    image.save(path, icc_profile=profile)
    return np.asarray(picture(path), dtype=float)


@pytest.fixture
def colours() -> Array:
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_a_wide_gamut_is_converted(tmp_path: Path, colours: Array, name: str) -> None:
    gamma = 563 / 256  # Adobe RGB (1998), section 4.3.4.2
    linear = (colours / 255) ** gamma @ TO_XYZ["adobe"].T @ np.linalg.inv(TO_XYZ["srgb"]).T
    image, profile = Image.fromarray(colours), rgb_profile(TO_XYZ["adobe"], gamma)
    options: dict[str, Any] = {"lossless": True} if name == "a.webp" else {}
    image.save(tmp_path / name, icc_profile=profile, **options)
    found = np.asarray(picture(tmp_path / name), dtype=float)
    assert np.abs(found - srgb_of(linear)).max() < 2 and np.abs(found - colours).max() > 30


def test_heif_s_profile_counts(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    image = Image.new("RGB", (64, 64), (100, 100, 100))
    image.info["icc_profile"] = rgb_profile(TO_XYZ["srgb"], 1.0)
    heif.from_pillow(image).save(tmp_path / "a.heic", quality=100)
    assert np.abs(np.asarray(picture(tmp_path / "a.heic")) - srgb_of(np.array(100 / 255))).max() < 3


def test_srgb_stays_bit_for_bit(tmp_path: Path, colours: Array) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (saved(tmp_path / "a.png", Image.fromarray(colours), profile) == colours).all()
    assert (saved(tmp_path / "b.png", Image.fromarray(colours[..., 0]), profile) == colours[..., :1]).all()


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_with_a_curve_of_its_own(tmp_path: Path, mode: str) -> None:
    grey = np.arange(256, dtype=np.uint8)[None]
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    found = saved(tmp_path / "a.png", image, grey_profile(1.0))
    assert np.abs(found - srgb_of(grey[..., None] / 255)).max() < 2


def test_inks_are_mixed_as_the_profile_says(tmp_path: Path) -> None:
    image = Image.new("CMYK", (2, 1))
    image.putpixel((1, 0), (255, 0, 0, 0))
    found = saved(tmp_path / "a.tif", image, cmyk_profile())
    grey = srgb_of(np.array(((50 + 16) / 116) ** 3))  # CIE 1976 L* -> Y
    assert np.abs(found[0] - [[255] * 3, [grey] * 3]).max() < 3


def test_transparency_survives_a_profile(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1), (100, 100, 100, 255))
    image.putpixel((0, 0), (100, 100, 100, 0))
    image.putpixel((1, 0), (100, 100, 100, 51))
    full = srgb_of(np.array(100 / 255))
    expected = [[[255] * 3, [0.8 * 255 + 0.2 * full] * 3, [full] * 3]]
    for mode, profile in (("RGBA", rgb_profile(TO_XYZ["srgb"], 1.0)), ("LA", grey_profile(1.0))):
        assert np.abs(saved(tmp_path / "a.png", image.convert(mode), profile) - expected).max() < 2


def test_a_palette_has_colours_too(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([100, 100, 100, 0, 0, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=1, icc_profile=rgb_profile(TO_XYZ["srgb"], 1.0))
    expected = [[srgb_of(np.array([100 / 255] * 3)), [255] * 3]]
    assert np.abs(np.asarray(picture(tmp_path / "a.png"), dtype=float) - expected).max() < 2


@pytest.mark.parametrize(
    ("profile", "reason"),
    [(b"no profile", "cannot open profile from string"), (grey_profile(1.0), "it is for GRAY, not for RGB")],
)
def test_what_is_no_profile_of_the_picture_is_ignored(
    tmp_path: Path, colours: Array, caplog: pytest.LogCaptureFixture, profile: bytes, reason: str
) -> None:
    with caplog.at_level(logging.WARNING):
        assert (saved(tmp_path / "a.png", Image.fromarray(colours), profile) == colours).all()
    assert caplog.messages == [f"the colour profile of picture a.png is ignored: {reason}"]
