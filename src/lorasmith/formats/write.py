"""LoRA files as each program names them: kohya's tools, diffusers and PEFT, ComfyUI, LyCORIS."""

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.base import Adapter, Member
from lorasmith.adapters.parts import OFFSETS, Parts
from lorasmith.adapters.registry import ADAPTERS, kind_of
from lorasmith.adapters.targets import TEXT_NETS
from lorasmith.formats.architectures.registry import ARCHITECTURES
from lorasmith.formats.dora_magnitude import COMFYUI, PAPER, for_comfyui
from lorasmith.formats.experts import experts
from lorasmith.formats.fused_qkv import joined
from lorasmith.formats.keys import LAYOUT, by_layer
from lorasmith.formats.module_names import UNETS, ModuleNames, class_in_diffusers, originals
from lorasmith.formats.text_encoder_names import text_layer
from lorasmith.formats.transformer_names import TRANSFORMERS
from lorasmith.types import Aliased, Denoiser, LayoutName

State = dict[str, Tensor]
"""{key in a LoRA file: tensor}."""
ORIGINAL_NAMES = {a.transformer: a.original_names for a in ARCHITECTURES if a.transformer}
"""{class in diffusers: when most programs read its LoRAs by the original code's names alone}."""


def best_layout(adapters: AdapterSet, denoiser: Denoiser) -> LayoutName | None:
    """That which most programs read of these adapters; None: the denoiser's own names, where it has some.

    A file of several experts has their own, which tell them apart. One with layers of T5, which diffusers leaves out,
    has kohya's.
    """
    kinds = [kind for net in denoiser.nets.values() if (kind := class_in_diffusers(net)) in TRANSFORMERS]
    is_plain = all(denoiser.file_key(path) == path or path.startswith(TEXT_NETS) for path in adapters.adapters)
    if not is_plain or not kinds or experts(denoiser):
        return None
    model = kinds[0] if len(adapters.algorithms) == 1 else ""
    wanted: set[LayoutName] = {_best(kind, model) for kind in adapters.kinds}
    layout: LayoutName = wanted.pop() if len(wanted) == 1 else "lycoris"
    if layout == "diffusers" and any(_is_of_t5(denoiser.file_key(path)) for path in adapters.adapters):
        layout = "kohya"
    if (layout == "diffusers" and adapters.offsets) or (layout == "comfyui" and not _are_joined(adapters, denoiser)):
        return "lycoris"
    return layout


def _best(kind: type[Adapter], model: str) -> LayoutName:
    """That which most programs read of one algorithm for a class of diffusers."""
    original_names = ORIGINAL_NAMES.get(model, "never")
    if original_names == "always" and not kind.DEPENDS_ON_LAYOUT:
        return "comfyui"
    if kind.is_read_by_diffusers([model]):
        return "diffusers"
    return "comfyui" if original_names == "others" and kind.CAN_FUSE else "lycoris"


def _is_of_t5(layer: str) -> bool:
    text = text_layer(layer)
    return text is not None and text.encoder == "t5"


def _are_joined(adapters: AdapterSet, denoiser: Denoiser) -> bool:
    """Whether they can become those of the original code's layers, as blocks of several sizes cannot."""
    try:
        _named(adapters.file_state(denoiser, torch.bfloat16), denoiser, "comfyui")
    except ValueError:
        return False
    return True


def in_layout(adapters: AdapterSet, denoiser: Denoiser, dtype: torch.dtype, layout: LayoutName | None) -> State:
    """{key in a LoRA file: tensor}, sorted; weights in this dtype. None: the best layout.

    ValueError where the layout has no names for a layer, or no way to hold an adapter.
    """
    state = adapters.file_state(denoiser, dtype)
    layout = layout or best_layout(adapters, denoiser)
    if layout == "comfyui":
        state = for_comfyui(state, denoiser)
    return state if layout is None else _named(state, denoiser, layout)


def refuse_impossible(adapters: AdapterSet, denoiser: Denoiser, layout: LayoutName | None) -> None:
    """ValueError where `in_layout` would raise it."""
    if layout is not None:
        _named(adapters.file_state(denoiser, torch.float32), denoiser, layout)


def metadata_of(adapters: AdapterSet, denoiser: Denoiser, layout: LayoutName | None) -> dict[str, str]:
    """What a file in a layout says of its names, and of its lengths of DoRA."""
    return metadata_in(layout or best_layout(adapters, denoiser), adapters.kinds)


def metadata_in(layout: LayoutName | None, kinds: Collection[type[Adapter]]) -> dict[str, str]:
    """The same; None: the denoiser's own names."""
    depends = any(kind.DEPENDS_ON_LAYOUT for kind in kinds)
    lengths = (COMFYUI if layout == "comfyui" else PAPER) if depends else {}
    return {**lengths, **({LAYOUT: layout} if layout else {})}


