"""Single-file checkpoints: tiny models of the libraries, written in the original layout by hand, loaded, compared."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from originals import open_clip, original_vae
from safetensors.torch import load_file, save_file
from tiny import several
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from lorasmith.api import train_lora
from lorasmith.diffusion.process import Diffusion
from lorasmith.formats.unet_names import ldm_names
from lorasmith.models.checkpoints.clip_tokenizer import clip_tokenizer
from lorasmith.models.load import load_model
from lorasmith.models.meta import skeleton

State = dict[str, Tensor]
CPU = torch.device("cpu")
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


@dataclass(frozen=True)
class Tiny:
    """The real models, and the file that holds them in the original layout."""

    version: int
    unet: Any
    vae: Any
    text_encoder: Any

    def state(self) -> State:
        names = ldm_names(self.unet.config)
        state = {f"{UNET}{renamed(key, names)}": value for key, value in self.unet.state_dict().items()}
        state |= {f"{VAE}{key}": value for key, value in original_vae(self.vae).items()}
        text = self.text_encoder.state_dict()
        if self.version == 1:
            return state | {f"{TEXT}transformer.text_model.{key}": value for key, value in text.items()}
        return state | {f"{TEXT}model.{key}": value for key, value in with_unread_layer(text).items()}


def tiny(version: int, num_words: int = 1000) -> Tiny:
    """Random weights, the same in every test."""
    widths = (32, 64, 64) if version == 1 else (64, 128)
    attends = [True] * (len(widths) - 1) + [False]
    shapes: dict[str, Any] = {} if version == 1 else {"use_linear_projection": True, "attention_head_dim": (1, 2)}
    with torch.random.fork_rng():
        torch.manual_seed(version)
        unet = UNet2DConditionModel(
            block_out_channels=widths, layers_per_block=version, cross_attention_dim=64, sample_size=64,
            down_block_types=tuple("CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
            up_block_types=tuple("CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in attends[::-1]),
            **shapes,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=several(32, 64), layers_per_block=1,
            down_block_types=several("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=several("UpDecoderBlock2D", "UpDecoderBlock2D"), latent_channels=4,
        )  # fmt: skip
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=num_words, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                num_attention_heads=1, max_position_embeddings=16, bos_token_id=num_words - 2,
                eos_token_id=num_words - 1, hidden_act="quick_gelu" if version == 1 else "gelu",
            )
        )  # fmt: skip
    return Tiny(version, unet.eval(), vae.eval(), text_encoder.eval())


def renamed(key: str, names: dict[str, str]) -> str:
    module, _, leaf = key.rpartition(".")
    return f"{names[module]}.{leaf}"


def with_unread_layer(text: State) -> State:
    """OpenCLIP's names, with the last layer and the projection that SD 2 does not read."""
    last = {key.replace(".layers.1.", ".layers.2."): t + 1 for key, t in text.items() if ".layers.1." in key}
    return open_clip({**text, **last}) | {"text_projection": torch.randn(64, 64), "logit_scale": torch.tensor(1.0)}


def written(path: Path, state: State, metadata: dict[str, str] | None = None) -> Path:
    save_file({key: value.contiguous().clone() for key, value in state.items()}, path, metadata)
    return path


@pytest.fixture(scope="module")
def models() -> dict[int, Tiny]:
    return {version: tiny(version) for version in (1, 2)}


@pytest.fixture(params=[1, 2])
def model(request: pytest.FixtureRequest, models: dict[int, Tiny]) -> Tiny:
    return models[request.param]


@pytest.fixture
def path(model: Tiny, tmp_path: Path) -> Path:
    return written(tmp_path / "model.safetensors", model.state())


@pytest.fixture
def text() -> Tensor:
    """[1,16,64]."""
    return torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_every_part_computes_what_the_original_computes(model: Tiny, path: Path, latents: Tensor, text: Tensor) -> None:
    family: Any = load_model(path)
    t, texts = torch.tensor([1, 200, 500, 999]), text.expand(4, -1, -1)
    assert torch.equal(family.denoiser.predict(latents, t, {"text": texts}), model.unet(latents, t, texts).sample)
    pipe = family.pipeline(family.denoiser)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(pipe.vae.encode(images).latent_dist.mode(), model.vae.encode(images).latent_dist.mode())
    assert torch.equal(pipe.vae.decode(latents).sample, model.vae.decode(latents).sample)
    tokens = torch.randint(0, 1000, (2, 16))
    assert torch.equal(pipe.text_encoder(tokens).last_hidden_state, model.text_encoder(tokens).last_hidden_state)
    assert pipe.vae.config["scaling_factor"] == 0.18215
    for ours, theirs in ((family.denoiser.unet, model.unet), (pipe.vae, model.vae)):
        same = set(theirs.config) - {"sample_size", "_use_default_values"}
        assert {k: _listed(ours.config[k]) for k in same} == {k: _listed(theirs.config[k]) for k in same}


