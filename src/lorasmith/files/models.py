"""The weights of a model on disk, and which of them a LoRA's layer means: by names alone, nothing is loaded."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import UNet2DConditionModel

from lorasmith.families.ldm_sizes import UNET, unet_config
from lorasmith.families.sdxl_file import sdxl_unet_config
from lorasmith.header import Header
from lorasmith.layouts import normal, spellings
from lorasmith.ldm_names import ldm_names
from lorasmith.looks import is_lora, model_family
from lorasmith.original_names import TRANSFORMERS, Original, original_layers

BROKEN = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError)
ENCODERS = {"text_encoder": ("te", "te1"), "text_encoder_2": ("te2",), "text_encoder_3": ("te3",)}
"""{part: what kohya calls it}."""
IN_ONE_FILE = {
    UNET: "unet", "cond_stage_model.": "text_encoder", "conditioner.embedders.0.": "text_encoder",
    "conditioner.embedders.1.": "text_encoder_2", "first_stage_model.": "vae", "vae.": "vae",
    "text_encoders.": "text_encoder", "model_ema.": "ema",
}  # fmt: skip
"""{how names begin in a single file: the part}; what begins otherwise is the denoising net's."""
TRANSFORMER = re.compile(r"^(transformer|model)\.(?=text_model\.)")


class Place(NamedTuple):
    """A module of a model, by where its weights are."""

    part: str  # a folder of a diffusers model; of a single file what the name begins with says
    stem: str  # the name of its tensors without `.weight` or `.bias`


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
    originals: Mapping[str, str]  # {stem: the other name that the UNet's module goes by}, original for diffusers'
    known: Mapping[str, frozenset[Place]]
    wholes: Mapping[str, frozenset[Whole]]

    @classmethod
    def opened(cls, path: Path) -> "Model":
        """ValueError where it is no model with safetensors weights."""
        files = _folder(path) if path.is_dir() else [("", _single(path))]
        originals = _originals(path, files)
        known: dict[str, set[Place]] = {}
        for part, header in files:
            for place in {place_of(part, key) for key in header.shapes}:
                for alias in _aliases(place, originals):
                    known.setdefault(normal(alias), set()).add(place)
        wholes: dict[str, set[Whole]] = {}
        for part, layer in _layers_of_transformers(path, files):
            places = tuple(Place(part, stem) for stem in layer.paths)
            if len(places) == 1 and not layer.swapped:
                known.setdefault(normal(layer.name), set()).add(places[0])
            else:
                wholes.setdefault(normal(layer.name), set()).add(Whole(places, layer.swapped))
        return cls(path, files, originals, _frozen(known), _frozen(wholes))

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
            key = f"{place.stem}.{parameter}"
            if key in header.shapes and place_of(part, key) == place:
                yield header

    def shape(self, place: Place) -> tuple[int, ...]:
        """Of the module's weight."""
        return next(self.headers(place, "weight")).shapes[f"{place.stem}.weight"]

    def lora_name(self, place: Place) -> str:
        """What a LoRA calls the module: kohya of UNets and text encoders, else diffusers or the original code."""
        stem = _below(place.stem)
        if place.part == "unet":
            return normal(f"lora_unet.{self.originals.get(stem, stem) if self.path.is_file() else stem}")
        if place.part in ENCODERS:
            numbered = any(part == "text_encoder_2" for part, _ in self._parts())
            return normal(f"lora_{ENCODERS[place.part][-1 if numbered else 0]}.{stem}")
        return f"{place.part}.{stem}" if place.part else f"diffusion_model.{stem}"

    def _parts(self) -> Iterable[tuple[str, str]]:
        return ((place_of(part, key).part, key) for part, header in self.files for key in header.shapes)


def _folder(path: Path) -> list[tuple[str, Header]]:
    if not (path / "model_index.json").is_file():
        raise ValueError(f"{path} must be a diffusers folder with a model_index.json, or a safetensors file")
    files = [(file.parent.name, Header.of(file)) for file in sorted(path.glob("*/*.safetensors"))]
    if not files:
        raise ValueError(f"{path} must hold safetensors weights, but it does not")
    return files


def _single(path: Path) -> Header:
    header = Header.of(path)
    if is_lora(header.shapes):
        raise ValueError(f"{path} must be a model, got a LoRA")
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
            stems = {place_of(part, key).stem for own, header in files if own == part for key in header.shapes}
            yield from ((part, layer) for layer in original_layers(kind, stems))


def place_of(part: str, key: str) -> Place:
    """Where a tensor belongs."""
    found = part or next((name for start, name in IN_ONE_FILE.items() if key.startswith(start)), "")
    return Place(found, key.rpartition(".")[0])


def _below(stem: str) -> str:
    """A stem without what a single file puts before the names of a part."""
    start = next((start for start in IN_ONE_FILE if stem.startswith(start)), "")
    return TRANSFORMER.sub("", stem[len(start) :])


def _aliases(place: Place, originals: Mapping[str, str]) -> set[str]:
    """All that programs call a module, but for their prefixes."""
    stem = _below(place.stem)
    names = {stem, originals.get(stem, stem)}
    if place.part in ENCODERS:
        names |= {stem if stem.startswith("text_model.") else f"text_model.{stem}"}
        names |= {f"{te}.{name}" for te in (*ENCODERS[place.part], place.part) for name in names}
    names |= {name.replace("to_out.0", "to_out") for name in names}
    return {place.stem, f"{place.part}.{place.stem}"} | names


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
