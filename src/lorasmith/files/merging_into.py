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
from torch import Tensor, nn

from lorasmith.adapters import adapter_from_file
from lorasmith.adapters.base import Weighted
from lorasmith.adapters.dora import SCALE, DoRAAdapter
from lorasmith.adapters.layer import Adapter, fitting
from lorasmith.dora_scales import COMFYUI, KEY
from lorasmith.experts import NET
from lorasmith.files.conversion import convert
from lorasmith.files.factors import LoRAFile, Parts, layer_of
from lorasmith.files.merging import Source
from lorasmith.files.models import Model, Place, place_of
from lorasmith.files.outputs import Shown, derived, plain, refuse_output
from lorasmith.fused import Member, parted
from lorasmith.header import PICKLES, Header, header_bytes
from lorasmith.layouts import OFFSETS
from lorasmith.loading import MAX_LISTED
from lorasmith.tensor_file import TensorFile, bytes_of
from lorasmith.whole import PARTIAL, errors_name, write_pieces

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

    def offset(self, part: str, shape: tuple[int, ...]) -> Tensor | None:
        """A difference [shape], float32; None where there is none; ValueError where it does not fit."""
        return fitting(self.parts, part, shape).float() if part in self.parts else None


Plan = Mapping[Place, Sequence[_Share]]


def merge_into(
    path: Path, sources: Sequence[Source], output: Path, *, overwrite: bool = False, shown: Shown = plain
) -> int:
    """Writes the model with the LoRAs in it, in the order given; returns how many weights and biases have changed.

    A weight W becomes W + strength (its adapted weight - W). ValueError where a LoRA does not fit; then nothing is
    written.
    """
    model = Model.opened(path)
    if path.is_dir():
        _refuse_folder(output, overwrite=overwrite)
    else:
        refuse_output(output, overwrite=overwrite)
    if path.is_dir():
        return _write_folder(model, _planned(model, sources), sources, output, shown)
    ((_, header),) = model.files
    with _under_its_names(model, sources, output) as sources:
        plan = _planned(model, sources)
        write_pieces(output, _pieces("", header, plan, sources, shown))
    return len(_changed("", header, plan))


@contextmanager
def _under_its_names(model: Model, sources: Sequence[Source], output: Path) -> Iterator[Sequence[Source]]:
    """The LoRAs, those by other names than a single file's converted to its model's, as long as this is open."""
    strange = [[layer for layer in s.lora.layers if not (model.place(layer) or model.whole(layer))] for s in sources]
    if not any(strange):
        yield sources
        return
    beside = {"dir": output.parent, "prefix": f".{output.name}.", "suffix": PARTIAL}
    with errors_name(output):
        made = TemporaryDirectory(**beside, ignore_cleanup_errors=True)
    with made as folder:
        yield [
            _converted(model, source, layers, Path(folder, str(number))) if layers else source
            for number, (source, layers) in enumerate(zip(sources, strange, strict=True))
        ]


def _converted(model: Model, source: Source, strange: Sequence[str], folder: Path) -> Source:
    """The LoRA under the model's names; ValueError that names those that are not, and why there are no others."""
    folder.mkdir()
    made = folder / source.lora.path.name
    try:
        convert(source.lora.path, made, model.path, "comfyui")
    except ValueError as error:
        raise ValueError(
            f"{source.lora.path} does not fit {model.path}: {len(strange)} of its {len(source.lora.layers)} layers "
            f"have names that the model has not, such as {strange[0]}, and it cannot be converted: {error}"
        ) from error
    return Source(LoRAFile.opened(made), source.weight)


def _refuse_folder(output: Path, *, overwrite: bool) -> None:
    if output.suffix.lower() == ".safetensors" or output.is_file():
        raise ValueError(f"output must be a folder, as the model is, got {output}")
    if not output.resolve().parent.is_dir():
        raise ValueError(f"output must be in a folder that exists, got {output}")
    if output.exists() and not overwrite:
        raise ValueError(f"output must not be there yet without --overwrite, got {output}")
    if output.exists() and not (output / "model_index.json").is_file():
        raise ValueError(f"output must be a diffusers folder to be written over, got {output}")


def _planned(model: Model, sources: Sequence[Source]) -> Plan:
    """Who changes which module; ValueError that lists what fits none, or not all of it."""
    plan: dict[Place, list[_Share]] = {}
    for source in sources:
        misfits: list[str] = []
        for layer in source.lora.layers:
            try:
                for place, parts in _placed(model, source, layer):
                    share = _Share(source, layer, parts)
                    if any(other.source is source for other in plan.get(place, [])):
                        raise ValueError("another name means the same layer")
                    _check(model, place, share)
                    plan.setdefault(place, []).append(share)
            except (ValueError, RuntimeError) as error:
                misfits.append(f"{layer}: {error}")
        if misfits or not source.lora.layers:
            more = f"; and {len(misfits) - MAX_LISTED} more" if len(misfits) > MAX_LISTED else ""
            raise ValueError(
                f"{source.lora.path} does not fit {model.path}: {len(misfits)} of its {len(source.lora.layers)} layers "
                f"do not, and it looks like one for {source.lora.family}: {'; '.join(misfits[:MAX_LISTED])}{more}"
            )
    return plan


