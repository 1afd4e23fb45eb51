"""plots.py and report.py."""

import base64
import io
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorasmith.reporting.comparison import save_comparison
from lorasmith.reporting.loss_plot import POINTS_MAX, loss_figure, save_loss_plot
from lorasmith.reporting.page import LARGE, SMALL, save_page
from lorasmith.types import Step

VOID = {"meta", "link", "img", "br", "source"}
HOSTILE = "<script src=http://x.test/a.js>alert('1')</script> \"&amp; $title ${config} $"


def _steps(losses: list[float], first: int = 1) -> list[Step]:
    return [Step(first + at, loss, 1e-4, 0.5, 0.1) for at, loss in enumerate(losses)]


def _noisy(num: int) -> list[Step]:
    return _steps([0.1 + 0.05 * math.sin(12.9898 * at) for at in range(num)])


def _texts(steps: list[Step]) -> list[str]:
    """The legend's texts."""
    legend = loss_figure(steps).axes[0].get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("losses", [[], [0.5], [0.5, 0.4], [0.0], [math.nan], [math.nan] * 30, [3e38, -3e38, 1.0]])
@pytest.mark.filterwarnings("error")
def test_any_number_of_steps_is_drawn(losses: list[float], tmp_path: Path) -> None:
    save_loss_plot(_steps(losses), tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (1000, 600)


def test_short_runs_have_no_smoothed_curve_and_longer_ones_name_its_window() -> None:
    assert _texts(_noisy(5)) == ["each step"]
    assert _texts(_noisy(300)) == ["each step", "mean over 37 steps (Hann window)"]


def test_the_smoothed_curve_keeps_a_constant_up_to_the_ends() -> None:
    smooth = loss_figure(_steps([0.25] * 100)).axes[0].get_lines()[-1].get_ydata()
    assert list(smooth) == pytest.approx([0.25] * 100)  # pyright: ignore[reportArgumentType]


@pytest.mark.filterwarnings("error")
def test_losses_that_are_not_finite_leave_gaps_and_are_counted() -> None:
    steps = _noisy(100)
    steps[40:43] = _steps([math.nan, math.inf, -math.inf], first=41)
    assert "not finite: 3 steps" in _texts(steps)
    raw = loss_figure(steps).axes[0].get_lines()[0].get_ydata()
    assert [at for at, loss in enumerate(raw) if math.isnan(loss)] == [40, 41, 42]  # pyright: ignore[reportArgumentType]


def test_a_rare_high_loss_is_counted_and_does_not_flatten_the_others() -> None:
    steps = _noisy(100)
    steps[50] = Step(51, 1e6, 1e-4, 0.5, 0.1)
    assert "off the axis, not averaged: 1 step" in _texts(steps)
    assert loss_figure(steps).axes[0].get_ylim()[1] < 1


def test_a_long_run_is_drawn_fast_and_small(tmp_path: Path) -> None:
    steps = _noisy(100_000)
    start = time.process_time()
    save_loss_plot(steps, tmp_path / "loss.png")
    assert time.process_time() - start < 2
    assert (tmp_path / "loss.png").stat().st_size < 300_000
    assert max(len(line.get_xdata()) for line in loss_figure(steps).axes[0].get_lines()) <= POINTS_MAX  # pyright: ignore[reportArgumentType]


def test_a_continued_run_starts_at_its_own_step() -> None:
    assert loss_figure(_steps([0.5, 0.4, 0.3], first=501)).axes[1].get_xlim()[0] > 500


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (64, 64), "teal"), Image.new("L", (30, 64), 90)]
    for name in ("a", "b"):
        save_loss_plot(_noisy(200), tmp_path / f"{name}.png")
        save_comparison([("with", pictures)], ["one", "two"], tmp_path / f"{name}_grid.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a_grid.png").read_bytes() == (tmp_path / "b_grid.png").read_bytes()
    assert Image.open(tmp_path / "a.png").info.keys() <= {"dpi"}


def _grid(rows: list[list[Image.Image]], captions: list[str], path: Path) -> Image.Image:
    save_comparison([(f"row {at}", row) for at, row in enumerate(rows)], captions, path)
    return Image.open(path)


def _coloured(image: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int]:
    """Width and height of the box round all pixels of a colour."""
    down, across = np.nonzero((np.asarray(image) == colour).all(2))
    return int(np.ptp(across)) + 1, int(np.ptp(down)) + 1


def test_the_grid_grows_by_one_cell_with_each_row_and_column(tmp_path: Path) -> None:
    red = Image.new("RGB", (64, 64), "red")
    one = _grid([[red]], ["a"], tmp_path / "grid.png")
    wide = _grid([[red] * 3], ["a"] * 3, tmp_path / "grid.png")
    tall = _grid([[red]] * 3, ["a"], tmp_path / "grid.png")
    across, down = wide.width - one.width, tall.height - one.height
    assert across == down and 2 * SMALL < across < 2 * SMALL + 60
    assert (wide.height, tall.width) == (one.height, one.width)


@pytest.mark.parametrize(
    ("size", "shown"),
    [((64, 64), (192, 192)), ((64, 32), (192, 96)), ((200, 300), (200, 300)), ((832, 1216), (263, LARGE))],
)
def test_small_pictures_are_enlarged_by_a_whole_factor_and_large_ones_shrunk(
    size: tuple[int, int], shown: tuple[int, int], tmp_path: Path
) -> None:
    assert _coloured(_grid([[Image.new("RGB", size, "red")]], ["a"], tmp_path / "grid.png"), (255, 0, 0)) == shown


