"""Base weights in 8 and 4 bits: what they save, how far off they are, what stays, what is refused."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_denoiser import FlowDenoiser
from frozen_nets import Case, equal, gradients
from measure_checkpointing import LiveBytes, Subject
from tiers import table
from torch import Tensor, nn

from lorasmith.adapters.algorithms import OFT, Algorithm, LoHa, LoKr
from lorasmith.api import train_lora
from lorasmith.diffusion.process import Flow
from lorasmith.diffusion.sampling import pictures_of
from lorasmith.models.families.sd import StableDiffusion
from lorasmith.prepare import quantize
from lorasmith.prepare.activation_checkpointing import blocks
from lorasmith.prepare.quantize import LowBitLinear, Stored, low_bit_copy
from lorasmith.prepare.share import shared_copy
from lorasmith.types import Denoiser

CPU = torch.device("cpu")
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""QLoRA, appendix E (Dettmers et al. 2023)."""
DTYPES = (torch.float32, torch.bfloat16)


def installed(kind: str) -> str:
    pytest.importorskip("bitsandbytes" if kind == "nf4" else "torchao")
    return kind


@pytest.fixture(params=["int8", "fp8", "nf4"])
def kind(request: pytest.FixtureRequest) -> str:
    return installed(request.param)


def layers_of(denoiser: Denoiser) -> dict[str, LowBitLinear]:
    return {
        path: layer
        for net in denoiser.nets.values()
        for path, layer in net.named_modules()
        if isinstance(layer, LowBitLinear)
    }


def reference(kind: str, weight: Tensor) -> Tensor:
    """float32 [n_out, n_in]: the kinds' own formulas, written again."""
    w = weight.float()
    if kind == "nf4":
        rows = w.reshape(-1, 64)
        most = rows.abs().amax(1, keepdim=True)
        code = torch.tensor(NF4)
        return (code[(rows / most)[..., None].sub(code).abs().argmin(-1)] * most).view(weight.shape)
    most = w.abs().amax(1, keepdim=True)
    if kind == "fp8":
        return (w / (most / 448)).to(torch.float8_e4m3fn).float() * (most / 448)
    return (w / (most / 127.5)).round().clamp(-128, 127) * (most / 127.5)


def bytes_of(kind: str, layer: nn.Linear) -> int:
    """As the kinds are defined: numbers, then scales in fp32 (and int8's zero points, of a byte)."""
    n = layer.in_features * layer.out_features
    return {"int8": n + 5 * layer.out_features, "fp8": n + 4 * layer.out_features, "nf4": n // 2 + n // 16}[kind]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_come_back_as_the_formula_says(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for n_out, n_in in ((64, 192), (65, 64), (32, 96), (64, 33), (2, 32)):  # rows of 96 and 33: see quantize._nf4
        weight = torch.randn(n_out, n_in, generator=generator).to(dtype)
        found, expected = quantize.PACKINGS[kind](weight).whole(), reference(kind, weight)
        assert found.dtype == dtype and found.shape == weight.shape
        close = (found.float() - expected).abs() <= 1e-5 + expected.abs() * (2**-8 if dtype == torch.bfloat16 else 1e-5)
        assert close.float().mean() > 0.99, (n_out, n_in)  # a number between two steps may go to either
    assert not quantize.PACKINGS[kind](torch.zeros(64, 64, dtype=dtype)).whole().any()


def test_small_weights_in_fp16_are_as_close(kind: str) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).div(4096).half()
    found, expected = (w.float() - weight for w in (quantize.PACKINGS[kind](weight).whole(), reference(kind, weight)))
    assert found.norm() < 1.01 * expected.norm()


@table("dtype", DTYPES, quick=DTYPES[:1])
def test_blocks_linear_layers_shrink_and_the_rest_stays(case: Case, kind: str, dtype: torch.dtype) -> None:  # noqa: F811
    before = {name: p.detach().clone() for name, p in case.net.named_parameters()}
    held = {name: p.data_ptr() for name, p in case.net.named_parameters()}
    twin = low_bit_copy(case.denoiser, kind, CPU, dtype)
    packed = layers_of(twin)
    inside = {id(m) for block in blocks(case.net, 1) for m in block.modules()}
    expected = {
        name for name, m in case.net.named_modules()
        if id(m) in inside and type(m) is nn.Linear and m.weight.numel() % 64 == 0
    }  # fmt: skip
    assert packed.keys() == expected and len(packed) >= 8
    for path, layer in packed.items():
        plain = before[f"{path}.weight"].to(dtype)
        assert layer.packed.nbytes == bytes_of(kind, layer)
        assert layer.weight.dtype == dtype and layer.weight.shape == plain.shape and layer.weight.device == CPU
        error = (layer.weight - plain).float().norm() / plain.float().norm()
        assert error < {"int8": 0.01, "fp8": 0.03, "nf4": 0.11}[kind]
    net = next(iter(twin.nets.values()))
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name].to(dtype)) and not p.requires_grad
    assert {f"{path}.weight" for path in packed} == before.keys() - dict(net.named_parameters()).keys()
    assert all(torch.equal(p, before[name]) and p.data_ptr() == held[name] for name, p in case.net.named_parameters())
    assert not layers_of(case.denoiser)


