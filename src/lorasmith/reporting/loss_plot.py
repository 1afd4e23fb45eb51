"""The loss plot of a run, drawn through matplotlib's objects: no pyplot, so nothing global is read or set.

N steps; along the plot P points, each a bin of W neighbouring steps, the last perhaps of fewer.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter
from numpy.typing import NDArray

from lorasmith.storage.atomic import write_whole
from lorasmith.types import Step

Floats = NDArray[np.float64]

POINTS_MAX = 800  # about one for each pixel of the plot's width
POINTS_WITH_DOTS = 40
INK, MUTED, GRID, AXIS = "#1d2433", "#667085", "#e9ecf1", "#c3c9d4"
BLUE, PALE_BLUE, TEAL, RED = "#1c56b0", "#a3c0ea", "#0f8577", "#c4302b"


def save_loss_plot(steps: Sequence[Step], path: Path) -> None:
    """Write loss_figure(steps) as a PNG; equal steps give equal bytes. OSError if path cannot be written."""
    write_whole(path, png_of(loss_figure(steps)))


def png_of(figure: Figure) -> bytes:
    """Equal figures give equal bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def loss_figure(steps: Sequence[Step], *, is_narrow: bool = False) -> Figure:
    """N >= 0 steps -> 1000x600 pixels: each loss and their smoothed course, below them the learning rate.

    Narrow: 420x480 pixels, for a telephone's screen.

    Above 800 steps the losses show as the range, least to greatest, of equal bins of steps. Losses that are not finite
    leave gaps; they, and the few so high that the axis leaves them out, are marked and counted.
    """
    figure = empty_figure()
    if is_narrow:
        figure.set_size_inches(4.2, 4.8)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4.6, 1])
    for axes in (upper, lower):
        prepare(axes)
    number = np.array([step.step for step in steps], np.float64)
    _draw_losses(upper, number, np.array([step.loss for step in steps], np.float64), is_narrow=is_narrow)
    _draw_rates(lower, number, np.array([step.lr for step in steps], np.float64))
    _number_steps(lower, number, max_labels=4 if is_narrow else 10)
    figure.align_ylabels([upper, lower])
    return figure


def losses_figure(losses: Sequence[float]) -> Figure:
    """The losses of steps 1 to N -> the same without a panel of learning rates."""
    figure = empty_figure()
    axes = figure.subplots()
    prepare(axes)
    number = np.arange(1, len(losses) + 1, dtype=np.float64)
    _draw_losses(axes, number, np.array(losses, np.float64))
    _number_steps(axes, number)
    return figure


