"""DoRA's lengths as each program reads them: the same weights by ComfyUI's formula, the paper's, LyCORIS and PEFT."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from lycoris_layers import lycoris_layer
from torch import Tensor, nn

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import DoRA
from lorasmith.adapters.hooks import attached
from lorasmith.adapters.targets import Targets, adaptable_layers
from lorasmith.api import train_lora
from lorasmith.formats import lora_file
from lorasmith.formats.dora_magnitude import COMFYUI, PAPER, for_comfyui
from lorasmith.formats.keys import by_layer
from lorasmith.formats.read import adapters_from
from lorasmith.models.families.sd import StableDiffusion, StableDiffusionDenoiser
from lorasmith.prepare.share import shared_copy

logging.getLogger("LyCORIS").setLevel(logging.ERROR)
TARGETS = Targets(preset="none", include=(r"up_blocks.1.*(to_q|ff.net.0.proj|conv1|proj_in)",))
QUICK: dict[str, Any] = {
    "steps": 2, "rank": 2, "alpha": 3.0, "learning_rate": 0.05, "algorithm": "DoRA", "targets": TARGETS,
    "training_dtype": "fp32", "lora_dtype": "fp32",
}  # fmt: skip


@pytest.fixture
def denoiser(family: StableDiffusion) -> StableDiffusionDenoiser:
    return shared_copy(family.denoiser, torch.device("cpu"), torch.float32)


@pytest.fixture
def lora(denoiser: StableDiffusionDenoiser) -> dict[str, Tensor]:
    """A file's tensors of trained adapters: random weights."""
    adapters = AdapterSet.new(denoiser, DoRA(rank=3, alpha=2.0), TARGETS, 0)
    for number, parameter in enumerate(adapters.parameters()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    return adapters.file_state(denoiser, torch.float32)


def weights(denoiser: StableDiffusionDenoiser) -> dict[str, Tensor]:
    """{a layer's name in a file: its weight}."""
    return {
        denoiser.file_key(path): module.weight.detach()
        for path, module in adaptable_layers(denoiser.nets).items()
        if isinstance(module.weight, Tensor)
    }


def update(parts: Mapping[str, Tensor]) -> Tensor:
    """s B A [n_out, …]."""
    down, up = parts["lora_down.weight"].float(), parts["lora_up.weight"].float()
    return float(parts["alpha"]) / len(down) * (up.flatten(1) @ down.flatten(1))


def lengths(weight: Tensor) -> Tensor:
    return weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))


