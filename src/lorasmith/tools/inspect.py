"""What a file or folder is: for a LoRA its family, algorithms, ranks and norms by block; for a model its parts.

r rank, s the side of a block of OFT.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasmith.adapters.base import normal
from lorasmith.adapters.parts import OFFSETS
from lorasmith.adapters.registry import ADAPTERS, kind_of, unread
from lorasmith.formats import lora_file
from lorasmith.formats.detect import Layers, is_lora, lora_family, model_family
from lorasmith.formats.keys import by_layer
from lorasmith.models.checkpoints.scaled import Quantisation
from lorasmith.models.sources.kind import local_header
from lorasmith.reporting.layer_norms_plot import LayerNorm
from lorasmith.reporting.progress import SILENT, Progress, tracked
from lorasmith.storage.not_safetensors import other_weights, refuse_pointer
from lorasmith.storage.safetensors_header import Header

BLOCK = re.compile(r"(?:(?:down|up|input|output|middle|mid)_blocks?|[a-z_]*?(?:blocks|layers))(?:_\d+)?")
WAY = (("down", "input"), ("mid",), ("up", "output"))  # how the blocks of a UNet begin, in the order that they run
Value = str | int | float | None | Sequence[str | int] | Mapping[str, int]
"""What there is to say of a thing: a text, a number, several of them, or how often each of some names occurs."""
Row = Mapping[str, Value]
KNOWN = frozenset[str]().union(*(kind.SUFFIXES for kind in ADAPTERS))


@dataclass(frozen=True)
class Inspection:
    """What there is to say of a file or folder: of the whole, and of its blocks or parts."""

    facts: Row
    kind: str  # of the rows: "blocks" or "parts"
    rows: Sequence[Row]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**self.facts, self.kind: list(self.rows), "metadata": dict(self.metadata)}

    @property
    def columns(self) -> list[str]:
        return [name.replace("_", " ") for name in self.rows[0]] if self.rows else []

    @property
    def facts_table(self) -> list[tuple[str, str]]:
        """For people; what there is none of is left out."""
        return [
            (name.replace("_", " "), _text(name, value)) for name, value in self.facts.items() if value not in (0, {})
        ]

    @property
    def rows_table(self) -> list[tuple[str, ...]]:
        return [tuple(_text(name, value) for name, value in row.items()) for row in self.rows]


def _text(name: str, value: Value) -> str:
    """ "8 (57), 4 (1)" of counts, "12.3 MB" of a size."""
    if isinstance(value, Mapping):
        if len(value) == 1:
            return next(iter(value))
        counts = sorted(value.items(), key=lambda item: -item[1])
        return ", ".join(f"{one} ({count})" for one, count in counts[:8]) + ("…" if len(counts) > 8 else "")
    if isinstance(value, int):
        return f"{value / 1e6:,.1f} MB" if name == "size" else f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None:
        return "not stated" if name == "steps" else "-"
    return value if isinstance(value, str) else ", ".join(map(str, value))


def _sizes(headers: Sequence[Header], keys: Iterable[str] | None = None) -> Row:
    """Of these tensors (all): how many, their parameters, dtypes and bytes."""
    wanted = None if keys is None else set(keys)
    found = [(header, key) for header in headers for key in header.shapes if wanted is None or key in wanted]
    return {
        "tensors": len(found),
        "parameters": sum(math.prod(header.shapes[key]) for header, key in found),
        "dtypes": sorted({header.dtypes[key].lower() for header, key in found}),
        "size": sum(header.num_bytes(key) for header, key in found),
    }


def inspected(path: Path, progress: Progress = SILENT) -> Inspection:
    """A LoRA file, a single-file checkpoint or a diffusers folder; ValueError where it is nothing that can be read."""
    header = local_header(path)
    if header is None:
        return _folder(path)
    return _lora(path, progress) if is_lora(header.shapes) else _checkpoint(path, header)


def _folder(path: Path) -> Inspection:
    """A diffusers folder: the parts with weights, a row each."""
    refuse_pointer(path / "model_index.json")
    try:
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        kind = str(index["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a diffusers folder with a model_index.json that names its class") from error
    parts: dict[str, list[Header]] = {}
    for file in sorted(path.glob("*/*.safetensors")):
        parts.setdefault(file.parent.name, []).append(Header.of(file))
    rows = [{"part": part, **_sizes(headers)} for part, headers in parts.items()]
    stored = [f"{part}: {text}" for part, headers in parts.items() for header in headers for text in _stored(header)]
    others = sorted({file.parent for file in path.glob("*/*.gguf")} - {path / part for part in parts})
    stored += [f"{folder.name} {other_weights(folder)}" for folder in others]
    facts: Row = {"kind": "model, a diffusers folder", "pipeline": kind}
    return Inspection({**facts, **({"weights": stored} if stored else {})}, "parts", rows)


def _stored(header: Header) -> list[str]:
    """What is to be said of how a file's weights are stored; nothing of plain ones."""
    return [*Quantisation.of(header).kinds(header)]


def _checkpoint(path: Path, header: Header) -> Inspection:
    """A single file with a model's weights: the parts by the first words of their names, a row each."""
    parts: dict[str, list[str]] = {}
    for key in header.shapes:
        parts.setdefault(key.partition(".")[0], []).append(key)
    rows = [{"part": part, **_sizes([header], keys)} for part, keys in sorted(parts.items())]
    facts: Row = {
        "kind": "model or other weights, one file",
        "family": model_family(header.shapes),
        "size": path.stat().st_size,
        **({"weights": stored} if (stored := _stored(header)) else {}),
    }
    return Inspection(facts, "parts", rows, header.metadata)


