"""LoRAs that name layers in different ways, converted to one layout, so that one layer has one name."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from lorasmith.adapters.base import normal
from lorasmith.formats.detect import lora_family
from lorasmith.formats.text_encoder_names import text_layer
from lorasmith.formats.transformer_names import TRANSFORMERS
from lorasmith.models.reference_configs import PUBLISHED
from lorasmith.reporting.progress import SILENT, Progress
from lorasmith.storage.atomic import PARTIAL, errors_name
from lorasmith.tools.convert import fitted_to_published
from lorasmith.tools.lora_layers import LoRAFile
from lorasmith.types import LayoutName

UNET = {
    "original": re.compile(r"(input|output|middle)_blocks?_|time_embed_\d|label_emb_"),
    "diffusers": re.compile(r"(down|up|mid)_blocks?_|(time|add)_embedding_"),
}
OPEN_CLIP = "resblocks"
PREFIX = re.compile(
    r"(_orig_mod\.|module\.|base_model\.model\.|pipe\.dit\.)*"
    r"(lora_unet_|lora_transformer_|lora_prior_unet_|lora_|lycoris_|unet\.|transformer\.|(model\.)?diffusion_model\.)?"
)
SECOND = re.compile(r"(?<=transformer)_2(?=\.)")  # of two experts in one file
LAYOUTS: Mapping[str, LayoutName] = {
    "lora_unet_": "kohya", "lora_te": "kohya", "unet.": "diffusers", "transformer.": "diffusers",
    "text_encoder": "diffusers", "diffusion_model.": "comfyui", "lycoris_": "lycoris",
}  # fmt: skip
"""{how names of layers begin: the layout}."""
WITH_KOHYAS_TEXTS = ("kohya", "comfyui", "lycoris")
"""The layouts in which text encoders have kohya's names."""
EVERY: tuple[LayoutName, ...] = ("kohya", "diffusers", "lycoris")


@dataclass(frozen=True)
class Way:
    """How a file names its layers."""

    prefixes: frozenset[str]  # what stands before the denoiser's
    texts: frozenset[str]  # and before the text encoders', kohya's "lora_te" whatever its number
    codes: frozenset[str]  # whose names they are: diffusers', the original code's, OpenCLIP's

    @classmethod
    def of(cls, lora: LoRAFile, kinds: Collection[str]) -> "Way":
        """kinds: the classes in diffusers of the transformers that it may be for."""
        texts = {layer for layer in lora.layers if text_layer(layer)}
        others = [SECOND.sub("", layer) for layer in lora.layers if layer not in texts]
        codes = {code for layer in others for code in _codes(canonical(layer), kinds)}
        codes |= {"OpenCLIP" if OPEN_CLIP in layer else "transformers" for layer in texts}
        return cls(frozenset(map(_prefix, others)), frozenset(map(_text_prefix, texts)), frozenset(codes))

    @property
    def layout(self) -> LayoutName | None:
        """That which has such names, where there is one."""
        starts = self.prefixes or self.texts
        found: set[LayoutName] = {
            layout for one in starts for start, layout in LAYOUTS.items() if one.startswith(start)
        }
        return found.pop() if len(found) == 1 and len(starts) == 1 else None

    def __or__(self, other: "Way") -> "Way":
        return Way(self.prefixes | other.prefixes, self.texts | other.texts, self.codes | other.codes)

    @property
    def is_one(self) -> bool:
        """Whether the names fit together in one file, and one layer has one of them."""
        fits = self.texts == {"lora_te"} if self.layout in WITH_KOHYAS_TEXTS else len(self.texts) == 1
        return len(self.prefixes) <= 1 and self.has_one_code and (fits or not self.texts or not self.prefixes)

    @property
    def has_one_code(self) -> bool:
        return not self.codes >= {"original", "diffusers"} and not self.codes >= {"OpenCLIP", "transformers"}


def canonical(layer: str) -> str:
    """A layer's name without the prefixes of programs; of a text encoder's layer, what all of its names mean."""
    text = text_layer(layer)
    return str(text) if text else normal(layer[len(_prefix(layer)) :].replace(".processor.", "."))


