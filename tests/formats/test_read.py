"""LoRA files of other programs on a model: the same output as theirs, continued whole, or refused with a list."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from lycoris import LycorisNetwork, create_lycoris
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tiers import table
from torch import Tensor, nn

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import LoRA
from lorasmith.adapters.hooks import attached
from lorasmith.adapters.targets import Targets
from lorasmith.api import train_lora
from lorasmith.formats import lora_file
from lorasmith.formats.read import adapters_from
from lorasmith.formats.unet_names import ldm_names
from lorasmith.models.families.sd import StableDiffusion, StableDiffusionDenoiser
from lorasmith.prepare.share import shared_copy

LYCORIS = {"LoRA": "locon", "LoHa": "loha", "LoKr": "lokr", "OFT": "diag-oft", "DoRA": "locon"}
LAYERS = r".*up_blocks.1.*(to_q|to_out.0|ff.net.0.proj|conv1|proj_in|upsamplers.0.conv)"


@pytest.fixture
def denoiser(family: StableDiffusion) -> StableDiffusionDenoiser:
    return shared_copy(family.denoiser, torch.device("cpu"), torch.float32)


def output(denoiser: StableDiffusionDenoiser, latents: Tensor, texts: Tensor) -> Tensor:
    with torch.no_grad():
        return denoiser.predict(latents, torch.full((len(latents),), 500), {"text": texts})


def randomised(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def with_file(path: Path, denoiser: StableDiffusionDenoiser, latents: Tensor, texts: Tensor) -> Tensor:
    adapters = adapters_from(lora_file.read(path)[0], denoiser)
    with attached(denoiser, adapters):
        return output(denoiser, latents, texts)


@table("prefix", ["lycoris", "lora_unet"], quick=["lycoris"])
@pytest.mark.parametrize("algorithm", LYCORIS)
def test_a_file_of_lycoris(
    denoiser: Any, latents: Tensor, texts: Tensor, tmp_path: Path, algorithm: str, prefix: str
) -> None:
    before = output(denoiser, latents, texts)
    LycorisNetwork.apply_preset({"name_algo_map": {}, "target_module": [], "target_name": [LAYERS]})
    network: Any = create_lycoris(
        denoiser.unet, 1.0, linear_dim=4, linear_alpha=2, algo=LYCORIS[algorithm], dora_wd=algorithm == "DoRA"
    )
    network.apply_to()
    randomised(network.parameters())
    theirs = output(denoiser, latents, texts)
    state = {k.replace("lycoris", prefix, 1): v.contiguous() for k, v in network.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    network.restore()
    assert torch.equal(output(denoiser, latents, texts), before)
    assert adapters_from(lora_file.read(tmp_path / "a.safetensors")[0], denoiser).algorithms == [algorithm]
    ours = with_file(tmp_path / "a.safetensors", denoiser, latents, texts)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)
    assert float((ours - before).abs().max()) > 0.01


PEFT_CONFIGS: dict[str, Callable[[list[str]], Any]] = {
    "plain": lambda names: peft.LoraConfig(r=4, lora_alpha=8, target_modules=names),
    "rslora": lambda names: peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=names),
    "dora": lambda names: peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, use_dora=True),
    "patterns": lambda names: peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=names, alpha_pattern={"to_q": 2}, rank_pattern={"to_q": 3}
    ),
    "loha": lambda names: peft.LoHaConfig(r=4, alpha=8, target_modules=names, init_weights=False),
    "lokr": lambda names: peft.LoKrConfig(r=4, alpha=8, target_modules=names, init_weights=False),
    "lokr_whole": lambda names: peft.LoKrConfig(r=64, alpha=8, target_modules=names, init_weights=False),
}


@table("kind", PEFT_CONFIGS, quick=["plain", "dora"])
def test_a_folder_of_peft(denoiser: Any, latents: Tensor, texts: Tensor, tmp_path: Path, kind: str) -> None:
    copy = shared_copy(denoiser)
    model: Any = peft.get_peft_model(copy.unet, PEFT_CONFIGS[kind](["to_q", "to_out.0", "conv1"]))
    randomised(p for name, p in model.named_parameters() if any(part in name for part in ("lora_", "hada_", "lokr_")))
    with torch.no_grad():
        theirs = model(latents, torch.full((4,), 500), texts).sample
    model.save_pretrained(tmp_path)
    ours = with_file(tmp_path / "adapter_model.safetensors", denoiser, latents, texts)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert float((ours - output(denoiser, latents, texts)).abs().max()) > 0.01


@pytest.mark.parametrize("with_metadata", [True, False])
def test_a_file_of_diffusers(
    denoiser: Any, latents: Tensor, texts: Tensor, tmp_path: Path, with_metadata: bool, caplog: Any
) -> None:
    """Without diffusers' metadata a file does not say alpha: then the scale is 1, as in diffusers, and we say so."""
    unet = shared_copy(denoiser).unet
    config = peft.LoraConfig(r=4, lora_alpha=8 if with_metadata else 4, target_modules=["to_q", "to_out.0"])
    unet.add_adapter(config)
    randomised(p for name, p in unet.named_parameters() if "lora_" in name)
    with torch.no_grad():
        theirs = unet(latents, torch.full((4,), 500), texts).sample
    options: dict[str, Any] = {"unet_lora_adapter_metadata": config.to_dict()} if with_metadata else {}
    options["unet_lora_layers"] = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path, **options)
    ours = with_file(tmp_path / "pytorch_lora_weights.safetensors", denoiser, latents, texts)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert ("alpha" in caplog.text) == (not with_metadata)


