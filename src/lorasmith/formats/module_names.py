"""The modules of a net by the names that LoRA files have for them."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import nn

from lorasmith.adapters.base import normal
from lorasmith.adapters.targets import adaptable_layers
from lorasmith.formats.keys import Found, without_prefixes
from lorasmith.formats.text_encoder_names import text_layer
from lorasmith.formats.transformer_names import TRANSFORMERS, Original, original_layers
from lorasmith.formats.unet_names import ldm_names
from lorasmith.types import Aliased, Denoiser

UNETS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, str]]] = {"UNet2DConditionModel": ldm_names}
"""{class of a diffusers net: its config -> {module path: the original checkpoint's}}."""


class ModuleNames:
    """Finds the modules of a denoiser that a file's layer name means."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.modules = {f"{name}.{path}": m for name, net in denoiser.nets.items() for path, m in net.named_modules()}
        self.adaptable = adaptable_layers(denoiser.nets)
        self.written: dict[str, str] = {}
        self.known: dict[str, set[str]] = {}
        self.composed: dict[str, set[Original]] = {}
        for name, net in denoiser.nets.items():
            for path in weighted(net):
                self._add_text(f"{name}.{path}")
                self.written[normal(denoiser.file_key(f"{name}.{path}"))] = f"{name}.{path}"
                for alias in (f"{name}.{path}", path, path.replace("to_out.0", "to_out")):
                    self._add(alias, f"{name}.{path}")
            for layer in known_originals(net):
                members = tuple(f"{name}.{path}" for path in layer.paths)
                if len(members) > 1 or layer.swapped:
                    whole = Original(layer.name, members, layer.swapped)
                    self.composed.setdefault(normal(layer.name), set()).add(whole)
                else:
                    self._add(layer.name, f"{name}.{layer.paths[0]}")
        for alias, path in denoiser.aliases().items() if isinstance(denoiser, Aliased) else ():
            for name in without_prefixes(normal(alias)):
                self._add(name, path)

    def _add(self, alias: str, path: str) -> None:
        self.known.setdefault(normal(alias), set()).add(path)

    def _add_text(self, path: str) -> None:
        """A text encoder's module, and what it is part of in OpenCLIP, by what `spellings` makes of all their names."""
        layer = text_layer(path)
        for text in (layer, layer.of_any) if layer else ():
            self.known.setdefault(str(text), set()).add(path)
            if whole := text.whole:
                members = tuple(f"{path.removesuffix('q_proj')}{name}_proj" for name in "qkv")
                self.composed.setdefault(str(whole), set()).add(Original(str(whole), members))

    def path(self, layer: str) -> str | None:
        """The path of the layer's module; None where there is none, or more than one."""
        return self.written.get(_spelt(layer)) or only_one(self.known, layer)

    def whole(self, layer: str) -> Original | None:
        """The layer of the original code, by the paths of its modules, that no single module is alike."""
        return None if self.path(layer) else only_one(self.composed, layer)


def only_one(known: Mapping[str, Collection[Found]], layer: str) -> Found | None:
    """What a layer's name means; None where it is nothing known, or more than one thing."""
    for name in spellings(layer):
        found = known.get(name, ())
        if len(found) == 1:
            return next(iter(found))
    return None


def spellings(layer: str) -> Iterator[str]:
    """A layer's name without programs' prefixes, one after another; of a text encoder's, what all its names mean."""
    name = _spelt(layer)
    yield from without_prefixes(name)
    if text := text_layer(name):
        yield str(text)


def _spelt(layer: str) -> str:
    return normal(layer.replace(".processor.", "."))


def weighted(net: nn.Module) -> list[str]:
    """The paths of the modules that have weights of their own."""
    return [path for path, m in net.named_modules() if next(m.parameters(recurse=False), None) is not None]


def class_in_diffusers(net: nn.Module) -> str:
    """The name of the net's class; "" where it is not diffusers', as others use the same names."""
    return type(net).__name__ if type(net).__module__.startswith("diffusers.") else ""


def originals(net: nn.Module) -> list[Original]:
    """The net's layers as the original code has them; ValueError that says why where there is none known."""
    kind = class_in_diffusers(net)
    if kind in TRANSFORMERS:
        return original_layers(kind, weighted(net))
    if kind not in UNETS:
        raise ValueError(
            f"the original names are known of {', '.join((*UNETS, *TRANSFORMERS))}, not of {type(net).__name__}"
        )
    config: Any = net.config
    return [Original(name, (path,)) for path, name in UNETS[kind](config).items()]


def known_originals(net: nn.Module) -> list[Original]:
    """Those that are known; a net may be of a kind that the original code never made."""
    try:
        return originals(net)
    except ValueError:
        return []
