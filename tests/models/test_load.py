"""What holds for every family alike, on tiny pipelines: predictions, encodings, gradients, files, all beside diffusers.

B batch, C channels, h w latent sides.
"""

import logging
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiers import table
from tiny import PROMPTS, TINY, made
from torch import Tensor

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import LoRA
from lorasmith.adapters.hooks import attached
from lorasmith.adapters.targets import Targets, adaptable_layers
from lorasmith.config.schema import Config
from lorasmith.data.dataset import batch_of
from lorasmith.diffusion.sampling import pictures_of
from lorasmith.formats import lora_file
from lorasmith.formats.write import in_layout, metadata_of
from lorasmith.models.load import FAMILIES, Family, load_model
from lorasmith.prepare.activation_checkpointing import checkpointed
from lorasmith.rng import Purpose, normal
from lorasmith.training.objective import sample_losses
from lorasmith.types import Cached, Codec, LayoutName, unread

CPU = torch.device("cpu")
ALIKE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}  # sums depend on where weights lie in memory
families = pytest.mark.parametrize("name", sorted(TINY))
some_families = table("name", sorted(TINY), quick=["FluxPipeline", "StableDiffusionXLPipeline", "Wan 2.2"])


@cache
def opened_family(name: str) -> tuple[Family, Codec]:
    family = load_model(made(name))
    return family, family.codec(CPU)


def samples(name: str) -> list[Cached]:
    """One for each prompt, with latents of noise."""
    _, codec = opened_family(name)
    conds = [{k: v[0] for k, v in codec.encode_texts([prompt]).items()} for prompt in PROMPTS]
    assert not any(value.requires_grad for cond in conds for value in cond.values())
    latents = [normal(1, Purpose.NOISE, number, TINY[name].latent) for number in range(len(PROMPTS))]
    return [Cached(*sample) for sample in zip(PROMPTS, latents, conds, strict=True)]


