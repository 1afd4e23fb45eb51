"""train_lora: names, order, defaults, ranges, outputs, every way in, seeds, and one clear line on bad input."""

import inspect
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith import lorafile
from lorasmith.attach import Targets
from lorasmith.contract import train_lora
from lorasmith.demo import BASE
from lorasmith.families.sd import StableDiffusion, StableDiffusionCodec, StableDiffusionDenoiser
from lorasmith.memory import shared_copy
from lorasmith.types import Denoiser

CONTRACT = {
    "batch_size": 1, "grad_accumulation_steps": 1, "steps": 16, "learning_rate": 0.0005, "rank": 8,
    "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": "bf16", "lora_dtype": "bf16",
    "algorithm": "LoRA", "gradient_checkpointing": True, "existing_lora": "[None]",
}  # fmt: skip
QUICK: dict[str, Any] = {"steps": 2, "rank": 2, "targets": Targets(preset="attention"), "gradient_checkpointing": False}


@pytest.fixture
def denoiser(family: StableDiffusion) -> StableDiffusionDenoiser:
    return shared_copy(family.denoiser, torch.device("cpu"), torch.float32)


def bytes_of(denoiser: Denoiser, latents: Any, positive: Any, **inputs: Any) -> bytes:
    return lorafile.file_bytes(train_lora(denoiser, latents, positive, **{**QUICK, **inputs}).lora, {})


def test_names_order_and_defaults() -> None:
    parameters = inspect.signature(train_lora).parameters
    sixteen = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in sixteen] == ["model", "latents", "positive", *CONTRACT]
    assert {p.name: p.default for p in sixteen[3:]} == CONTRACT


def test_the_four_outputs(denoiser: Any, latents: Tensor, texts: Tensor) -> None:
    result = train_lora(denoiser, {"samples": latents}, list(texts), **QUICK)
    model, lora, loss, steps = result
    assert result._fields == ("model_with_lora", "lora", "loss", "steps")
    assert isinstance(model, Denoiser) and steps == 2
    assert list(loss) == ["loss"] and len(loss["loss"]) == 2 and all(isinstance(x, float) for x in loss["loss"])
    assert {t.dtype for k, t in lora.items() if ".lora_" in k} == {torch.bfloat16}
    assert all(t.isfinite().all() for t in lora.values())


def test_the_model_that_came_in_is_bit_for_bit_what_it_was(denoiser: Any, latents: Tensor, texts: Tensor) -> None:
    def state() -> list[tuple[str, Any, bool, bool]]:
        named = denoiser.unet.named_parameters()
        return [(n, p.detach().clone(), p.requires_grad, p.grad is None) for n, p in named]

    denoiser.unet.train().requires_grad_(True)
    before = state()
    result = train_lora(denoiser, latents, list(texts), **{**QUICK, "gradient_checkpointing": True})
    for (name, weight, *flags), (_, now, *now_flags) in zip(before, state(), strict=True):
        assert torch.equal(weight, now) and flags == now_flags, name
    assert all(module.training and not module._forward_hooks for module in denoiser.unet.modules())
    t = torch.full((4,), 500)
    with torch.no_grad():
        without = denoiser.predict(latents, t, {"text": texts})
        with_lora = result.model_with_lora.predict(latents, t, {"text": texts})
        assert not torch.equal(without, with_lora)
        assert torch.equal(without, denoiser.predict(latents, t, {"text": texts}))


def test_the_model_with_lora_is_what_the_file_gives(denoiser: Any, latents: Tensor, texts: Tensor) -> None:
    result = train_lora(denoiser, latents, list(texts), **QUICK)
    again = lorafile.adapters_from(result.lora, result.model_with_lora).file_state(denoiser, torch.bfloat16)
    assert all(torch.equal(again[key], tensor) for key, tensor in result.lora.items())


def test_same_seed_same_file_and_every_bit_of_it_counts(denoiser: Any, latents: Tensor, texts: Tensor) -> None:
    def file(seed: int) -> bytes:
        return bytes_of(denoiser, latents, list(texts), seed=seed)

    assert file(7) == file(7)
    assert len({file(seed) for seed in (7, 7 + 2**32, 7 + 2**63, 2**64 - 1)}) == 4


