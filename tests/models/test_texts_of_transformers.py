"""Text encoders of SD 3 and Flux.1: applied as diffusers and PEFT apply LoRAs to them, trained, and continued."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from commands import made as pictures_in
from tiny import PROMPTS, TINY, adapters_of, made
from torch import Tensor

from lorasmith.adapters.hooks import attached
from lorasmith.adapters.targets import Targets
from lorasmith.api import train_lora
from lorasmith.config.schema import Config, TextEncoder
from lorasmith.config.values import configured
from lorasmith.data.dataset import batch_of
from lorasmith.formats import lora_file
from lorasmith.formats.write import in_layout
from lorasmith.models.load import load_model, with_adapted_texts
from lorasmith.prepare.share import shared_copy
from lorasmith.rng import Purpose, normal
from lorasmith.runs import generate
from lorasmith.runs.checks import checked
from lorasmith.runs.generate import draw_comparison
from lorasmith.runs.run import opened_run
from lorasmith.training.objective import sample_losses
from lorasmith.types import Cached

CPU = torch.device("cpu")
SD3, FLUX = "StableDiffusion3Pipeline", "FluxPipeline"
T5 = {SD3: "text_encoder_3", FLUX: "text_encoder_2"}
models = pytest.mark.parametrize("model", [SD3, FLUX])
ALL = Targets(preset="all", exclude=(r"text_projection",))  # which diffusers gives no adapter


def opened_whole(model: str) -> tuple[Any, Any]:
    """The family with its text encoders, and a copy of its denoiser in fp32."""
    family: Any = load_model(made(model), with_texts=True)
    return family, shared_copy(family.denoiser, CPU, torch.float32)


def embeddings(pipe: Any) -> tuple[Tensor, Tensor]:
    """What diffusers makes of the prompts: the tokens, as many of T5 as are trained with, and the pooled vector."""
    length = 512 if isinstance(pipe, type(made(FLUX))) else 256
    with torch.no_grad():
        found = pipe.encode_prompt(list(PROMPTS), *[None] * (1 if length == 512 else 2), max_sequence_length=length)
    return found[0], found[1 if length == 512 else 2]


@pytest.mark.parametrize(
    ("model", "has_t5", "is_adapted"),
    [(SD3, True, True), (SD3, True, False), (SD3, False, False), (FLUX, True, True), (FLUX, True, False)],
)
def test_tokens_are_encoded_as_by_diffusers(model: str, has_t5: bool, is_adapted: bool) -> None:
    """With T5 adapted, with what it made of the captions once, and without it."""
    pipe = made(model)
    if not has_t5:
        pipe.text_encoder_3 = None
    nets = {"transformer", *([T5[model]] if is_adapted else ())}
    family: Any = with_adapted_texts(load_model(pipe, with_texts=True), nets)
    assert (T5[model] in family.denoiser.nets) == is_adapted
    tokens = family.codec(CPU).encode_texts(list(PROMPTS))
    with torch.no_grad():
        found = family.denoiser.encoded(tokens)
    text, pooled = embeddings(pipe)
    torch.testing.assert_close(found["text"], text)
    torch.testing.assert_close(found["pooled"], pooled)
    assert (T5[model].replace("text_encoder", "ids") in tokens) == is_adapted


@models
def test_gradients_reach_every_adapter(model: str) -> None:
    family, denoiser = opened_whole(model)
    codec = family.codec(CPU)
    conds = [{k: v[0] for k, v in codec.encode_texts([prompt]).items()} for prompt in PROMPTS]
    latents = [normal(1, Purpose.NOISE, n, codec.latent_shape((32, 32))) for n in range(len(PROMPTS))]
    batch = batch_of([Cached(*s) for s in zip(PROMPTS, latents, conds, strict=True)], (0, 1, 2, 3))
    adapters = adapters_of(denoiser, ALL, 0.2)
    assert adapters.nets == denoiser.nets.keys() > {"text_encoder", T5[model]}
    with attached(denoiser, adapters):
        sample_losses(denoiser, batch, Config()).sum().backward()
    for path, adapter in adapters.adapters.items():
        assert all(p.grad is not None and p.grad.any() for p in adapter.parameters()), path


@models
def test_a_file_makes_the_embeddings_that_diffusers_and_peft_make(model: str, tmp_path: Path) -> None:
    """CLIPs by diffusers' own loader, T5, which it leaves out, by PEFT."""
    family, denoiser = opened_whole(model)
    adapters = adapters_of(denoiser, ALL, 0.2)
    lora_file.write(tmp_path / "lora.safetensors", in_layout(adapters, denoiser, torch.float32, "diffusers"))
    tokens = family.codec(CPU).encode_texts(list(PROMPTS))
    with torch.no_grad(), attached(denoiser, adapters):
        found = denoiser.encoded(tokens)
    pipe = made(model)
    plain, _ = embeddings(pipe)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    without_t5, _ = embeddings(pipe)
    t5: Any = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q", "k", "v", "o", "wi_0", "wi_1", "wo"]),
        getattr(pipe, T5[model]),
    )
    named = dict(t5.named_parameters())
    for path, adapter in adapters.adapters.items():
        if path.startswith(f"{T5[model]}."):
            ours: Any = adapter
            named[f"{path.partition('.')[2]}.lora_A.default.weight"].data.copy_(ours.down)
            named[f"{path.partition('.')[2]}.lora_B.default.weight"].data.copy_(ours.up)
    text, pooled = embeddings(pipe)
    torch.testing.assert_close(found["text"], text, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["pooled"], pooled, rtol=1e-4, atol=1e-5)
    assert (text - without_t5).abs().max() > 0.01
    assert (model == FLUX) or (without_t5 - plain).abs().max() > 0.01  # Flux reads CLIP's pooled vector alone


