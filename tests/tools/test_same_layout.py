"""merge of LoRAs under different names: by the formula, for every family; the file is in one layout."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiers import table
from tiny import made
from torch import Tensor

from lorasmith.adapters.targets import adaptable_layers
from lorasmith.formats.architectures.registry import ARCHITECTURES
from lorasmith.formats.module_names import known_originals
from lorasmith.formats.read import adapters_from
from lorasmith.formats.write import in_layout
from lorasmith.models.load import family_of, load_model
from lorasmith.models.meta import published_skeleton
from lorasmith.tools.merge import Source, merge
from lorasmith.types import Denoiser, LayoutName

MODELS = {model.name: model for architecture in ARCHITECTURES for model in architecture.published}
PAIRS: list[tuple[str, LayoutName, LayoutName]] = [
    ("Stable Diffusion 1.5", "kohya", "comfyui"), ("SDXL", "comfyui", "diffusers"), ("SDXL", "kohya", "lycoris"),
    ("SD 3.5 medium", "diffusers", "kohya"), ("FLUX.1", "kohya", "diffusers"), ("FLUX.1", "diffusers", "kohya"),
    ("FLUX.1", "lycoris", "comfyui"), ("Chroma1", "diffusers", "comfyui"), ("FLUX.2 klein 4B", "diffusers", "kohya"),
    ("Qwen-Image", "lycoris", "diffusers"), ("Wan 2.1 1.3B", "comfyui", "diffusers"),
    ("Z-Image", "kohya", "diffusers"), ("Lumina Image 2.0", "diffusers", "comfyui"),
]  # fmt: skip
Factors = Mapping[str, tuple[Tensor, Tensor]]


def layers_of(denoiser: Denoiser) -> list[str]:
    """Some that are one in the original code, some that are not, and some of each text encoder."""
    found = []
    for name, net in denoiser.nets.items():
        if name.startswith("text_encoder"):
            found += [p for p in adaptable_layers({name: net}) if "layers.0.self_attn" in p or "block.0." in p][:3]
        else:
            wholes = [layer.paths for layer in known_originals(net) if len(layer.paths) > 1]
            single = [layer.paths for layer in known_originals(net) if len(layer.paths) == 1]
            inside = [paths for paths in single if ".0." in paths[0] and ("attn" in paths[0] or "ff" in paths[0])]
            layers = adaptable_layers({name: net})
            found += [
                f"{name}.{p}"
                for paths in (*wholes[:2], *wholes[-1:], *inside)
                for p in paths
                if f"{name}.{p}" in layers
            ][:12]
    return found


def random_lora(denoiser: Denoiser, layers: list[str], rank: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in layers:
        weight = adaptable_layers(denoiser.nets)[layer].weight
        assert isinstance(weight, Tensor)
        shapes = (len(weight), rank, *[1] * (weight.ndim - 2)), (rank, *weight.shape[1:])
        found[layer] = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    return found


def written(path: Path, denoiser: Denoiser, lora: Factors, layout: LayoutName) -> Source:
    state = {f"{layer}.lora_{w}.weight": t for layer, pair in lora.items() for w, t in zip("BA", pair, strict=True)}
    named = in_layout(adapters_from(state, denoiser), denoiser, torch.float32, layout)
    save_file({key: tensor.contiguous() for key, tensor in named.items()}, path)
    return Source.parsed(str(path))


def product(pair: tuple[Tensor, Tensor]) -> Tensor:
    """What a layer's delta makes of three vectors."""
    up, down = (factor.flatten(1) for factor in pair)
    return up @ (down @ torch.randn(down.shape[1], 3, generator=torch.Generator().manual_seed(9)))


