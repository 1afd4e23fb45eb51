"""Training with packed layers: the caller's model stays, and results agree to rounding, whatever else is set."""

import copy
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import made
from flow_denoiser import FlowDenoiser
from PIL import Image
from plain_net import Plain, packed_in
from tiers import table
from torch import Tensor, nn

from lorasmith.adapters.hooks import attached
from lorasmith.adapters.targets import Targets
from lorasmith.api import train_lora
from lorasmith.config.schema import Config
from lorasmith.config.values import configured, merged
from lorasmith.data.dataset import Dataset
from lorasmith.demo import BASE
from lorasmith.devices import has_packed_products
from lorasmith.formats import lora_file
from lorasmith.models.families.sd import StableDiffusion
from lorasmith.ops.prepacked import Packed
from lorasmith.runs import run
from lorasmith.runs.checks import checked
from lorasmith.runs.run import opened_run
from lorasmith.training import loop
from lorasmith.training.in_memory import samples_of
from lorasmith.training.job import Job
from lorasmith.training.nonfinite import origin_of_non_finite
from lorasmith.types import Denoiser

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not has_packed_products(CPU, torch.float32), reason="torch is built without oneDNN")
ALL = Targets(preset="all")
QUICK: dict[str, Any] = {"steps": 3, "batch_size": 2, "rank": 2, "learning_rate": 1e-3, "targets": ALL}
FULL: dict[str, Any] = {"training_dtype": "fp32", "lora_dtype": "fp32"}


