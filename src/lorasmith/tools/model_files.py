"""The weights of a model on disk, and which of them a LoRA's layer means: by names alone, nothing is loaded."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lorasmith.adapters.base import normal
from lorasmith.formats.detect import model_family
from lorasmith.formats.module_names import spellings
from lorasmith.formats.text_encoder_names import TextLayer, text_layer
from lorasmith.formats.transformer_names import TRANSFORMERS, Original, original_layers
from lorasmith.formats.unet_names import ldm_names
from lorasmith.models.checkpoints.ldm_configs import UNET, unet_config
from lorasmith.models.checkpoints.scaled import Quantisation, StoredWeight
from lorasmith.models.checkpoints.sdxl import sdxl_unet_config
from lorasmith.models.meta import NETS
from lorasmith.models.sources.kind import local_header, refuse_lora
from lorasmith.models.sources.parts import check_shards
from lorasmith.storage.not_safetensors import other_weights, refuse_pointer
from lorasmith.storage.safetensors import TensorFile
from lorasmith.storage.safetensors_header import Header

BROKEN = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError)
PARTS_OF_TEXTS = {"1": "text_encoder", "2": "text_encoder_2", "3": "text_encoder_3", "t5": "text_encoder_3", "": ""}
"""{the number of a text encoder in a single file: the part}."""
IN_ONE_FILE = {UNET: "unet", "first_stage_model.": "vae", "vae.": "vae", "model_ema.": "ema"}
"""{how names begin in a single file: the part}; what begins otherwise is a text encoder's or the denoising net's."""


class Place(NamedTuple):
    """A module of a model, by where its weights are."""

    part: str  # a folder of a diffusers model; of a single file what the name begins with says
    stem: str  # the name of its tensors without `.weight` or `.bias`
    text: TextLayer | None = None  # what it is of a text encoder
    third: int | None = None  # of OpenCLIP's in_proj_weight and in_proj_bias, where these hold the module
    is_transposed: bool = False  # the stem is the whole name of the weight: OpenCLIP's text_projection

    def key(self, parameter: str) -> str:
        """The name of the tensor that holds a parameter."""
        if self.is_transposed:
            return self.stem
        return f"{self.stem}.{parameter}" if self.third is None else f"{self.stem}.in_proj_{parameter}"

    def within(self, tensor: Tensor) -> Tensor:
        """The tensor of that name -> the view of it that is the module's parameter."""
        return tensor.T if self.is_transposed else tensor if self.third is None else tensor.chunk(3)[self.third]


class Whole(NamedTuple):
    """A layer of the original code that is several modules of a model, or has its halves the other way round."""

    places: tuple[Place, ...]
    swapped: bool


Found = TypeVar("Found", Place, Whole)


