"""Runs of train_lora: seeds, runs beside and after each other, steps counted on, what the outputs draw."""

import itertools
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiers import table
from torch import Tensor

from lorasmith.adapters.targets import Targets
from lorasmith.api import train_lora
from lorasmith.demo import BASE
from lorasmith.formats import lora_file
from lorasmith.models.families.sd import StableDiffusion, StableDiffusionDenoiser
from lorasmith.prepare.share import shared_copy
from lorasmith.storage.hashing import digest
from lorasmith.types import Result

QUICK: dict[str, Any] = {"steps": 2, "rank": 2, "targets": Targets(preset="attention"), "gradient_checkpointing": False}
FLOW_TARGETS = Targets(
    preset="attention", exclude=(r"blocks\.1\.attn\.add_q_proj",)
)  # which its last block throws away
SEEDS = (0, 1, 2**32, 2**64 - 1)
Run = Callable[..., bytes]


@pytest.fixture
def denoiser(family: StableDiffusion) -> StableDiffusionDenoiser:
    return shared_copy(family.denoiser, torch.device("cpu"), torch.float32)


@pytest.fixture
def train(flow_denoiser: Any, latents: Tensor, texts: Tensor) -> Callable[..., Result]:
    """On the smallest model there is."""
    positive = [{"text": text[:5, :16], "pooled": text[5, :8]} for text in texts]
    return lambda **inputs: train_lora(
        flow_denoiser, latents[..., :8, :8], positive, **{**QUICK, "targets": FLOW_TARGETS, **inputs}
    )


@pytest.fixture
def run(train: Callable[..., Result]) -> Run:
    """Trains; returns what is made, adapters and losses, as bytes."""

    def made(**inputs: Any) -> bytes:
        result = train(**inputs)
        return f"{digest(result.lora.items())} {result.loss} {result.steps}".encode()

    return made


def test_every_seed_gives_its_own_file_again_and_again(run: Run) -> None:
    files = {seed: run(seed=seed) for seed in SEEDS}
    assert len(set(files.values())) == len(SEEDS)
    assert {seed: run(seed=seed) for seed in reversed(SEEDS)} == files


def test_a_run_leaves_nothing_for_the_next(run: Run) -> None:
    a: dict[str, Any] = {"seed": 3, "gradient_checkpointing": True}
    b: dict[str, Any] = {"algorithm": "LoKr", "optimizer": "SGD", "training_dtype": "fp32", "batch_size": 2}
    first, other, again = run(**a), run(**b), run(**a)
    assert first == again != other


def test_a_run_that_fails_leaves_nothing_for_the_next(flow_denoiser: Any, run: Run, latents: Tensor) -> None:
    first = run(gradient_checkpointing=True)
    huge, positive = torch.full_like(latents, 3e38), [{"text": torch.ones(5, 16), "pooled": torch.ones(8)}]
    with pytest.raises(ArithmeticError, match=r"3 times in a row: sample \d \(number 2, t .*\): the output of "):
        train_lora(flow_denoiser, huge, positive, targets=FLOW_TARGETS)
    assert not any(module._forward_hooks for module in flow_denoiser.transformer.modules())
    assert run(gradient_checkpointing=True) == first


def test_threads_do_not_meet(run: Run) -> None:
    """Different trainings at once, and the same one twice, on one model."""
    tasks: list[dict[str, Any]] = [
        {"seed": 1, "gradient_checkpointing": True},
        {"seed": 2, "algorithm": "LoHa", "training_dtype": "fp32"},
        {"seed": 3, "steps": 3, "lora_dtype": "fp32", "gradient_checkpointing": True},
        {"seed": 3, "steps": 3, "lora_dtype": "fp32", "gradient_checkpointing": True},
    ]
    alone = [run(**task) for task in tasks]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda task: run(**task), tasks)) == alone
    assert alone[2] == alone[3] and len(set(alone)) == 3


def test_a_callers_modes_do_not_matter(denoiser: Any, latents: Tensor, texts: Tensor) -> None:
    """Nor does it matter that weights, latents and conditioning were made in inference mode."""

    def run(model: Any, latents: Tensor, texts: Tensor) -> str:
        return digest(train_lora(model, latents, list(texts), **QUICK).lora.items())

    outside = run(denoiser, latents, texts)
    with torch.no_grad():
        assert run(denoiser, latents, texts) == outside
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        made_here = shared_copy(denoiser, dtype=torch.float64)
        made_here.unet.to(torch.float32)
        assert run(made_here, latents.clone(), texts.clone()) == outside
        assert torch.is_inference_mode_enabled()


def test_global_state_is_neither_read_nor_set(run: Run) -> None:
    files = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
        files.append(run(gradient_checkpointing=True))
        after = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
        assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert files[0] == files[1]
    assert torch.get_default_dtype() == torch.float32
    assert not torch.are_deterministic_algorithms_enabled() and torch.is_grad_enabled()


@table("modes", [(True, True), (False, True), (True, False)], quick=[(True, True)])
def test_the_model_that_came_in_is_bit_for_bit_what_it_was(
    denoiser: Any, latents: Tensor, texts: Tensor, modes: tuple[bool, bool]
) -> None:
    """Its modes, gradients and predictions too."""
    training, requires_grad = modes
    unet = denoiser.unet.train(training).requires_grad_(requires_grad)
    weights = {key: tensor.clone() for key, tensor in unet.state_dict().items()}

    def prediction(model: Any) -> Tensor:
        with torch.no_grad():
            return model.predict(latents, torch.full((4,), 500), {"text": texts})

    before = prediction(denoiser)
    result = train_lora(denoiser, latents, list(texts), **{**QUICK, "gradient_checkpointing": True})
    assert torch.equal(prediction(denoiser), before)
    assert not torch.equal(prediction(result.model_with_lora), before)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in unet.state_dict().items())
    assert all(p.requires_grad == requires_grad and p.grad is None for p in unet.parameters())
    assert all(module.training == training and not module._forward_hooks for module in unet.modules())