def far(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The distance of two LoRAs as a share of the length of the second."""
    one, other = (torch.cat([lora[key].flatten().float() for key in sorted(lora)]) for lora in (some, others))
    return float((one - other).norm() / other.norm())


def job_of(denoiser: Denoiser, latents: Tensor, texts: Tensor, **values: Any) -> Job:
    config = Config(steps=3, targets=ALL, **values)
    samples = samples_of(latents, list(texts), None, several_sizes=False)
    dataset = Dataset.of(samples, [1] * len(samples), seed=0, group_size=config.group_size)
    return Job.of(denoiser, dataset, config, device=CPU)


@contextmanager
def untouched(denoiser: Denoiser) -> Iterator[None]:
    """AssertionError where modules, parameters or what they hold are others afterwards."""

    def state() -> list[Any]:
        modules = [m for net in denoiser.nets.values() for m in net.modules()]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
        held = [(type(m), sorted(vars(m)), m.training, list(m._modules)) for m in modules]
        tensors = [p for net in denoiser.nets.values() for p in (*net.parameters(), *net.buffers())]
        return [hooks, held, [(id(p), p.data_ptr(), p.stride(), p.requires_grad, p.grad) for p in tensors]]

    before = state()
    values = {name: copy.deepcopy(net.state_dict()) for name, net in denoiser.nets.items()}
    try:
        yield
    finally:
        assert state() == before
        for name, net in denoiser.nets.items():
            assert all(torch.equal(values[name][key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize("what", ["conv", "all"])
@table("dtype", ["fp32", "bf16"], quick=["bf16"])
def test_the_callers_model_is_as_it_was(
    family: StableDiffusion, latents: Tensor, texts: Tensor, what: Any, dtype: Any
) -> None:
    with untouched(family.denoiser):
        result = train_lora(family.denoiser, latents, list(texts), **QUICK, training_dtype=dtype, pack=what)
    assert not packed_in(result.model_with_lora) and not packed_in(family.denoiser)


def test_the_callers_model_is_as_it_was_where_training_fails_or_is_stopped(
    family: StableDiffusion, latents: Tensor, texts: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, calls = loop.sample_losses, []

    def failing(*args: Any) -> Tensor:
        calls.append(None)
        if len(calls) == 2:
            raise KeyError("planted")
        return losses(*args)

    with untouched(family.denoiser):
        job, stop = job_of(family.denoiser, latents, texts), threading.Event()
        assert packed_in(job.denoiser)
        steps: Any = job.steps(stop)
        with closing(steps):
            next(steps)
            stop.set()
            assert len(list(steps)) == 1 and job.state.counters.step == 2
        layers = [m for net in job.denoiser.nets.values() for m in net.modules() if isinstance(m, Packed)]
        assert not any(layer.adapter for layer in layers)
        monkeypatch.setattr(loop, "sample_losses", failing)
        with pytest.raises(KeyError, match="planted"):
            train_lora(family.denoiser, latents, list(texts), **QUICK)


@table("algorithm", ["LoRA", "LoHa", "LoKr", "OFT", "DoRA"], quick=["LoRA"])
def test_results_agree_to_rounding(family: StableDiffusion, latents: Tensor, texts: Tensor, algorithm: Any) -> None:
    for dtypes, bound in ((FULL, 1e-3), ({}, 0.05)):
        plain, other = (
            train_lora(family.denoiser, latents, list(texts), **QUICK, **dtypes, algorithm=algorithm, pack=what)
            for what in ("none", "all")
        )
        assert other.loss["loss"] == pytest.approx(plain.loss["loss"], rel=bound / 10)
        assert far(other.lora, plain.lora) < bound


@table("depth", [None, 1, 2, 5], quick=[2])
def test_checkpointed_blocks_give_the_same_packed(
    family: StableDiffusion, latents: Tensor, texts: Tensor, depth: int | None
) -> None:
    values = {**QUICK, **FULL, "gradient_checkpointing": False}
    plain = train_lora(family.denoiser, latents, list(texts), **values)
    values |= {"gradient_checkpointing": depth is not None, "checkpoint_depth": depth or 2, "memory_ladder": True}
    other = train_lora(family.denoiser, latents, list(texts), **values)
    assert other.loss == plain.loss and all(torch.equal(plain.lora[key], other.lora[key]) for key in plain.lora)


def test_the_ladder_goes_down_packed(
    flow_denoiser: FlowDenoiser, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    losses = loop.sample_losses

    def short(denoiser: Any, batch: Any, config: Any) -> Tensor:
        if len(batch) > 1:
            raise MemoryError("planted")
        return losses(denoiser, batch, config)

    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = [{"text": torch.ones(5, 16), "pooled": torch.ones(8)}]
    values = {**QUICK, **FULL, "memory_ladder": True}
    plain = train_lora(flow_denoiser, latents, cond, **{**values, "pack": "none"})
    monkeypatch.setattr(loop, "sample_losses", short)
    with untouched(flow_denoiser):
        result = train_lora(flow_denoiser, latents, cond, **values)
    assert "continuing with batches of 1" in caplog.text
    assert far(result.lora, plain.lora) < 1e-3


@pytest.mark.slow
def test_what_an_existing_lora_changes_stays(
    family: StableDiffusion, latents: Tensor, texts: Tensor, tmp_path: Path
) -> None:
    """A difference of a bias needs no plain weight."""
    path, weights = tmp_path / "diff.safetensors", family.denoiser.unet.state_dict()
    linear, conv = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1"
    lora = train_lora(family.denoiser, latents, list(texts), steps=1, targets=Targets(preset="attention")).lora
    for layer, part in ((linear, "weight"), (conv, "weight"), ("conv_out", "bias")):
        key = family.denoiser.file_key(f"unet.{layer}")
        offset = torch.randn_like(weights[f"{layer}.{part}"]) / 50
        lora[f"{key}.{'diff' if part == 'weight' else 'diff_b'}"] = offset
    lora_file.write(path, lora, {})
    job = job_of(family.denoiser, latents, texts, existing_lora=path)
    assert not {linear, conv} & set(packed_in(job.denoiser)) and "conv_out" in packed_in(job.denoiser)
    values = {**QUICK, **FULL, "existing_lora": path}
    values.pop("targets")
    with untouched(family.denoiser):
        plain, other = (
            train_lora(family.denoiser, latents, list(texts), **values, pack=what) for what in ("none", "all")
        )
    assert other.loss["loss"] == pytest.approx(plain.loss["loss"], rel=1e-4) and far(other.lora, plain.lora) < 1e-3


def test_conv_packs_convolutions_alone(family: StableDiffusion, latents: Tensor, texts: Tensor) -> None:
    for what, kinds in (("none", set()), ("conv", {nn.Conv2d}), ("all", {nn.Conv2d, nn.Linear})):
        job = job_of(family.denoiser, latents, texts, pack=what)
        before = dict(family.denoiser.unet.named_modules())
        found = packed_in(job.denoiser)
        assert {type(before[path]) for path in found} == kinds
        assert {path for path, m in before.items() if type(m) in kinds and path != "conv_in"} == set(found)
        assert job.facts["packed layers"] == str(len(found))


def test_a_layer_in_two_places_is_adapted_in_both(latents: Tensor, texts: Tensor) -> None:
    """Also where the net keeps it under a name that torch does not know."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.entry, self.conv = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
            self.again, self.unseen = self.conv, [self.conv]

        def forward(self, x: Tensor) -> Tensor:
            return self.unseen[0](self.again(self.conv(self.entry(x))))

    values = {**QUICK, **FULL, "learning_rate": 0.1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Twice()
    plain, other = (train_lora(Plain(net), latents, list(texts), **values, pack=what) for what in ("none", "all"))
    assert other.loss["loss"] == pytest.approx(plain.loss["loss"], rel=1e-4) and far(other.lora, plain.lora) < 1e-3


def test_a_model_may_ask_its_first_parameter(latents: Tensor, texts: Tensor) -> None:
    """Which is all that a net without biases and norms has left."""
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.Conv2d(8, 4, 3, padding=1, bias=False))
    job = job_of(Plain(net), latents, texts)
    assert packed_in(job.denoiser) == ["1"] and len(list(job.steps())) == 3


@pytest.mark.slow
def test_pictures_are_drawn_on_the_way_with_packed_layers(
    family: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same run, before and after, without and with the LoRA; the model is as it was."""
    monkeypatch.setattr(run, "load_model", lambda model, encoders, with_texts: family)
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "cats", "a cat")
    (tmp_path / "runs").mkdir()
    base = {
        "model": str(BASE), "device": "cpu", "data": {"folder": "cats"}, "steps": 2, "training_dtype": "fp32",
        "sampling": {"steps": 2, "every": 1},
    }  # fmt: skip
    with untouched(family.denoiser):
        for what in ("none", "all"):
            with opened_run(checked(configured(merged(base, {"output": f"runs/{what}", "pack": what})))) as opened:
                assert bool(packed_in(opened.job.denoiser)) == (what == "all")
                assert len(list(opened.steps())) == 2
                opened.finish()
    names = ("samples/step-0000001.png", "samples/step-0000002.png", "before_after.png")
    for name in names:
        one, other = (np.asarray(Image.open(tmp_path / "runs" / what / name), dtype=float) for what in ("none", "all"))
        assert np.abs(one - other).mean() < 0.5


def test_an_output_that_is_not_finite_is_found_in_a_packed_layer(
    family: StableDiffusion, latents: Tensor, texts: Tensor
) -> None:
    job = job_of(family.denoiser, latents, texts)
    path = "unet.mid_block.attentions.0.proj_in"
    next(job.adapters.adapters[path].parameters()).data.fill_(float("nan"))
    batch = job.dataset.group_at(0)
    with attached(job.denoiser, job.adapters):
        origin = origin_of_non_finite(job.denoiser, job.adapters, batch, job.config)
    assert origin.endswith(f"the output of {path} (with its adapter) is nan")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({}, {"pack": "none"}, r"pack all -> none, packed layers \d+ -> 0"),
        ({"pack": "none"}, {}, r"pack none -> all, packed layers 0 -> \d+"),
        ({"native_kernels": True}, {"native_kernels": False}, "native_kernels True -> False, kernels in C yes -> no"),
    ],
)
def test_resuming_with_other_kernels_is_told(
    family: StableDiffusion, latents: Tensor, texts: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, before: dict[str, Any], after: dict[str, Any], said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(loop, "library", lambda: "there")
    values = {**QUICK, **FULL}
    train_lora(family.denoiser, latents, list(texts), **values, **before, checkpoint_folder=tmp_path)
    caplog.clear()
    values["steps"] = 5
    train_lora(family.denoiser, latents, list(texts), **values, **after, resume_from=tmp_path)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "checkpoint" in r.msg]
    assert re.search(f"not that of a run which was never interrupted: {said}$", warning)


def test_settings_that_change_nothing_are_told_as_such(
    latents: Tensor, texts: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "library", lambda: None)
    caplog.set_level(logging.INFO, "lorasmith")
    values = {**QUICK, **FULL}
    denoiser = Plain(nn.Conv2d(4, 4, 1))
    train_lora(denoiser, latents, list(texts), **values, checkpoint_folder=tmp_path)
    caplog.clear()
    train_lora(denoiser, latents, list(texts), **values, pack="none", native_kernels=False, resume_from=tmp_path)
    assert "without effect on the weights: pack all -> none, native_kernels True -> False" in caplog.text
    assert "never interrupted" not in caplog.text
