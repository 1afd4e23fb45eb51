"""merge into models: diffusers reads the merged folder or file, and it equals diffusers with the LoRA fused."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from originals import original
from safetensors.torch import save_file
from tiers import table
from tiny import FOLDERS_ALONE, TINY, made
from transformers import T5EncoderModel

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import LoRA
from lorasmith.adapters.targets import Targets
from lorasmith.demo import BASE
from lorasmith.formats import lora_file
from lorasmith.formats.write import in_layout
from lorasmith.models.load import family_of, load_model
from lorasmith.tools.merge import Source
from lorasmith.tools.merge_into_model import merge_into
from lorasmith.types import LayoutName

SD = "StableDiffusionPipeline"
FOLDERS = [SD, *(name for name in TINY if name != "Wan 2.2")]  # whose experts have a file each
WIDE = ("FluxPipeline", "ChromaPipeline", "Lumina2Pipeline")  # which diffusers reads from files in one width alone
FILES = [name for name in FOLDERS if name not in (SD, "StableDiffusionXLPipeline", *WIDE, *FOLDERS_ALONE)]


def model_of(name: str) -> Any:
    """A pipeline in float32."""
    if name != SD:
        return made(name)
    return diffusers.StableDiffusionPipeline.from_pretrained(
        BASE, torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )


def trained(pipe: Any, *, with_texts: bool) -> tuple[Any, AdapterSet]:
    """A denoiser, and adapters on its layers of attention and MLPs and all those of its text encoders."""
    denoiser = load_model(pipe, with_texts=with_texts).denoiser
    targets = Targets(preset="attention+mlp", include=(r"^text_encoder",), exclude=(r"text_projection|modulation",))
    adapters = AdapterSet.new(denoiser, LoRA(rank=2), targets, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapters.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return denoiser, adapters


def fused(pipe: Any, lora: Path, adapters: AdapterSet) -> dict[str, Any]:
    """{part: the net} of diffusers' pipeline with the LoRA in it; T5's, which diffusers leaves out, by hand."""
    pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    held = [net for net in sorted(adapters.nets) if not isinstance(getattr(pipe, net), T5EncoderModel)]
    pipe.fuse_lora(components=held)
    pipe.unload_lora_weights()
    for path, adapter in adapters.adapters.items():
        net, _, module = path.partition(".")
        if net not in held:
            ours: Any = adapter
            getattr(pipe, net).get_submodule(module).weight.data += (ours.up @ ours.down).data
    return {net: getattr(pipe, net) for net in adapters.nets}


@table("name", FOLDERS, quick=["FluxPipeline", "ZImagePipeline"])
def test_a_merged_folder(name: str, tmp_path: Path) -> None:
    """With the layers of all text encoders that can be trained, under diffusers' names and those of training."""
    pipe = model_of(name)
    has_texts = family_of(type(pipe).__name__, pipe).TEXTS is not None
    denoiser, adapters = trained(pipe, with_texts=has_texts)
    assert any(net.startswith("text_encoder") for net in adapters.nets) == has_texts
    pipe.save_pretrained(tmp_path / "model")
    layouts: tuple[LayoutName | None, ...] = ("diffusers", None)
    for number, layout in enumerate(layouts):
        lora_file.write(tmp_path / f"{number}.safetensors", in_layout(adapters, denoiser, torch.float32, layout))
        source = Source.parsed(str(tmp_path / f"{number}.safetensors"))
        assert merge_into(tmp_path / "model", [source], tmp_path / f"out-{number}") == len(adapters.adapters)
    for part, net in fused(pipe, tmp_path / "0.safetensors", adapters).items():
        for number in range(len(layouts)):
            merged = type(net).from_pretrained(tmp_path / f"out-{number}" / part)
            torch.testing.assert_close(merged.state_dict(), net.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FILES)
def test_a_merged_single_file(name: str, tmp_path: Path) -> None:
    """The transformer in the layout of the original code, as diffusers' own conversion reads it."""
    pipe = model_of(name)
    denoiser, adapters = trained(pipe, with_texts=False)
    net: Any = denoiser.nets["transformer"]
    net.save_pretrained(tmp_path / "transformer")
    save_file(
        {key: tensor.detach().contiguous().clone() for key, tensor in original(net).items()}, tmp_path / "a.safetensors"
    )
    layouts: tuple[LayoutName, ...] = ("comfyui", "diffusers")
    for layout in layouts:
        lora_file.write(tmp_path / f"{layout}.safetensors", in_layout(adapters, denoiser, torch.float32, layout))
    merge_into(
        tmp_path / "a.safetensors", [Source.parsed(str(tmp_path / "comfyui.safetensors"))], tmp_path / "b.safetensors"
    )
    merged = type(net).from_single_file(tmp_path / "b.safetensors", config=str(tmp_path), subfolder="transformer")
    expected = fused(pipe, tmp_path / "diffusers.safetensors", adapters)["transformer"]
    torch.testing.assert_close(merged.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)