@pytest.mark.slow
@models
def test_sample_draws_as_diffusers_does(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a LoRA of the transformer and both kinds of text encoder in kohya's names; T5's is fused by hand."""
    made(model).save_pretrained(tmp_path / "model")
    _, denoiser = opened_whole(model)
    adapters = adapters_of(denoiser, ALL, 0.2)
    lora_file.write(tmp_path / "lora.safetensors", in_layout(adapters, denoiser, torch.float32, "kohya"))
    rows: list[Any] = []
    monkeypatch.setattr(generate, "save_comparison", lambda found, prompts, path: rows.extend(found))
    guidance = TINY[model].guidance
    sampling = {"prompts": ["a cat"], "steps": 1, "guidance": guidance, "seed": 3}
    config = configured(
        {"model": str(tmp_path / "model"), "training_dtype": "fp32", "lora_dtype": "fp32", "sampling": sampling}
    )
    draw_comparison(config, tmp_path / "lora.safetensors", Path("unwritten.png"), CPU)
    without, ours = (np.asarray(pictures[0], dtype=np.float32) for _, pictures in rows)

    pipe = made(model)
    lora_file.write(tmp_path / "clip.safetensors", in_layout(adapters, denoiser, torch.float32, "diffusers"))
    pipe.load_lora_weights(tmp_path, weight_name="clip.safetensors")
    for path, adapter in adapters.adapters.items():
        if path.startswith(f"{T5[model]}."):
            mine: Any = adapter
            getattr(pipe, T5[model]).get_submodule(path.partition(".")[2]).weight.data += (mine.up @ mine.down).data
    codec = load_model(made(model)).codec(CPU)
    side, arguments = codec.resolution, {k: v for k, v in TINY[model].arguments.items() if k != "sigmas"}
    arguments["sigmas"] = [1.0]
    noise = normal(3, Purpose.PICTURE, 0, codec.latent_shape((side, side)))[None]
    theirs = pipe(
        "a cat", latents=TINY[model].noise(noise), num_inference_steps=1, height=side, width=side, output_type="np",
        max_sequence_length=512 if model == FLUX else 256, **arguments,
    ).images[0]  # fmt: skip
    np.testing.assert_allclose(ours, 255 * theirs, atol=2)
    assert np.abs(ours - without).max() > 10


@pytest.mark.slow
@models
def test_a_run_writes_names_that_others_read_and_is_continued(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By default CLIP is trained, under diffusers' names; with T5 the file has kohya's, and goes on being trained."""
    made(model).save_pretrained(tmp_path / "model")
    values: dict[str, Any] = {
        "model": str(tmp_path / "model"), "device": "cpu", "sampling": {"prompts": []}, "steps": 1,
        "data": {"folder": str(pictures_in(tmp_path / "cats", "a cat")), "resolution": 32}, "training_dtype": "fp32",
        "text_encoder": {"train": True}, "output": str(tmp_path / "clip"), "adapter": {"name": "LoRA", "rank": 2},
    }  # fmt: skip
    with opened_run(checked(configured(values))) as run:
        list(run.steps())
        (path,) = run.save()
        assert T5[model] not in run.job.denoiser.nets
    keys = lora_file.read(path)[0]
    assert {key.partition(".")[0] for key in keys} == run.job.adapters.nets
    made(model).load_lora_weights(path.parent, weight_name=path.name)
    whole = values | {"targets": {"preset": "all"}, "output": str(tmp_path / "all")}
    with opened_run(checked(configured(whole))) as run:
        list(run.steps())
        (path,) = run.save()
        assert T5[model] in run.job.denoiser.nets
    starts = {key[: len("lora_te1")] for key in lora_file.read(path)[0]}
    assert starts == {"lora_une", "lora_te1", "lora_te3", *(["lora_te2"] if model == SD3 else [])}
    more = {key: value for key, value in values.items() if key != "text_encoder"}
    changed = {"existing_lora": str(path), "steps": 2, "output": str(tmp_path / "more")}
    with opened_run(checked(configured(more | changed))) as run:
        assert run.job.adapters.nets == {"transformer", *run.job.denoiser.nets} and T5[model] in run.job.adapters.nets
        list(run.steps())
    assert "text_encoder.train: on, as existing_lora holds layers of text encoders" in caplog.text


@models
def test_the_contract_continues_them_or_says_what_to_pass(model: str, tmp_path: Path) -> None:
    latents = torch.randn(2, *load_model(made(model)).codec(CPU).latent_shape((32, 32)))
    one: dict[str, Any] = {"steps": 1, "training_dtype": "fp32", "lora_dtype": "fp32", "rank": 2}
    trained = TextEncoder(train=True)
    first = train_lora(
        made(model), latents, ["a cat", "dog"], **one, targets=Targets(preset="all"), text_encoder=trained
    )
    path = tmp_path / "a_1_steps.safetensors"
    lora_file.write(path, first.lora)
    again = train_lora(made(model), latents, ["a cat", "dog"], **one, existing_lora=path, text_encoder=trained)
    assert again.steps == 2 and again.lora.keys() == first.lora.keys()
    (name,) = {key for key in again.lora if key.startswith("lora_te3_") and "SelfAttention_q.lora_up" in key}
    assert not torch.equal(again.lora[name], first.lora[name])
    with pytest.raises(
        ValueError,
        match=r"^text_encoder must be TextEncoder\(train=True\), with captions as positive, to continue \S*a_1_steps",
    ):
        train_lora(made(model), latents, ["a cat", "dog"], **one, existing_lora=path)