def adapters_of(family: Family) -> AdapterSet:
    """New ones on every layer, which change what the net returns."""
    adapters = AdapterSet.new(family.denoiser, LoRA(rank=2), Targets(preset="all"), 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapters.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return adapters


def gradients(name: str, *, depth: int | None = None) -> tuple[Tensor, list[Tensor]]:
    """The losses of a batch of all samples, and the gradients of every adapter's parameters."""
    family, _ = opened_family(name)
    adapters = adapters_of(family)
    batch = batch_of(samples(name), tuple(range(len(PROMPTS))))
    with attached(family.denoiser, adapters):
        if depth is None:
            losses = sample_losses(family.denoiser, batch, Config())
            losses.sum().backward()
        else:
            with checkpointed(family.denoiser, depth):
                losses = sample_losses(family.denoiser, batch, Config())
                losses.sum().backward()
    grads = [parameter.grad for parameter in adapters.parameters()]
    assert all(grad is not None for grad in grads)
    return losses.detach(), [grad for grad in grads if grad is not None]


def test_every_family_is_tested() -> None:
    tested = {type(made(name)).__name__ for name in TINY}
    assert FAMILIES.keys() - {"StableDiffusionPipeline"} == tested


@some_families
def test_a_picture_is_the_one_that_diffusers_draws(name: str) -> None:
    family, codec = opened_family(name)
    tiny, (width, height) = TINY[name], TINY[name].size
    drawing = {"size": tiny.size, "seed": 3, "steps": tiny.steps, "guidance": tiny.guidance}
    _, ours, *_ = pictures_of(family.denoiser, codec, dict(enumerate(PROMPTS)), **drawing)
    noise = normal(3, Purpose.PICTURE, 1, codec.latent_shape(tiny.size))[None]
    pipe = made(name)
    output = pipe(
        latents=tiny.noise(noise), num_inference_steps=tiny.steps, height=height, width=width, output_type="pt",
        **tiny.prompt(pipe, PROMPTS[1]), **tiny.arguments,
    )  # fmt: skip
    assert ours.std() > 0.01
    torch.testing.assert_close(((ours + 1) / 2), tiny.picture(output), atol=tiny.tolerance, rtol=0)


@families
def test_a_batch_of_captions_equals_the_single_ones(name: str) -> None:
    family, _ = opened_family(name)
    cached = samples(name)
    batch = batch_of(cached, tuple(range(len(cached))))
    with torch.no_grad():
        together = sample_losses(family.denoiser, batch, Config())
        single = [sample_losses(family.denoiser, batch_of([s], (n,)), Config()) for n, s in enumerate(cached)]
    assert len(set(together.tolist())) == len(cached)
    torch.testing.assert_close(together, torch.cat(single), atol=1e-5, rtol=1e-5)


@families
def test_gradients_reach_every_adapter_and_checkpointing_keeps_them(name: str) -> None:
    losses, grads = gradients(name)
    assert all(grad.any() and grad.isfinite().all() for grad in grads)
    again, checkpointed_grads = gradients(name, depth=2)
    assert torch.equal(losses, again)
    torch.testing.assert_close(checkpointed_grads, grads, rtol=1e-4, atol=1e-6)


@families
def test_layers_without_an_adapter_are_those_that_no_prediction_depends_on(name: str) -> None:
    family = load_model(made(name))
    layers: dict[str, Any] = dict(adaptable_layers(family.denoiser.nets))
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    batch = batch_of(samples(name), tuple(range(len(PROMPTS))))
    sample_losses(family.denoiser, batch, Config()).sum().backward()
    idle = {path for path, layer in layers.items() if layer.weight.grad is None or not layer.weight.grad.any()}
    assert layers.keys() - adapters_of(family).adapters.keys() == idle == set(unread(family.denoiser))


@families
def test_predictions_follow_the_prompt(name: str) -> None:
    family, _ = opened_family(name)
    first, *others = samples(name)
    t = family.denoiser.process.time(torch.tensor([0.5]))
    with torch.no_grad():
        pred, *preds = (
            family.denoiser.predict(first.latent[None], t, {k: v[None] for k, v in sample.cond.items()})
            for sample in (first, *others)
        )
    assert all((pred - other).abs().mean() > 1e-4 * pred.abs().mean() for other in preds)


@table(
    ("name", "layout"),
    [
        *((name, None) for name in TINY if not name.startswith("Wan")),
        *((name, "diffusers") for name in TINY if name != "Wan 2.2"),
    ],
    quick=[("FluxPipeline", None), ("StableDiffusion3Pipeline", None), ("Wan 2.1", "diffusers")],
)
def test_diffusers_predicts_the_same_with_the_file(name: str, layout: LayoutName | None, tmp_path: Path) -> None:
    """Every layer, except those diffusers skips in SDXL files with kohya's names. Two experts' files: test_experts."""
    family, _ = opened_family(name)
    left_out = "none" if layout else "add_embedding"
    chosen = {path: adapter for path, adapter in adapters_of(family).adapters.items() if left_out not in path}
    adapters = AdapterSet(chosen)
    state = in_layout(adapters, family.denoiser, torch.float32, layout)
    lora_file.write(tmp_path / "a.safetensors", state, metadata_of(adapters, family.denoiser, layout))
    pipe = made(name)
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors")
    batch = batch_of(samples(name)[:1], (0,))
    with torch.no_grad():
        before = sample_losses(family.denoiser, batch, Config())
        theirs = sample_losses(load_model(pipe).denoiser, batch, Config())
        with attached(family.denoiser, adapters):
            ours = sample_losses(family.denoiser, batch, Config())
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    assert float((ours - before).abs()) > 1e-3


@some_families
def test_a_folder_is_the_open_pipeline(name: str, tmp_path: Path) -> None:
    made(name).save_pretrained(tmp_path)
    family, (reference, reference_codec) = load_model(tmp_path), opened_family(name)
    codec = family.codec(CPU)
    images = torch.rand(1, 3, *TINY[name].size[::-1], generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = codec.encode_images(images)
        torch.testing.assert_close(latents, reference_codec.encode_images(images), **ALIKE)
        assert tuple(latents.shape[1:]) == codec.latent_shape(TINY[name].size) == TINY[name].latent
        cond = codec.encode_texts(PROMPTS[:1])
        torch.testing.assert_close(cond, reference_codec.encode_texts(PROMPTS[:1]), **ALIKE)
        t = family.denoiser.process.time(torch.tensor([0.5]))
        ours, theirs = (f.denoiser.predict(latents, t, cond) for f in (family, reference))
        torch.testing.assert_close(ours, theirs, **ALIKE)
    assert type(family.pipeline(family.denoiser)) is type(made(name))
    assert family.metadata()["modelspec.architecture"].endswith("/lora")


@some_families
def test_training_lowers_the_loss_of_a_fixed_noise(name: str) -> None:
    family, _ = opened_family(name)
    adapters = AdapterSet.new(family.denoiser, LoRA(rank=4), Targets(), 0)
    optimizer = torch.optim.Adam(adapters.parameters(), lr=1e-2)
    batch = batch_of(samples(name), tuple(range(len(PROMPTS))))
    losses: list[float] = []
    with attached(family.denoiser, adapters):
        for _ in range(8):
            loss = sample_losses(family.denoiser, batch, Config()).mean()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[-1] < 0.98 * losses[0]


@families
def test_latents_and_texts_of_another_model_are_refused(name: str) -> None:
    family, _ = opened_family(name)
    (sample, *_) = samples(name)
    cond: Any = {key: value[None] for key, value in sample.cond.items()}
    x_t, t = sample.latent[None], family.denoiser.process.time(torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"latents must be \[N,\d+,.*\] for this model, got"):
        family.denoiser.predict(x_t[:, :-1], t, cond)
    with pytest.raises(ValueError, match=r"positive must hold text \[L,\d+\] for this model, got width"):
        family.denoiser.predict(x_t, t, cond | {"text": cond["text"][..., 1:]})
    with pytest.raises(ValueError, match=r"positive must hold text \[L,\d+\] for this model, got only"):
        family.denoiser.predict(x_t, t, {k: v for k, v in cond.items() if k != "text"} | {"other": cond["text"]})


@families
def test_captions_that_are_cut_are_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    _, codec = opened_family(name)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "lorasmith"):
        codec.encode_texts(["a cat", "a b " * 600])
    (said,) = [record.message for record in caplog.records if record.name.startswith("lorasmith")]
    assert "tokens are read of 'a b a b" in said