def test_its_head_tells_of_all_layers(path: Path) -> None:
    expected, found = load_model(path, with_texts=True).denoiser, skeleton(path, with_texts=True)[0]
    assert found.nets.keys() == expected.nets.keys() == {"unet", "text_encoder"}
    for name, net in expected.nets.items():
        shapes = {key: tensor.shape for key, tensor in found.nets[name].state_dict().items()}
        assert shapes == {key: tensor.shape for key, tensor in net.state_dict().items()}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_it_trains_from_latents_and_tensors(
    model: Tiny, tmp_path: Path, latents: Tensor, text: Tensor, dtype: torch.dtype
) -> None:
    path = written(tmp_path / "model.safetensors", {key: value.to(dtype) for key, value in model.state().items()})
    pipe, lora, loss, steps = train_lora(path, latents, [text], steps=2, training_dtype="fp32")
    assert isinstance(pipe, StableDiffusionPipeline) and pipe.unet.dtype == dtype and pipe.vae.dtype == dtype
    assert len(loss["loss"]) == steps == 2 and lora
    assert pipe.scheduler.config["beta_end"] == 0.012
    assert pipe.scheduler.config["prediction_type"] == ("epsilon" if model.version == 1 else "v_prediction")


@pytest.mark.slow
@torch.no_grad()
def test_captions_are_read_with_clips_words(tmp_path: Path, latents: Tensor) -> None:
    """The original SD 2 code fills short captions up with zeros, SD 1 with the end token."""
    for version, fill in ((1, 49407), (2, 0)):
        model = tiny(version, num_words=49408)
        path = written(tmp_path / f"{version}.safetensors", model.state())
        family = load_model(str(path))
        known = [49406, 320, 1125, 539, 320, 2368, 49407]
        tokens = torch.tensor([known + [fill] * 9])
        expected = model.text_encoder(tokens).last_hidden_state
        assert torch.equal(family.codec(CPU).encode_texts(["a photo of a cat"])["text"], expected)
        with torch.enable_grad():
            pipe = train_lora(path, latents, ["a photo of a cat"], steps=1, training_dtype="fp32").model_with_lora
        assert pipe.tokenizer("a photo of a cat").input_ids == known
        images = torch.randn(1, 3, 32, 32)
        pipe_mean = pipe.vae.encode(images).latent_dist.mode() * 0.18215
        assert torch.equal(family.codec(CPU).encode_images(images), pipe_mean)
        picture = pipe("a cat", num_inference_steps=1, output_type="pt", height=32, width=32).images
        assert picture.shape == (1, 3, 32, 32)


def test_clips_words() -> None:
    tokenizer = clip_tokenizer("!")
    assert len(tokenizer) == 49408 and tokenizer.pad_token_id == 0
    ids = tokenizer("Wow!  It's\n2 CATS, café ☃").input_ids
    assert ids == [49406, 2781, 256, 585, 568, 273, 3989, 267, 15304, 1741, 481, 49407]  # as open_clip has them
    assert len(tokenizer("cat " * 100, truncation=True).input_ids) == 77


def test_other_words_are_refused_once_captions_are_needed(path: Path, latents: Tensor) -> None:
    with pytest.raises(ValueError, match="must hold tokenizer to encode captions, or encoders be a folder that does"):
        train_lora(path, latents, ["a cat"], steps=1)


def test_names_without_the_text_model_level_and_averages_are_read(models: dict[int, Tiny], tmp_path: Path) -> None:
    state = {key.replace("text_model.", ""): value for key, value in models[1].state().items()}
    state[f"{TEXT}transformer.embeddings.position_ids"] = torch.arange(16)[None]
    state |= {"model_ema.decay": torch.tensor(0.9), "model_ema.diffusion_modelout2weight": torch.zeros(4)}
    state |= {"betas": torch.zeros(1000), f"{VAE}loss.logvar": torch.tensor(0.0)}
    family = load_model(written(tmp_path / "model.safetensors", state))
    ours = family.pipeline(family.denoiser).text_encoder.state_dict()
    theirs = models[1].text_encoder.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_text_encoder_without_its_last_layer_is_read_whole(models: dict[int, Tiny], tmp_path: Path) -> None:
    """Files that were made of diffusers folders hold the 23 layers that are read, others 24."""
    state = models[2].state()
    layer = {key: value for key, value in state.items() if ".resblocks.1." in key}
    state |= {key.replace(".1.", f".{n}.", 1): value for key, value in layer.items() for n in range(2, 23)}
    for extra in ({}, {key.replace(".1.", ".23.", 1): value for key, value in layer.items()}):
        path = written(tmp_path / "model.safetensors", state | extra)
        family = load_model(path)
        assert family.pipeline(family.denoiser).text_encoder.config.num_hidden_layers == 23


