"""LoRAs merged into a model on disk: tensor by tensor, in the model's own dtypes, names and files."""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from lorasmith.adapters.base import Adapter, Member
from lorasmith.adapters.frozen_weight import Weighted
from lorasmith.adapters.parts import OFFSETS, fitting
from lorasmith.adapters.registry import adapter_from_file, kind_of
from lorasmith.formats.dora_magnitude import take_papers_lengths
from lorasmith.formats.experts import NET
from lorasmith.formats.fused_qkv import parted
from lorasmith.formats.read import absent, misfitting, warn_of_left_out
from lorasmith.models.checkpoints.scaled import StoredWeight
from lorasmith.reporting.pace import counted
from lorasmith.reporting.progress import SILENT, Progress, tracked
from lorasmith.storage.atomic import PARTIAL, errors_name, write_pieces
from lorasmith.storage.safetensors import TensorFile, bytes_of
from lorasmith.storage.safetensors_header import PICKLES, Header, header_bytes
from lorasmith.tools.convert import Fitted, denoiser_for
from lorasmith.tools.lora_layers import LoRAFile, Parts, layer_of
from lorasmith.tools.merge import Source
from lorasmith.tools.model_files import Model, Place, Whole, held_in
from lorasmith.tools.outputs import copied_in_view, derived, refuse_output_like
from lorasmith.tools.rounding import Rounding

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Share:
    """What one LoRA does to a module."""

    source: Source
    layer: str
    parts: Parts  # what the file holds for the module

    @property
    def trained(self) -> Parts:
        """The parts that make an adapter, none where there are only differences (and an alpha that scales nothing)."""
        parts = {part: t for part, t in self.parts.items() if part not in OFFSETS}
        return {} if parts.keys() == {"alpha"} else parts

    def touches(self, parameter: str) -> bool:
        """Whether it is to change this parameter of the module."""
        is_offset = any(name == parameter and part in self.parts for part, name in OFFSETS.items())
        return is_offset or (parameter == "weight" and bool(self.trained))

    def offset(self, part: str, shape: tuple[int, ...]) -> Tensor | None:
        """A difference [shape], float32; None where there is none; ValueError where it does not fit."""
        return fitting(self.parts, part, shape).float() if part in self.parts else None


Plan = Mapping[Place, Mapping[int, _Share]]
"""{a module: {the number of a LoRA that changes it: how}}."""


def merge_into(
    path: Path, sources: Sequence[Source], output: Path, *, overwrite: bool = False, ignore_unknown: bool = False,
    progress: Progress = SILENT,
) -> int:  # fmt: skip
    """Writes the model with the LoRAs in it, in the order given; returns how many weights and biases have changed.

    A weight W becomes W + strength (its adapted weight - W), rounded to what it is stored in; a warning says what that
    loses. ignore_unknown: layers that the model does not have are
    left out, and logged. ValueError where a LoRA does not fit; then nothing is written.
    """
    model = Model.opened(path)
    refuse_output_like(path, output, overwrite=overwrite)
    with _under_its_names(model, sources, output, progress, ignore_unknown=ignore_unknown) as parts:
        _refuse_packed(model, sources)
        merge = Merge(model, sources, _planned(model, parts, ignore_unknown=ignore_unknown), Rounding())
        if path.is_dir():
            _write_folder(model, merge, output, progress)
        else:
            write_pieces(output, merge.pieces("", model.files[0][1], progress))
    merge.rounding.tell()
    return merge.rounding.num_changed


def _refuse_packed(model: Model, sources: Sequence[Source]) -> None:
    """ValueError where weights that a LoRA changes are stored in a way that cannot be read."""
    parts = set()
    for layer in (layer for source in sources for layer in source.lora.layers):
        place, whole = model.place(layer), model.whole(layer)
        parts |= {place.part} if place else {one.part for one in whole.places} if whole else set()
    for part, header in model.files:
        if not part or part in parts:
            model.quantised[header.path].check(header.path)


@contextmanager
def _under_its_names(
    model: Model, sources: Sequence[Source], output: Path, progress: Progress, *, ignore_unknown: bool
) -> Iterator[Sequence[Sequence[Source]]]:
    """Each LoRA in one part or two: what has other names than a single file's model is converted to the model's.

    As long as this is open.
    """
    strange = [[layer for layer in s.lora.layers if not (model.place(layer) or model.whole(layer))] for s in sources]
    if model.path.is_dir() or not any(strange):
        yield [[source] for source in sources]
        return
    beside = {"dir": output.parent, "prefix": f".{output.name}.", "suffix": PARTIAL}
    with errors_name(output):
        made = TemporaryDirectory(**beside, ignore_cleanup_errors=True)
    with made as folder:
        yield [
            _converted(
                model,
                source,
                layers,
                Path(folder, f"{number}.safetensors"),
                ignore_unknown=ignore_unknown,
                progress=progress,
            )
            if layers
            else [source]
            for number, (source, layers) in enumerate(zip(sources, strange, strict=True))
        ]


