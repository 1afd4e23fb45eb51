"""The names in LoRA files: which layer a key means, and which part of its adapter, in every program's way of writing.

Kohya's `lora_unet_down_blocks_0….lora_down.weight`, diffusers' and PEFT's `unet.down_blocks.0….lora_A.weight`, LyCORIS'
`lycoris_down_blocks_0….hada_w1_a`, ComfyUI's `diffusion_model.input_blocks.1….lora_up.weight`. Kohya's and ComfyUI's of
transformers are by the original code, which makes one layer of several.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from lorasmith.ldm_names import ldm_names
from lorasmith.original_names import TRANSFORMERS, Original, original_layers
from lorasmith.text_names import text_layer
from lorasmith.types import Aliased, Denoiser

DOWN, UP = "lora_down.weight", "lora_up.weight"
DOWN_BIAS, UP_BIAS = "lora_down.bias", "lora_up.bias"
SPELLINGS = (
    (r"\.lora_(A|down)(\.\w+)*\.bias", DOWN_BIAS),
    (r"\.lora_(B|up)(\.\w+)*\.bias", UP_BIAS),
    (r"\.lora_(A|down)(\.(?!bias)\w+)*", DOWN),
    (r"\.lora_(B|up)(\.(?!bias)\w+)*", UP),
    (r"[._]lora\.down\.weight", DOWN),
    (r"[._]lora\.up\.weight", UP),
    (r"\.lora_linear_layer\.down\.weight", DOWN),
    (r"\.lora_linear_layer\.up\.weight", UP),
    (r"\.lora_magnitude_vector(\.\w+)*", "lora_magnitude_vector"),
    (r"\.w_norm", "diff"),
    (r"\.b_norm", "diff_b"),
    (r"(\.lora_linear_layer|[._]lora)\.alpha", "alpha"),
    (r"\.oft_R(\.\w+)*", "oft_R.weight"),
    (r"\.(lora_E|ia3_l|boft_[Rs]|vera_lambda_[bd]|hra_u)\.\w+", None),
    (r"\.(lora_mid\.weight|[ab][12]\.weight)", None),
    (r"\.([^.]+)", None),
)
"""How a key may end, and what that part of an adapter is called here, by kohya and LyCORIS; None: as it is spelt."""
LAYOUT = "lorasmith.file_layout"
"""The key in a file's metadata that says which layout its names are of, where they are not the denoiser's own."""
RANKED = ("lora_down.weight", "hada_w1_b", "hada_w2_b", "lokr_w1_b", "lokr_w2_b")
"""The parts that have as many rows as the rank."""
OFFSETS = {"diff": "weight", "diff_b": "bias"}
"""The parts that are added to a parameter of the layer, and its name."""
XLABS = re.compile(
    r"((?:.*\.)?(?P<block>double|single)_blocks\.\d+)\.processor\.(?P<layer>\w+_lora[12]?)\.(?P<part>down|up)\.weight"
)
XLABS_LAYERS = {
    ("double", "qkv_lora1"): "img_attn.qkv", ("double", "proj_lora1"): "img_attn.proj",
    ("double", "qkv_lora2"): "txt_attn.qkv", ("double", "proj_lora2"): "txt_attn.proj",
    ("single", "qkv_lora"): "linear1", ("single", "proj_lora"): "linear2",
}  # fmt: skip
"""{(kind of block, XLabs' name of a layer of Flux.1): the original code's}; of linear1 they adapt q, k and v alone."""
PREFIXES = (
    "_orig_mod_", "module_", "pipe_dit_", "base_model_model_", "lora_unet_", "lora_transformer_", "lora_prior_unet_",
    "lora_", "lycoris_", "unet_", "transformer_", "model_diffusion_model_", "diffusion_model_",
)  # fmt: skip
UNETS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, str]]] = {"UNet2DConditionModel": ldm_names}
"""{class of a diffusers net: its config -> {module path: the original checkpoint's}}."""


def split(key: str) -> tuple[str, str]:
    """A key -> the layer as the file calls it, and the part under kohya's or LyCORIS' name ("" where there is none).

    XLabs' layers are called by the original code's names.
    """
    own = XLABS.fullmatch(key)
    if own and (own["block"], own["layer"]) in XLABS_LAYERS:
        return f"{own[1]}.{XLABS_LAYERS[own['block'], own['layer']]}", DOWN if own["part"] == "down" else UP
    for ending, part in SPELLINGS:
        match = re.search(f"(?<=.){ending}$", key)
        if match:
            return key[: match.start()], part or match[1]
    return key, ""


def by_layer(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A LoRA's tensors -> {layer as the file calls it: {part: tensor}}; ValueError where two keys mean the same."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        layer, part = split(key)
        parts = layers.setdefault(layer, {})
        if part in parts:
            raise ValueError(f"{key} must be the only {part} of {layer}, but there is another")
        parts[part] = tensor
    return layers


class ModuleNames:
    """Finds the modules of a denoiser that a file's layer name means."""

    def __init__(self, denoiser: Denoiser) -> None:
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


Found = TypeVar("Found")


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


def normal(name: str) -> str:
    """A layer's name as readers of files compare it."""
    return name.replace(".", "_")


def without_prefixes(name: str) -> Iterator[str]:
    """The name, and what is left of it without programs' prefixes, one after another."""
    yield name
    for prefix in PREFIXES:
        if name.startswith(prefix):
            yield from without_prefixes(name.removeprefix(prefix))


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