def test_the_global_generator_is_neither_read_nor_set(denoiser: Any, latents: Tensor, texts: Tensor) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = bytes_of(denoiser, latents, list(texts), gradient_checkpointing=True)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert bytes_of(denoiser, latents, list(texts), gradient_checkpointing=True) == first


def test_every_way_to_give_the_conditioning(denoiser: Any, latents: Tensor, texts: Tensor) -> None:
    comfy = [[text[None], {"pooled_output": torch.zeros(1, 8), "strength": 1.0}] for text in texts]
    ways = [list(texts), list(texts[:, None]), [{"text": text} for text in texts], comfy, tuple(texts)]
    assert len({bytes_of(denoiser, latents, way) for way in ways}) == 1


def test_captions_go_through_the_models_own_encoders(
    family: StableDiffusion, codec: StableDiffusionCodec, latents: Tensor
) -> None:
    captions = ["red apple", "dog", "cat", "rocket"]
    with torch.no_grad():
        encoded = list(codec.encode_texts(captions)["text"])
    by_caption = train_lora(BASE, latents, captions, **QUICK)
    assert lorafile.file_bytes(by_caption.lora, {}) == bytes_of(family.denoiser, latents, encoded)
    assert type(by_caption.model_with_lora).__name__ == "StableDiffusionPipeline"


def test_a_pipeline_gives_a_pipeline_and_stays(family: StableDiffusion, denoiser: Any, latents: Tensor) -> None:
    pipe = family.pipeline(denoiser)
    unet = pipe.unet
    result = train_lora(pipe, latents, ["red apple"], **QUICK)
    assert pipe.unet is unet and result.model_with_lora.unet is not unet
    assert type(result.model_with_lora) is type(pipe)
    assert len([m for m in result.model_with_lora.unet.modules() if m._forward_hooks]) == len(result.lora) / 3
    assert not [m for m in unet.modules() if m._forward_hooks]


def test_one_conditioning_serves_all(denoiser: Any, latents: Tensor, texts: Tensor) -> None:
    one, four = ([texts[0]], [texts[0]] * 4)
    assert bytes_of(denoiser, latents, one) == bytes_of(denoiser, latents, four)


def test_each_latent_keeps_its_own_conditioning(denoiser: Any, latents: Tensor, texts: Tensor) -> None:
    swapped = texts[[1, 0, 2, 3]]
    assert bytes_of(denoiser, latents, list(texts), batch_size=4) != bytes_of(
        denoiser, latents, list(swapped), batch_size=4
    )