def comfyui_state(denoiser: StableDiffusionDenoiser) -> dict[str, Tensor]:
    """What ComfyUI's own trainer writes: adapters, biases' and norms' differences, by the original names."""
    adapters = AdapterSet.new(denoiser, LoRA(rank=2, alpha=1), Targets(preset="attention"), 0)
    randomised(adapters.parameters())
    original = ldm_names(denoiser.unet.config)
    state = {}
    for path, adapter in adapters.adapters.items():
        name = f"diffusion_model.{original[path.removeprefix('unet.')]}"
        state |= {f"{name}.{part}": tensor for part, tensor in adapter.file_tensors(torch.float32).items()}
    for path, module in denoiser.unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            state[f"diffusion_model.{original[path]}.diff_b"] = torch.full_like(module.bias, 0.01)
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            state[f"diffusion_model.{original[path]}.diff"] = torch.full_like(module.weight, 0.02)
            state[f"diffusion_model.{original[path]}.diff_b"] = torch.full_like(module.bias, 0.01)
    return state


def test_a_file_of_comfyui(denoiser: Any, latents: Tensor, texts: Tensor, tmp_path: Path) -> None:
    state = comfyui_state(denoiser)
    save_file(state, tmp_path / "comfy_500_steps_00001_.safetensors")
    before = output(denoiser, latents, texts)
    ours = with_file(tmp_path / "comfy_500_steps_00001_.safetensors", denoiser, latents, texts)
    assert torch.equal(output(denoiser, latents, texts), before)

    merged: Any = UNet2DConditionModel.from_config(denoiser.unet.config)
    merged.load_state_dict(denoiser.unet.state_dict())
    original = ldm_names(denoiser.unet.config)
    for path, module in merged.named_modules():
        name = f"diffusion_model.{original.get(path)}"
        if f"{name}.diff" in state:
            module.weight.data += state[f"{name}.diff"]
        if f"{name}.diff_b" in state:
            module.bias.data += state[f"{name}.diff_b"]
        if f"{name}.lora_up.weight" in state:
            module.weight.data += 0.5 * state[f"{name}.lora_up.weight"] @ state[f"{name}.lora_down.weight"]
    with torch.no_grad():
        theirs = merged.eval()(latents, torch.full((4,), 500), texts).sample
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)

    result = train_lora(
        denoiser, latents, list(texts), steps=1, existing_lora=tmp_path / "comfy_500_steps_00001_.safetensors"
    )
    assert result.steps == 501
    kept = {key: tensor for key, tensor in result.lora.items() if ".diff" in key}
    assert len(kept) == sum(".diff" in key for key in state)
    again = output(result.model_with_lora, latents, texts)
    assert float((again - theirs).abs().mean()) < float((again - before).abs().mean()) / 2


