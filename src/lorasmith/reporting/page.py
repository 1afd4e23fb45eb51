"""What a run leaves to look at besides its loss plot (plots.py): the before/after grid and the report page."""

import base64
import io
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from PIL import Image

from lorasmith.reporting.loss_plot import loss_figure, png_of
from lorasmith.storage.atomic import write_whole
from lorasmith.types import Step

SMALL, LARGE = 192, 384  # pixels: the grid enlarges pictures below the one and shrinks those above the other
LINES_MAX = 6  # of a caption above its column
TABLE_ROWS_MAX = 20
INK, MUTED, FRAME = "#1d2433", "#475467", "#d5d9e0"


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
    page = Template(
        resources.files("lorasmith.reporting").joinpath("report_template.html").read_text("utf-8")
    ).substitute(
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
