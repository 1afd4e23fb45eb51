"""What Flux.2 has alone: normalised latents, a shift of its own, a distilled klein."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PROMPTS, flux2_klein, made

from lorasmith.diffusion.sampling import pictures_of
from lorasmith.models.families.flux2 import empirical_shift
from lorasmith.models.load import load_model
from lorasmith.rng import Purpose, normal

CPU = torch.device("cpu")


def test_the_shift_lies_between_those_of_10_and_200_steps_and_is_of_200_for_large_pictures() -> None:
    of_10, of_200 = (8.73809524e-05 * 4096 + 1.89833333, 0.00016927 * 4096 + 0.45666666)  # as the authors' code has it
    assert math.log(empirical_shift((128, 64, 64))) == pytest.approx(of_10 + (of_200 - of_10) * 40 / 190)
    assert math.log(empirical_shift((128, 72, 64))) == pytest.approx(0.00016927 * 4608 + 0.45666666)
    process: Any = load_model(made("Flux2Pipeline")).denoiser.process
    assert process.sized((16, 64, 64)).shift == empirical_shift((16, 64, 64))


@torch.no_grad()
def test_latents_are_those_of_the_pipeline() -> None:
    pipe = made("Flux2Pipeline")
    images = torch.rand(2, 3, 48, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codec = load_model(pipe).codec(CPU)
    torch.testing.assert_close(codec.encode_images(images), pipe._encode_vae_image(images, None))


def test_the_distilled_klein_knows_one_guidance() -> None:
    pipe: Any = flux2_klein(is_distilled=True)
    pipe.set_progress_bar_config(disable=True)
    family = load_model(pipe)
    codec = family.codec(CPU)
    ours = next(pictures_of(family.denoiser, codec, {1: PROMPTS[1]}, size=(32, 48), seed=3, steps=2, guidance=4.0))
    theirs = pipe(
        prompt=PROMPTS[1], latents=normal(3, Purpose.PICTURE, 1, (16, 12, 8))[None], num_inference_steps=2, height=48,
        width=32, guidance_scale=4.0, output_type="pt",
    ).images[0]  # fmt: skip
    torch.testing.assert_close((ours + 1) / 2, theirs, atol=2e-3, rtol=0)


def test_a_processor_that_cannot_be_loaded_is_named_in_one_line(tmp_path: Path) -> None:
    """Flux.2 dev's own needs torchvision."""
    made("Flux2Pipeline").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="cannot load") as raised:
        load_model(tmp_path).codec(CPU)
    assert "\n" not in str(raised.value)
