"""What a run leaves to look at besides its loss plot (plots.py): the before/after grid and the report page."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from lorasmith.plots import loss_figure, png_of
from lorasmith.types import Step
from lorasmith.whole import write_whole

SMALL, LARGE = 192, 384  # pixels: the grid enlarges pictures below the one and shrinks those above the other
LINES_MAX = 6  # of a caption above its column
TABLE_ROWS_MAX = 20
INK, MUTED, FRAME = "#1d2433", "#475467", "#d5d9e0"


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


def save_page(
    path: Path,
    title: str,
    summary: Sequence[tuple[str, str]],
    pictures: Sequence[tuple[str, Path]],
    config_toml: str,
    *,
    steps: Sequence[Step],
) -> None:
    """Write a page that needs no other file: summary (name, value), pictures (caption, file), loss, config, 20 steps.

    All text is escaped and pictures are embedded. OSError if a picture cannot be read or path cannot be written.
    """
    count = min(len(steps), TABLE_ROWS_MAX)
    shown = [steps[row * (len(steps) - 1) // max(1, count - 1)] for row in range(count)]
    page = Template(resources.files("lorasmith").joinpath("report_template.html").read_text("utf-8")).substitute(
        title=escape(title),
        summary="\n".join(_row([name, value]) for name, value in summary),
        pictures="\n".join([*(_figure(caption, file) for caption, file in pictures), *_loss_plot(steps)]),
        steps_note=f"all {len(steps):,}" if count == len(steps) else f"{count} of {len(steps):,}, evenly spaced",
        steps="\n".join(
            _row([f"{step.step:,}", *map(_number, (step.loss, step.lr, step.grad_norm, step.seconds))])
            for step in shown
        ),
        config=escape(config_toml),
    )
    # text may hold a lone surrogate, from a file name that is not UTF-8
    write_whole(path, page.encode("utf-8", errors="replace"))


def _figure(caption: str, file: Path) -> str:
    """A picture file in any format that browsers and Pillow know -> a <figure> with its bytes inside."""
    data = file.read_bytes()
    with Image.open(io.BytesIO(data)) as picture:
        width, height, media = picture.width, picture.height, Image.MIME[str(picture.format)]
    size = f'width="{width}" height="{height}" style="min-width: {min(width * 2 // 5, 900)}px"'
    tag = f'<div class="wide"><img src="{_data_url(data, media)}" alt="{escape(caption)}" {size}></div>'
    return f"<figure>\n{tag}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def _loss_plot(steps: Sequence[Step]) -> list[str]:
    """The plot in two sizes, of which a browser shows the one that fits its window; none without steps."""
    if not steps:
        return []
    wide, narrow = (png_of(loss_figure(steps, is_narrow=is_narrow)) for is_narrow in (False, True))
    source = f'<source media="(max-width: 36rem)" srcset="{_data_url(narrow, "image/png")}">'
    tag = f'<picture>{source}<img src="{_data_url(wide, "image/png")}" alt="Training loss"></picture>'
    return [f"<figure>\n{tag}\n<figcaption>Loss</figcaption>\n</figure>"]


def _data_url(data: bytes, media: str) -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def _row(cells: Sequence[str]) -> str:
    """A row of a table, its first cell the row's header."""
    rest = "".join(f"<td>{escape(cell)}</td>" for cell in cells[1:])
    return f'<tr><th scope="row">{escape(cells[0])}</th>{rest}</tr>'


def _number(value: float) -> str:
    """Four decimals, or four digits and an exponent where those would say little."""
    return f"{value:.4f}" if value == 0 or 1e-2 <= abs(value) < 1e5 else f"{value:.3e}"
