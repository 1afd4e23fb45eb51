"""train_lora: names, order, defaults, outputs and every kind of model; the rest is in test_contract_*.py."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from tiers import table
from torch import Tensor

from lorasmith.adapters.targets import Targets
from lorasmith.api import train_lora
from lorasmith.demo import BASE
from lorasmith.formats import lora_file
from lorasmith.formats.read import adapters_from
from lorasmith.models.families.sd import StableDiffusion, StableDiffusionCodec, StableDiffusionDenoiser
from lorasmith.prepare.share import shared_copy
from lorasmith.storage.hashing import digest
from lorasmith.types import Denoiser

CONTRACT = {
    "batch_size": 1, "grad_accumulation_steps": 1, "steps": 16, "learning_rate": 0.0005, "rank": 8,
    "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": "bf16", "lora_dtype": "bf16",
    "algorithm": "LoRA", "gradient_checkpointing": True, "existing_lora": "[None]",
}  # fmt: skip
QUICK: dict[str, Any] = {"steps": 2, "rank": 2, "targets": Targets(preset="attention"), "gradient_checkpointing": False}


@pytest.fixture
def denoiser(family: StableDiffusion) -> StableDiffusionDenoiser:
    return shared_copy(family.denoiser, torch.device("cpu"), torch.float32)


def bytes_of(denoiser: Denoiser, latents: Any, positive: Any, **inputs: Any) -> str:
    return digest(train_lora(denoiser, latents, positive, **{**QUICK, **inputs}).lora.items())


def test_names_order_and_defaults() -> None:
    parameters = inspect.signature(train_lora).parameters
    sixteen = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in sixteen] == ["model", "latents", "positive", *CONTRACT]
    assert {p.name: p.default for p in sixteen[3:]} == CONTRACT


def test_the_four_outputs(denoiser: Any, latents: Tensor, texts: Tensor) -> None:
    result = train_lora(denoiser, {"samples": latents}, list(texts), **QUICK)
    model, lora, loss, steps = result
    assert result._fields == ("model_with_lora", "lora", "loss", "steps")
    assert isinstance(model, Denoiser) and steps == 2
    assert list(loss) == ["loss"] and len(loss["loss"]) == 2 and all(isinstance(x, float) for x in loss["loss"])
    assert {t.dtype for k, t in lora.items() if ".lora_" in k} == {torch.bfloat16}
    assert all(t.isfinite().all() for t in lora.values())


def test_the_model_with_lora_is_what_the_file_gives(denoiser: Any, latents: Tensor, texts: Tensor) -> None:
    result = train_lora(denoiser, latents, list(texts), **QUICK)
    again = adapters_from(result.lora, result.model_with_lora).file_state(denoiser, torch.bfloat16)
    assert all(torch.equal(again[key], tensor) for key, tensor in result.lora.items())


def test_captions_go_through_the_models_own_encoders(
    family: StableDiffusion, codec: StableDiffusionCodec, latents: Tensor
) -> None:
    captions = ["red apple", "dog", "cat", "rocket"]
    with torch.no_grad():
        encoded = list(codec.encode_texts(captions)["text"])
    by_caption = train_lora(BASE, latents, captions, **QUICK)
    assert digest(by_caption.lora.items()) == bytes_of(family.denoiser, latents, encoded)
    assert type(by_caption.model_with_lora).__name__ == "StableDiffusionPipeline"


def test_a_pipeline_gives_a_pipeline_and_stays(family: StableDiffusion, denoiser: Any, latents: Tensor) -> None:
    pipe = family.pipeline(denoiser)
    unet = pipe.unet
    result = train_lora(pipe, latents, ["red apple"], **QUICK)
    assert pipe.unet is unet and result.model_with_lora.unet is not unet
    assert type(result.model_with_lora) is type(pipe)
    assert len([m for m in result.model_with_lora.unet.modules() if m._forward_hooks]) == len(result.lora) / 3
    assert not [m for m in unet.modules() if m._forward_hooks]


@pytest.mark.parametrize("lora_dtype", ["bf16", "fp32"])
@table("training_dtype", ["bf16", "fp32"], quick=["bf16"])
def test_dtypes(denoiser: Any, latents: Tensor, texts: Tensor, training_dtype: Any, lora_dtype: Any) -> None:
    inputs = {**QUICK, "training_dtype": training_dtype, "lora_dtype": lora_dtype}
    result = train_lora(denoiser, latents, list(texts), **inputs)
    expected = {"bf16": torch.bfloat16, "fp32": torch.float32}[lora_dtype]
    assert {t.dtype for k, t in result.lora.items() if ".lora_" in k} == {expected}


def test_a_lora_that_does_not_fit_is_refused(denoiser: Any, latents: Tensor, texts: Tensor, tmp_path: Path) -> None:
    lora_file.write(tmp_path / "a.safetensors", {"lora_unet_x.lora_up.weight": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="the LoRA does not fit the model"):
        train_lora(denoiser, latents, list(texts), existing_lora=tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("shape", "width", "message"),
    [
        ((2, 16, 8, 8), 192, r"^latents must be \[N,4,h,w\] for this model, got \[1, 16, 8, 8\]$"),
        ((2, 4, 3, 8, 8), 192, r"^latents must be \[N,4,h,w\] for this model, got \[1, 4, 3, 8, 8\]$"),
        ((2, 4, 8, 8), 768, r"^positive must hold text \[L,192\] for this model, got width 768$"),
    ],
)
def test_data_of_another_model_is_refused(denoiser: Any, shape: tuple[int, ...], width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_lora(denoiser, torch.randn(shape), [torch.randn(7, width)], **QUICK)
    with pytest.raises(ValueError, match=r"^positive must hold text \[L,192\] for this model, got only pooled$"):
        train_lora(denoiser, torch.randn(2, 4, 8, 8), [{"pooled": torch.randn(8)}], **QUICK)


@table("algorithm", ["LoRA", "LoHa", "LoKr", "OFT", "DoRA"], quick=["LoRA"])
def test_the_default_dtype_does_not_matter(denoiser: Any, latents: Tensor, texts: Tensor, algorithm: str) -> None:
    expected = bytes_of(denoiser, latents, list(texts), algorithm=algorithm)
    torch.set_default_dtype(torch.float64)
    try:
        assert bytes_of(denoiser, latents, list(texts), algorithm=algorithm) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_missing_lora_is_named(denoiser: Any, latents: Tensor, texts: Tensor) -> None:
    with pytest.raises(ValueError, match="^existing_lora: no.safetensors must be a safetensors file: file not found"):
        train_lora(denoiser, latents, list(texts), existing_lora="no.safetensors")
