"""The original transformers' names against diffusers' own converters, row by row."""

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils as converters
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from tiny import TINY
from torch import Tensor, nn

from lorasmith.formats.transformer_names import TRANSFORMERS, original_layers

FLUX = {"num_layers": 2, "num_single_layers": 2}
NETS: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "FluxTransformer2DModel": (
        {**FLUX, "guidance_embeds": True},
        converters.convert_flux_transformer_checkpoint_to_diffusers,
    ),
    "ChromaTransformer2DModel": (
        {**FLUX, "approximator_layers": 2},
        converters.convert_chroma_transformer_checkpoint_to_diffusers,
    ),
    "Flux2Transformer2DModel": (FLUX, converters.convert_flux2_transformer_checkpoint_to_diffusers),
    "SD3Transformer2DModel": (
        {"num_layers": 3, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        converters.convert_sd3_transformer_checkpoint_to_diffusers,
    ),
    "WanTransformer3DModel": (
        {"num_layers": 2, "image_dim": 64, "added_kv_proj_dim": 128},
        converters.convert_wan_transformer_to_diffusers,
    ),
    "ZImageTransformer2DModel": ({"n_layers": 2}, converters.convert_z_image_transformer_checkpoint_to_diffusers),
    "Lumina2Transformer2DModel": ({"num_layers": 2}, converters.convert_lumina2_to_diffusers),
}
"""{class: its config, with layers as wide as they are, which converters count on; what converts its checkpoints}."""
SCALES = {"query_norm": "scale", "key_norm": "scale", "norms.0": "scale", "norms.1": "scale"}


def made(kind: str) -> nn.Module:
    with torch.device("meta"):
        return getattr(diffusers, kind)(**NETS[kind][0])


def numbered(net: nn.Module) -> dict[str, Tensor]:
    """The net's parameters, each row its own number, in one column."""
    state, begin = {}, 0
    for name, parameter in net.state_dict().items():
        rows = parameter.shape[0] if parameter.ndim else 1
        state[name] = torch.arange(begin, begin + rows, dtype=torch.float64).view(-1, 1)
        begin += rows
    return state


def as_original(net: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a net as an original checkpoint has them."""
    paths = [path for path, module in net.named_modules() if list(module.parameters(recurse=False))]
    left, original = dict(state), {}
    for layer in original_layers(type(net).__name__, paths):
        for leaf in ("weight", "bias"):
            parts = [left.pop(f"{path}.{leaf}") for path in layer.paths if f"{path}.{leaf}" in left]
            if parts:
                whole = torch.cat(parts)
                whole = torch.cat(whole.chunk(2)[::-1]) if layer.swapped else whole
                is_scale = layer.name.endswith(tuple(SCALES))
                original[f"{layer.name}.{'scale' if is_scale else leaf}"] = whole
    return original | left


def renamed(kind: str, original: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters outside layers have other names too."""
    if kind == "SD3Transformer2DModel":
        original["pos_embed"] = original.pop("pos_embed.pos_embed")
    return original


@pytest.mark.parametrize("kind", NETS)
def test_the_names_are_those_that_diffusers_converts(kind: str) -> None:
    net = made(kind)
    state = numbered(net)
    converted = NETS[kind][1](renamed(kind, as_original(net, dict(state))), config={})
    assert converted.keys() == state.keys()
    assert not [name for name, tensor in state.items() if not torch.equal(converted[name], tensor)]


def others() -> dict[str, tuple[nn.Module, Mapping[str, str]]]:
    """{a class that NETS lacks: a tiny net, and the parameters outside layers that have other names}."""
    nets = [(tiny.pipe().components.get("transformer"), tiny.original_names) for tiny in TINY.values()]
    return {type(net).__name__: (net, names) for net, names in nets if net and type(net).__name__ not in NETS}


def test_the_names_of_other_classes_are_those_that_diffusers_converts() -> None:
    for kind, (net, names) in others().items():
        state = numbered(net)
        original = {names.get(name, name): tensor for name, tensor in as_original(net, dict(state)).items()}
        if kind == "QwenImageTransformer2DModel":  # whose names are the original ones
            converted = original
        else:
            converted = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"](original, config={})
        assert converted.keys() == state.keys()
        assert not [name for name, tensor in state.items() if not torch.equal(converted[name], tensor)]


def test_every_class_is_tested() -> None:
    assert TRANSFORMERS.keys() == NETS.keys() | others().keys()
