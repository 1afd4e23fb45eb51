"""How much a LoRA adds to each layer, as a picture: a bar each layer, in the order of the net, coloured by its kind."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorasmith.reporting.loss_plot import AXIS, BLUE, INK, MUTED, RED, TEAL, empty_figure, png_of, prepare
from lorasmith.storage.atomic import write_whole

AMBER, PURPLE = "#c98a14", "#7a4fb5"
KINDS = (
    ("cross-attention", re.compile(r"attn2|cross_attn|add_[qkv]_proj|add_out"), BLUE),
    ("MLP", re.compile(r"(^|_)(ff|ffn|mlp|feed_forward)(_|\d|$)"), AMBER),
    ("attention", re.compile(r"attn|attention"), TEAL),
    ("convolution", re.compile(r"conv|resnets|in_layers|out_layers|sampler"), PURPLE),
)
OTHER = ("other", MUTED)
LABELS_MAX = 40
NARROW = 1 / 60  # share of the width below which a block's name would run into the next one's


class LayerNorm(NamedTuple):
    """The Frobenius norm of what is added to a layer; NaN where its tensors do not make one."""

    block: str
    layer: str
    norm: float


def save_norms_plot(norms: Sequence[LayerNorm], title: str, path: Path) -> None:
    """Writes norms_figure as a PNG; equal norms give equal bytes. OSError if path cannot be written."""
    write_whole(path, png_of(norms_figure(norms, title)))


def kind_of_layer(layer: str) -> tuple[str, str]:
    """What a layer is by its name, and the colour of that."""
    name = layer.replace(".", "_")
    return next(((kind, colour) for kind, sign, colour in KINDS if sign.search(name)), OTHER)


def norms_figure(norms: Sequence[LayerNorm], title: str) -> Figure:
    """N >= 1 layers in the order in which they are drawn, those of a block beside each other -> 1000x600 pixels."""
    figure = empty_figure()
    axes = figure.subplots()
    prepare(axes)
    axes.grid(visible=False, axis="x")
    axes.set_title(title, loc="left", color=INK, fontsize=15, fontweight="bold", pad=34)
    axes.set_ylabel("Frobenius norm of what is added", color=INK, fontsize=10.5)
    kinds = [kind_of_layer(one.layer) for one in norms]
    for kind, colour in dict.fromkeys([*((k, c) for k, _, c in KINDS), OTHER]):
        places = [
            number for number, found in enumerate(kinds) if found[0] == kind and math.isfinite(norms[number].norm)
        ]
        if places:
            heights = [norms[number].norm for number in places]
            axes.bar(places, heights, width=0.8, color=colour, label=f"{kind} ({len(places)})")
    _mark_what_has_none(axes, norms)
    _name_blocks(axes, norms)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=6, frameon=False, fontsize=9.5, labelcolor=INK,
            handlelength=1, columnspacing=1.4,
        )  # fmt: skip
    return figure


def _mark_what_has_none(axes: Axes, norms: Sequence[LayerNorm]) -> None:
    """Crosses at the bottom for layers whose norm is no number."""
    places = [number for number, one in enumerate(norms) if not math.isfinite(one.norm)]
    if places:
        label = f"not finite ({len(places)})"
        transform = axes.get_xaxis_transform()
        axes.plot(places, [0.02] * len(places), "x", color=RED, transform=transform, label=label, clip_on=False)


def _name_blocks(axes: Axes, norms: Sequence[LayerNorm]) -> None:
    """The names of blocks below, lines between them; a block too narrow for its name goes without."""
    starts = [n for n, one in enumerate(norms) if not n or norms[n - 1].block != one.block]
    ends = [*starts[1:], len(norms)]
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    axes.set_xlim(-0.7, len(norms) - 0.3)
    for start in starts[1:]:
        axes.axvline(start - 0.5, color=AXIS, linewidth=0.8)
    wide = [m for m, start, end in zip(middles, starts, ends, strict=True) if (end - start) / len(norms) >= NARROW]
    named = wide[:: math.ceil(len(wide) / LABELS_MAX)] if wide else []
    axes.set_xticks(named, [norms[round(middle)].block for middle in named], rotation=90 if len(named) > 8 else 0)
    axes.set_xlabel("layers by block, in the order of the net", color=INK, fontsize=10.5)