def test_transparent_pictures_lie_on_white(tmp_path: Path) -> None:
    image = _grid([[Image.new("RGBA", (64, 64), (255, 0, 0, 0))]], [""], tmp_path / "grid.png")
    assert not (np.asarray(image) == (255, 0, 0)).all(2).any()


def test_no_text_touches_the_edges_of_the_grid(tmp_path: Path) -> None:
    captions = ["W" * 500, "a long caption " * 40, "\n\t", "gjpqy"]
    image = _grid([[Image.new("RGB", (64, 64), "red")] * 4], captions, tmp_path / "grid.png")
    inked = np.pad(np.asarray(image)[20:-20, 20:-20] < 255, ((20, 20), (20, 20), (0, 0)), constant_values=False)
    assert np.array_equal(inked, np.asarray(image) < 255)


def test_a_row_that_does_not_fit_the_captions_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row 'with' must hold 2 pictures, one a caption, got 1"):
        save_comparison([("with", [Image.new("RGB", (8, 8))])], ["a", "b"], tmp_path / "grid.png")
    with pytest.raises(ValueError, match="at least 1 row and 1 caption, got 0 and 1"):
        save_comparison([], ["a"], tmp_path / "grid.png")


class _Page(HTMLParser):
    """What a page holds; fails on a tag that closes another one."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.text.setdefault(self._open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def _page(path: Path, num_steps: int = 3) -> _Page:
    Image.new("RGB", (64, 32), "teal").save(path / "one.png")
    Image.new("RGB", (16, 16), "red").save(path / "two.jpg")
    pictures = [("one", path / "one.png"), (HOSTILE, path / "two.jpg")]
    summary = [("rank", "8"), (HOSTILE, HOSTILE)]
    save_page(path / "report.html", HOSTILE, summary, pictures, f'name = "{HOSTILE}"', steps=_noisy(num_steps))
    return _Page((path / "report.html").read_text("utf-8"))


def test_the_page_embeds_every_picture(tmp_path: Path) -> None:
    *images, loss = _page(tmp_path).all("img")
    assert [image["alt"] for image in images] == ["one", HOSTILE] and loss["alt"] == "Training loss"
    assert [(image["width"], image["height"]) for image in images] == [("64", "32"), ("16", "16")]
    for image, name, media in zip(images, ("one.png", "two.jpg"), ("image/png", "image/jpeg"), strict=True):
        head, data = image["src"].split(",")
        assert head == f"data:{media};base64"
        assert base64.b64decode(data) == (tmp_path / name).read_bytes()


def test_a_telephone_is_shown_a_loss_plot_of_its_own_width(tmp_path: Path) -> None:
    page = _page(tmp_path)
    (narrow,) = page.all("source")
    assert narrow["media"] == "(max-width: 36rem)"
    sizes = []
    for source in (narrow["srcset"], page.all("img")[-1]["src"]):
        with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as picture:
            sizes.append(picture.size)
    assert sizes == [(420, 480), (1000, 600)]


def test_the_page_escapes_what_it_is_given_and_loads_nothing(tmp_path: Path) -> None:
    page = _page(tmp_path)
    assert page.all("html") == [{"lang": "en"}]
    assert not page.all("script")
    for tag in ("title", "h1", "figcaption", "td"):
        assert HOSTILE in page.text[tag]
    assert page.text["pre"] == [f'name = "{HOSTILE}"']
    links = [attributes[name] for _, attributes in page.tags for name in ("src", "href") if name in attributes]
    assert links and all(link.startswith("data:") for link in links)
    assert not re.search(r"url\(|@import", (tmp_path / "report.html").read_text("utf-8"))


@pytest.mark.parametrize(("num", "rows"), [(0, 0), (1, 1), (20, 20), (21, 20), (1000, 20)])
def test_the_page_lists_at_most_twenty_steps_the_first_and_the_last_among_them(
    num: int, rows: int, tmp_path: Path
) -> None:
    _page(tmp_path, num)
    body = (tmp_path / "report.html").read_text("utf-8").rsplit("<tbody>", 1)[1]
    shown = [int(text.replace(",", "")) for text in re.findall(r'<th scope="row">([\d,]+)</th>', body)]
    assert len(set(shown)) == rows and shown == sorted(shown)
    assert not num or (shown[0], shown[-1]) == (1, num)


def test_a_page_without_pictures_or_with_broken_text_is_written(tmp_path: Path) -> None:
    save_page(tmp_path / "report.html", "caf\udce9", [], [], "", steps=_steps([math.nan]))
    page = _Page((tmp_path / "report.html").read_text("utf-8"))
    assert page.text["h1"] == ["caf?"] and "nan" in page.text["td"]


def test_errors_of_the_disk_go_through(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(OSError, match="^cannot write .*loss.png: No such file"):
        save_loss_plot(_noisy(3), missing / "loss.png")
    with pytest.raises(OSError, match="^cannot write .*grid.png: No such file"):
        save_comparison([("a", [Image.new("RGB", (8, 8))])], ["a"], missing / "grid.png")
    with pytest.raises(FileNotFoundError):
        save_page(tmp_path / "report.html", "a", [], [("gone", missing / "one.png")], "", steps=[])