def check_sum(tmp_path: Path, denoiser: Denoiser, one: LayoutName, other: LayoutName) -> None:
    """Two LoRAs in these layouts that share layers are merged by the formula, into the first one's layout."""
    layers = layers_of(denoiser)
    a, b = random_lora(denoiser, layers[::2] + layers[1:2], 2, 0), random_lora(denoiser, layers[1:], 1, 1)
    assert a.keys() & b.keys() and a.keys() - b.keys() and b.keys() - a.keys()
    sources = [
        Source(written(tmp_path / "a.safetensors", denoiser, a, one).lora, 0.5),
        Source(written(tmp_path / "b.safetensors", denoiser, b, other).lora, -2.0),
    ]
    merge(sources, tmp_path / "c.safetensors")
    state = load_file(tmp_path / "c.safetensors")
    again = adapters_from(state, denoiser)
    assert again.adapters.keys() == a.keys() | b.keys()
    for layer, adapter in again.adapters.items():
        parts = adapter.file_tensors(torch.float32)
        assert adapter.rank is not None
        found = product((parts["lora_up.weight"], parts["lora_down.weight"])) * float(parts["alpha"]) / adapter.rank
        expected = sum(weight * product(lora[layer]) for weight, lora in ((0.5, a), (-2.0, b)) if layer in lora)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)
    assert state.keys() == in_layout(again, denoiser, torch.float32, one).keys()
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "b.safetensors", "c.safetensors"}


@table(("model", "one", "other"), PAIRS, quick=[PAIRS[0], PAIRS[6], PAIRS[11]])
def test_layers_add_up_under_the_first_one_s_names(
    tmp_path: Path, model: str, one: LayoutName, other: LayoutName
) -> None:
    check_sum(tmp_path, published_skeleton(MODELS[model], with_texts=True), one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("Wan 2.1", "comfyui", "diffusers"), ("FluxPipeline", "kohya", "diffusers"),
        ("StableDiffusion3Pipeline", "diffusers", "kohya"),
    ],
)  # fmt: skip
def test_no_published_model_needs_to_have_such_sizes(
    tmp_path: Path, name: str, one: LayoutName, other: LayoutName
) -> None:
    pipe = made(name)
    has_texts = family_of(type(pipe).__name__, pipe).TEXTS is not None
    check_sum(tmp_path, load_model(pipe, with_texts=has_texts).denoiser, one, other)


def pair(name: str, n_out: int, n_in: int) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": torch.randn(2, n_in), f"{name}.lora_B.weight": torch.randn(n_out, 2)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pair("transformer.layers.0.attn.to_q", 24, 24), pair("diffusion_model.layers.0.attention.qkv", 48, 24)),
        (pair("transformer.layers.0.attn.to_q", 24, 24), pair("diffusion_model.layers.0.feed_forward.w1", 64, 24)),
        (
            pair("transformer.transformer_blocks.0.attn.to_q", 24, 24),
            pair("diffusion_model.joint_blocks.0.x_block.attn.qkv", 96, 32),
        ),
        (
            pair("transformer.transformer_blocks.1.norm1_context.linear", 48, 24),
            pair("diffusion_model.joint_blocks.0.x_block.attn.proj", 24, 24),
        ),
        (
            pair("lora_unet_transformer_blocks_0_attn_add_q_proj", 24, 24),
            pair("transformer.transformer_blocks.0.attn.to_q", 24, 24),
        ),
    ],
    ids=["heads shared otherwise", "heads unknown", "contradictions", "names by depth", "any transformer"],
)
def test_sizes_that_do_not_say_which_rows_are_whose(
    tmp_path: Path, one: dict[str, Tensor], other: dict[str, Tensor]
) -> None:
    sources = []
    for name, state in (("a", one), ("b", other)):
        save_file(state, tmp_path / f"{name}.safetensors")
        sources.append(Source.parsed(str(tmp_path / f"{name}.safetensors")))
    with pytest.raises(ValueError, match=r"must name layers alike .* convert one of them first|made for"):
        merge(sources, tmp_path / "c.safetensors")
    assert not (tmp_path / "c.safetensors").exists()
