"""GLoRA against its formula, and against LyCORIS from training to the merged model; test_lycoris.py has its layers."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris_layers import lycoris_layer
from torch import Tensor, nn

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import GLoRA
from lorasmith.adapters.base import Layer, Member
from lorasmith.adapters.glora import GLoRAAdapter
from lorasmith.adapters.registry import adapter_from_file, kind_of
from lorasmith.adapters.targets import Targets
from lorasmith.api import train_lora
from lorasmith.demo import BASE
from lorasmith.formats import lora_file
from lorasmith.formats.keys import by_layer
from lorasmith.formats.read import adapters_from
from lorasmith.models.load import load_model
from lorasmith.tools.inspect import inspected
from lorasmith.tools.merge import Source, merge
from lorasmith.tools.merge_into_model import merge_into

logging.getLogger("LyCORIS").setLevel(logging.ERROR)


@pytest.fixture
def adapter(sample: Any, filled: Any) -> Any:
    return filled(GLoRA(rank=3, alpha=2.0).build(sample.sizes, "layer", 0, sample.module))


def delta(adapter: Any, weight: Tensor) -> Tensor:
    """s (W A1 A2 + B1 B2), of the formula."""
    a1, a2, b1, b2 = (factor.detach().flatten(1) for factor in (adapter.a1, adapter.a2, adapter.b1, adapter.b2))
    return 2 / 3 * (torch.einsum("oi...,ij,jk->ok...", weight, a1, a2) + (b1 @ b2).view(weight.shape))


def test_output_gradients_and_merged_weight_are_the_formula_s(sample: Any, adapter: Any) -> None:
    weight, x = sample.module.weight.detach(), sample.x.clone().requires_grad_()
    expected = sample.run(x, weight + delta(adapter, weight))
    torch.testing.assert_close(sample.adapted(adapter), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter.merged(weight), weight + delta(adapter, weight), rtol=1e-4, atol=1e-5)

    def through_the_weight(*factors: Tensor) -> Tensor:
        a1, a2, b1, b2 = (factor.flatten(1) for factor in factors)
        change = torch.einsum("oi...,ij,jk->ok...", weight, a1, a2) + (b1 @ b2).view(weight.shape)
        return sample.run(x, weight + 2 / 3 * change)

    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    factors = [*adapter.parameters()]
    actual = torch.autograd.grad(sample.adapted(adapter, x), [x, *factors], grad)
    wanted = torch.autograd.grad(through_the_weight(*factors), [x, *factors], grad)
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_trained_saved_continued_and_merged(tmp_path: Path) -> None:
    """What LyCORIS makes of the file is what training computed with, and what the merged model computes."""
    quick: dict[str, Any] = {"learning_rate": 0.01, "rank": 2, "training_dtype": "fp32", "lora_dtype": "fp32"}
    latents, captions = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), ["a cat"] * 4
    result = train_lora(BASE, latents, captions, steps=3, algorithm="GLoRA", **quick)
    path = tmp_path / "glora.safetensors"
    lora_file.write(path, result.lora, {"lorasmith.steps": "3"})
    state, metadata = lora_file.read(path)
    denoiser = load_model(BASE).denoiser
    adapters = adapters_from(state, denoiser, metadata)
    assert adapters.algorithms == ["GLoRA"] and adapters.ranks == [2]

    more = train_lora(BASE, latents, captions, steps=2, existing_lora=path, **quick)
    assert more.steps == 5 and any((more.lora[key] != state[key]).any() for key in state)

    assert merge_into(BASE, [Source.parsed(str(path))], tmp_path / "model") == len(adapters.adapters)
    unet, merged = denoiser.nets["unet"].float(), load_model(tmp_path / "model").denoiser.nets["unet"]
    for name, parts in by_layer(state).items():
        (module,) = (p.removeprefix("unet.") for p in adapters.adapters if f"lora_{p.replace('.', '_')}" == name)
        layer: Any = unet.get_submodule(module)
        theirs = lycoris_layer({f"{name}.{p}": t for p, t in parts.items()}, name, layer)
        expected = layer.weight.detach() + theirs.get_diff_weight()[0].detach()
        assert not torch.equal(expected, layer.weight)
        found: Any = merged.get_submodule(module).weight
        torch.testing.assert_close(found.detach().float(), expected, rtol=1e-3, atol=1e-4)  # it is in 16 bits


def test_what_the_tools_say_of_it(tmp_path: Path) -> None:
    denoiser = load_model(BASE).denoiser
    adapters = AdapterSet.new(denoiser, GLoRA(rank=2), Targets(), 0)
    path = tmp_path / "a.safetensors"
    lora_file.write(path, adapters.file_state(denoiser, torch.float32))
    facts = inspected(path).facts
    assert facts["algorithms"] == {"GLoRA": len(adapters.adapters)} and facts["not_read"] == {}
    assert facts["ranks"] == {"2": len(adapters.adapters)}
    source = Source.parsed(str(path))
    with pytest.raises(ValueError, match="holds GLoRA, which depends on the model's weights: merge it into the model"):
        merge([source, source], tmp_path / "b.safetensors")


def test_layers_that_are_one_in_the_original_code(filled: Any) -> None:
    """A whole is cut into its members, each with all of A; several cannot become one."""
    whole = nn.Linear(6, 8, bias=False)
    adapter: Any = filled(GLoRA(rank=2).build(Layer.of("layer", whole), "layer", 0, whole))
    members = [Member(nn.Linear(6, rows)) for rows in (3, 5)]
    parts = GLoRAAdapter.split(adapter.file_tensors(torch.float32), members)
    merged = adapter.merged(whole.weight.detach()).split([3, 5])
    for own, rows, expected in zip(parts, whole.weight.detach().split([3, 5]), merged, strict=True):
        one = adapter_from_file(Layer.of("layer", nn.Linear(6, len(rows))), own)
        torch.testing.assert_close(one.merged(rows), expected)
    with pytest.raises(ValueError, match="GLoRA changes the inputs of several layers in several ways"):
        GLoRAAdapter.fuse([Member(member.base, own) for member, own in zip(members, parts, strict=True)])
    assert kind_of(parts[0]) is GLoRAAdapter
