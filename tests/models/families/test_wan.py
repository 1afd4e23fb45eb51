"""Wan: videos, two experts, and what is its own alone; all else is in test_families.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FRAME, PROMPTS, TINY, made
from torch import Tensor

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import LoRA
from lorasmith.adapters.hooks import attached
from lorasmith.adapters.targets import Targets
from lorasmith.api import train_lora
from lorasmith.config.schema import Config
from lorasmith.data.dataset import Dataset
from lorasmith.diffusion.sampling import drawn
from lorasmith.models.load import load_model
from lorasmith.prepare.fsdp import shard
from lorasmith.prepare.share import shared_copy
from lorasmith.rng import Purpose, normal
from lorasmith.training.loop import train
from lorasmith.training.state import State
from lorasmith.types import Cached, Denoiser

CPU = torch.device("cpu")
SECOND = Targets(preset="all", exclude=(r"^transformer\.",))


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("name", ["Wan 2.1", "Wan 2.2", "Wan 2.2 5B"])
def test_a_video_is_the_one_that_diffusers_draws(name: str) -> None:
    pipe = made(name)
    family = load_model(pipe)
    codec: Any = family.codec(CPU)
    noise = numbers(1, pipe.transformer.config["in_channels"], 2, 6, 4)
    height, width = (side * codec.factor for side in noise.shape[-2:])
    with torch.no_grad():
        cond, uncond = (codec.encode_texts([text]) for text in (PROMPTS[1], ""))
        ours = codec.decode(drawn(family.denoiser, cond, uncond, noise, steps=4, guidance=3.0))
    arguments = FRAME | {"num_frames": 5, "height": height, "width": width, "output_type": "pt"}
    theirs = pipe(PROMPTS[1], latents=noise, num_inference_steps=4, **arguments).frames
    assert ours.shape == (1, 3, 5, height, width)
    torch.testing.assert_close(((ours + 1) / 2).clamp(0, 1).transpose(1, 2), theirs, atol=TINY[name].tolerance, rtol=0)


def test_videos_are_encoded_frame_by_frame_and_decoded() -> None:
    """A frame's latent depends on no later frame, so that the first is the picture's; scales as in diffusers' own."""
    pipe = made("Wan 2.1")
    codec: Any = load_model(pipe).codec(CPU)
    video = numbers(2, 3, 5, 48, 32).clamp(-1, 1)
    with torch.no_grad():
        latents = codec.encode_images(video)
        torch.testing.assert_close(latents[:, :, :1], codec.encode_images(video[:, :, 0]))
        mean, std = (torch.tensor(pipe.vae.config[f"latents_{k}"]).view(1, 16, 1, 1, 1) for k in ("mean", "std"))
        torch.testing.assert_close(latents * std + mean, pipe.vae.encode(video).latent_dist.mode())
    assert latents.shape == (2, 16, 2, 6, 4)
    with pytest.raises(ValueError, match="a video must have 1 \\+ a multiple of 4 frames, got 4"):
        codec.encode_images(video[:, :, :4])


def test_each_sample_goes_to_the_expert_of_its_time() -> None:
    pipe = made("Wan 2.2")
    x_t, t, text = numbers(4, 16, 1, 6, 4), torch.tensor([0.1, 0.6, 0.59, 0.9]), numbers(4, 5, 16)
    with torch.no_grad():
        ours = load_model(pipe).denoiser.predict(x_t, t, {"text": text})
        for place, net in enumerate((pipe.transformer_2, pipe.transformer, pipe.transformer_2, pipe.transformer)):
            own = slice(place, place + 1)
            torch.testing.assert_close(ours[own], net(x_t[own], t[own] * 1000, text[own]).sample)


def test_latents_that_no_patch_fits_are_refused() -> None:
    denoiser = load_model(made("Wan 2.2")).denoiser
    for x_t, said in (
        (numbers(1, 16, 1, 5, 4), r"multiples of \[1, 2, 2\] .* got \[1, 5, 4\]"),
        (numbers(1, 16, 6, 4), ""),
    ):
        with pytest.raises(ValueError, match=said or r"latents must be \[N,16,f,h,w\] .* got \[1, 16, 6, 4\]"):
            denoiser.predict(x_t, torch.tensor([0.5]), {"text": numbers(1, 5, 16)})


def test_experts_need_two_transformers(tmp_path: Path) -> None:
    pipe = made("Wan 2.2")
    pipe.transformer_2 = None
    with pytest.raises(ValueError, match="model must hold a transformer_2, but the pipeline's is None"):
        load_model(pipe)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold transformer_2/, but it does not"):
        load_model(tmp_path)


