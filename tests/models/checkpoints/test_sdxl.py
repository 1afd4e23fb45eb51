"""SDXL in one file: all of it, a UNet alone, and files that lack a part, beside diffusers' own pipeline."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from originals import open_clip, original, original_vae
from safetensors.torch import save_file
from tiny import several
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lorasmith.api import train_lora
from lorasmith.models.checkpoints.clip_tokenizer import clip_tokenizer
from lorasmith.models.load import load_model
from lorasmith.models.meta import skeleton

State = dict[str, Tensor]
CPU = torch.device("cpu")
DENOISER, VAE = "model.diffusion_model.", "first_stage_model."
FIRST, SECOND = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
CAPTIONS = ["a photo of a cat", "two birds"]


def clip(act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1,
        max_position_embeddings=16, projection_dim=48, bos_token_id=49406, eos_token_id=49407, hidden_act=act,
    )  # fmt: skip


@cache
def pipeline() -> StableDiffusionXLPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            block_out_channels=(64, 64, 128), layers_per_block=1, sample_size=128, cross_attention_dim=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=several(1, 1, 2), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, transformer_layers_per_block=several(1, 1, 2),
            projection_class_embeddings_input_dim=48 + 6 * 256,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=several(32, 64), layers_per_block=1,
            down_block_types=several("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=several("UpDecoderBlock2D", "UpDecoderBlock2D"), latent_channels=4, scaling_factor=0.13025,
        )  # fmt: skip
        scheduler: Any = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        pipe = StableDiffusionXLPipeline(
            vae=vae, unet=unet, tokenizer=clip_tokenizer(length=16), tokenizer_2=clip_tokenizer("!", 16),
            text_encoder=CLIPTextModel(clip("quick_gelu")), text_encoder_2=CLIPTextModelWithProjection(clip("gelu")),
            scheduler=scheduler,
        )  # fmt: skip
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        part.eval()
    return pipe


@cache
def parts() -> dict[str, State]:
    pipe: Any = pipeline()
    second = {key.removeprefix("text_model."): t for key, t in pipe.text_encoder_2.state_dict().items()}
    projection = second.pop("text_projection.weight").T
    return {
        "unet": {f"{DENOISER}{key}": t for key, t in original(pipe.unet).items()},
        "vae": {f"{VAE}{key}": t for key, t in original_vae(pipe.vae).items()},
        "first": {f"{FIRST}{key}": t for key, t in pipe.text_encoder.state_dict().items()},
        "second": {f"{SECOND}{key}": t for key, t in open_clip(second).items()}
        | {f"{SECOND}text_projection": projection, f"{SECOND}logit_scale": torch.tensor(1.0)},
    }


def written(path: Path, *names: str, **extra: Tensor) -> Path:
    state = {key: tensor for name in names for key, tensor in parts()[name].items()} | extra
    save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, path)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "sdxl.safetensors", *parts())


@torch.no_grad()
def check_same(family: Any) -> None:
    reference = load_model(pipeline())
    ours, theirs = family.codec(CPU), reference.codec(CPU)
    cond, images = theirs.encode_texts(CAPTIONS), torch.rand(2, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(ours.encode_texts(CAPTIONS), cond, rtol=0, atol=0)
    latents = theirs.encode_images(images)
    assert torch.equal(ours.encode_images(images), latents) and torch.equal(
        ours.decode(latents), theirs.decode(latents)
    )
    t = torch.tensor([3, 700])
    assert torch.equal(*(f.denoiser.predict(latents, t, cond) for f in (family, reference)))
    processes: list[Any] = [f.denoiser.process for f in (family, reference)]
    assert torch.equal(*(process.alphas_cumprod for process in processes))


def test_its_head_tells_of_all_layers(path: Path, tmp_path: Path) -> None:
    expected = load_model(path, with_texts=True).denoiser.nets
    found = skeleton(path, with_texts=True)[0].nets
    assert shapes(found) == shapes(expected) and len(found) == 3
    alone = written(tmp_path / "unet.safetensors", "unet")
    assert shapes(skeleton(alone, with_texts=True)[0].nets) == shapes({"unet": expected["unet"]})


def shapes(nets: Mapping[str, torch.nn.Module]) -> dict[str, torch.Size]:
    return {f"{name}.{key}": tensor.shape for name, net in nets.items() for key, tensor in net.state_dict().items()}


def test_a_whole_file_needs_no_folder(path: Path) -> None:
    family = load_model(path)
    check_same(family)
    assert family.codec(CPU).resolution == 256  # the tiny autoencoder halves sides where the real one takes 1/8
    pipe = family.pipeline(family.denoiser)
    picture = pipe("a cat", num_inference_steps=1, output_type="pt", height=32, width=32).images
    assert picture.shape == (1, 3, 32, 32)


def test_it_trains_from_captions_without_a_folder(path: Path) -> None:
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pipe, lora, loss, _ = train_lora(path, latents, CAPTIONS, steps=1, training_dtype="fp32")
    assert isinstance(pipe, StableDiffusionXLPipeline) and lora and len(loss["loss"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("held", [("unet",), ("unet", "vae"), ("unet", "first", "second"), ("unet", "first")])
def test_what_a_file_lacks_is_the_folder_s(held: tuple[str, ...], tmp_path: Path) -> None:
    path, folder = written(tmp_path / "sdxl.safetensors", *held), tmp_path / "folder"
    with pytest.raises(ValueError, match="sdxl.safetensors must hold .* to encode captions, or encoders be a folder"):
        load_model(path).codec(CPU)
    pipeline().save_pretrained(folder)
    check_same(load_model(path, folder))


@pytest.mark.slow
def test_unets_alone_are_read_under_all_names(tmp_path: Path) -> None:
    pipeline().save_pretrained(tmp_path / "folder")
    state = {key.removeprefix(DENOISER): tensor.contiguous() for key, tensor in parts()["unet"].items()}
    save_file(state, tmp_path / "comfyui.safetensors")
    check_same(load_model(tmp_path / "comfyui.safetensors", tmp_path / "folder"))
    theirs = next((tmp_path / "folder" / "unet").glob("*.safetensors")).rename(tmp_path / "diffusers.safetensors")
    check_same(load_model(theirs, tmp_path / "folder"))
    with pytest.raises(ValueError, match="under diffusers' names: encoders must be a folder with its unet/config.json"):
        load_model(theirs)


def test_what_a_file_states_of_its_noise_goes_before_the_folder(tmp_path: Path) -> None:
    extra = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    path = written(tmp_path / "sdxl.safetensors", *parts(), **extra)
    pipeline().save_pretrained(tmp_path / "folder")
    for encoders in (None, tmp_path / "folder"):
        family = load_model(path, encoders)
        process: Any = family.denoiser.process
        assert process.prediction == "v" and float(process.alphas_cumprod[-1]) < 1e-6
        assert family.pipeline(family.denoiser).scheduler.config["prediction_type"] == "v_prediction"


def test_tensors_of_another_model_are_named_and_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = {"control_model.x": torch.ones(1), "control_model.y": torch.ones(1), "model_ema.decay": torch.ones(1)}
    path = written(tmp_path / "sdxl.safetensors", *parts(), **extra)
    load_model(path)
    said = f"{path}: 2 tensors have no place in the model and are not used, such as control_model.x"
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [said]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"edm_mean": torch.ones(4)}, "must be an SDXL of noise or v prediction, got one of EDM's"),
        ({"conditioner.embedders.0.model.ln_final.bias": torch.ones(4)}, "must be SDXL's base, got its refiner"),
        ({f"{DENOISER}out.3.weight": torch.ones(4)}, f"which has no {DENOISER}out.3.weight"),
        ({f"{DENOISER}input_blocks.0.0.weight": torch.ones(64, 9, 3, 3)}, "got 9 .an inpainting model"),
        ({f"{DENOISER}out.2.bias": torch.ones(5)}, "cannot load the UNet2DConditionModel of .* must have the shape"),
    ],
)
def test_what_is_no_such_model_is_named(extra: State, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(written(tmp_path / "sdxl.safetensors", *parts(), **extra))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (f"{VAE}quant_conv.bias", "AutoencoderKL of .*: 1 tensor is missing, such as quant_conv.bias"),
        (f"{FIRST}final_layer_norm.bias", "the text encoder of .*: 1 tensor is missing, such as .*final_layer_norm"),
        (f"{SECOND}ln_final.bias", "the text encoder of .*: 1 tensor is missing, such as .*final_layer_norm.bias"),
    ],
)
def test_a_broken_encoder_is_named_once_it_is_needed(key: str, message: str, tmp_path: Path) -> None:
    state = {k: t.contiguous().clone() for part in parts().values() for k, t in part.items() if k != key}
    save_file(state, tmp_path / "sdxl.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "sdxl.safetensors").codec(CPU)
    save_file({**state, f"{VAE}strange.weight": torch.ones(1), key: torch.ones(1)}, tmp_path / "sdxl.safetensors")
    with pytest.raises(ValueError, match="cannot load the"):
        load_model(tmp_path / "sdxl.safetensors").codec(CPU)