def _converted(
    model: Model, source: Source, strange: Sequence[str], made: Path, *, ignore_unknown: bool, progress: Progress
) -> Sequence[Source]:
    """A LoRA's layers that have the model's names, and the others converted; ValueError that says why they cannot be.

    ignore_unknown: those that the model does not have stay as they are.
    """
    lora, others = source.lora, source.lora.of(strange)
    try:
        denoiser = denoiser_for(others, model.path)
    except ValueError as error:  # not of a kind that other names are known of
        if ignore_unknown:
            return [source]
        raise _unfit(model, lora, strange, error) from error
    try:
        fitted = Fitted.of(others, denoiser, progress, ignore_unknown=ignore_unknown)
        if not fitted.num_layers:
            return [source]
        fitted.write(made, "comfyui")
    except ValueError as error:
        raise _unfit(model, lora, strange, error) from error
    kept = lora.of(lora.layers.keys() - fitted.lora.layers.keys())
    return [Source(kept, source.weight), Source(LoRAFile.opened(made, lora.path), source.weight)]


def _unfit(model: Model, lora: LoRAFile, strange: Sequence[str], error: ValueError) -> ValueError:
    return ValueError(
        f"{lora.path} does not fit {model.path}: {len(strange)} of its {counted(len(lora.layers), 'layer')} "
        f"{'has a name' if len(strange) == 1 else 'have names'} that the model has not, such as {strange[0]}, and it "
        f"cannot be converted: {error}"
    )


def _planned(model: Model, sources: Sequence[Sequence[Source]], *, ignore_unknown: bool) -> Plan:
    """Who changes which module; ValueError that lists what fits none, or not all of it."""
    plan: dict[Place, dict[int, _Share]] = {}
    for number, parts in enumerate(sources):
        misfits: list[str] = []
        unknown: dict[str, str] = {}
        for source, layer in ((part, layer) for part in parts for layer in part.lora.layers):
            placed = _places(model, source, layer)
            if not placed:
                unknown[layer] = absent(layer, source.lora.layers[layer])
                continue
            try:
                for place, own in _cut(model, placed, source.lora.layers[layer]):
                    share = _Share(source, layer, own)
                    if number in plan.setdefault(place, {}):
                        raise ValueError("another name means the same layer")
                    _check(model, place, share)
                    plan[place][number] = share
            except (ValueError, RuntimeError) as error:
                misfits.append(f"{layer}: {error}")
        if unknown and ignore_unknown and any(number in shares for shares in plan.values()):
            warn_of_left_out(unknown)
        else:
            misfits += unknown.values()
        lora, num_layers = parts[0].lora, sum(len(source.lora.layers) for source in parts)
        if misfits or not num_layers:
            raise ValueError(f"{lora.path} does not fit {model.path}: {misfitting(misfits, num_layers, lora.family)}")
    return plan


def _places(model: Model, source: Source, layer: str) -> Place | Whole | None:
    """The module that a LoRA's layer means, or those that it is in the original code; None where there are none.

    Of a file for one net of several, those of that net.
    """
    stated = source.lora.metadata.get(NET)
    net = stated if model.has(stated) else None
    return model.place(layer, net) or model.whole(layer, net)


def _cut(model: Model, found: Place | Whole, parts: Parts) -> list[tuple[Place, Parts]]:
    """The modules that a layer means, each with its parts; ValueError where it cannot be cut."""
    if isinstance(found, Place):
        return [(found, parts)]
    members = [Member(Weighted(torch.zeros(1).expand(model.shape(place)))) for place in found.places]
    cut = zip(found.places, parted(parts, members, swapped=found.swapped), strict=True)
    return [(place, own) for place, own in cut if own]


def _check(model: Model, place: Place, share: _Share) -> None:
    """ValueError where a LoRA's layer does not fit the module's shapes, found before anything is written."""
    parts = share.parts
    for part, parameter in (*OFFSETS.items(), *((("", "weight"),) if share.trained else ())):
        headers = [*model.headers(place, parameter)] if not part or part in parts else []
        if not headers and (not part or part in parts):
            raise ValueError(f"{part or 'the adapter'} has no place: the layer has no {parameter}")
        for header in headers:
            key = place.key(parameter)
            shape = model.shape(place, parameter)
            if not header.dtypes[key].startswith(("F", "BF")) and key not in model.quantised[header.path].scales:
                raise ValueError(f"the model's {parameter} must hold floating-point numbers, got {header.dtypes[key]}")
            if part:
                share.offset(part, shape)
            else:
                _adapter(share, torch.zeros(1).expand(shape))
    if "diff" in parts and (kind := kind_of(parts)) and kind.NEEDS_WEIGHT:
        raise ValueError(f"diff changes the weight that {kind.algorithm} was made for")