def _named(state: State, denoiser: Denoiser, layout: LayoutName) -> State:
    """A LoRA by the denoiser's own names -> by those of a layout."""
    names, named = ModuleNames(denoiser), by_layer(state)
    layers = {path: parts for key, parts in named.items() if (path := names.path(key))}
    assert len(layers) == len(named)
    refuse_several(layers, layout)
    try:
        nets = {path: parts for path, parts in layers.items() if not path.startswith(TEXT_NETS)}
        texts = {path: parts for path, parts in layers.items() if path.startswith(TEXT_NETS)}
        named_texts = _diffusers_texts if layout == "diffusers" else _own_texts
        return dict(sorted((WRITERS[layout](nets, denoiser) | named_texts(texts, denoiser)).items()))
    except ValueError as error:
        raise ValueError(f"file_layout {layout}: {error}") from error


def refuse_several(paths: Iterable[str], layout: LayoutName) -> None:
    """ValueError where layers of two nets would have one name."""
    nets = sorted({path.partition(".")[0] for path in paths if not path.startswith(TEXT_NETS)})
    if layout != "diffusers" and len(nets) > 1:
        raise ValueError(
            f"file_layout {layout}: its names are of one net, got layers of {' and '.join(nets)}: "
            f"each needs a file of its own"
        )


def _own_texts(layers: Mapping[str, Parts], denoiser: Denoiser) -> State:
    """Text encoders' layers as kohya names them, and so does ComfyUI."""
    return {f"{denoiser.file_key(path)}.{part}": tensor for path, own in layers.items() for part, tensor in own.items()}


def _diffusers_texts(layers: Mapping[str, Parts], denoiser: Denoiser) -> State:
    """By the names that diffusers has for them, whatever transformers calls them."""
    names = {path: name for name, path in denoiser.aliases().items()} if isinstance(denoiser, Aliased) else {}
    return _diffusers({names.get(path, path): parts for path, parts in layers.items()}, denoiser)


def _nets(denoiser: Denoiser) -> dict[str, nn.Module]:
    """All but the text encoders."""
    return {name: net for name, net in denoiser.nets.items() if not name.startswith(TEXT_NETS)}


def _kohya(layers: Mapping[str, Parts], denoiser: Denoiser) -> State:
    """Of UNets by diffusers' names, of transformers by the original ones."""
    state: State = {}
    for name, net in _nets(denoiser).items():
        if class_in_diffusers(net) in UNETS:
            state |= _underscored({path: parts for path, parts in layers.items() if path.startswith(f"{name}.")})
        else:
            state |= _underscored({f"unet.{layer}": parts for layer, parts in _wholes(layers, denoiser, name)})
    return state


def _underscored(layers: Mapping[str, Parts], prefix: str = "lora_") -> State:
    return {f"{prefix}{layer.replace('.', '_')}.{p}": t for layer, parts in layers.items() for p, t in parts.items()}


def _comfyui(layers: Mapping[str, Parts], denoiser: Denoiser) -> State:
    """By the original names."""
    wholes = [whole for name in _nets(denoiser) for whole in _wholes(layers, denoiser, name)]
    return {f"diffusion_model.{layer}.{part}": tensor for layer, parts in wholes for part, tensor in parts.items()}


def _lycoris(layers: Mapping[str, Parts], denoiser: Denoiser) -> State:
    """By diffusers' names without the net's."""
    return _underscored({path.partition(".")[2]: parts for path, parts in layers.items()}, "lycoris_")


def _wholes(layers: Mapping[str, Parts], denoiser: Denoiser, name: str) -> list[tuple[str, Parts]]:
    """Each layer of the original code of a net that something is held for."""
    net, found = denoiser.nets[name], []
    for layer in originals(net):
        members = [Member(net.get_submodule(path), layers.get(f"{name}.{path}", {})) for path in layer.paths]
        if any(member.parts for member in members):
            try:
                found.append((layer.name, joined(members, swapped=layer.swapped)))
            except ValueError as error:
                raise ValueError(f"{layer.name} is {', '.join(layer.paths)}, but {error}") from error
    return found


def _diffusers(layers: Mapping[str, Parts], denoiser: Denoiser) -> State:
    """By diffusers' names and PEFT's, which have no alpha: what it scales by is in the weights."""
    classes = {class_in_diffusers(net) for net in denoiser.nets.values()}
    read = [kind for kind in ADAPTERS if kind.is_read_by_diffusers(classes)]
    read.sort(key=lambda kind: kind.DIFFUSERS_READS is not True)  # those that it reads for all models first
    state: State = {}
    for path, parts in layers.items():
        kind = kind_of(parts)
        if offsets := sorted(parts.keys() & OFFSETS.keys()):
            raise ValueError(f"diffusers reads no {', '.join(offsets)}, which {path} has")
        of_peft = kind.to_peft(parts) if kind and kind in read else None
        if of_peft is None:
            names = [one.algorithm for one in read]
            raise ValueError(
                f"diffusers reads {', '.join(names[:-1])} and {names[-1]} for this model, "
                f"got {kind.algorithm if kind else 'none'}"
            )
        state |= {f"{path}.{part}": tensor for part, tensor in of_peft.items()}
    return state


WRITERS: Mapping[LayoutName, Callable[[Mapping[str, Parts], Denoiser], State]] = {
    "kohya": _kohya, "diffusers": _diffusers, "comfyui": _comfyui, "lycoris": _lycoris,
}  # fmt: skip
