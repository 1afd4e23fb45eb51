"""Every input of train_lora at, within and beyond its range: legal values train, others give one line naming it."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Notes
from PIL import Image
from torch import Tensor, nn

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import LoRA
from lorasmith.adapters.targets import Targets
from lorasmith.api import _targets, train_lora
from lorasmith.config.schema import Config
from lorasmith.diffusion.process import Flow
from lorasmith.storage.hashing import digest
from lorasmith.types import Cond, Result

NAN, INF = float("nan"), float("inf")
INTEGERS = {  # lowest, default, highest
    "batch_size": (1, 1, 10_000),
    "grad_accumulation_steps": (1, 1, 1024),
    "steps": (1, 16, 100_000),
    "rank": (1, 8, 128),
    "seed": (0, 0, 18_446_744_073_709_551_615),
    "checkpoint_depth": (1, 2, 5),
}
CHOICES = {
    "optimizer": ("AdamW", "Adam", "SGD", "RMSprop"),
    "loss_function": ("MSE", "L1", "Huber", "SmoothL1"),
    "training_dtype": ("bf16", "fp32", "none"),
    "lora_dtype": ("bf16", "fp32"),
    "algorithm": ("LoRA", "LoHa", "LoKr", "OFT", "DoRA"),
    "base_dtype": ("none", "int8", "fp8", "nf4"),
}
FLAGS = ("gradient_checkpointing", "bucket_mode", "offloading", "quantized_backward")
RULES = {
    **{name: f"{low} to {high}" for name, (low, _, high) in INTEGERS.items()},
    "learning_rate": "1e-07 to 1",
    "alpha": r"above 0, up to 1e\+06",
    **{name: rf"one of {', '.join(names)}(, \w+)*" for name, names in CHOICES.items()},
    **{name: "true or false" for name in FLAGS},
}
LEGAL = [(name, value) for name, values in INTEGERS.items() for value in values if (name, value) != ("steps", 100_000)]
LEGAL += [("learning_rate", value) for value in (1e-7, 5e-4, 1.0, 1)]
LEGAL += [("alpha", value) for value in (None, 1e-6, 3, 1e6)]
LEGAL += [(name, value) for name, values in CHOICES.items() for value in values if value not in ("int8", "fp8", "nf4")]
LEGAL += [("gradient_checkpointing", True), ("gradient_checkpointing", False), ("bucket_mode", True)]
LEGAL += [("existing_lora", "[None]"), ("existing_lora", None)]

ILLEGAL: list[tuple[str, Any]] = []
for _name, (_low, _, _high) in INTEGERS.items():
    ILLEGAL += [(_name, value) for value in (_low - 1, _high + 1, "8", "many", 8.0, 1.5, True, None, NAN, INF, [1])]
for _name in ("learning_rate", "alpha"):
    ILLEGAL += [(_name, value) for value in (0, 0.0, -0.1, "0.1", "fast", True, NAN, INF, -INF, [0.1])]
ILLEGAL += [("learning_rate", value) for value in (9.9e-8, 1.0000001, 2, None)] + [("alpha", 1.1e6)]
for _name, _names in CHOICES.items():
    ILLEGAL += [(_name, value) for value in ("Foo", _names[0].swapcase(), "", " ", None, 0, True, NAN, [_names[0]])]
for _name in FLAGS:
    ILLEGAL += [(_name, value) for value in ("yes", "true", "", 1, 0, 1.0, None, NAN)]


@dataclass(frozen=True)
class Pointwise:
    """A linear layer over the channels of latents with any axes; conditioning is added, and kept to look at."""

    net: nn.Module
    process: Flow = Flow()
    seen: Notes = field(default_factory=Notes)

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.seen.append(cond)
        dtype = next(self.net.parameters()).dtype
        shift = sum(value.flatten(1).mean(1) for value in cond.values())
        assert isinstance(shift, Tensor)
        x_t = (x_t + shift.view(-1, *[1] * (x_t.ndim - 1))).to(dtype)
        return self.net(x_t.movedim(1, -1)).movedim(-1, 1).float()

    def file_key(self, path: str) -> str:
        return f"lora_{path}".replace(".", "_")


@pytest.fixture
def model() -> Pointwise:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Pointwise(nn.Sequential(nn.Linear(4, 4)))


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


LATENTS, TEXTS = numbers(2, 4, 2, 2), list(numbers(2, 3, 2))


def trained(model: Any, latents: Any = LATENTS, positive: Any = TEXTS, **inputs: Any) -> Result:
    return train_lora(model, latents, positive, **{"steps": 1, "targets": Targets(preset="all"), **inputs})


def bytes_of(model: Pointwise, latents: Any = LATENTS, positive: Any = TEXTS) -> str:
    return digest(trained(model, latents, positive, batch_size=2, steps=2).lora.items())


def refusal(model: Any, latents: Any = LATENTS, positive: Any = TEXTS, **inputs: Any) -> str:
    """The one line of the ValueError."""
    with pytest.raises(ValueError) as info:
        trained(model, latents, positive, **inputs)
    text = str(info.value)
    assert "\n" not in text and len(text) < 400
    return text


@pytest.mark.parametrize(("name", "value"), LEGAL)
def test_a_legal_value_trains(model: Pointwise, name: str, value: Any) -> None:
    result = trained(model, **{name: value})
    assert len(result.loss["loss"]) == result.steps == (value if name == "steps" else 1)
    assert all(torch.tensor(loss).isfinite() for loss in result.loss["loss"])
    assert result.lora and all(tensor.isfinite().all() for tensor in result.lora.values())
    if name == "rank":
        assert result.lora["lora_net_0.lora_down.weight"].shape == (value, 4)
    if name == "alpha":
        assert float(result.lora["lora_net_0.alpha"]) == pytest.approx(8.0 if value is None else value)
    if name == "lora_dtype":
        expected = torch.bfloat16 if value == "bf16" else torch.float32
        assert result.lora["lora_net_0.lora_up.weight"].dtype == expected


def test_the_most_steps_reach_the_loop(model: Pointwise, monkeypatch: pytest.MonkeyPatch) -> None:
    """100000 of them would take minutes, so the loop is left out."""
    asked: list[Any] = []
    monkeypatch.setattr(
        "lorasmith.training.job.train", lambda *args, **kwargs: asked.extend(args) or (step for step in ())
    )
    trained(model, steps=100_000)
    assert [config.steps for config in asked if isinstance(config, Config)] == [100_000]


@pytest.mark.parametrize(("name", "value"), ILLEGAL)
def test_an_illegal_value_is_named_with_its_rule(model: Pointwise, name: str, value: Any) -> None:
    kind = ""
    if name in INTEGERS and type(value) is not int:
        kind = "a whole number, "
    if name in ("learning_rate", "alpha") and type(value) not in (int, float):
        kind = "a number, "
    pattern = rf"{name} must be {kind}{RULES[name]}, got {re.escape(repr(value))}(: did you mean \w+\?)?"
    assert re.fullmatch(pattern, refusal(model, **{name: value}))
    assert not model.seen


def test_a_long_value_is_cut_to_one_line(model: Pointwise) -> None:
    """As when the arguments come in another order."""
    assert refusal(model, batch_size=numbers(50, 50)).startswith(
        "batch_size must be a whole number, 1 to 10000, got tensor"
    )
    assert refusal(model, optimizer="A\n" * 5000).startswith("optimizer must be one of AdamW, Adam, SGD, RMSprop")


@pytest.mark.parametrize("value", [None, 3, torch.zeros(1), {"samples": 1}])
def test_what_is_no_model_is_named(value: Any) -> None:
    kind = type(value).__name__
    assert refusal(value) == f"model must be a path, a hub id, a diffusers pipeline or a Denoiser, got {kind}"


@pytest.mark.parametrize("path", ["", "nowhere"])
def test_a_model_that_is_not_there(path: str, tmp_path: Path) -> None:
    assert "must be a diffusers folder" in refusal(str(tmp_path / path))


def test_what_is_no_lora_is_named(model: Pointwise, tmp_path: Path) -> None:
    for value in (5, True, b"a", [], 0.5):
        assert re.fullmatch(
            f"existing_lora must be .*, got {re.escape(repr(value))}", refusal(model, existing_lora=value)
        )
    (tmp_path / "text.safetensors").write_text("no LoRA")
    for value in ("", "None", tmp_path, tmp_path / "nowhere.safetensors", tmp_path / "text.safetensors", "a.pt"):
        assert re.search("must be a safetensors file", refusal(model, existing_lora=value))


def test_every_way_to_give_latents(model: Pointwise) -> None:
    latents = numbers(2, 4, 2, 2)
    ways = [{"samples": latents}, [latents], [{"samples": latents}], (latents[:1], {"samples": latents[1:]})]
    assert {bytes_of(model, way) for way in ways} == {bytes_of(model, latents)}
    assert torch.equal(latents, numbers(2, 4, 2, 2))


def test_latents_may_have_frames(model: Pointwise) -> None:
    frames = numbers(2, 4, 3, 2, 2)
    assert bytes_of(model, frames) == bytes_of(model, {"samples": frames})
    assert bytes_of(model, frames) != bytes_of(model, frames[:, :, :1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_latents_and_conditioning_count_by_their_values(model: Pointwise, dtype: torch.dtype) -> None:
    latents, texts = numbers(2, 4, 2, 2).to(dtype), numbers(2, 3, 2).to(dtype)
    assert bytes_of(model, latents, list(texts)) == bytes_of(model, latents.float(), list(texts.float()))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_what_is_no_floating_point_is_refused(model: Pointwise, dtype: torch.dtype) -> None:
    latents, text = numbers(2, 4, 2, 2).to(dtype), numbers(1, 3).to(dtype)
    assert refusal(model, latents) == f"latents must hold floating point numbers, got {dtype}"
    assert refusal(model, LATENTS, [text]) == f"positive[0] text must hold floating point numbers, got {dtype}"


def broken(shape: tuple[int, ...], value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers, with this one in the last sample."""
    tensor = numbers(*shape).to(dtype)
    tensor.view(-1)[-1] = value
    return tensor