def papers(weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """W' by the paper's equation 5."""
    whole = weight + update(parts).view_as(weight)
    return parts["dora_scale"] / lengths(whole) * whole


def comfyuis(weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """W' as ComfyUI makes it at strength 1: it divides by the lengths of W."""
    whole = weight + update(parts).view_as(weight)
    return parts["dora_scale"] / (lengths(weight) + torch.finfo(torch.float32).eps) * whole


def prediction(denoiser: Any, latents: Tensor, texts: Tensor) -> Tensor:
    with torch.no_grad():
        return denoiser.predict(latents, torch.full((len(latents),), 500), {"text": texts})


def with_lora(denoiser: Any, lora: Mapping[str, Tensor], *inputs: Tensor, metadata: Any = PAPER) -> Tensor:
    with attached(denoiser, adapters_from(lora, denoiser, metadata)):
        return prediction(denoiser, *inputs)


def test_every_program_makes_the_same_weights(denoiser: Any, lora: Any, latents: Tensor, texts: Tensor) -> None:
    ours, plain = with_lora(denoiser, lora, latents, texts), prediction(denoiser, latents, texts)
    assert float((ours - plain).abs().max()) > 0.05
    own, by_papers, by_comfyui = weights(denoiser), by_layer(lora), by_layer(for_comfyui(lora, denoiser))
    modules = {denoiser.file_key(path): module for path, module in adaptable_layers(denoiser.nets).items()}
    for layer, parts in by_papers.items():
        expected = papers(own[layer], parts)
        torch.testing.assert_close(comfyuis(own[layer], by_comfyui[layer]), expected, rtol=1e-4, atol=1e-5)
        theirs = lycoris_layer(lora, layer, modules[layer])
        torch.testing.assert_close(theirs.get_merged_weight()[0], expected, rtol=1e-4, atol=1e-5)
    merged = shared_copy(denoiser)
    for path, module in adaptable_layers(merged.nets).items():
        layer = denoiser.file_key(path)
        if layer in by_papers:
            module.weight = nn.Parameter(papers(own[layer], by_papers[layer]))
    torch.testing.assert_close(ours, prediction(merged, latents, texts), rtol=1e-3, atol=1e-4)


def test_what_is_written_for_comfyui_is_read_back(denoiser: Any, lora: Any) -> None:
    state = for_comfyui(lora, denoiser)
    changed = [key for key in lora if not torch.equal(state[key], lora[key])]
    assert changed == [key for key in lora if key.endswith(".dora_scale")] and state.keys() == lora.keys()
    back = adapters_from(state, denoiser, COMFYUI).file_state(denoiser, torch.float32)
    for key, tensor in lora.items():
        torch.testing.assert_close(back[key], tensor, rtol=1e-5, atol=0)


def test_names_of_comfyui_that_do_not_say_are_warned_of(denoiser: Any, lora: Any, caplog: Any) -> None:
    adapters_from(lora, denoiser, {})
    assert not caplog.records
    renamed = {key.replace("lora_unet_", "diffusion_model.", 1): tensor for key, tensor in lora.items()}
    adapters = adapters_from(renamed, denoiser, {})
    assert "does not say whether its dora_scale is ComfyUI's: taken as the paper's" in caplog.text
    assert all(torch.equal(lora[key], tensor) for key, tensor in adapters.file_state(denoiser, torch.float32).items())


def test_diffusers_reads_the_lengths_under_pefts_name(denoiser: Any, lora: Any, latents: Tensor, texts: Tensor) -> None:
    state = {}
    paths = {denoiser.file_key(path): path.removeprefix("unet.") for path in adaptable_layers(denoiser.nets)}
    for layer, parts in by_layer(lora).items():
        scale = parts["dora_scale"]
        state |= {
            f"{paths[layer]}.lora_A.weight": parts["lora_down.weight"],
            f"{paths[layer]}.lora_B.weight": parts["lora_up.weight"] * float(parts["alpha"]) / 3,
            f"{paths[layer]}.lora_magnitude_vector": scale.mT.flatten() if scale.ndim == 2 else scale.transpose(0, 1),
        }
    unet: Any = UNet2DConditionModel.from_config(denoiser.unet.config)
    unet.load_state_dict(denoiser.unet.state_dict())
    unet.eval().load_lora_adapter(state, prefix=None)
    with torch.no_grad():
        theirs = unet(latents, torch.full((4,), 500), texts).sample
    ours = with_lora(denoiser, lora, latents, texts)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    again = with_lora(denoiser, {f"unet.{key}": tensor for key, tensor in state.items()}, latents, texts)
    torch.testing.assert_close(again, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("lora_dtype", ["bf16", "fp32"])
def test_training_and_continuing(
    denoiser: Any, latents: Tensor, texts: Tensor, tmp_path: Path, lora_dtype: Any
) -> None:
    """What goes on is what was: a step of next to no rate changes next to nothing, and m in 16 bits nothing."""
    inputs = {**QUICK, "lora_dtype": lora_dtype}
    result = train_lora(denoiser, latents, list(texts), **inputs)
    parts = by_layer(result.lora)
    own = weights(denoiser)
    assert all((part["dora_scale"] - lengths(own[layer])).abs().max() > 1e-3 for layer, part in parts.items())
    expected = with_lora(denoiser, result.lora, latents, texts)
    torch.testing.assert_close(prediction(result.model_with_lora, latents, texts), expected, rtol=0.02, atol=0.02)
    path = tmp_path / "a_2_steps.safetensors"
    for state, metadata in ((result.lora, {}), (for_comfyui(result.lora, denoiser), COMFYUI)):
        lora_file.write(path, state, metadata)
        more = train_lora(denoiser, latents, list(texts), **{**inputs, "existing_lora": path, "learning_rate": 1e-7})
        assert more.steps == 4 and more.lora.keys() == result.lora.keys()
        for key, tensor in result.lora.items():
            torch.testing.assert_close(
                more.lora[key], tensor, rtol=1e-5 if tensor.dtype == torch.float32 else 0.01, atol=1e-6
            )


@pytest.mark.slow
def test_the_steps_that_were_done_are_not_made_again(
    denoiser: Any, latents: Tensor, texts: Tensor, tmp_path: Path
) -> None:
    inputs: dict[str, Any] = {**QUICK, "optimizer": "SGD", "learning_rate": 0.5}
    whole = train_lora(denoiser, latents, list(texts), **{**inputs, "steps": 3})
    first = train_lora(denoiser, latents, list(texts), **{**inputs, "steps": 1})
    lora_file.write(tmp_path / "a_1_steps.safetensors", first.lora, {})
    rest = train_lora(denoiser, latents, list(texts), **{**inputs, "existing_lora": tmp_path / "a_1_steps.safetensors"})
    assert rest.steps == whole.steps
    assert first.loss["loss"] + rest.loss["loss"] == pytest.approx(whole.loss["loss"], rel=1e-5)
    for key, tensor in whole.lora.items():
        torch.testing.assert_close(rest.lora[key], tensor, rtol=1e-3, atol=1e-6)


def test_differences_of_the_same_weight_are_refused(denoiser: Any, lora: Any) -> None:
    layer = next(iter(by_layer(lora)))
    diff = {f"{layer}.diff": torch.zeros_like(weights(denoiser)[layer])}
    message = r"does not fit the model: 1 of its .*: diff changes the weight that DoRA reads, which cannot be trained"
    with pytest.raises(ValueError, match=message):
        adapters_from({**lora, **diff}, denoiser)
    elsewhere = {"lora_unet_conv_in.diff": torch.zeros_like(weights(denoiser)["lora_unet_conv_in"])}
    assert adapters_from({**lora, **elsewhere}, denoiser).algorithms == ["DoRA"]


def test_lengths_on_other_algorithms_are_refused(denoiser: Any) -> None:
    adapters = AdapterSet.new(denoiser, DoRA(rank=2), TARGETS, 0).file_state(denoiser, torch.float32)
    layer = next(iter(by_layer(adapters)))
    n_out = len(adapters[f"{layer}.lora_up.weight"])
    loha = {f"{layer}.hada_w{n}_{ab}": torch.ones(1) for n in (1, 2) for ab in "ab"}
    with pytest.raises(ValueError, match="dora_scale (is|are) not read"):
        adapters_from({**loha, f"{layer}.dora_scale": torch.ones(n_out, 1)}, denoiser)
