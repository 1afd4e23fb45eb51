"""A video transformer in train_lora: every algorithm on every layer, its patches' convolution over frames too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiers import table
from torch import Tensor, nn

from lorasmith.adapters.targets import Targets
from lorasmith.api import train_lora
from lorasmith.formats import lora_file
from lorasmith.storage.hashing import digest

STARTS_AT_ZERO = {
    "LoRA": ("lora_up.weight",),
    "LoHa": ("hada_w2_a",),
    "LoKr": ("lokr_w2", "lokr_w2_b"),
    "OFT": ("oft_blocks",),
    "DoRA": ("lora_up.weight",),
}
"""The parts of an adapter that are 0 until a gradient moves them."""
QUICK: dict[str, Any] = {
    "steps": 2,
    "batch_size": 2,
    "rank": 2,
    "targets": Targets(preset="all"),
    "learning_rate": 0.01,
}


@pytest.fixture
def model(video_denoiser: Any) -> Any:
    return video_denoiser


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


LATENTS, TEXTS = numbers(3, 4, 2, 8, 8), list(numbers(3, 5, 16))


def layers(model: Any) -> list[str]:
    """The names in a file of every linear layer and convolution."""
    modules = model.transformer.named_modules()
    return [
        model.file_key(f"transformer.{path}") for path, module in modules if isinstance(module, nn.Linear | nn.Conv3d)
    ]


def prediction(model: Any) -> Tensor:
    with torch.no_grad():
        return model.predict(LATENTS, torch.full((3,), 0.5), {"text": torch.stack(TEXTS)})


@pytest.mark.parametrize("algorithm", STARTS_AT_ZERO)
def test_every_algorithm_trains_every_layer(model: Any, algorithm: Any) -> None:
    weights = {key: tensor.clone() for key, tensor in model.transformer.state_dict().items()}
    before = prediction(model)
    kept, again = (
        train_lora(model, LATENTS, TEXTS, algorithm=algorithm, gradient_checkpointing=checkpointing, **QUICK)
        for checkpointing in (False, True)
    )
    assert digest(kept.lora.items()) == digest(again.lora.items()) and kept.loss == again.loss
    assert all(torch.tensor(loss).isfinite() for loss in kept.loss["loss"]) and kept.steps == 2

    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in kept.lora.items():
        layer, _, part = key.partition(".")
        parts.setdefault(layer, {})[part] = tensor
    assert sorted(parts) == sorted(layers(model)) and "lora_transformer_patch_embedding" in parts
    for layer, tensors in parts.items():
        assert any(tensors[part].any() for part in STARTS_AT_ZERO[algorithm] if part in tensors), layer

    assert not torch.equal(prediction(kept.model_with_lora), before)
    assert torch.equal(prediction(kept.model_with_lora), prediction(again.model_with_lora))
    assert torch.equal(prediction(model), before)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.transformer.state_dict().items())


def test_the_patch_embedding_is_adapted_over_frames(model: Any) -> None:
    lora = train_lora(model, LATENTS, TEXTS, **QUICK).lora
    assert lora["lora_transformer_patch_embedding.lora_down.weight"].shape == (2, 4, 1, 2, 2)
    assert lora["lora_transformer_patch_embedding.lora_up.weight"].shape == (24, 2, 1, 1, 1)


@table("algorithm", STARTS_AT_ZERO, quick=["LoRA"])
def test_a_file_goes_on(model: Any, tmp_path: Path, algorithm: Any) -> None:
    first = train_lora(model, LATENTS, TEXTS, algorithm=algorithm, **QUICK)
    lora_file.write(tmp_path / "a.safetensors", first.lora, {"ss_steps": "2"})
    more = train_lora(
        model, LATENTS, TEXTS, algorithm=algorithm, existing_lora=tmp_path / "a.safetensors", **{**QUICK, "steps": 1}
    )
    assert more.steps == 3 and len(more.loss["loss"]) == 1
    assert {key: t.shape for key, t in more.lora.items()} == {key: t.shape for key, t in first.lora.items()}
    assert any(not torch.equal(tensor, first.lora[key]) for key, tensor in more.lora.items())
    assert not torch.equal(prediction(more.model_with_lora), prediction(first.model_with_lora))


def test_several_numbers_of_frames_are_buckets(model: Any) -> None:
    clips = [numbers(2, 4, 1, 8, 8), numbers(1, 4, 3, 8, 8), numbers(1, 4, 3, 4, 8)]
    texts = [*TEXTS, TEXTS[0]]
    with pytest.raises(ValueError, match="latents must be of one size unless bucket_mode is True"):
        train_lora(model, clips, texts, **QUICK)
    result = train_lora(model, clips, texts, bucket_mode=True, **{**QUICK, "steps": 4})
    assert len(result.loss["loss"]) == 4 and all(torch.tensor(loss).isfinite() for loss in result.loss["loss"])
    alone = [train_lora(model, clip, [TEXTS[0]], **QUICK) for clip in clips]
    assert len({digest(one.lora.items()) for one in alone}) == 3
