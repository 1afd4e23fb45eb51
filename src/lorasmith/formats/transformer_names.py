"""The layers of transformers as the code that came with their weights has them: other names, q, k and v in one layer.

ComfyUI and kohya's tools name LoRA files by these. {} is a block's number.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from lorasmith.formats.architectures.architecture import Blocks
from lorasmith.formats.architectures.registry import ARCHITECTURES


@dataclass(frozen=True)
class Original:
    """A layer of the original code."""

    name: str
    paths: tuple[str, ...]  # diffusers' modules whose rows it has, one after another
    swapped: bool = False  # its rows are shift and scale, diffusers' scale and shift


TRANSFORMERS: Mapping[str, Blocks] = {a.transformer: a.layers for a in ARCHITECTURES if a.transformer}
"""{class in diffusers: what is named otherwise there than in the original code}."""


def original_layers(kind: str, paths: Collection[str]) -> list[Original]:
    """Every layer of the original code that a net of this class of TRANSFORMERS has, its modules' paths being these."""
    known = set(paths)
    found = [
        Original(name, members, _is_swapped(members[0], known))
        for name, members in _filled(TRANSFORMERS[kind], known)
        if known.issuperset(members)
    ]
    named = {path for layer in found for path in layer.paths}
    return [*found, *(Original(path, (path,)) for path in paths if path not in named)]


def _filled(table: Blocks, paths: Collection[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The table's names for every number that a path has."""
    numbers = sorted({word for path in paths for word in path.split(".") if word.isdigit()}, key=int)
    for name, members in table.items():
        for number in numbers if "{}" in name else [""]:
            yield name.format(number), tuple(member.format(number) for member in members)


def _is_swapped(path: str, paths: Collection[str]) -> bool:
    """Whether it modulates as diffusers' AdaLayerNormContinuous does; of contexts, the last block alone."""
    block, _, layer = path.rpartition("norm1_context.")
    return path == "norm_out.linear" or (layer == "linear" and f"{block}attn.to_add_out" not in paths)
