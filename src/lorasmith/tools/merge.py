"""LoRAs together in one: exactly, side by side, or through their deltas at a rank that is asked for."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.adapters.base import Adapter, Layer, normal
from lorasmith.adapters.parts import OFFSETS
from lorasmith.adapters.registry import adapter_from_file, kind_of
from lorasmith.formats.detect import lora_family, transformer_width
from lorasmith.formats.experts import EXPERT
from lorasmith.formats.keys import DOWN, UP
from lorasmith.formats.text_encoder_names import text_layer
from lorasmith.models.reference_configs import may_be_one
from lorasmith.reporting.progress import SILENT, Progress, tracked
from lorasmith.storage.safetensors import Named, write_streamed
from lorasmith.tools.lora_layers import LoRAFile, layer_of, read_factors
from lorasmith.tools.outputs import derived, network_dim, refuse_output
from lorasmith.tools.same_layout import canonical, named_alike
from lorasmith.tools.svd import Cut, Decomposition, Losses, squared_error
from lorasmith.tools.weighted import refuse_too_few, weighted

CONVOLUTION = re.compile(r"conv|sampler|(in|out)_layers|skip_connection|_op$")


@dataclass(frozen=True)
class Source:
    """A LoRA and its weight in the sum."""

    lora: LoRAFile
    weight: float

    @classmethod
    def parsed(cls, text: str) -> "Source":
        """`FILE` or `FILE:WEIGHT`; ValueError where the weight is not a finite number other than 0."""
        path, weight = weighted(text)
        return cls(LoRAFile.opened(path), weight)

    def __str__(self) -> str:
        return f"{self.lora.path.name} * {self.weight:g}"


@dataclass(frozen=True)
class _Share:
    """One source's part in a layer."""

    source: Source
    layer: str

    @property
    def kind(self) -> type[Adapter] | None:
        return kind_of(self.parts)

    @property
    def parts(self) -> Mapping[str, Tensor]:
        return self.source.lora.layers[self.layer]

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """As `read_factors` has them; ValueError that names the file."""
        with self._named():
            return read_factors(self.parts)

    def delta(self, kernel: tuple[int, ...] | None) -> Tensor:
        """What it adds to the weight [n_out, n_in, k…]; ValueError that names the file."""
        with self._named():
            return _own_delta(self, kernel)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{self.source.lora.path}: {error}") from error


def merge(
    sources: Sequence[Source], output: Path, *, rank: int | None = None, dtype: torch.dtype | None = None,
    overwrite: bool = False, progress: Progress = SILENT,
) -> Losses:  # fmt: skip
    """Writes the weighted sum of LoRAs; LoRA beside LoRA is exact, with the sum of the ranks.

    rank: every layer's at most; needed where another algorithm is among them. dtype: of the weights; None: the widest
    of the sources. ValueError where they are for different models, or need the model's own weights to be added.
    """
    refuse_output(output, overwrite=overwrite)
    refuse_too_few(sources)
    cut = None if rank is None else Cut(rank=rank)
    _refuse_what_cannot_be_added(sources, rank)
    _refuse_other_models(sources)
    losses = Losses()
    what = f"merge of {', '.join(map(str, sources))}" + (f" at {cut}" if cut else "")
    with named_alike([source.lora for source in sources], output, progress) as loras:
        alike = [replace(source, lora=lora) for source, lora in zip(sources, loras, strict=True)]
        shares, names = _by_layer(alike), Names.of(loras)
        shown = tracked(sorted(shares), "merging", progress, len(shares))
        write_streamed(
            output,
            (named for layer in shown for named in _added(shares[layer], cut, dtype, losses, names)),
            lambda: {
                **derived(_agreed([lora.metadata for lora in loras]), what),
                **network_dim(losses.ranks.values()),
                "ss_network_alpha": network_dim(losses.ranks.values())["ss_network_dim"],
                "modelspec.merged_from": ", ".join(lora.path.name for lora in loras),
            },
        )
    return losses


@dataclass(frozen=True)
class Names:
    """How the keys of a file are written, after the first one's."""

    endings: Mapping[str, str]  # {part: how it is spelt}
    has_alphas: bool

    @classmethod
    def of(cls, loras: Sequence[LoRAFile]) -> "Names":
        endings: dict[str, str] = {}
        for lora in loras:
            for layer, parts in lora.keys.items():
                for part, key in parts.items():
                    endings.setdefault(part, key.removeprefix(layer))
        return cls(endings, any("alpha" in parts for parts in loras[0].keys.values()))

    def key(self, layer: str, part: str) -> str:
        return f"{layer}{self.endings.get(part, f'.{part}')}"