def test_a_folder_in_bf16_gives_a_pipeline_in_bf16(tmp_path: Path) -> None:
    """diffusers keeps some of the transformer's weights in float32, the first one too."""
    made("Wan 2.1").to(torch.bfloat16).save_pretrained(tmp_path)
    family = load_model(tmp_path)
    net: Any = family.denoiser.nets["transformer"]
    assert next(net.parameters()).dtype == torch.float32 and net.proj_out.weight.dtype == torch.bfloat16
    pipe = family.pipeline(family.denoiser)
    assert pipe.text_encoder.dtype == pipe.vae.dtype == torch.bfloat16
    with torch.no_grad():
        out = family.denoiser.predict(numbers(1, 16, 1, 6, 4), torch.tensor([0.5]), {"text": numbers(1, 5, 16)})
    assert out.dtype == torch.float32 and out.isfinite().all()


def run(targets: Targets, *, steps: int, seed: int = 1) -> tuple[AdapterSet, list[bool]]:
    """Trains the adapters of 2.2; and whether the nets with adapters had a sample in each step."""
    denoiser: Denoiser = shared_copy(load_model(made("Wan 2.2")).denoiser, CPU, torch.float32)
    samples = [Cached(str(n), numbers(16, 1, 6, 4), {"text": numbers(5, 16)}) for n in range(4)]
    config = Config(steps=steps, adapter=LoRA(rank=2), targets=targets, seed=seed)
    dataset = Dataset.of(samples, [1] * 4, seed=seed, group_size=1)
    adapters = AdapterSet.new(denoiser, config.adapter, config.targets, seed)
    with attached(denoiser, adapters):
        done = list(train(denoiser, adapters, dataset, config, state=State(adapters, config, is_fp16=False)))
    return adapters, [step.grad_norm > 0 for step in done]


def moved(adapters: AdapterSet) -> set[str]:
    """The nets of adapters that are no longer the identity."""
    return {path.split(".")[0] for path, adapter in adapters.adapters.items() if list(adapter.parameters())[1].any()}


def test_an_expert_may_rest_for_some_steps() -> None:
    adapters, had = run(Targets(preset="all"), steps=6)
    assert moved(adapters) == {"transformer", "transformer_2"} and all(had)


def test_one_expert_may_be_trained_alone() -> None:
    adapters, had = run(SECOND, steps=6, seed=5)
    assert moved(adapters) == {"transformer_2"} and had == [False] * 5 + [True]
    with pytest.raises(ValueError, match="no adapter ran in 5 steps: no sample went to transformer_2"):
        run(SECOND, steps=5, seed=5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_expert_with_a_layer_that_never_runs_is_refused_once_it_runs(batch_size: int) -> None:
    def with_idle(name: str) -> None:
        denoiser: Any = load_model(made("Wan 2.2")).denoiser
        net = denoiser.nets[name]
        net.idle = torch.nn.Linear(4, 4)
        samples = [Cached(str(n), numbers(16, 1, 6, 4), {"text": numbers(5, 16)}) for n in range(4)]
        config = Config(steps=6, batch_size=batch_size, adapter=LoRA(rank=2), targets=Targets(preset="all"), seed=1)
        dataset = Dataset.of(samples, [1] * 4, seed=1, group_size=config.group_size)
        adapters = AdapterSet.new(denoiser, config.adapter, config.targets, 1)
        with attached(denoiser, adapters):
            list(train(denoiser, adapters, dataset, config, state=State(adapters, config, is_fp16=False)))

    for name in ("transformer", "transformer_2"):
        with pytest.raises(ValueError, match=rf"1 of \d+ adapters \({name}.idle\) never ran"):
            with_idle(name)


def test_experts_are_not_shared_out_over_processes() -> None:
    with pytest.raises(ValueError, match="sharded must be False: the model sends each sample to one of its nets"):
        shard(load_model(made("Wan 2.2")).denoiser, CPU)


def test_a_run_behind_the_contract_draws_videos_with_what_it_learned() -> None:
    pipe = made("Wan 2.2")
    latents = torch.stack([normal(1, Purpose.NOISE, n, (16, 2, 6, 4)) for n in range(3)])
    result = train_lora(
        pipe, latents, list(PROMPTS[:3]), steps=6, rank=2, learning_rate=0.02, targets=Targets(preset="all"),
        training_dtype="fp32", lora_dtype="fp32",
    )  # fmt: skip
    assert {key.split(".")[0] for key in result.lora} == {"transformer", "transformer_2"}
    arguments = FRAME | {"num_frames": 5, "height": 48, "width": 32, "output_type": "pt", "num_inference_steps": 2}
    before, after = (
        p("a cat", latents=numbers(1, 16, 2, 6, 4), **arguments).frames for p in (pipe, result.model_with_lora)
    )
    assert (before - after).abs().max() > 1e-3
