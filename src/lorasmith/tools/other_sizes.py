"""Published models at the sizes that LoRAs show: what layers are called does not depend on how wide they are."""

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from lorasmith.adapters.targets import TEXT_NETS
from lorasmith.formats.architectures.architecture import Published
from lorasmith.formats.module_names import ModuleNames, known_originals
from lorasmith.formats.transformer_names import TRANSFORMERS, Original
from lorasmith.models.meta import published_skeleton
from lorasmith.models.reference_configs import PUBLISHED
from lorasmith.tools.lora_layers import LoRAFile
from lorasmith.types import Denoiser

BY_DEPTH = "norm1_context.linear"  # its halves are swapped in the last block alone, whose number nobody knows
Sizes = dict[str, tuple[int, int]]
"""{path of a layer: its outputs and inputs}."""


def at_sizes_of(loras: Sequence[LoRAFile], *, with_texts: bool) -> dict[str, Denoiser]:
    """{a published model: its skeleton with layers as wide as the LoRAs'}: one of each class that has all their layers.

    Of UNets none, whose names depend on their sizes. ValueError where the files contradict each other, do not say a
    size, or name a layer whose meaning depends on the number of blocks.
    """
    found = {}
    for published in _one_of_each_class():
        outline = published_skeleton(published, with_texts=with_texts)
        names = ModuleNames(outline)
        if all(names.path(layer) or names.whole(layer) for lora in loras for layer in lora.layers):
            _resize(outline, _sizes(loras, outline))
            found[published.name] = outline
    return found


def _one_of_each_class() -> Iterator[Published]:
    """The first of each class of transformers."""
    seen = set()
    for model in (model for models in PUBLISHED.values() for model in models):
        kind = model.parts.get("transformer", ("", "", {}))[1]
        if kind in TRANSFORMERS and kind not in seen:
            seen.add(kind)
            yield model


def _resize(denoiser: Denoiser, sizes: Sizes) -> None:
    """Gives a skeleton's linear layers these sizes."""
    for path in sizes:
        if path.endswith(BY_DEPTH):
            raise ValueError(f"{path} depends on how many blocks the model has")
    for path, (n_out, n_in) in sizes.items():
        parent, _, name = path.rpartition(".")
        old = _module(denoiser, path)
        new = nn.Linear(n_in, n_out, bias=old.bias is not None, device="meta")
        _parent(denoiser, parent).register_module(name, new)


def _sizes(loras: Sequence[LoRAFile], denoiser: Denoiser) -> Sizes:
    """Of the layers that the files adapt, and of those that are one with them in the original code."""
    names, sizes = ModuleNames(denoiser), Sizes()
    wholes: list[tuple[Original, int, int]] = []
    for layer, n_out, n_in in _shown(loras):
        path, whole = names.path(layer), names.whole(layer)
        if path:
            _agreed(sizes, path, n_out, n_in)
        elif whole:
            wholes.append((whole, n_out, n_in))
    for whole, n_out, n_in in wholes:
        for path, rows in zip(whole.paths, _rows(whole, denoiser, sizes, n_out=n_out, n_in=n_in), strict=True):
            _agreed(sizes, path, rows, n_in)
    _complete(sizes, denoiser)
    return sizes


def _shown(loras: Sequence[LoRAFile]) -> Iterator[tuple[str, int, int]]:
    """Each layer of the files with its outputs and inputs."""
    for lora in loras:
        for layer in lora.layers:
            up, down, _ = lora.factors(layer)
            if up.ndim != 2:
                raise ValueError(f"{layer} must be a linear layer, got a kernel {list(down.shape)}")
            yield layer, len(up), down.shape[1]


def _rows(
    whole: Original, denoiser: Denoiser, sizes: Mapping[str, tuple[int, int]], *, n_out: int, n_in: int
) -> list[int]:
    """How many rows of a layer of the original code each of its modules has.

    As other layers show them, else in the published proportions, the first one's to its inputs included.
    """
    if all(path in sizes for path in whole.paths):
        rows = [sizes[path][0] for path in whole.paths]
    else:
        modules = [_module(denoiser, path) for path in whole.paths]
        published, first = [module.out_features for module in modules], modules[0]
        rows = [n_out * own // sum(published) for own in published]
        if rows[0] * first.in_features != first.out_features * n_in:
            raise ValueError(f"{whole.name} of {n_out} outputs and {n_in} inputs does not say the rows of its modules")
    if sum(rows) != n_out:
        raise ValueError(f"{whole.name} must have {sum(rows)} outputs, got {n_out}")
    return rows


def _complete(sizes: Sizes, denoiser: Denoiser) -> None:
    """Adds the other modules of the original code's layers, as wide as a known one where they are published so."""
    for name, net in denoiser.nets.items():
        for layer in known_originals(net) if not name.startswith(TEXT_NETS) else ():
            paths = [f"{name}.{path}" for path in layer.paths]
            known = {_module(denoiser, path).out_features: sizes[path] for path in paths if path in sizes}
            for path in paths if known else ():
                if path not in sizes:
                    published = _module(denoiser, path).out_features
                    if published not in known:
                        raise ValueError(f"nothing shows the size of {path}, which {layer.name} holds too")
                    sizes[path] = known[published]


def _agreed(sizes: Sizes, path: str, n_out: int, n_in: int) -> None:
    if sizes.setdefault(path, (n_out, n_in)) != (n_out, n_in):
        raise ValueError(f"{path} has {sizes[path]} outputs and inputs in one place, {(n_out, n_in)} in another")


def _parent(denoiser: Denoiser, path: str) -> nn.Module:
    net, _, module = path.partition(".")
    return denoiser.nets[net].get_submodule(module)


def _module(denoiser: Denoiser, path: str) -> nn.Linear:
    module = _parent(denoiser, path)
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{path} must be a linear layer, got {type(module).__name__}")
    return module