@pytest.mark.parametrize("lora_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("training_dtype", ["bf16", "fp32"])
def test_dtypes(denoiser: Any, latents: Tensor, texts: Tensor, training_dtype: Any, lora_dtype: Any) -> None:
    inputs = {**QUICK, "training_dtype": training_dtype, "lora_dtype": lora_dtype}
    result = train_lora(denoiser, latents, list(texts), **inputs)
    expected = {"bf16": torch.bfloat16, "fp32": torch.float32}[lora_dtype]
    assert {t.dtype for k, t in result.lora.items() if ".lora_" in k} == {expected}


def test_continuing_a_file(denoiser: Any, latents: Tensor, texts: Tensor, tmp_path: Path) -> None:
    """Rank and alpha are the file's; the steps come from its metadata, else from its name."""
    first = train_lora(denoiser, latents, list(texts), **{**QUICK, "rank": 3}, alpha=1.5)
    named = tmp_path / "cat_40_steps_00001_.safetensors"
    lorafile.write(named, first.lora, {})
    more = train_lora(denoiser, latents, list(texts), existing_lora=named, **QUICK)
    assert more.steps == 42 and len(more.loss["loss"]) == 2
    assert all(float(t) == 1.5 for key, t in more.lora.items() if key.endswith("alpha"))
    assert {t.shape[0] for key, t in more.lora.items() if "lora_down" in key} == {3}
    assert any(not torch.equal(t, first.lora[key]) for key, t in more.lora.items())
    lorafile.write(named, first.lora, {"lorasmith.steps": "7"})
    assert train_lora(denoiser, latents, list(texts), existing_lora=str(named), **QUICK).steps == 9


RANGES = {
    "batch_size": (1, 10000), "grad_accumulation_steps": (1, 1024), "steps": (1, 100000), "rank": (1, 128),
    "seed": (0, 2**64 - 1),
}  # fmt: skip
OUT = [(name, value) for name, (low, high) in RANGES.items() for value in (low - 1, high + 1)]
OUT += [("learning_rate", value) for value in (0.0, 1e-8, 1.1, float("nan"), float("inf"))]
OUT += [("alpha", value) for value in (0.0, -1.0, float("nan"))]


@pytest.mark.parametrize(("name", "value"), OUT)
def test_what_is_out_of_range_is_named(denoiser: Any, latents: Tensor, texts: Tensor, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .* to .*, got {value}$"):
        train_lora(denoiser, latents, list(texts), **{name: value})


@pytest.mark.parametrize(
    "name", ["optimizer", "loss_function", "training_dtype", "lora_dtype", "algorithm", "gradient_checkpointing"]
)
def test_an_unknown_choice_is_named(denoiser: Any, latents: Tensor, texts: Tensor, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got 'Foo'$"):
        train_lora(denoiser, latents, list(texts), **{name: "Foo"})


def test_bad_data_is_named(denoiser: Any, latents: Tensor, texts: Tensor) -> None:
    nan = latents.clone()
    nan[2, 0, 0, 0] = float("nan")
    cases: list[tuple[Any, Any, str]] = [
        (latents[0], list(texts), r"latents must be \[N,C,h,w\] or \[N,C,f,h,w\], none of them 0, got \[4, 16, 16\]"),
        (latents[:0], list(texts), r"got \[0, 4, 16, 16\]"),
        ({"latent": latents}, list(texts), "latents must be a tensor or {'samples': tensor}, got dict"),
        (nan, list(texts), "sample 2: latent must be finite, got NaN or infinity"),
        (latents, list(texts[:3]), "got 3 conditionings for 4 latents"),
        (latents[:2], list(texts), "got 4 conditionings for 2 latents"),
        (latents, [], "positive must be a list with a conditioning for each latent, got list of length 0"),
        (latents, texts, "positive must be a list .* got Tensor"),
        (latents, [texts], r"positive\[0\] text must be \[L,D\] or \[1,L,D\], got \[4, 32, 192\]"),
        (latents, [3], r"positive\[0\] must be a tensor, a dict of tensors, a caption or \[tensor, dict\], got int"),
        (latents, ["dog"], "positive must be tensors where model is a Denoiser"),
    ]
    for bad_latents, positive, message in cases:
        with pytest.raises(ValueError, match=message):
            train_lora(denoiser, bad_latents, positive, **QUICK)


def test_a_lora_that_does_not_fit_is_refused(denoiser: Any, latents: Tensor, texts: Tensor, tmp_path: Path) -> None:
    lorafile.write(tmp_path / "a.safetensors", {"lora_unet_x.lora_up.weight": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="the LoRA does not fit the model"):
        train_lora(denoiser, latents, list(texts), existing_lora=tmp_path / "a.safetensors")


def test_it_runs_inside_inference_mode(denoiser: Any, latents: Tensor, texts: Tensor) -> None:
    """Also with weights, latents and conditioning that were made in it."""
    outside = bytes_of(denoiser, latents, list(texts))
    with torch.no_grad():
        assert bytes_of(denoiser, latents, list(texts)) == outside
    with torch.inference_mode():
        made_here = shared_copy(denoiser, dtype=torch.float64)
        made_here.unet.to(torch.float32)
        assert bytes_of(made_here, latents.clone(), list(texts.clone())) == outside


def test_more_latents_than_a_batch_are_all_seen(denoiser: Any, latents: Tensor, texts: Tensor) -> None:
    """With each sample's latents non-finite in turn, four steps of one sample find it."""
    for index in range(4):
        broken = latents.clone()
        broken[index] = 3e38
        with pytest.raises(ArithmeticError, match=f"loss of sample {index} "):
            train_lora(denoiser, broken, list(texts), **{**QUICK, "steps": 4})


def test_accumulation_is_a_larger_batch(denoiser: Any, latents: Tensor, texts: Tensor) -> None:
    losses = [
        train_lora(
            denoiser, latents, list(texts), batch_size=b, grad_accumulation_steps=4 // b, training_dtype="fp32", **QUICK
        ).loss["loss"]
        for b in (1, 2, 4)
    ]  # fmt: skip
    for one, other in itertools.pairwise(losses):
        assert one == pytest.approx(other, rel=1e-4)
