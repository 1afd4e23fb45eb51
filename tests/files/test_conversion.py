"""convert: every layout holds the same LoRA, there and back bit for bit; diffusers reads what is made for it."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from commands import lorasmith
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from lorasmith import lorafile
from lorasmith.adapters import LoRA
from lorasmith.adapters.dora import DoRA
from lorasmith.attach import AdapterSet
from lorasmith.config import LayoutName
from lorasmith.demo import BASE
from lorasmith.families.sd import StableDiffusion
from lorasmith.files.conversion import convert
from lorasmith.targets import Targets

STARTS = {"kohya": "lora_unet_", "diffusers": "unet.", "comfyui": "diffusion_model.", "lycoris": "lycoris_"}


def written(path: Path, family: StableDiffusion, algorithm: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    adapters = AdapterSet.new(family.denoiser, algorithm, Targets(), 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    lorafile.write(path, adapters.file_state(family.denoiser, dtype), {"ss_steps": "7"})
    return load_file(path)


@pytest.mark.parametrize("layout", get_args(LayoutName))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(tmp_path: Path, family: StableDiffusion, layout: LayoutName, dtype: torch.dtype) -> None:
    state = written(tmp_path / "a.safetensors", family, LoRA(rank=4, alpha=4), dtype)
    num_layers = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", BASE, layout)
    there = load_file(tmp_path / "b.safetensors")
    assert num_layers == len(state) // 3 and all(key.startswith(STARTS[layout]) for key in there)
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", BASE, "kohya")
    back = load_file(tmp_path / "c.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    with safe_open(tmp_path / "b.safetensors", framework="pt") as file:
        assert file.metadata()["ss_steps"] == "7" and f"convert to {layout}" in file.metadata()["lorasmith.history"]


def test_dora_s_lengths_survive_comfyui_s(tmp_path: Path, family: StableDiffusion) -> None:
    state = written(tmp_path / "a.safetensors", family, DoRA(rank=4, alpha=4), torch.float32)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", BASE, "comfyui")
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", BASE, "kohya")
    back = load_file(tmp_path / "c.safetensors")
    assert back.keys() == state.keys()
    for key in state:
        torch.testing.assert_close(back[key], state[key], rtol=1e-4, atol=1e-5)


def test_the_command_and_diffusers(tmp_path: Path, family: StableDiffusion) -> None:
    written(tmp_path / "a.safetensors", family, LoRA(rank=4, alpha=2), torch.float32)
    arguments = ("convert", "a.safetensors", "--model", "demo", "--to", "diffusers", "--output", "b.safetensors")
    ended = lorasmith(tmp_path, *arguments)
    assert (ended.code, ended.err) == (0, "") and "b.safetensors" in ended.out
    deltas = []
    for name in ("a", "b"):
        pipe: Any = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None, requires_safety_checker=False)
        pipe.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors")
        layers = [module for module in pipe.unet.modules() if "default_0" in getattr(module, "lora_A", {})]
        deltas.append([layer.get_delta_weight("default_0") for layer in layers])
    assert len(deltas[0]) > 50
    torch.testing.assert_close(*deltas, rtol=1e-3, atol=1e-4)
    refused = lorasmith(tmp_path, *arguments)
    assert (refused.code, refused.err) == (
        2, "lorasmith: output must not be there yet without --overwrite, got b.safetensors\n"
    )  # fmt: skip
    refused = lorasmith(tmp_path, *arguments[:5], "x", "--output", "c.safetensors")
    assert refused.code == 2 and 'Choose from: "kohya", "diffusers"' in refused.err
