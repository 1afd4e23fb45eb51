"""The names in LoRA files: which layer a key means, and which part of its adapter, in every program's way of writing.

Kohya's `lora_unet_down_blocks_0….lora_down.weight`, diffusers' and PEFT's `unet.down_blocks.0….lora_A.weight`, LyCORIS'
`lycoris_down_blocks_0….hada_w1_a`, ComfyUI's `diffusion_model.input_blocks.1….lora_up.weight`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lorasmith.ldm_names import ldm_names
from lorasmith.types import Aliased, Denoiser

DOWN, UP = "lora_down.weight", "lora_up.weight"
SPELLINGS = (
    (r"\.lora_(A|down)(\.(?!bias)\w+)*", DOWN),
    (r"\.lora_(B|up)(\.(?!bias)\w+)*", UP),
    (r"[._]lora\.down\.weight", DOWN),
    (r"[._]lora\.up\.weight", UP),
    (r"\.lora_linear_layer\.down\.weight", DOWN),
    (r"\.lora_linear_layer\.up\.weight", UP),
    (r"\.lora_magnitude_vector(\.\w+)*", "lora_magnitude_vector"),
    (r"\.w_norm", "diff"),
    (r"\.b_norm", "diff_b"),
    (r"\.(lora_mid\.weight|oft_R\.\w+|lora_[AB][.\w]*)", None),
    (r"\.([^.]+)", None),
)
"""How a key may end, and what that part of an adapter is called here, by kohya and LyCORIS; None: as it is spelt."""
RANKED = ("lora_down.weight", "hada_w1_b", "hada_w2_b", "lokr_w1_b", "lokr_w2_b")
"""The parts that have as many rows as the rank."""
OFFSETS = {"diff": "weight", "diff_b": "bias"}
"""The parts that are added to a parameter of the layer, and its name."""
PREFIXES = (
    "base_model_model_", "lora_unet_", "lora_transformer_", "lora_prior_unet_", "lora_", "lycoris_", "unet_",
    "transformer_", "model_diffusion_model_", "diffusion_model_",
)  # fmt: skip
ORIGINAL_NAMES = {"UNet2DConditionModel": ldm_names}
"""{class of a diffusers net: its config -> {module path: the original checkpoint's}}."""


def split(key: str) -> tuple[str, str]:
    """A key -> the layer as the file calls it, and the part under kohya's or LyCORIS' name ("" where there is none)."""
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
    """Finds the module of a denoiser that a file's layer name means."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.written: dict[str, str] = {}
        self.known: dict[str, set[str]] = {}
        for name, net in denoiser.nets.items():
            original = _original_names(net)
            for path, module in net.named_modules():
                if next(module.parameters(recurse=False), None) is not None:
                    self.written[normal(denoiser.file_key(f"{name}.{path}"))] = f"{name}.{path}"
                    for alias in (f"{name}.{path}", path, path.replace("to_out.0", "to_out"), original.get(path, path)):
                        self.known.setdefault(normal(alias), set()).add(f"{name}.{path}")

        for alias, path in denoiser.aliases().items() if isinstance(denoiser, Aliased) else ():
            for name in _without_prefixes(normal(alias)):
                self.known.setdefault(name, set()).add(path)

    def path(self, layer: str) -> str | None:
        """The path of the layer's module; None where there is none, or more than one."""
        name = normal(layer.replace(".processor.", "."))
        if name in self.written:
            return self.written[name]
        for candidate in _without_prefixes(name):
            found = self.known.get(candidate, set())
            if len(found) == 1:
                return next(iter(found))
        return None


def normal(name: str) -> str:
    """A layer's name as readers of files compare it."""
    return name.replace(".", "_")


def _without_prefixes(name: str) -> Iterator[str]:
    """The name, and what is left of it without programs' prefixes, one after another."""
    yield name
    for prefix in PREFIXES:
        if name.startswith(prefix):
            yield from _without_prefixes(name.removeprefix(prefix))


def _original_names(net: nn.Module) -> dict[str, str]:
    """{module path: the original checkpoint's}, for a net that has one."""
    names = ORIGINAL_NAMES.get(type(net).__name__)
    config: Any = net.config if names else None
    try:
        return names(config) if names else {}
    except ValueError:  # of a kind that the original code never made
        return {}