def _placed(model: Model, source: Source, layer: str) -> list[tuple[Place, Parts]]:
    """The modules that a LoRA's layer means, each with its parts; ValueError where there are none or it cannot be cut.

    Of a file for one net of several, those of that net.
    """
    parts, stated = source.lora.layers[layer], source.lora.metadata.get(NET)
    net = stated if model.has(stated) else None
    place = model.place(layer, net)
    if place is not None:
        return [(place, parts)]
    whole = model.whole(layer, net)
    if whole is None:
        raise ValueError("the model has no such layer")
    members = [Member(Weighted(torch.zeros(1).expand(model.shape(place)))) for place in whole.places]
    cut = zip(whole.places, parted(parts, members, swapped=whole.swapped), strict=True)
    return [(place, own) for place, own in cut if own]


def _check(model: Model, place: Place, share: _Share) -> None:
    """ValueError where a LoRA's layer does not fit the module's shapes, found before anything is written."""
    parts = share.parts
    for part, parameter in (*OFFSETS.items(), *((("", "weight"),) if share.trained else ())):
        headers = [*model.headers(place, parameter)] if not part or part in parts else []
        if not headers and (not part or part in parts):
            raise ValueError(f"{part or 'the adapter'} has no place: the layer has no {parameter}")
        for header in headers:
            key = f"{place.stem}.{parameter}"
            shape = header.shapes[key]
            if not header.dtypes[key].startswith(("F", "BF")):
                raise ValueError(f"the model's {parameter} must hold floating-point numbers, got {header.dtypes[key]}")
            if part:
                share.offset(part, shape)
            else:
                _adapter(share, torch.zeros(1).expand(shape))
    if "diff" in parts and SCALE in parts:
        raise ValueError(f"diff changes the weight that {SCALE} was made for")


def _adapter(share: _Share, weight: Tensor) -> Adapter:
    """Of a LoRA's layer for this weight [n_out, n_in, k…]; ValueError where it does not fit."""
    if weight.ndim < 2:
        raise ValueError(f"{', '.join(sorted(share.trained))} cannot be merged into a weight of {weight.ndim} axes")
    base = Weighted(weight)
    n_out, n_in, *kernel = weight.shape
    adapter = adapter_from_file(layer_of(n_out, n_in, tuple(kernel)), share.trained, base)
    if isinstance(adapter, DoRAAdapter) and share.source.lora.metadata.get(KEY) == COMFYUI[KEY]:
        lengths = adapter.squares.sqrt()  # of W, by which ComfyUI divides, where the paper has those of W + s B A
        adapter.change = nn.Parameter(adapter.magnitudes() / lengths * adapter.norms(base) - lengths)
    return adapter


@torch.no_grad()
def _merged(place: Place, parameter: str, tensor: Tensor, shares: Sequence[_Share]) -> Tensor:
    """A parameter with all shares in it, in its dtype; ValueError that names it where it is not finite."""
    value = tensor.float()
    for share in shares:
        try:
            part = next(part for part, name in OFFSETS.items() if name == parameter)
            if parameter == "weight" and share.trained:
                new = _adapter(share, value).merged(value)
                value = new if share.source.weight == 1 else value + share.source.weight * (new - value)
            offset = share.offset(part, tuple(tensor.shape))
            if offset is not None:
                value = value + share.source.weight * offset
        except ValueError as error:
            raise ValueError(f"{share.source.lora.path}: {share.layer}: {error}") from error
    merged = value.to(tensor.dtype)
    if not merged.float().isfinite().all():
        raise ValueError(f"{place.stem}.{parameter} must be finite to be saved, got NaN or infinity")
    return merged


def _changed(part: str, header: Header, plan: Plan) -> set[str]:
    """The names of the tensors of a file that a plan changes."""
    found = set()
    for key in header.shapes:
        parameter = key.rpartition(".")[2]
        for share in plan.get(place_of(part, key), ()):
            is_offset = any(name == parameter and offset in share.parts for offset, name in OFFSETS.items())
            if is_offset or (parameter == "weight" and share.trained):
                found.add(key)
    return found


def _pieces(
    part: str, header: Header, plan: Plan, sources: Sequence[Source], shown: Shown
) -> Iterator[bytes | memoryview]:
    """A file of the model with what a plan changes, its other tensors as they are, in the order in which they lie."""
    changed = _changed(part, header, plan)
    order = sorted(header.places, key=lambda key: header.places[key])
    entries = [(key, header.dtypes[key], header.shapes[key], header.num_bytes(key)) for key in order]
    what = f"merge into the model of {', '.join(map(str, sources))}"
    yield header_bytes(entries, derived(header.metadata, what))
    with TensorFile(header) as file:
        for key in shown(order):
            if key in changed:
                place, parameter = place_of(part, key), key.rpartition(".")[2]
                yield bytes_of(_merged(place, parameter, file.tensor(key), plan[place]))
            else:
                yield from file.pieces(key)


def _write_folder(model: Model, plan: Plan, sources: Sequence[Source], output: Path, shown: Shown) -> int:
    """The whole folder beside, then under its name."""
    made = output.with_name(f".{output.name}.{os.getpid()}{PARTIAL}")
    weights = {header.path: (part, header) for part, header in model.files}
    num_changed = 0
    try:
        for source in sorted(path for path in model.path.rglob("*") if path.is_file()):
            target = made / source.relative_to(model.path)
            with errors_name(target):
                target.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix.lower() in PICKLES:
                log.warning("%s is left out: a pickle is neither read nor merged into", source)
            elif source in weights and (changed := _changed(*weights[source], plan)):
                num_changed += len(changed)
                write_pieces(target, _pieces(*weights[source], plan, sources, shown))
            else:
                with errors_name(target):
                    shutil.copyfile(source, target)
        with errors_name(output):
            _put(made, output)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return num_changed


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