def empty_figure() -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.16, h_pad=0.13, hspace=0.03)  # inches, inches, share of a panel
    figure = Figure(figsize=(10, 6), dpi=100, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def prepare(axes: Axes) -> None:
    axes.grid(color=GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9.5, length=0, pad=6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(AXIS)


def _number_steps(axes: Axes, number: Floats, max_labels: int = 10) -> None:
    """number [N] -> the axis below."""
    first, last = (number[0], number[-1]) if len(number) else (0.0, 1.0)
    margin = max(0.5, 0.015 * (last - first))
    axes.set_xlim(first - margin, last + margin)
    axes.set_xlabel("step (optimizer updates)", color=INK, fontsize=10.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=max_labels, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _draw_losses(axes: Axes, number: Floats, loss: Floats, *, is_narrow: bool = False) -> None:
    """number, loss [N] -> title, curves, marks and legend, in one row or in one column."""
    axes.set_title("Training loss", loc="left", color=INK, fontsize=15, fontweight="bold", pad=50 if is_narrow else 34)
    axes.set_ylabel("loss" if is_narrow else "loss (mean over a step's samples)", color=INK, fontsize=10.5)
    finite = np.isfinite(loss)
    low, high = _limits(loss[finite])
    axes.set_ylim(low, high)
    above = finite & (loss > high)
    if not finite.any():
        axes.text(0.5, 0.5, "no finite loss", color=MUTED, fontsize=12, ha="center", transform=axes.transAxes)
        axes.set_yticks([])
    starts, width = _bins(len(loss))
    x, shown = number[starts], np.where(finite, loss, np.nan)
    least, greatest = np.fmin.reduceat(shown, starts), np.fmax.reduceat(shown, starts)
    if width > 1:
        label = f"range of {width:,} steps"
        axes.fill_between(x, least, greatest, color=PALE_BLUE, alpha=0.6, linewidth=0, label=label)
    else:
        marker = "o" if len(x) <= POINTS_WITH_DOTS else ""
        axes.plot(
            x, least, color=PALE_BLUE, linewidth=1, marker=marker, markersize=5, mfc=BLUE, mew=0, label="each step"
        )
    gap = np.pad(np.isnan(least), 1, constant_values=True)
    alone = ~gap[1:-1] & gap[:-2] & gap[2:]  # between two gaps a line has no length
    axes.plot(x[alone], least[alone], "o", color=BLUE, markersize=5, mew=0)
    window = len(x) // 8 | 1
    if window > 1 and finite.any():
        total = np.add.reduceat(np.where(finite & ~above, loss, 0), starts)
        smooth = _smoothed(total, np.add.reduceat(finite & ~above, starts, dtype=np.int64), window)
        smooth[gap[1:-1]] = np.nan
        axes.plot(x, smooth, color=BLUE, linewidth=2.4, label=f"mean over {window * width:,} steps (Hann window)")
    _draw_marks(axes, number, ~finite, ("not finite", "x", RED, 0.0))
    _draw_marks(axes, number, above, ("off the axis, not averaged", "^", MUTED, 1.0))
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=1 if is_narrow else 4,
        frameon=False,
        labelcolor=INK,
        fontsize=9.5,
        columnspacing=1.8,
        handlelength=1.6,
        borderaxespad=0.9,
        borderpad=0.0,
    )


def _draw_rates(axes: Axes, number: Floats, rate: Floats) -> None:
    """number, rate [N] -> the learning rate at each bin's start."""
    starts, _ = _bins(len(rate))
    marker = "o" if len(starts) <= POINTS_WITH_DOTS else ""
    axes.plot(number[starts], rate[starts], color=TEAL, linewidth=1.8, marker=marker, markersize=4)
    axes.set_ylim(0, 1.15 * float(np.fmax.reduce(rate, initial=0.0)) or 1.0)
    axes.set_ylabel("learning rate", color=INK, fontsize=10.5)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3, steps=[1, 2, 5, 10]))
    exponent = ScalarFormatter(useMathText=True)
    exponent.set_powerlimits((-2, 3))
    axes.yaxis.set_major_formatter(exponent)
    axes.yaxis.get_offset_text().set(color=MUTED, fontsize=9)


def _draw_marks(axes: Axes, number: Floats, where: NDArray[np.bool_], look: tuple[str, str, str, float]) -> None:
    """number, where [N], look (text, marker, colour, height 0 to 1) -> a mark at each bin with such a step, counted."""
    text, marker, colour, height = look
    num = int(where.sum())
    if num:
        starts, _ = _bins(len(where))
        x = number[starts][np.logical_or.reduceat(where, starts)]
        label = f"{text}: {num:,} {'step' if num == 1 else 'steps'}"
        marks = axes.plot(x, np.full(len(x), height), marker, color=colour, markersize=5.5, label=label, zorder=5)
        marks[0].set(transform=axes.get_xaxis_transform(), clip_on=False)


def _bins(num: int) -> tuple[NDArray[np.int64], int]:
    """Number of steps N -> the index that each bin starts at [P], P <= 800, and the bins' width W in steps."""
    width = max(1, -(-num // POINTS_MAX))
    return np.arange(0, num, width), width


def _smoothed(total: Floats, count: NDArray[np.int64], window: int) -> Floats:
    """Bins' sums and counts [P] -> their centred mean [P] under a Hann window of that many bins (odd).

    At the ends and beside gaps it is the mean of what is there; nan where nothing is.
    """
    hann = np.hanning(window + 2)[1:-1]
    weight = np.convolve(count, hann, mode="same")
    return np.convolve(total, hann, mode="same") / np.where(weight > 0, weight, np.nan)


def _limits(loss: Floats) -> tuple[float, float]:
    """Finite losses [n] -> the ends of the y axis; it ends below rare high losses that would flatten all others."""
    if not len(loss):
        return 0.0, 1.0
    low, high = float(loss.min()), float(loss.max())
    usual = float(np.quantile(loss, 0.99, method="lower")) if len(loss) >= 20 else high
    if high > 3 * usual > 0:
        high = 1.5 * usual
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
    return 0.0 if 0 <= low < 0.5 * high else low - margin, high + margin