@pytest.mark.parametrize(
    ("extra", "metadata", "prediction", "side", "said"),
    [
        ({}, {}, "v", 96, "v, as of SD 2 for 768 pixels, is assumed"),
        ({"global_step": torch.tensor(875000)}, {}, "eps", 64, "the noise, as of SD 2 base, is assumed"),
        ({"global_step": torch.tensor(110000)}, {}, "v", 96, "v, as of SD 2 for 768 pixels, is assumed"),
        ({}, {"modelspec.resolution": "512x512"}, "eps", 256, "the noise, as of SD 2 base, is assumed"),
        ({}, {"modelspec.prediction_type": "epsilon"}, "eps", 64, ""),
        ({}, {"modelspec.prediction_type": "v", "modelspec.resolution": "768x768"}, "v", 384, ""),
        ({"v_pred": torch.tensor([])}, {"modelspec.prediction_type": "epsilon"}, "v", 96, ""),
    ],
)
def test_what_an_sd2_file_predicts(
    models: dict[int, Tiny], tmp_path: Path, caplog: pytest.LogCaptureFixture, extra: State,
    metadata: dict[str, str], prediction: str, side: int, said: str,
) -> None:  # fmt: skip
    path = written(tmp_path / "model.safetensors", models[2].state() | extra, metadata)
    with caplog.at_level(logging.WARNING, "lorasmith"):
        family = load_model(path)
    process, unet = family.denoiser.process, family.denoiser.nets["unet"]
    assert isinstance(unet, UNet2DConditionModel)
    assert isinstance(process, Diffusion) and process.prediction == prediction
    assert unet.config["sample_size"] == side  # the tiny VAE halves sides where the real one takes 1/8
    assert said in caplog.text and bool(said) == bool(caplog.text)


def test_v_prediction_and_zero_snr_are_read_in_sd1_too(models: dict[int, Tiny], tmp_path: Path) -> None:
    extra = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor(0.0)}
    process = load_model(written(tmp_path / "model.safetensors", models[1].state() | extra)).denoiser.process
    assert isinstance(process, Diffusion) and process.prediction == "v" and float(process.alphas_cumprod[-1]) < 1e-6
    plain = load_model(written(tmp_path / "plain.safetensors", models[1].state())).denoiser.process
    assert isinstance(plain, Diffusion) and plain.prediction == "eps"
    assert float(plain.alphas_cumprod[-1]) == pytest.approx(0.00466, rel=1e-2)


def test_a_unet_alone_trains_from_tensors_and_says_what_it_lacks(
    model: Tiny, tmp_path: Path, latents: Tensor, text: Tensor
) -> None:
    state = {key: value for key, value in model.state().items() if key.startswith(UNET)}
    path = written(tmp_path / "unet.safetensors", state)
    if model.version == 1:
        assert train_lora(path, latents, [text], steps=1).model_with_lora.vae is None
    with pytest.raises(ValueError, match="must hold vae and text_encoder and tokenizer to encode captions"):
        load_model(path).codec(CPU)
    vae = {key: value for key, value in model.state().items() if key.startswith(VAE)}
    with pytest.raises(ValueError, match="must hold text_encoder and tokenizer to encode"):
        load_model(written(tmp_path / "two.safetensors", state | vae)).codec(CPU)


@pytest.mark.slow
@torch.no_grad()
def test_what_a_file_lacks_is_the_folder_s(tmp_path: Path) -> None:
    model = tiny(1, num_words=49408)
    others: dict[str, Any] = {"scheduler": DDIMScheduler(), "safety_checker": None, "feature_extractor": None}
    StableDiffusionPipeline(
        vae=model.vae, text_encoder=model.text_encoder, tokenizer=clip_tokenizer(length=16), unet=model.unet,
        requires_safety_checker=False, **others,
    ).save_pretrained(tmp_path / "folder")  # fmt: skip
    whole = load_model(written(tmp_path / "whole.safetensors", model.state())).codec(CPU)
    state = {key: value for key, value in model.state().items() if key.startswith(UNET)}
    family = load_model(written(tmp_path / "unet.safetensors", state), tmp_path / "folder")
    texts, images = ["a photo of a cat"], torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(family.codec(CPU).encode_texts(texts)["text"], whole.encode_texts(texts)["text"])
    assert torch.equal(family.codec(CPU).encode_images(images), whole.encode_images(images))
    assert family.pipeline(family.denoiser).tokenizer is not None