def test_what_does_not_fit_is_listed(denoiser: Any) -> None:
    state = comfyui_state(denoiser)
    key = next(key for key in state if key.endswith("attn1.to_q.lora_up.weight")).removesuffix(".lora_up.weight")
    path = {v: k for k, v in ldm_names(denoiser.unet.config).items()}[key.removeprefix("diffusion_model.")]
    cases = {
        "lora_unet_nowhere.lora_up.weight": (torch.ones(1), r"lora_unet_nowhere \(lora_up.weight\): the model has no"),
        "lora_te_text_model_x.alpha": (torch.ones(1), r"lora_te_text_model_x \(alpha\): the model has no such layer"),
        f"{key}.dora_scale": (torch.ones(1), rf"{key}: dora_scale must have the shape \[\d+, 1\], got \[1\]"),
        f"{key}.lora_mid.weight": (torch.ones(1), "lora_mid.weight (is|are) not read"),
        f"{key}.diff": (torch.ones(3), r"diff must have the shape \[\d+, \d+\], got \[3\]"),
        f"{key}.lora_up.weight": (torch.ones(3, 2), f"{key}: lora_up.weight must have the shape"),
        "diffusion_model.out.0.lora_up.weight": (torch.ones(3, 2), "cannot be trained on a layer of this kind"),
        f"lora_unet_{path.replace('.', '_')}.hada_w1_a": (torch.ones(3, 2), "another key means the same layer"),
    }
    for name, (tensor, message) in cases.items():
        with pytest.raises(ValueError, match=f"does not fit the model: 1 of its .*text width of 192.*{message}"):
            adapters_from({**state, name: tensor}, denoiser)
    with pytest.raises(ValueError, match="the LoRA must hold an adapter, got 0 layers"):
        adapters_from({}, denoiser)


def test_a_lora_for_another_model_says_which(denoiser: Any) -> None:
    layer = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    state = {f"{layer}.lora_down.weight": torch.ones(4, 2048), f"{layer}.lora_up.weight": torch.ones(640, 4)}
    with pytest.raises(ValueError, match="1 of its 1 layer does not, and it looks like one for SDXL"):
        adapters_from(state, denoiser)
    flux = {
        f"transformer.single_transformer_blocks.{i}.attn.to_q.lora_A.weight": torch.ones(4, 3072) for i in range(38)
    }
    with pytest.raises(
        ValueError, match="38 of its 38 layers do not, and it looks like one for Flux: .*; and 28 more$"
    ):
        adapters_from(flux, denoiser)


@pytest.mark.parametrize("way", ["pissa", "olora"])
def test_a_start_that_changes_the_base_is_refused(denoiser: Any, tmp_path: Path, way: Any) -> None:
    config = peft.LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=way)
    model: Any = peft.get_peft_model(shared_copy(denoiser).unet, config)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"must start from the model as it is, got init_lora_weights '{way}', which"):
        lora_file.read(tmp_path / "adapter_model.safetensors")


def test_offsets_are_checked_like_weights(denoiser: Any) -> None:
    state = comfyui_state(denoiser)
    key = "diffusion_model.input_blocks.0.0.diff_b"
    for tensor, message in (
        (torch.full_like(state[key], float("nan")), "diff_b must be finite, got NaN or infinity"),
        (state[key].to(torch.int8), "diff_b must hold floating-point numbers, got torch.int8"),
    ):
        with pytest.raises(ValueError, match=message):
            adapters_from({**state, key: tensor}, denoiser)
    with pytest.raises(ValueError, match="unet.conv_in: another key means the same parameter"):
        adapters_from({**state, "unet.conv_in.diff_b": state[key]}, denoiser)