AXES = r"must be \[N,C,h,w\] or \[N,C,f,h,w\], none of them 0, got "
BAD_LATENTS = [
    (numbers(4, 2, 2), rf"latents {AXES}\[4, 2, 2\]"),
    (numbers(1, 1, 1, 4, 2, 2), rf"latents {AXES}\[1, 1, 1, 4, 2, 2\]"),
    (numbers(2, 4, 2, 2)[:0], rf"latents {AXES}\[0, 4, 2, 2\]"),
    (numbers(2, 4, 2, 2)[..., :0], rf"latents {AXES}\[2, 4, 2, 0\]"),
    ([numbers(1, 4, 2, 2), numbers(4, 2, 2)], rf"latents\[1\] {AXES}\[4, 2, 2\]"),
    ({"latent": numbers(2, 4, 2, 2)}, r"latents must be a tensor or \{'samples': tensor\}, got dict"),
    ([{"samples": None}], r"latents\[0\] must be a tensor or \{'samples': tensor\}, got dict"),
    (np.array(["a"]), r"latents must be a tensor or \{'samples': tensor\}, got ndarray"),
    ("latents.pt", r"latents must be a tensor or \{'samples': tensor\}, got str"),
    ([], r"latents must be .*, got an empty list"),
    (broken((2, 4, 2, 2), NAN), "sample 1: latent must be finite, got NaN or infinity"),
    (broken((2, 4, 2, 2), -INF), "sample 1: latent must be finite, got NaN or infinity"),
    (broken((2, 4, 2, 2), 1e300, torch.float64), "sample 1: latent must be finite, got NaN or infinity"),
    ([numbers(1, 4, 2, 2), numbers(1, 3, 2, 2)], r"latents must have the same channels and axes, got .*4.* and .*3.*"),
    ([numbers(1, 4, 2, 2), numbers(1, 4, 1, 2, 2)], r"latents must have the same channels and axes, got .* and .*"),
]