def without(key: str) -> Callable[[State], State]:
    return lambda state: {name: value for name, value in state.items() if name != key}


def with_zeros(key: str, *shape: int) -> Callable[[State], State]:
    return lambda state: {**state, key: torch.zeros(*shape)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_zeros(f"{UNET}input_blocks.0.0.weight", 32, 9, 3, 3), "4 input channels, got 9 .an inpainting model"),
        (with_zeros(f"{UNET}input_blocks.0.0.weight", 32, 5, 3, 3), "UNet of 4 input channels, got 5$"),
        (with_zeros("conditioner.embedders.0.x", 1), r"UNet of widths in 64s, got \[32, 64, 64\]"),
        (lambda _: {f"{UNET}label_emb.0.0.weight": torch.zeros(1)}, "hold the tensor .*input_blocks.0.0.weight"),
        (lambda _: {"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, "FluxTransformer2DModel of .*: no img_in"),
        (lambda _: {f"{UNET}joint_blocks.0.x_block.mlp.fc1.weight": torch.zeros(1)}, "Stable Diffusion 3|SD3Tr"),
        (lambda _: {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}, "got a part of a diffusers folder"),
        (lambda _: {"emb_params": torch.zeros(1)}, "family among .*, Stable .* 1.x, got tensors such as emb_params"),
        (lambda _: {"lora_unet_mid_block.lora_down.weight": torch.zeros(1)}, "must be a model, got a LoRA"),
        (without(f"{UNET}input_blocks.0.0.weight"), "hold the tensor model.diffusion_model.input_blocks.0.0.weight"),
        (without(f"{UNET}input_blocks.1.0.in_layers.2.weight"), "hold the tensor .*blocks.1.0.in_layers.2.weight"),
        (without(f"{UNET}input_blocks.2.0.op.weight"), "hold the tensor .*input_blocks.2.0.in_layers.2.weight"),
        (without(f"{UNET}out.2.bias"), "UNet2DConditionModel of .*: 1 tensor is missing, such as conv_out.bias"),
        (with_zeros(f"{UNET}label_emb.0.0.weight", 4, 4), "which has no model.diffusion_model.label_emb.0.0.weight"),
        (with_zeros(f"{UNET}out.0.weight", 7), "cannot load the UNet2DConditionModel of .* must have the shape"),
    ],
)  # fmt: skip
def test_what_is_no_such_model_is_named(
    models: dict[int, Tiny], tmp_path: Path, change: Callable[[State], State], message: str
) -> None:
    path = written(tmp_path / "model.safetensors", change(models[1].state()))
    with pytest.raises(ValueError, match=message) as raised:
        load_model(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("version", "key", "message"),
    [
        (1, f"{VAE}decoder.up.1.upsample.conv.bias", "AutoencoderKL of .*upsample.conv.bias"),
        (1, f"{VAE}quant_conv.bias", "AutoencoderKL of .*: 1 tensor is missing, such as quant_conv.bias"),
        (1, f"{TEXT}transformer.text_model.final_layer_norm.bias", "text encoder of .*: 1 tensor is missing"),
        (2, f"{TEXT}model.transformer.resblocks.0.ln_1.bias", "text encoder of .*such as .*layer_norm1.bias"),
        (2, f"{TEXT}model.positional_embedding", "must hold the tensor cond_stage_model.model.positional_embedding"),
    ],
)
def test_a_broken_encoder_is_named_once_it_is_needed(
    models: dict[int, Tiny], tmp_path: Path, version: int, key: str, message: str
) -> None:
    family = load_model(written(tmp_path / "model.safetensors", without(key)(models[version].state())))
    with pytest.raises(ValueError, match=message):
        family.codec(CPU)


def test_files_of_other_kinds_are_refused(tmp_path: Path, models: dict[int, Tiny]) -> None:
    pickle = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}}, pickle)
    with pytest.raises(ValueError, match=r"model\.ckpt must be a safetensors file: a pickle \(\.ckpt\) can run code"):
        load_model(pickle)
    renamed_pickle = pickle.rename(tmp_path / "pickle.safetensors")
    with pytest.raises(
        ValueError, match="pickle.safetensors is a zip archive or a pickle of torch.save, not a safetensors file"
    ):
        load_model(renamed_pickle)
    with pytest.raises(ValueError, match="nothing.safetensors must be a safetensors file: file not found"):
        load_model(str(tmp_path / "nothing.safetensors"))
    path = written(tmp_path / "flow.safetensors", models[2].state(), {"modelspec.prediction_type": "flow"})
    with pytest.raises(ValueError, match=r"prediction_type of .*flow.safetensors must be epsilon or v, got 'flow'"):
        load_model(path)
    assert load_file(path)  # a sound file but for its metadata