def unpacked(denoiser: Denoiser) -> Denoiser:
    """A copy with the weights that the library makes whole, as plain layers."""
    twin = shared_copy(denoiser)
    for layer in layers_of(twin).values():
        weight = layer.weight
        layer.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]
        layer.weight = nn.Parameter(weight, False)  # pyright: ignore[reportAttributeAccessIssue]
    return twin


@pytest.mark.slow
@table("dtype", DTYPES, quick=DTYPES[:1])
def test_predictions_and_gradients_are_those_of_the_whole_weights(
    case: Case,  # noqa: F811
    kind: str,
    dtype: torch.dtype,
) -> None:
    case.cond.update({name: value.to(dtype) for name, value in case.cond.items()})
    case = Case(low_bit_copy(case.denoiser, kind, CPU, dtype), case.x.to(dtype), case.t, case.cond)
    plain = unpacked(case.denoiser)
    assert layers_of(case.denoiser) and not layers_of(plain)
    with torch.no_grad():
        y, expected = (d.predict(case.x, case.t, case.cond) for d in (case.denoiser, plain))
    assert torch.equal(y, expected)
    found = gradients(case.denoiser, case)
    assert equal(found, gradients(plain, case))
    assert equal(found, gradients(case.denoiser, case, 2))


@pytest.mark.parametrize("algorithm", [LoHa(rank=2), LoKr(rank=2), OFT()])
def test_every_algorithm_trains_through_them(flow_denoiser: Any, algorithm: Algorithm) -> None:
    installed("nf4")
    cond = {"text": torch.randn(2, 32, 16), "pooled": torch.randn(2, 8)}
    twin = low_bit_copy(flow_denoiser, "nf4", CPU, None)
    case = Case(twin, torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.7]), cond)  # noqa: F811
    assert equal(gradients(twin, case, None, algorithm), gradients(unpacked(twin), case, 1, algorithm))


def test_no_whole_weight_is_kept_for_the_backward_pass(kind: str) -> None:
    layer = nn.Sequential(nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))]))
    twin = low_bit_copy(Subject(layer, lambda net, x, t, cond: x), kind, CPU, None)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x = torch.randn(3, 64, requires_grad=True)
        parts: Any = twin.net.get_submodule("0.0")
        y = parts(x)
    assert not saved
    y.sum().backward()
    weights = [part.weight for part in parts]
    torch.testing.assert_close(x.grad, (weights[1].sum(0) @ weights[0]).expand(3, 64))


def test_no_second_set_of_weights_is_held_on_the_way(family: StableDiffusion, kind: str) -> None:
    quantize.PACKINGS[kind](torch.ones(64, 64))  # the libraries keep tables from their first use
    net = family.denoiser.unet
    live = LiveBytes([*net.parameters(), *net.buffers()])
    with live:
        twin = low_bit_copy(family.denoiser, kind, CPU, torch.float32)
    largest, whole = (f(4 * layer.weight.numel() for layer in layers_of(twin).values()) for f in (max, sum))
    assert live.peak - live.now < 6 * largest < whole / 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "none"])
def test_a_lora_is_trained_on_them(
    family: StableDiffusion, latents: Tensor, texts: Tensor, kind: str, dtype: Any, caplog: pytest.LogCaptureFixture
) -> None:
    before = {name: p.detach().clone() for name, p in family.denoiser.unet.named_parameters()}
    caplog.set_level(logging.INFO, "lorasmith.prepare.quantize")
    inputs: dict[str, Any] = {"steps": 2, "learning_rate": 1e-3, "training_dtype": dtype, "lora_dtype": "fp32"}
    plain = train_lora(family.denoiser, latents, list(texts), **inputs)
    assert not [r for r in caplog.records if r.name == "lorasmith.prepare.quantize"]
    result = train_lora(family.denoiser, latents, list(texts), **inputs, base_dtype=kind)  # pyright: ignore
    (line,) = [r.getMessage() for r in caplog.records if r.name == "lorasmith.prepare.quantize"]
    size = {"int8": "3.6", "fp8": "3.5", "nf4": "2.0"}[kind]
    assert line.startswith(f"base weights: {size} MB in {kind} instead of ") and "MB of convolutions" in line
    for one, other in zip(result.loss["loss"], plain.loss["loss"], strict=True):
        assert one != other and abs(one - other) < 0.02 * other
    assert result.lora.keys() == plain.lora.keys() and any(t.any() for k, t in result.lora.items() if "up" in k)
    assert all(torch.equal(p, before[name]) for name, p in family.denoiser.unet.named_parameters())
    model = result.model_with_lora
    assert not layers_of(model) and model.unet.dtype == family.denoiser.unet.dtype
    with torch.no_grad():
        out = model.predict(latents, torch.tensor([10, 500, 700, 900]), {"text": texts})
    assert out.isfinite().all()