def test_a_group_is_one_however_it_is_cut_into_micro_batches(train: Callable[..., Result]) -> None:
    """SGD's steps are as long as its gradients, so that a sum in place of a mean would show."""
    inputs: dict[str, Any] = {"training_dtype": "fp32", "lora_dtype": "fp32", "optimizer": "SGD", "learning_rate": 0.5}
    results = [train(batch_size=b, grad_accumulation_steps=4 // b, steps=3, **inputs) for b in (1, 2, 4)]
    losses = [result.loss["loss"] for result in results]
    assert all(len(row) == 3 and all(type(loss) is float for loss in row) for row in losses)
    assert torch.tensor(losses).isfinite().all()
    start = train(steps=1, **{**inputs, "learning_rate": 1e-7}).lora
    for one, other in itertools.pairwise(results):
        assert one.loss["loss"] == pytest.approx(other.loss["loss"], rel=1e-4)
        assert any(float((tensor - start[key]).abs().max()) > 1e-3 for key, tensor in one.lora.items())
        torch.testing.assert_close(one.lora, other.lora, atol=1e-5, rtol=0)


STATED = {
    "own": ("a_500_steps_00001_", {"lorasmith.steps": "7", "ss_steps": "8"}, 7),
    "kohya": ("a_500_steps_00001_", {"ss_steps": "8"}, 8),
    "name": ("a_500_steps_00001_", {}, 500),
    "not a number": ("a_500_steps_00001_", {"ss_steps": "many", "lorasmith.steps": "-3"}, 500),
    "nothing": ("steps_5", {"ss_learning_rate": "1"}, 0),
}


@pytest.mark.parametrize("case", STATED)
def test_steps_go_on_from_those_of_the_existing_lora(
    train: Callable[..., Result], tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    name, metadata, done = STATED[case]
    path = tmp_path / f"{name}.safetensors"
    lora_file.write(path, train(steps=1).lora, metadata)
    caplog.clear()
    result = train(existing_lora=str(path) if done else path)
    assert result.steps == done + 2 and len(result.loss["loss"]) == 2
    expected = [] if done else ["existing_lora: steps_5.safetensors does not say how many steps it was trained: coun"]
    assert [record.getMessage()[:83] for record in caplog.records] == expected


def test_the_steps_that_were_done_are_not_made_again(train: Callable[..., Result], tmp_path: Path) -> None:
    """SGD has no state, so 1 step and 2 more are 3, losses and all."""
    inputs: dict[str, Any] = {"optimizer": "SGD", "learning_rate": 0.5, "lora_dtype": "fp32"}
    whole, first = train(steps=3, **inputs), train(steps=1, **inputs)
    lora_file.write(tmp_path / "a_1_steps.safetensors", first.lora, {})
    rest = train(steps=2, existing_lora=tmp_path / "a_1_steps.safetensors", **inputs)
    assert first.loss["loss"] + rest.loss["loss"] == whole.loss["loss"] and rest.steps == whole.steps
    assert all(torch.equal(tensor, whole.lora[key]) for key, tensor in rest.lora.items())


def test_an_existing_lora_overrules_and_says_what(
    train: Callable[..., Result], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a_1_steps.safetensors"
    first = train(rank=3, alpha=1.5, algorithm="LoHa")
    lora_file.write(path, first.lora, {})
    more = train(existing_lora=path, rank=5, alpha=2.5, algorithm="LoKr")
    assert [record.getMessage() for record in caplog.records] == [
        "algorithm: the LoRA's own (LoHa) holds, not LoKr",
        "rank: the LoRA's own (3) holds, not 5",
        "alpha: the LoRA's own (1.5) holds, not 2.5",
    ]
    assert {key: tensor.shape for key, tensor in more.lora.items()} == {k: t.shape for k, t in first.lora.items()}
    assert {float(tensor) for key, tensor in more.lora.items() if key.endswith("alpha")} == {1.5}
    caplog.clear()
    assert train(existing_lora=path, rank=3, algorithm="LoHa").steps == 3
    assert not caplog.records


def test_no_existing_lora_is_a_new_one(run: Run) -> None:
    assert run(existing_lora="[None]") == run(existing_lora=None) == run()


@pytest.mark.slow
def test_the_model_with_lora_draws_what_the_saved_file_draws(latents: Tensor, tmp_path: Path) -> None:
    """In diffusers, which reads the file by itself; the caller's pipeline goes on drawing its own."""

    def opened() -> Any:
        pipe = StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def picture(pipe: Any) -> Tensor:
        settings = {"num_inference_steps": 4, "output_type": "pt", "height": 64, "width": 64}
        return pipe("red apple", latents=latents[:1], **settings)[0]

    mine, theirs = opened(), opened()
    own = picture(mine)
    inputs: dict[str, Any] = {"training_dtype": "fp32", "lora_dtype": "fp32", "learning_rate": 0.05, "alpha": 3.0}
    result = train_lora(mine, latents, ["red apple"], **{**QUICK, **inputs})
    assert isinstance(result.model_with_lora, StableDiffusionPipeline) and result.model_with_lora is not mine
    lora_file.write(tmp_path / "lora.safetensors", result.lora, {})
    theirs.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    ours = picture(result.model_with_lora)
    torch.testing.assert_close(ours, picture(theirs), atol=1e-4, rtol=0)
    assert float((ours - own).abs().max()) > 0.02
    assert torch.equal(picture(mine), own)