def _prefix(layer: str) -> str:
    match = PREFIX.match(layer)
    assert match is not None
    return match[0]


def _text_prefix(layer: str) -> str:
    return "lora_te" if layer.startswith("lora_te") else layer.partition(".")[0].rstrip("_0123456789")


def _codes(name: str, kinds: Collection[str]) -> Iterator[str]:
    """Whose a layer's name is: of UNets by their blocks, of transformers by what tells their two names apart."""
    yield from (code for code, pattern in UNET.items() if pattern.match(name))
    for kind in kinds:
        original, diffusers = _patterns(kind)
        if bool(original.fullmatch(name)) != bool(diffusers.fullmatch(name)):
            yield "original" if original.fullmatch(name) else "diffusers"


@cache
def _patterns(kind: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """The original code's names of a transformer's layers, and diffusers'."""
    table = TRANSFORMERS[kind]
    members = {path for paths in table.values() for path in paths}
    return _any_of(table.keys() - members), _any_of(members - table.keys())


def _any_of(names: Collection[str]) -> re.Pattern[str]:
    found = (re.escape(normal(name)).replace(r"\{\}", r"\d+") for name in names)
    return re.compile("|".join(name.replace("to_out_0", "to_out(_0)?") for name in found) or r"(?!)")


@contextmanager
def named_alike(loras: Sequence[LoRAFile], output: Path, progress: Progress = SILENT) -> Iterator[Sequence[LoRAFile]]:
    """The files under one layout, the first one's where that can hold all of them, as long as this is open.

    Those that are named alike stay as they are. ValueError where they fit no published model, as for others nobody
    knows which names mean the same.
    """
    family = lora_family({layer: parts for lora in loras for layer, parts in lora.layers.items()})
    kinds = {kind for model in PUBLISHED.get(family, ()) for _, kind, _ in model.parts.values() if kind in TRANSFORMERS}
    ways = [Way.of(lora, kinds) for lora in loras]
    if _are_alike(ways, loras):
        yield loras
        return
    layouts: list[LayoutName] = list(dict.fromkeys([*(layout for way in ways if (layout := way.layout)), *EVERY]))
    beside = {"dir": output.parent, "prefix": f".{output.name}.", "suffix": PARTIAL}
    with errors_name(output):
        made = TemporaryDirectory(**beside, ignore_cleanup_errors=True)
    with made as folder:
        yield _converted(loras, layouts, Path(folder), progress)


def _are_alike(ways: Sequence[Way], loras: Sequence[LoRAFile]) -> bool:
    whole = ways[0]
    for way in ways[1:]:
        whole |= way
    first, *others = [{canonical(layer) for layer in lora.layers} for lora in loras]
    return whole.is_one or (ways[0].is_one and whole.has_one_code and all(names <= first for names in others))


def _converted(
    loras: Sequence[LoRAFile], layouts: Sequence[LayoutName], folder: Path, progress: Progress
) -> Sequence[LoRAFile]:  # fmt: skip
    """In the first of these layouts that has a way to say all of them."""
    files = " and ".join(str(lora.path) for lora in loras)
    refused: list[ValueError] = []
    for layout in layouts:
        paths = [folder / f"{layout}-{number}.safetensors" for number in range(len(loras))]
        try:
            fits = fitted_to_published(loras, layout, progress=progress)
        except ValueError as error:
            raise ValueError(
                f"{files} must name layers alike to be added up, but do not, and {error}: "
                f"convert one of them first, with the model that they are for"
            ) from error
        try:
            for fitted, path in zip(fits, paths, strict=True):
                fitted.write(path, layout)
        except ValueError as error:
            refused.append(error)
            continue
        return [LoRAFile.opened(path, lora.path) for path, lora in zip(paths, loras, strict=True)]
    raise ValueError(
        f"{files} must name layers alike to be added up, but do not, and no layout holds both: {refused[0]}"
    ) from refused[0]