@dataclass(frozen=True)
class Model:
    """A diffusers folder or a single file."""

    path: Path
    files: Sequence[tuple[str, Header]]  # of a folder each with its part; of a single file ""
    quantised: Mapping[Path, Quantisation]  # how the weights in each file are stored
    originals: Mapping[str, str]  # {stem: the other name that the UNet's module goes by}, original for diffusers'
    known: Mapping[str, frozenset[Place]]
    wholes: Mapping[str, frozenset[Whole]]

    @classmethod
    def opened(cls, path: Path) -> "Model":
        """ValueError where it is no model with safetensors weights."""
        header = local_header(path)
        files = _folder(path) if header is None else [("", _single(header))]
        originals, quantised = _originals(path, files), {header.path: Quantisation.of(header) for _, header in files}
        known: dict[str, set[Place]] = {}
        wholes: dict[str, set[Whole]] = {}
        places = {place for part, header in files for key in header.shapes for place, _ in held_in(part, key)}
        for place in places:
            for alias in _aliases(place, originals):
                known.setdefault(alias, set()).add(place)
        for name, whole in _in_projs(places):
            wholes.setdefault(name, set()).add(whole)
        for part, layer in _layers_of_transformers(path, files):
            members = tuple(Place(part, stem) for stem in layer.paths)
            if len(members) == 1 and not layer.swapped:
                known.setdefault(normal(layer.name), set()).add(members[0])
            else:
                wholes.setdefault(normal(layer.name), set()).add(Whole(members, layer.swapped))
        return cls(path, files, quantised, originals, _frozen(known), _frozen(wholes))

    def place(self, layer: str, part: str | None = None) -> Place | None:
        """The module that a LoRA's layer means, of one part where it is given; None where there is not just one."""
        return _only_one(self.known, layer, lambda place: part in (None, place.part))

    def whole(self, layer: str, part: str | None = None) -> Whole | None:
        """The same, of layers of the original code that are no single module."""
        return _only_one(self.wholes, layer, lambda whole: part in (None, whole.places[0].part))

    def has(self, part: str | None) -> bool:
        """Whether this is a folder with such a part."""
        return any(part == own for own, _ in self.files)

    def headers(self, place: Place, parameter: str) -> Iterator[Header]:
        """The files with a parameter of a module: several where a folder holds variants."""
        for part, header in self.files:
            key = place.key(parameter)
            if key in header.shapes and (place, parameter) in held_in(part, key):
                yield header

    def read(self, file: TensorFile, key: str) -> StoredWeight:
        """A tensor with its scale; ValueError where the file's weights are packed in a way that is not read."""
        quantised = self.quantised[file.header.path]
        quantised.check(file.header.path)
        return quantised.read(file, key)

    def shape(self, place: Place, parameter: str = "weight") -> tuple[int, ...]:
        """Of a module's parameter."""
        whole = next(self.headers(place, parameter)).shapes[place.key(parameter)]
        return tuple(place.within(torch.empty(whole, device="meta")).shape)

    def lora_name(self, place: Place) -> str:
        """What a LoRA calls the module: kohya of UNets and text encoders, else diffusers or the original code."""
        if place.text is not None:
            return self._text_name(place, place.text)
        stem = _below(place.stem)
        if place.part == "unet":
            return normal(f"lora_unet.{self.originals.get(stem, stem) if self.path.is_file() else stem}")
        return f"{place.part}.{stem}" if place.part else f"diffusion_model.{stem}"

    def _text_name(self, place: Place, text: TextLayer) -> str:
        """T5 is the third wherever it is not alone."""
        number = {"t5": "3", "": ""}.get(text.encoder, text.encoder) if len(self._text_parts) > 1 else ""
        if text.encoder != "t5" and not text.is_clip:
            return normal(f"lora_te{number}.{place.stem}")
        level = "text_model_" if text.is_clip and text.module != "text_projection" else ""
        return f"lora_te{number}_{level}{text.module}"

    @cached_property
    def _text_parts(self) -> set[str]:
        held = (held_in(part, key) for part, header in self.files for key in header.shapes)
        return {place.part for places in held for place, _ in places if place.text is not None}


def _folder(path: Path) -> list[tuple[str, Header]]:
    if not (path / "model_index.json").is_file():
        raise ValueError(f"{path} must be a diffusers folder with a model_index.json, or a safetensors file")
    for config in (path / "model_index.json", *sorted(path.glob("*/config.json"))):
        refuse_pointer(config)
    files = [(file.parent.name, Header.of(file)) for file in sorted(path.glob("*/*.safetensors"))]
    lacking = (path / net for net in NETS if (path / net).is_dir() and net not in {part for part, _ in files})
    for part in (*lacking, *(() if files else (path,))):
        raise ValueError(f"{part} {other_weights(part)}")
    for part in sorted({part for part, _ in files}):
        check_shards(path / part, [header for own, header in files if own == part])
    return files


def _single(header: Header) -> Header:
    refuse_lora(header)
    return header


def _frozen(found: Mapping[str, set[Found]]) -> dict[str, frozenset[Found]]:
    return {name: frozenset(values) for name, values in found.items()}