@pytest.mark.parametrize(("latents", "message"), BAD_LATENTS)
def test_bad_latents_are_named(model: Pointwise, latents: Any, message: str) -> None:
    assert re.fullmatch(message, refusal(model, latents))


def test_every_way_to_give_the_conditioning(model: Pointwise) -> None:
    texts = numbers(2, 3, 2)
    comfy = [[text[None], {"pooled_output": None, "strength": 1.0}] for text in texts]
    ways = [list(texts[:, None]), [{"text": text} for text in texts], comfy, tuple(texts), [list(texts)]]
    assert {bytes_of(model, LATENTS, way) for way in ways} == {bytes_of(model, LATENTS, list(texts))}
    assert bytes_of(model, LATENTS, [texts[0]]) == bytes_of(model, LATENTS, [texts[0], texts[0]])
    assert bytes_of(model, LATENTS, list(texts)) != bytes_of(model, LATENTS, [texts[1], texts[0]])


def test_a_pooled_output_goes_along(model: Pointwise) -> None:
    pairs = [[numbers(1, 3, 2), {"pooled_output": pooled}] for pooled in (numbers(1, 5), numbers(5))]
    trained(model, LATENTS, pairs, batch_size=2)
    (cond,) = model.seen
    assert {name: tuple(value.shape) for name, value in cond.items()} == {"text": (2, 3, 2), "pooled": (2, 5)}