def test_pictures_are_drawn_with_them(family: StableDiffusion, codec: Any) -> None:
    twin = low_bit_copy(family.denoiser, installed("nf4"), CPU, torch.float32)
    picture = next(pictures_of(twin, codec, {0: "a rocket"}, size=(32, 32), seed=0, steps=2, guidance=2.0))
    assert picture.isfinite().all()


@pytest.mark.slow
def test_a_resumed_training_gives_the_same_lora(
    family: StableDiffusion, latents: Tensor, texts: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def trained(base_dtype: Any, steps: int, **more: Any) -> dict[str, Tensor]:
        inputs = {"steps": steps, "base_dtype": base_dtype, "training_dtype": "fp32", **more}
        return train_lora(family.denoiser, latents, list(texts), **inputs).lora

    whole = trained(installed("nf4"), 3)
    trained("nf4", 2, checkpoint_folder=tmp_path)
    caplog.clear()
    resumed = trained("nf4", 3, resume_from=tmp_path)
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    trained("none", 3, resume_from=tmp_path)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert warning.startswith("changed since the checkpoint, so that the result is not that of a run")
    assert "base_dtype nf4 -> none" in warning


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as info:
        call()
    return str(info.value)


def test_a_training_that_needs_whole_weights_is_refused_at_its_start(
    family: StableDiffusion, latents: Tensor, texts: Tensor
) -> None:
    said = refusal(lambda: train_lora(family.denoiser, latents, list(texts), base_dtype="nf4", quantized_backward=True))
    assert said == "base_dtype must be none with quantized_backward: it computes gradients through unquantised weights"


def test_models_that_have_nothing_to_pack_are_refused(kind: str) -> None:
    for net in (nn.Conv2d(4, 4, 1), nn.Sequential(nn.Linear(64, 64)), nn.ModuleList([nn.Linear(64, 1)] * 2)):
        said = refusal(lambda net=net: low_bit_copy(FlowDenoiser(net, Flow()), kind, CPU, None))  # pyright: ignore
        assert said == "base_dtype must be none: the model has no torch.nn.Linear in lists of blocks"


def test_weights_that_cannot_be_packed_are_refused(flow_denoiser: FlowDenoiser, kind: str) -> None:
    path = "transformer.transformer_blocks.0.norm1.linear"
    flow_denoiser.transformer.double()
    said = refusal(lambda: low_bit_copy(flow_denoiser, kind, CPU, None))
    assert said == f"base_dtype must be none here: {path}.weight is torch.float64, not fp32, bf16 or fp16"
    flow_denoiser.transformer.float()
    flow_denoiser.transformer.get_parameter("transformer_blocks.0.norm1.linear.weight").data[0, 0] = float("nan")
    said = refusal(lambda: low_bit_copy(flow_denoiser, kind, CPU, None))
    assert said == f"{path}.weight must be finite for base_dtype {kind}, got NaN or infinity"


def test_kernels_that_are_not_there_or_wrong_are_refused(
    flow_denoiser: FlowDenoiser, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(weight: Tensor) -> Stored:
        raise RuntimeError("no kernel\nand a traceback")

    monkeypatch.setitem(quantize.PACKINGS, kind, missing)
    said = refusal(lambda: low_bit_copy(flow_denoiser, kind, CPU, None))
    assert said == f"base_dtype must not be {kind} on this cpu and torch: no kernel"
    for factor in (-1, float("nan")):
        monkeypatch.setitem(quantize.PACKINGS, kind, lambda w, factor=factor: Stored((w,), lambda: w * factor))
        said = refusal(lambda: low_bit_copy(flow_denoiser, kind, CPU, None))
        assert said == f"base_dtype must not be {kind} on this cpu and torch: numbers come back wrong"


@pytest.mark.parametrize(
    ("kind", "package", "extra"),
    [("int8", "torchao", "quantized"), ("fp8", "torchao", "quantized"), ("nf4", "bitsandbytes", "nf4")],
)
def test_a_missing_package_is_named(
    family: StableDiffusion, latents: Tensor, texts: Tensor, monkeypatch: pytest.MonkeyPatch, kind: Any, package: str,
    extra: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("lorasmith.training.job.train", lambda *args, **kwargs: pytest.fail("trained"))
    for module in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, {"nf4": "bitsandbytes.functional"}.get(kind, "torchao.quantization"), None)
    said = refusal(lambda: train_lora(family.denoiser, latents, list(texts), base_dtype=kind))
    assert said == f"base_dtype {kind} needs the extra '{extra}': pip install 'lorasmith[{extra}]'"
