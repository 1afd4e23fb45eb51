"""Stable Diffusion against diffusers: schedulers' configs, predictions, encoders, whole pictures, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasmith.data.encode import pixels
from lorasmith.demo import BASE
from lorasmith.demo import FOLDER as DEMO
from lorasmith.diffusion.sampling import pictures_of
from lorasmith.models.families.sd import StableDiffusion, StableDiffusionCodec, diffusion
from lorasmith.models.load import load_model
from lorasmith.prepare.share import shared_copy
from lorasmith.rng import Purpose, normal
from lorasmith.types import Example

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@pytest.mark.parametrize(
    ("config", "prediction"),
    [
        (SD15, "eps"),
        ({**SD15, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "v"),
        ({**SD15, "prediction_type": "sample", "skip_prk_steps": True}, "x0"),
    ],
)
def test_the_process_comes_from_the_schedulers_config(config: dict[str, Any], prediction: str) -> None:
    process = diffusion(config)
    known = {key: value for key, value in config.items() if key != "skip_prk_steps"}
    assert process.prediction == prediction
    assert torch.equal(process.alphas_cumprod, DDPMScheduler(**known).alphas_cumprod)


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction_type must be one of epsilon, v_prediction, sample, got 'flow'"):
        diffusion({**SD15, "prediction_type": "flow"})


def test_predict_is_the_unet(family: StableDiffusion, latents: Tensor, texts: Tensor) -> None:
    t = torch.tensor([0, 100, 500, 999])
    denoiser = shared_copy(family.denoiser, torch.device("cpu"), torch.float32)
    unet = UNet2DConditionModel.from_pretrained(BASE / "unet")
    with torch.no_grad():
        torch.testing.assert_close(denoiser.predict(latents, t, {"text": texts}), unet(latents, t, texts).sample)


def test_a_batch_of_captions_equals_the_single_ones(family: StableDiffusion, latents: Tensor, texts: Tensor) -> None:
    t = torch.tensor([0, 100, 500, 999])
    denoiser = shared_copy(family.denoiser, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        together = denoiser.predict(latents, t, {"text": texts})
        single = [denoiser.predict(latents[i : i + 1], t[i : i + 1], {"text": texts[i : i + 1]}) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(single), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_picture_is_the_one_that_diffusers_draws(
    family: StableDiffusion, codec: StableDiffusionCodec, guidance: float
) -> None:
    denoiser = shared_copy(family.denoiser, torch.device("cpu"), torch.float32)
    ours = next(pictures_of(denoiser, codec, {1: "red apple"}, size=(64, 48), seed=3, steps=10, guidance=guidance))
    pipe = family.pipeline(denoiser)
    pipe.to(torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        "red apple", latents=normal(3, Purpose.PICTURE, 1, (4, 12, 16))[None], num_inference_steps=10,
        guidance_scale=guidance, output_type="pt", height=48, width=64,
    ).images[0]  # fmt: skip
    torch.testing.assert_close((ours + 1) / 2, theirs, atol=2e-3, rtol=0)


def test_a_picture_survives_the_codec(codec: StableDiffusionCodec) -> None:
    path = next((DEMO / "pictures" / "flat" / "held_out").glob("*.png"))
    image = pixels(Example(path, ""), 64, codec.multiple)[None]
    with torch.no_grad():
        latents = codec.encode_images(image)
        assert tuple(latents.shape[1:]) == codec.latent_shape((64, 64)) == (4, 16, 16)
        assert float((codec.decode(latents) - image).abs().mean()) < 0.1


def test_codec_sizes(codec: StableDiffusionCodec) -> None:
    assert (codec.resolution, codec.multiple, codec.latent_shape((96, 32))) == (64, 16, (4, 8, 24))


def test_a_long_caption_is_cut_and_said(codec: StableDiffusionCodec, caplog: pytest.LogCaptureFixture) -> None:
    with torch.no_grad():
        cond = codec.encode_texts(["apple " * 60, "dog"])
    assert cond["text"].shape == (2, 32, 192)
    assert "only the first 32 of 62 tokens are read of 'apple apple" in caplog.text


def test_file_keys_are_kohyas(family: StableDiffusion) -> None:
    path = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert family.denoiser.file_key(path) == "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BASE, tmp_path / "model"))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a diffusers folder with a model_index.json, got no such folder"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match="got a folder without it"):
        load_model(tmp_path)
    model = copied(tmp_path)
    (model / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(ValueError, match="kind among .*, StableDiffusionPipeline, got KandinskyPipeline"):
        load_model(model)
    (model / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read .*model_index.json"):
        load_model(model)
    with pytest.raises(ValueError, match="model must be a path, a hub id, a diffusers pipeline or a Denoiser, got int"):
        load_model(3)


def test_a_broken_part_is_named(tmp_path: Path) -> None:
    model = copied(tmp_path)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="unet/.* is cut off"):
        load_model(model)
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="unet must hold safetensors weights: pickles can run code"):
        load_model(model)
    shutil.copy(BASE / "unet" / weights.name, weights)
    shutil.rmtree(model / "scheduler")
    with pytest.raises(ValueError, match="cannot read .*scheduler/scheduler_config.json"):
        load_model(model)
    shutil.rmtree(model / "unet")
    with pytest.raises(ValueError, match="must hold unet/, but it does not"):
        load_model(model)


def test_a_tokenizer_that_is_not_the_text_encoders_is_refused(tmp_path: Path) -> None:
    """The library makes an empty vocabulary of a folder without files, and would train on nonsense."""
    model = copied(tmp_path)
    tokenizer = json.loads((model / "tokenizer" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"].popitem()
    (model / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="must know the same words, got 2047 and 2048|cannot load .*/tokenizer"):
        load_model(model).codec(torch.device("cpu"))
    (model / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer must hold tokenizer.json or vocab.json"):
        load_model(model).codec(torch.device("cpu"))


def test_missing_tensors_and_strange_configs_are_named(tmp_path: Path) -> None:
    model = copied(tmp_path)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if k != "conv_in.weight"}, weights)
    with pytest.raises(ValueError, match="unet: 1 tensor is missing, such as conv_in.weight"):
        load_model(model)
    shutil.copy(BASE / "unet" / weights.name, weights)
    (model / "scheduler" / "scheduler_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"scheduler_config.json must be a table, got \[\]"):
        load_model(model)
    (model / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="must name the pipeline's _class_name"):
        load_model(model)
    with pytest.raises(ValueError, match="must describe betas, got {'beta_schedule': 'steep'}"):
        diffusion({"beta_schedule": "steep"})