def _adapter(share: _Share, weight: Tensor) -> Adapter:
    """Of a LoRA's layer for this weight [n_out, n_in, k…]; ValueError where it does not fit."""
    if weight.ndim < 2:
        raise ValueError(f"{', '.join(sorted(share.trained))} cannot be merged into a weight of {weight.ndim} axes")
    base = Weighted(weight)
    n_out, n_in, *kernel = weight.shape
    adapter = adapter_from_file(layer_of(n_out, n_in, tuple(kernel)), share.trained, base)
    take_papers_lengths(adapter, base, share.source.lora.metadata)
    return adapter


@torch.no_grad()
def _merged(parameter: str, value: Tensor, shares: Sequence[_Share]) -> Tensor:
    """A parameter, float32, with all shares in it; ValueError that names the one that does not fit."""
    for share in shares:
        try:
            part = next(part for part, name in OFFSETS.items() if name == parameter)
            if parameter == "weight" and share.trained:
                new = _adapter(share, value).merged(value)
                value = new if share.source.weight == 1 else value + share.source.weight * (new - value)
            offset = share.offset(part, tuple(value.shape))
            if offset is not None:
                value = value + share.source.weight * offset
        except ValueError as error:
            raise ValueError(f"{share.source.lora.path}: {share.layer}: {error}") from error
    return value


@dataclass(frozen=True)
class Merge:
    """What becomes of a model's files, one after another."""

    model: Model
    sources: Sequence[Source]
    plan: Plan
    rounding: Rounding  # of what was written so far

    def concerned(self, part: str, key: str) -> list[tuple[Place, str]]:
        """The modules in a tensor, each with its parameter there, that the plan is to change."""
        return [
            (place, parameter)
            for place, parameter in held_in(part, key)
            if any(share.touches(parameter) for share in self.plan.get(place, {}).values())
        ]

    def pieces(self, part: str, header: Header, progress: Progress) -> Iterator[bytes | memoryview]:
        """A file of the model with the LoRAs in it, its other tensors as they are, in the order in which they lie."""
        order = sorted(header.places, key=lambda key: header.places[key])
        entries = [(key, header.dtypes[key], header.shapes[key], header.num_bytes(key)) for key in order]
        what = f"merge into the model of {', '.join(map(str, self.sources))}"
        yield header_bytes(entries, derived(header.metadata, what))
        weights = {scale: weight for weight, scale in self.model.quantised[header.path].scales.items()}
        with TensorFile(header) as file:
            for key in tracked(order, "merging", progress, len(order)):
                if self.concerned(part, key):
                    yield bytes_of(self._merged(file, part, key).numbers)
                elif key in weights and self.concerned(part, weights[key]):  # a greater weight needs a greater scale
                    before, value = self._change(file, part, weights[key])
                    scale = before.holding(value).scale
                    assert scale is not None
                    yield bytes_of(scale)
                else:
                    yield from file.pieces(key)

    def _change(self, file: TensorFile, part: str, key: str) -> tuple[StoredWeight, Tensor]:
        """A tensor as it is stored, and the value that it takes, in float32."""
        before = self.model.read(file, key)
        value = before.value.to(torch.float32, copy=True)
        for place, parameter in self.concerned(part, key):
            own = place.within(value)
            own.copy_(_merged(parameter, own, list(self.plan[place].values())))
        return before, value

    def _merged(self, file: TensorFile, part: str, key: str) -> StoredWeight:
        """A tensor as it is written; ValueError that names it where it is not finite."""
        after = self.rounding.stored(*self._change(file, part, key))
        if not after.value.float().isfinite().all():
            raise ValueError(f"{key} must be finite to be saved, got NaN or infinity")
        return after


def _write_folder(model: Model, merge: Merge, output: Path, progress: Progress) -> None:
    """The whole folder beside, then under its name."""
    made = output.with_name(f".{output.name}.{os.getpid()}{PARTIAL}")
    weights = {header.path: (part, header) for part, header in model.files}
    try:
        for source in sorted(path for path in model.path.rglob("*") if path.is_file()):
            target = made / source.relative_to(model.path)
            with errors_name(target):
                target.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix.lower() in PICKLES:
                log.warning("%s is left out: a pickle is neither read nor merged into", source)
            elif source in weights and any(
                merge.concerned(weights[source][0], key) for key in weights[source][1].shapes
            ):
                write_pieces(target, merge.pieces(*weights[source], progress))
            else:
                copied_in_view(source, target, progress)
        with errors_name(output):
            _put(made, output)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _put(made: Path, output: Path) -> None:
    """The folder under its name; what was there goes once it is."""
    before = made.with_name(f"{made.name}.before")
    if output.exists():
        os.replace(output, before)
    try:
        os.replace(made, output)
    except OSError:
        if before.exists():
            os.replace(before, output)
        raise
    shutil.rmtree(before, ignore_errors=True)
