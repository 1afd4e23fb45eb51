"""The command that draws: LoRAs with layers of text encoders, beside diffusers' own pipeline."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import LoRA
from lorasmith.adapters.targets import Targets
from lorasmith.config.values import configured
from lorasmith.demo import BASE
from lorasmith.formats import lora_file
from lorasmith.models.load import load_model
from lorasmith.rng import Purpose, normal
from lorasmith.runs import generate
from lorasmith.runs.generate import draw_comparison

CPU = torch.device("cpu")


def drawn(monkeypatch: pytest.MonkeyPatch, lora: Path) -> list[Any]:
    """The pixels of a prompt's picture without and with a LoRA, 0 to 255."""
    rows: list[Any] = []
    monkeypatch.setattr(generate, "save_comparison", lambda found, prompts, path: rows.extend(found))
    sampling = {"prompts": ["red apple"], "steps": 4, "guidance": 3.0, "seed": 3}
    config = configured({"model": str(BASE), "training_dtype": "fp32", "lora_dtype": "fp32", "sampling": sampling})
    draw_comparison(config, lora, Path("unwritten.png"), CPU)
    assert [label for label, _ in rows] == ["without LoRA", "with LoRA"]
    return [np.asarray(pictures[0], dtype=np.float32) for _, pictures in rows]


@pytest.mark.slow
def test_a_lora_with_layers_of_the_text_encoder_is_drawn_as_diffusers_draws_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family: Any = load_model(BASE, with_texts=True)
    adapters = AdapterSet.new(family.denoiser, LoRA(rank=2), Targets(), 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapters.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    state = adapters.file_state(family.denoiser, torch.float32)
    lora_file.write(tmp_path / "both.safetensors", state, {})
    lora_file.write(tmp_path / "unet.safetensors", {k: t for k, t in state.items() if "lora_te" not in k}, {})
    without, both = drawn(monkeypatch, tmp_path / "both.safetensors")
    _, unet = drawn(monkeypatch, tmp_path / "unet.safetensors")

    pipe = load_model(BASE).pipeline(load_model(BASE).denoiser).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    ours: dict[str, Any] = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
    pipe.scheduler = DDIMScheduler.from_config(dict(pipe.scheduler.config) | ours)
    pipe.load_lora_weights(tmp_path, weight_name="both.safetensors")
    noise = normal(3, Purpose.PICTURE, 0, (4, 16, 16))[None]
    theirs = pipe(
        "red apple", negative_prompt="", latents=noise, num_inference_steps=4, guidance_scale=3.0, height=64, width=64,
        output_type="np",
    ).images[0]  # fmt: skip
    np.testing.assert_allclose(both, 255 * theirs, atol=1.5)
    assert np.abs(both - unet).max() > 10 and np.abs(both - without).max() > 10
