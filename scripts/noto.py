"""Noto Emoji's pictures and names, read from npm's `emoji-datasource-google` 16, unpacked."""

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

SIDE = 64  # pixels
NOT_TRAINED_ON = {"Flags", "Component", "People & Body", "Symbols"}


@dataclass(frozen=True)
class Emoji:
    """One picture of the package."""

    short_name: str
    caption: str  # its Unicode name in lower case
    category: str
    picture_path: Path


def emojis(package: Path) -> list[Emoji]:
    """The emoji that have a picture, in the package's order; `package` holds emoji.json and img/google/64."""
    list_path = package / "emoji.json"
    if not list_path.is_file():
        raise ValueError(f"the package must be unpacked emoji-datasource-google: there is no {list_path}")
    rows = json.loads(list_path.read_text(encoding="utf-8"))
    return [
        Emoji(
            short_name=row["short_name"],
            caption=(row["name"] or row["short_name"]).lower().replace("_", " "),
            category=row["category"],
            picture_path=package / "img" / "google" / "64" / row["image"],
        )
        for row in rows
        if row["has_img_google"]
    ]


def training_emojis(package: Path) -> list[Emoji]:
    """The emoji that the demo's base model is trained on: things, animals, places and faces."""
    return [emoji for emoji in emojis(package) if emoji.category not in NOT_TRAINED_ON]


def picture(emoji: Emoji) -> Image.Image:
    """Its picture on white, RGB, 64 x 64."""
    with Image.open(emoji.picture_path) as file:
        drawn = file.convert("RGBA")
    if drawn.size != (SIDE, SIDE):
        raise ValueError(f"a picture must be {SIDE} x {SIDE}, got {drawn.width} x {drawn.height}: {emoji.picture_path}")
    on_white = Image.new("RGBA", drawn.size, "white")
    on_white.alpha_composite(drawn)
    return on_white.convert("RGB")
