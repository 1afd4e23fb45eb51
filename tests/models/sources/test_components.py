"""Diffusers folders: variants of weights, the safety checker."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor

from lorasmith.api import train_lora
from lorasmith.demo import BASE
from lorasmith.models.load import load_model
from lorasmith.models.sources.parts import variant_of


def in_variant(part: Path, variant: str = "fp16") -> None:
    weights = next(part.glob("*.safetensors"))
    weights.rename(weights.with_suffix(f".{variant}.safetensors"))


def test_a_folder_with_variants_only_loads(tmp_path: Path, latents: Tensor, texts: Tensor) -> None:
    model = Path(shutil.copytree(BASE, tmp_path / "model"))
    for part in ("unet", "vae", "text_encoder"):
        in_variant(model / part, "fp16" if part != "vae" else "ema")
    ours, plain = train_lora(model, latents, list(texts), steps=1), train_lora(BASE, latents, list(texts), steps=1)
    assert ours.loss == plain.loss
    cpu = torch.device("cpu")
    family, reference = load_model(model).codec(cpu), load_model(BASE).codec(cpu)
    with torch.no_grad():
        assert torch.equal(family.encode_texts(["a cat"])["text"], reference.encode_texts(["a cat"])["text"])
        assert torch.equal(family.decode(latents), reference.decode(latents))


def test_the_plain_files_dtype_is_kept_beside_a_variant(tmp_path: Path) -> None:
    model = Path(shutil.copytree(BASE, tmp_path / "model"))
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_suffix(".fp16.safetensors"))
    save_file({key: value.float() for key, value in load_file(weights).items()}, weights)
    assert {p.dtype for p in load_model(model).denoiser.nets["unet"].parameters()} == {torch.float32}


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_safety_checker_stays_where_there_is_one(tmp_path: Path, variant: str | None) -> None:
    model = Path(shutil.copytree(BASE, tmp_path / "model"))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**sizes, "image_size": 32, "patch_size": 16}, text_config=sizes)
    StableDiffusionSafetyChecker(config).save_pretrained(model / "safety_checker", variant=variant)
    index = json.loads((model / "model_index.json").read_text())
    CLIPImageProcessor().save_pretrained(model / "feature_extractor")
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    del index["requires_safety_checker"]
    (model / "model_index.json").write_text(json.dumps(index))
    family = load_model(model)
    pipe = family.pipeline(family.denoiser)
    assert isinstance(pipe.safety_checker, StableDiffusionSafetyChecker) and pipe.feature_extractor is not None
    shutil.rmtree(model / "safety_checker")  # as with a model fetched from the hub
    pipe = family.pipeline(family.denoiser)
    assert pipe.safety_checker is None and not pipe.config.requires_safety_checker


@pytest.mark.parametrize(
    ("names", "variant"),
    [
        (["model.safetensors", "model.fp16.safetensors"], None),
        (["model.bf16.safetensors", "model.fp16.safetensors"], "fp16"),
        (["model.non_ema-00001-of-00002.safetensors", "config.json"], "non_ema"),
        (["diffusion_pytorch_model-00001-of-00002.safetensors"], None),
        ([], None),
    ],
)
def test_the_variant_that_is_loaded(names: list[str], variant: str | None) -> None:
    assert variant_of(names) == variant