def _agreed(metadata: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What all of them say alike."""
    first, *others = metadata
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def _by_layer(sources: Sequence[Source]) -> dict[str, list[_Share]]:
    """{canonical name: who has a part in it}; ValueError where one file names a layer twice."""
    shares: dict[str, list[_Share]] = {}
    for source in sources:
        for layer in source.lora.layers:
            found = shares.setdefault(canonical(layer), [])
            if any(share.source is source for share in found):
                raise ValueError(f"{source.lora.path}: {layer} must be named once, but another name means the same")
            found.append(_Share(source, layer))
    return shares


def _refuse_other_models(sources: Sequence[Source]) -> None:
    """ValueError where they are not for one and the same model, as far as names, sizes and metadata say."""
    first, *others = [source.lora for source in sources]
    for other in others:
        looks = [_look(first), _look(other)]
        (family, width), (other_family, other_width) = looks
        if not may_be_one(family, other_family) or len({width, other_width} - {None}) > 1:
            shown = (f"{name}{f' of width {wide}' if wide and width != other_width else ''}" for name, wide in looks)
            raise ValueError(
                "the LoRAs must be for the same model, but look made for "
                + " and ".join(f"{look} ({lora.path})" for look, lora in zip(shown, (first, other), strict=True))
            )
        stated = {lora.metadata[EXPERT]: lora.path for lora in (first, other) if EXPERT in lora.metadata}
        if len(stated) > 1:
            raise ValueError(
                f"the LoRAs must be for the same expert of a model, but are for "
                f"{' and '.join(f'{expert} ({path})' for expert, path in stated.items())}"
            )


def _look(lora: LoRAFile) -> tuple[str, int | None]:
    """The family that the denoiser's layers show, and the width of a transformer."""
    layers = {layer: parts for layer, parts in lora.layers.items() if not text_layer(layer)}
    return lora_family(layers), transformer_width(layers)


def _refuse_what_cannot_be_added(sources: Sequence[Source], rank: int | None) -> None:
    for source in sources:
        source.lora.refuse_strange_parts()
        kinds = {kind for parts in source.lora.layers.values() if (kind := kind_of(parts))}
        for kind in sorted(kinds, key=lambda kind: kind.algorithm):
            if not kind.IS_ADDITIVE:
                raise ValueError(
                    f"{source.lora.path} holds {kind.algorithm}, which depends on the model's weights: "
                    "merge it into the model, with --model"
                )
            if not kind.IS_LOW_RANK and rank is None:
                raise ValueError(
                    f"{source.lora.path} holds {kind.algorithm}, which adds to others only through its delta: "
                    "give --rank, at which the sum is cut off"
                )


def _added(
    shares: Sequence[_Share], cut: Cut | None, dtype: torch.dtype | None, losses: Losses, names: Names
) -> Iterator[Named]:
    """The tensors of the sum, under the first source's names; the scale is 1."""
    first = shares[0]
    own = dtype or _widest(shares)
    trained = [share for share in shares if share.kind is not None]
    try:
        if trained:
            up, down = _sum(trained, cut, own, losses, first.layer)
            yield names.key(first.layer, UP), up
            yield names.key(first.layer, DOWN), down
            if names.has_alphas:
                yield names.key(first.layer, "alpha"), torch.tensor(len(down), dtype=torch.float32)
        for part in OFFSETS:
            found = [share for share in shares if part in share.parts]
            if found:
                yield names.key(first.layer, part), _offset(found, part).to(own)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{first.layer}: {error}") from error


def _widest(shares: Sequence[_Share]) -> torch.dtype:
    """The dtype that holds the weights of all."""
    found = [t.dtype for share in shares for part, t in share.parts.items() if part != "alpha"]
    widest = found[0] if found else torch.float32
    for one in found:
        widest = torch.promote_types(widest, one)
    return widest


def _sum(
    shares: Sequence[_Share], cut: Cut | None, dtype: torch.dtype, losses: Losses, layer: str
) -> tuple[Tensor, Tensor]:
    """up [n_out, R] or [n_out, R, 1…], down [R, n_in] or [R, n_in, k…] of the weighted sum, in this dtype."""
    if all(share.kind and share.kind.IS_LOW_RANK for share in shares):
        whole = _side_by_side(shares)
        up, down = whole
        if cut is not None and cut.rank is not None and len(down) > cut.rank:
            parts = Decomposition.of_product(up.flatten(1), down.flatten(1))
            up, down = _shaped(*parts.factors(cut.kept(parts.values)), down.shape[1:])
        up, down = up.to(dtype), down.to(dtype)
        pairs = [(one.flatten(1), other.flatten(1)) for one, other in (whole, (up, down))]
        losses.add(layer, len(down), *squared_error(*pairs))
        return up, down
    assert cut is not None
    delta = _delta(shares)
    parts = Decomposition.of_matrix(delta.flatten(1))
    up, down = (factor.to(dtype) for factor in parts.factors(cut.kept(parts.values)))
    error = delta.flatten(1).double() - up.double() @ down.double()
    losses.add(layer, len(down), float(error.square().sum()), float(delta.double().square().sum()))
    return _shaped(up, down, delta.shape[1:])


def _shaped(up: Tensor, down: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Matrices -> factors for a layer whose weight is [n_out, *shape]."""
    return up.view(*up.shape, *[1] * (len(shape) - 1)), down.view(len(down), *shape)


def _side_by_side(shares: Sequence[_Share]) -> tuple[Tensor, Tensor]:
    """[w1 s1 up1 | w2 s2 up2 …], [down1; down2; …], float32: their product is the weighted sum."""
    found = [(share, *share.factors()) for share in shares]
    _refuse_other_shapes([(share, (len(up), *down.shape[1:])) for share, up, down, _ in found])
    up = torch.cat([share.source.weight * scale * up.float() for share, up, _, scale in found], dim=1)
    return up, torch.cat([down.float() for _, _, down, _ in found])


def _refuse_other_shapes(found: Sequence[tuple[_Share, tuple[int, ...]]]) -> None:
    (first, shape), *others = found
    for share, other in others:
        if other != shape:
            raise ValueError(
                f"must be of one shape in {first.source.lora.path} and {share.source.lora.path}, "
                f"got {list(shape)} and {list(other)}"
            )


def _delta(shares: Sequence[_Share]) -> Tensor:
    """The weighted sum of what all add to the weight [n_out, n_in, k…], float32."""
    kernels = {tuple(share.parts[DOWN].shape[2:]) for share in shares if share.kind and share.kind.IS_LOW_RANK}
    kernel = kernels.pop() if len(kernels) == 1 else None
    found = [(share, share.delta(kernel)) for share in shares]
    _refuse_other_shapes([(share, tuple(delta.shape)) for share, delta in found])
    return sum((share.source.weight * delta for share, delta in found[1:]), found[0][0].source.weight * found[0][1])


def _own_delta(share: _Share, kernel: tuple[int, ...] | None) -> Tensor:
    layer = _sizes(share, kernel)
    parts = {part: tensor for part, tensor in share.parts.items() if part not in OFFSETS}
    with torch.no_grad():
        return adapter_from_file(layer, parts).merged(torch.zeros(layer.weight_shape))


def _sizes(share: _Share, kernel: tuple[int, ...] | None) -> Layer:
    """The layer that the parts are for; ValueError where they do not say whether it has a kernel."""
    kind, parts = share.kind, share.parts
    assert kind is not None
    if kind.IS_LOW_RANK:
        read_factors(parts)  # which fit together, or it is said why not
    sizes = kind.layer_sizes(parts)
    if sizes is None:
        raise ValueError(f"{', '.join(sorted(parts))} must show the sizes of a layer, which they do not")
    n_out, n_in, own = sizes
    if own is not None:
        return layer_of(n_out, n_in, own)
    if kernel is None and CONVOLUTION.search(normal(share.layer)):
        raise ValueError(
            f"the file does not say the kernel of this layer's {kind.algorithm}: merge it into the model, with --model"
        )
    return layer_of(n_out, n_in // max(1, math.prod(kernel or ())), kernel or ())


def _offset(shares: Sequence[_Share], part: str) -> Tensor:
    """The weighted sum of differences, float32."""
    _refuse_other_shapes([(share, tuple(share.parts[part].shape)) for share in shares])
    total = torch.zeros(shares[0].parts[part].shape)
    for share in shares:
        total += share.source.weight * share.parts[part].float()
    return total