def _lora(path: Path, progress: Progress) -> Inspection:
    """A LoRA: a row each block, with the norm of what it adds."""
    state, metadata = lora_file.read(path)
    layers = by_layer(state)
    num_bad = sum(
        not _is_finite(tensor) for parts in layers.values() for part, tensor in parts.items()
        if part != "alpha" or _is_scaled(parts)
    )  # fmt: skip
    measured = {
        layer: _measured(parts)
        for layer, parts in tracked(layers.items(), "measuring layers", progress, len(layers))
        if kind_of(parts)
    }
    alphas = (_number(parts["alpha"]) for parts in layers.values() if "alpha" in parts and _is_scaled(parts))
    facts: Row = {
        "kind": "LoRA",
        "family": lora_family(layers),
        "algorithms": Counter(kind.algorithm for parts in layers.values() if (kind := kind_of(parts))),
        "layers": len(layers),
        "ranks": Counter(str(rank) for parts in layers.values() if (rank := _rank(parts))),
        "alphas": Counter(alphas),
        "parameters": sum(t.numel() for parts in layers.values() for part, t in parts.items() if part != "alpha"),
        "dtypes": Counter(str(t.dtype).removeprefix("torch.") for t in state.values() if t.ndim),
        "steps": next((n for key in lora_file.STEPS_KEYS if (n := lora_file.stated_number(metadata, key))), None),
        "other_parts": Counter(part for parts in layers.values() for part in parts.keys() - KNOWN),
        "not_read": Counter(what for parts in layers.values() for what in unread(parts, KNOWN | OFFSETS.keys())),
        "not_measured": Counter(reason for _, reason in measured.values() if reason),
        "tensors_not_finite": num_bad,
    }
    norms = {layer: norm for layer, (norm, _) in measured.items()}
    return Inspection(facts, "blocks", _blocks(layers, norms), metadata)


def layer_norms(path: Path) -> list[LayerNorm]:
    """What a LoRA adds to each layer, blocks in the order of the net; ValueError where the file is no LoRA."""
    if path.is_dir() or not is_lora(Header.of(path).shapes):
        raise ValueError(f"{path} must be a LoRA file to have norms, which it is not")
    layers = by_layer(lora_file.read(path)[0])
    norms = [LayerNorm(_block(layer), layer, _measured(parts)[0]) for layer, parts in layers.items() if kind_of(parts)]
    if not norms:
        raise ValueError(f"{path} must hold an adapter to have norms, which it does not")
    return sorted(norms, key=lambda one: (_place(one.block), one.layer))


def _is_finite(tensor: Tensor) -> bool:
    return bool((tensor if tensor.is_complex() else tensor.float()).isfinite().all())


def _number(tensor: Tensor) -> str:
    if tensor.numel() != 1 or tensor.is_complex():
        return f"{tensor.numel()} numbers"
    return f"{float(tensor):g}"


def _is_scaled(parts: Mapping[str, Tensor]) -> bool:
    """Whether an alpha counts."""
    kind = kind_of(parts)
    return kind is not None and not kind.RANKED.keys().isdisjoint(parts)


def _rank(parts: Mapping[str, Tensor]) -> int | str | None:
    """The rank that the shapes show, in words where it is none of factors."""
    kind = kind_of(parts)
    rank = kind.rank_of(parts) if kind else None
    return f"{kind.RANK_WORDS}{rank}" if kind and kind.RANK_WORDS and rank else rank


def _blocks(layers: Layers, norms: Mapping[str, float]) -> list[Row]:
    """A row each block: layers, ranks, and the norms of what they add, None where these are not finite."""
    blocks: dict[str, list[str]] = {}
    for layer in norms:
        blocks.setdefault(_block(layer), []).append(layer)
    rows: list[Row] = []
    for block in sorted(blocks, key=_place):
        members = [layers[layer] for layer in blocks[block]]
        found = torch.tensor([norms[layer] for layer in blocks[block]])
        mean, most = float(found.square().mean().sqrt()), float(found.max())
        rows.append(
            {
                "block": block,
                "layers": len(members),
                "ranks": sorted({rank for parts in members if (rank := _rank(parts))}, key=str),
                "norm_root_mean_square": mean if math.isfinite(mean) else None,
                "norm_greatest": most if math.isfinite(most) else None,
            }
        )
    return rows


def _place(block: str) -> tuple[int, str, int]:
    """Where a block comes: by the way of data through the net, then by name and number."""
    name, _, number = block.rpartition(" ")
    way = next((place for place, words in enumerate(WAY) if block.startswith(words)), 1)
    return (way, name, int(number)) if number.isdigit() else (way, block, 0)


def _block(layer: str) -> str:
    """ "lora_unet_down_blocks_1_attentions_0…" -> "down_blocks 1"; layers outside blocks go by their own name."""
    found = BLOCK.search(re.sub(r"^(lora|lycoris)_(unet|te\d?|transformer)?_?", "", normal(layer)))
    return re.sub(r"_(\d+)$", r" \1", found[0]) if found else layer


def _measured(parts: Mapping[str, Tensor]) -> tuple[float, str]:
    """The Frobenius norm of an adapter's delta; of OFT, of R - I; of DoRA, of s B A.

    NaN and the reason where parts are missing or do not match.
    """
    parts = {part: tensor.float() for part, tensor in parts.items()}
    kind = kind_of(parts)
    assert kind is not None
    try:
        return kind.delta_norm(parts), ""
    except KeyError as error:
        return math.nan, f"{kind.algorithm} without {error.args[0]}"
    except ValueError as error:
        return math.nan, str(error)
    except (IndexError, RuntimeError, ZeroDivisionError):
        return math.nan, f"{kind.algorithm} of shapes that do not fit together"