T = numbers(3, 2)
BAD_POSITIVE = [
    ([T] * 3, "positive must have one conditioning for each latent .*, got 3 conditionings for 2 latents"),
    ([[T], [T], [T]], "positive must have .*, got 3 conditionings for 2 latents"),
    ([], "positive must be a list with a conditioning for each latent, got list of length 0"),
    ([[]], "positive must have .*, got 0 conditionings for 2 latents"),
    (None, "positive must be a list .*, got NoneType"),
    (numbers(2, 3, 2), "positive must be a list .*, got Tensor"),
    ("a dog", "positive must be a list .*, got str"),
    ({"text": T}, "positive must be a list .*, got dict"),
    ([[T], T], "positive must have lists alone or none, got Tensor at 1"),
    (["a dog", "a cat"], "positive must be tensors where model is a Denoiser, which cannot encode captions, got texts"),
    ([T, "a cat"], r"positive\[1\] must be a tensor, .*, got str"),
    ([T, 3], r"positive\[1\] must be a tensor, a dict of tensors, a caption or \[tensor, dict\], got int"),
    ([{"text": [1.0]}], r"positive\[0\] must be a tensor, .*, got dict"),
    ([numbers(2)], r"positive\[0\] text must be \[L,D\] or \[1,L,D\], got \[2\]"),
    ([numbers(2, 3, 2)], r"positive\[0\] text must be \[L,D\] or \[1,L,D\], got \[2, 3, 2\]"),
    ([T, {"text": T, "pooled": numbers(2, 2)}], r"positive\[1\] pooled must be \[D\] or \[1,D\], got \[2, 2\]"),
    ([T, broken((3, 2), NAN)], "sample 1: text must be finite, got NaN or infinity"),
    ([T, {"text": T, "pooled": broken((2,), INF)}], "sample 1: pooled must be finite, got NaN or infinity"),
]


@pytest.mark.parametrize(("positive", "message"), BAD_POSITIVE)
def test_bad_conditioning_is_named(model: Pointwise, positive: Any, message: str) -> None:
    assert re.fullmatch(message, refusal(model, LATENTS, positive))


@pytest.mark.parametrize(
    ("name", "value"), [("training_dtype", "fp32"), ("lora_dtype", "bf16"), ("lora_dtype", "fp32")]
)
def test_torch_s_dtypes_are_other_names(model: Pointwise, name: str, value: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[value]
    one, other = (digest(trained(model, **{name: given}).lora.items()) for given in (value, dtype))
    assert one == other


def test_other_dtypes_of_torch_are_refused(model: Pointwise) -> None:
    assert refusal(model, lora_dtype=torch.float16) == "lora_dtype must be one of bf16, fp32, got torch.float16"


def test_arrays_of_numpy_are_tensors(model: Pointwise) -> None:
    arrays = LATENTS.double().numpy(), [text.numpy() for text in TEXTS]
    assert bytes_of(model, *arrays) == bytes_of(model)
    assert bytes_of(model, {"samples": arrays[0]}, [{"text": text} for text in arrays[1]]) == bytes_of(model)


def test_pictures_are_refused_with_the_way_to_encode_them(model: Pointwise) -> None:
    way = "make latents with encode_images of lorasmith.load_model(model).codec(device)"
    picture = Image.new("RGB", (8, 8))
    assert refusal(model, [picture] * 2) == f"latents[0] must be encoded, got a picture: {way}"
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    expected = f"latents must hold floating point numbers, got torch.uint8; for pictures, {way}"
    assert refusal(model, pixels) == refusal(model, pixels.numpy()) == expected


def test_targets_may_be_the_last_words_of_paths(model: Pointwise) -> None:
    two = replace(model, net=nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_q2": nn.Linear(4, 4)}))
    found = AdapterSet.new(two, LoRA(), _targets(["to_q"]), 0).adapters
    assert found.keys() == {"net.to_q"}
    assert "targets must match a layer" in refusal(model, targets=["to_q"])
    assert trained(model, targets=["0"]).lora.keys() == trained(model).lora.keys()


@pytest.mark.parametrize("lacking", [("nets",), ("process", "file_key")])
def test_what_a_denoiser_lacks_is_named(model: Pointwise, lacking: tuple[str, ...]) -> None:
    kept = {name: None for name in ("nets", "process", "predict", "file_key") if name not in lacking}
    said = refusal(type("Mine", (), kept)())
    assert said.endswith(f"to be a Denoiser, but Mine lacks {' and '.join(lacking)}")


def test_a_net_alone_is_refused_with_what_is_wanted(model: Pointwise) -> None:
    said = refusal(model.net)
    assert said.endswith("got a net alone (Sequential): give the pipeline that it is a part of")


def test_the_log_says_how_far_it_is(
    model: Pointwise, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lorasmith.api.SECONDS", -1)
    with caplog.at_level("INFO", logger="lorasmith.api"):
        trained(model, steps=3)
    lines = [record.getMessage() for record in caplog.records if record.name == "lorasmith.api"]
    assert [line.partition(", loss")[0] for line in lines] == [f"step {n} of 3" for n in (1, 2, 3)]
