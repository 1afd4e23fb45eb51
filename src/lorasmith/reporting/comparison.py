"""The image that compares samples without and with a LoRA."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from lorasmith.reporting.page import FRAME, INK, LARGE, LINES_MAX, MUTED, SMALL
from lorasmith.storage.atomic import write_whole


@dataclass(frozen=True)
class _Text:
    """Text wrapped to a width in pixels."""

    lines: tuple[str, ...]
    font: ImageFont.FreeTypeFont

    @property
    def leading(self) -> int:
        """From one line to the next, in pixels."""
        return round(1.3 * self.font.size)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return round(max(map(self.font.getlength, self.lines), default=0)), self.leading * len(self.lines)

    def draw(self, canvas: ImageDraw.ImageDraw, corner: tuple[int, int], colour: str) -> None:
        """corner: the text's left and top, in pixels."""
        for row, line in enumerate(self.lines):
            canvas.text((corner[0], corner[1] + row * self.leading), line, colour, self.font)


def save_comparison(rows: Sequence[tuple[str, Sequence[Image.Image]]], captions: Sequence[str], path: Path) -> None:
    """Write a labelled grid as a PNG: a row for each (label, pictures), a column for each caption.

    Pictures may differ in size: each is enlarged by a whole factor to at least 192 pixels a side, or shrunk to 384.
    A caption gets at most six lines. Equal pictures give equal bytes. ValueError if a row has not one picture for each
    caption or the grid is empty; OSError if path cannot be written.
    """
    if not rows or not captions:
        raise ValueError(f"a comparison must have at least 1 row and 1 caption, got {len(rows)} and {len(captions)}")
    for label, pictures in rows:
        if len(pictures) != len(captions):
            raise ValueError(f"row {label!r} must hold {len(captions)} pictures, one a caption, got {len(pictures)}")
    grid = [[_fitted(picture) for picture in pictures] for _, pictures in rows]
    width = max(SMALL * 3 // 4, *(picture.width for row in grid for picture in row))
    em = 12 + width // 32
    headers = [_wrapped(caption, _font("DejaVuSans", em), width) for caption in captions]
    labels = [_wrapped(label, _font("DejaVuSans-Bold", em), 8 * em) for label, _ in rows]

    gap, margin = em, 2 * em
    left = margin + max(label.size[0] for label in labels) + gap * 3 // 2
    top = margin + max(header.size[1] for header in headers) + gap * 3 // 4
    heights = [
        max(label.size[1], *(picture.height for picture in row)) for label, row in zip(labels, grid, strict=True)
    ]
    right = left + len(captions) * (width + gap) - gap + margin
    image = Image.new("RGB", (right, top + sum(heights) + gap * (len(heights) - 1) + margin), "white")
    canvas = ImageDraw.Draw(image)
    for column, header in enumerate(headers):
        header.draw(canvas, (left + column * (width + gap), top - gap * 3 // 4 - header.size[1]), MUTED)
    for label, row, height in zip(labels, grid, heights, strict=True):
        label.draw(canvas, (margin, top + (height - label.size[1]) // 2), INK)
        for column, picture in enumerate(row):
            x = left + column * (width + gap) + (width - picture.width) // 2
            y = top + (height - picture.height) // 2
            canvas.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=FRAME)
            image.paste(picture, (x, y), picture)
        top += height + gap
    content = io.BytesIO()
    image.save(content, "PNG")
    write_whole(path, content.getvalue())


def _fitted(picture: Image.Image) -> Image.Image:
    """A picture of any mode and size -> RGBA, its longer side 192 to 384 pixels."""
    picture = picture.convert("RGBA")
    longest = max(picture.size)
    if longest > LARGE:
        width, height = (max(1, round(side * LARGE / longest)) for side in picture.size)
        return picture.resize((width, height), Image.Resampling.LANCZOS)
    factor = -(-SMALL // longest)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _font(name: str, em: int) -> ImageFont.FreeTypeFont:
    """One of the fonts that come with matplotlib, em pixels high."""
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    # the basic layout, because the other one is there on some machines only and spaces letters otherwise
    return ImageFont.truetype(file, em, layout_engine=ImageFont.Layout.BASIC)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> _Text:
    """Text broken at spaces, and inside words wider than width pixels; what six lines do not hold ends in "…"."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".lstrip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > LINES_MAX:
        last = lines[LINES_MAX - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: LINES_MAX - 1], last.rstrip() + "…"]
    return _Text(tuple(lines), font)