def _only_one(known: Mapping[str, frozenset[Found]], layer: str, fits: Callable[[Found], bool]) -> Found | None:
    for name in spellings(layer):
        found = [value for value in known.get(name, ()) if fits(value)]
        if len(found) == 1:
            return found[0]
    return None


def _layers_of_transformers(path: Path, files: Sequence[tuple[str, Header]]) -> Iterator[tuple[str, Original]]:
    """The original code's layers of the parts of a folder that it has other names for, each with its part."""
    for part in sorted({part for part, _ in files if part}):
        try:
            kind = json.loads((path / part / "config.json").read_text(encoding="utf-8"))["_class_name"]
        except BROKEN:  # of a part that is no model of diffusers
            continue
        if kind in TRANSFORMERS:
            stems = {key.rpartition(".")[0] for own, header in files if own == part for key in header.shapes}
            yield from ((part, layer) for layer in original_layers(kind, stems))


def part_of(part: str, key: str) -> str:
    """The part of a model that a tensor belongs to; part: its folder, "" in a single file."""
    if part:
        return part
    text = text_layer(key)
    return PARTS_OF_TEXTS[text.encoder] if text else next((n for s, n in IN_ONE_FILE.items() if key.startswith(s)), "")


def held_in(part: str, key: str) -> list[tuple[Place, str]]:
    """The modules that a tensor holds a parameter of, each with the parameter's name: one, or three of OpenCLIP's."""
    stem, _, parameter = key.rpartition(".")
    own = part_of(part, key)
    text = text_layer(f"{part}.{stem}" if part else stem)
    if text and parameter in ("in_proj_weight", "in_proj_bias"):
        whole = text_layer(f"{part}.{stem}.in_proj" if part else f"{stem}.in_proj")
        members = whole.members if whole else ()
        name = parameter.removeprefix("in_proj_")
        return [(Place(own, stem, member, third), name) for third, member in enumerate(members)]
    if text and parameter == "text_projection":
        return [(Place(own, key, text._replace(module=parameter), is_transposed=True), "weight")]
    return [(Place(own, stem, text), parameter)]


def _below(stem: str) -> str:
    """A stem without what a single file puts before the names of a part."""
    return stem[len(next((start for start in IN_ONE_FILE if stem.startswith(start)), "")) :]


def _aliases(place: Place, originals: Mapping[str, str]) -> set[str]:
    """All that programs call a module, but for their prefixes, as `spellings` has them."""
    if place.text is not None:
        return {str(place.text), str(place.text.of_any)}
    stem = _below(place.stem)
    names = {stem, originals.get(stem, stem)}
    names |= {name.replace("to_out.0", "to_out") for name in names}
    return {normal(name) for name in (place.stem, f"{place.part}.{place.stem}", *names)}


def _in_projs(places: Iterable[Place]) -> Iterator[tuple[str, Whole]]:
    """OpenCLIP's layers of queries, keys and values, however the model names these."""
    texts = {place.text: place for place in places if place.text is not None}
    for whole in (text.whole for text in texts):
        if whole and all(member in texts for member in whole.members):
            found = Whole(tuple(texts[member] for member in whole.members), False)
            yield from ((str(name), found) for name in (whole, whole.of_any))


def _originals(path: Path, files: Sequence[tuple[str, Header]]) -> dict[str, str]:
    """Of a UNet in a folder {diffusers' name: the original}, of one in a single file the reverse; else none."""
    try:
        if path.is_file():
            header = files[0][1]
            is_xl = model_family(header.shapes) == "SDXL"
            config = sdxl_unet_config(header, {}) if is_xl else unet_config(header)
            return {original: name for name, original in ldm_names(_completed(config)).items()}
        return ldm_names(_completed(json.loads((path / "unet" / "config.json").read_text(encoding="utf-8"))))
    except BROKEN:  # not such a UNet, or of a kind that the original code never made
        return {}


def _completed(config: Mapping[str, Any]) -> Any:
    """A UNet's config with every default."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(dict(config))
    return unet.config
