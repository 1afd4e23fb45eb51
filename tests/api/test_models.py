"""train_lora and the models it is given: ones that carry LoRAs already, odd nets, and what is around the call."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lorasmith.adapters.targets import Targets
from lorasmith.api import train_lora
from lorasmith.config.schema import Config
from lorasmith.data.dataset import Dataset
from lorasmith.diffusion.process import Flow
from lorasmith.formats import lora_file
from lorasmith.models.families.sd import StableDiffusion, StableDiffusionDenoiser
from lorasmith.prepare.share import shared_copy
from lorasmith.storage.hashing import digest
from lorasmith.training.in_memory import samples_of
from lorasmith.training.job import Job

QUICK: dict[str, Any] = {"steps": 1, "rank": 2, "targets": Targets(preset="attention"), "gradient_checkpointing": False}


@pytest.fixture
def denoiser(family: StableDiffusion) -> StableDiffusionDenoiser:
    return shared_copy(family.denoiser, torch.device("cpu"), torch.float32)


def hooked(denoiser: Any) -> list[Tensor]:
    """The parameters of the adapters that hang on a denoiser."""
    hooks = [hook for module in denoiser.unet.modules() for hook in module._forward_hooks.values()]
    return [parameter for hook in hooks for parameter in hook.adapter.parameters()]


def test_a_model_with_a_lora_is_trained_on_and_stays(denoiser: Any, latents: Tensor, texts: Tensor) -> None:
    first = train_lora(denoiser, latents, list(texts), **QUICK, learning_rate=0.01).model_with_lora
    before = [parameter.clone() for parameter in hooked(first)]
    assert before and not any(parameter.requires_grad for parameter in hooked(first))
    t = torch.full((4,), 500)
    once = first.predict(latents, t, {"text": texts})
    assert not once.requires_grad
    second = train_lora(first, latents, list(texts), **QUICK, seed=1, learning_rate=0.01).model_with_lora
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, hooked(first), strict=True))
    assert len(hooked(second)) == 2 * len(before)
    assert not {p.data_ptr() for p in hooked(first)} & {p.data_ptr() for p in hooked(second)}
    twice = second.predict(latents, t, {"text": texts})
    assert torch.equal(first.predict(latents, t, {"text": texts}), once) and not torch.equal(once, twice)


def test_the_adapters_follow_a_model_that_is_moved(denoiser: Any, latents: Tensor, texts: Tensor) -> None:
    model = train_lora(denoiser, latents, list(texts), **QUICK).model_with_lora
    model.unet.to("meta")
    cond = {"text": texts.to("meta")}
    assert model.unet(latents.to("meta"), torch.full((4,), 500, device="meta"), cond["text"]).sample.is_meta
    assert all(parameter.is_meta for parameter in hooked(model))


def test_a_model_with_adapters_of_peft_is_refused(denoiser: Any, latents: Tensor, texts: Tensor) -> None:
    denoiser.unet.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"^model must hold no adapters of PEFT, got one at unet\..*to_q: fuse"):
        train_lora(denoiser, latents, list(texts), **QUICK)


class Plain:
    """A denoiser around any net of latents."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.process = net, Flow()

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def predict(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.net(x_t.to(next(self.net.parameters()).dtype)).float()

    def file_key(self, path: str) -> str:
        return f"lora_{path}".replace(".", "_")


def test_layers_of_one_name_in_a_file_are_refused(latents: Tensor, texts: Tensor) -> None:
    conv = nn.Conv2d(4, 4, 1)
    net = nn.ModuleDict({"a": nn.ModuleDict({"b_c": conv}), "a_b": nn.ModuleDict({"c": nn.Conv2d(4, 4, 1)})})
    with pytest.raises(ValueError, match="^targets must have different names in a file, got net.a.b_c and net.a_b.c"):
        train_lora(Plain(net), latents, list(texts), steps=1, targets=Targets(preset="all"))


def test_a_prediction_of_another_shape_is_refused(latents: Tensor, texts: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^model must predict the latents' shape \[1, 4, 16, 16\], got \[1, 1, "):
        train_lora(Plain(nn.Conv2d(4, 1, 1)), latents, list(texts), steps=1, targets=Targets(preset="all"))


def test_checkpointing_that_does_nothing_is_said(latents: Tensor, texts: Tensor, caplog: Any) -> None:
    train_lora(Plain(nn.Conv2d(4, 4, 1)), latents, list(texts), steps=1, targets=Targets(preset="all"))
    assert "gradient_checkpointing does nothing: the model has no lists of blocks" in caplog.text


def test_the_callers_autocast_does_not_matter(denoiser: Any, latents: Tensor, texts: Tensor) -> None:
    inputs = {**QUICK, "training_dtype": "fp32", "lora_dtype": "fp32"}
    outside = train_lora(denoiser, latents, list(texts), **inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = train_lora(denoiser, latents, list(texts), **inputs)
    assert outside.loss == inside.loss
    assert digest(outside.lora.items()) == digest(inside.lora.items())


def test_bf16_gradients_add_up_in_fp32(latents: Tensor, texts: Tensor) -> None:
    """One batch and its samples one by one give nearly the same bf16 weights."""
    net = nn.Conv2d(4, 4, 3, padding=1)
    x, cond = latents.repeat(64, 1, 1, 1), [texts[0]]
    inputs: dict[str, Any] = {
        "steps": 1, "optimizer": "SGD", "learning_rate": 1.0, "targets": Targets(preset="all"), "training_dtype": "fp32"
    }  # fmt: skip
    whole = train_lora(Plain(net), x, cond, batch_size=256, **inputs).lora
    cut = train_lora(Plain(net), x, cond, grad_accumulation_steps=256, **inputs).lora
    ups = [lora["lora_net_.lora_up.weight"].float() for lora in (whole, cut)]
    assert float((ups[0] - ups[1]).norm() / ups[0].norm()) < 0.008  # 3 % where micro-batches add up in bf16


def test_a_limit_of_oft_outlives_its_file(denoiser: Any, latents: Tensor, texts: Tensor, tmp_path: Path) -> None:
    adapter = {"name": "OFT", "rank": 4, "alpha": 1e-4}
    values: dict[str, Any] = {
        "steps": 5,
        "learning_rate": 0.1,
        "targets": Targets(preset="attention"),
        "adapter": adapter,
    }
    samples = samples_of(latents, list(texts), None, several_sizes=False)
    dataset = Dataset.of(samples, [1] * 4, seed=0, group_size=1)
    job = Job.of(denoiser, dataset, Config(**values), device=torch.device("cpu"))
    list(job.steps())
    lora_file.write(tmp_path / "oft.safetensors", job.lora(), job.file_metadata())
    again = Job.of(
        denoiser, dataset, Config(**values, existing_lora=tmp_path / "oft.safetensors"), device=torch.device("cpu")
    )
    assert again.adapters.alphas == [1e-4]


def test_draws_are_not_repeated_whatever_the_group(
    denoiser: Any, latents: Tensor, texts: Tensor, tmp_path: Path
) -> None:
    """3 groups of 4 and then groups of 5: the first one whose samples are new is the fourth."""
    samples = samples_of(latents, list(texts), None, several_sizes=False)

    def job(group_size: int, **values: Any) -> Job:
        dataset = Dataset.of(samples, [1] * 4, seed=0, group_size=group_size)
        config = Config(steps=3, batch_size=group_size, targets=Targets(preset="attention"), **values)
        return Job.of(denoiser, dataset, config, device=torch.device("cpu"))

    first = job(4)
    first.state.counters.step = first.state.counters.group = 3
    lora_file.write(tmp_path / "a.safetensors", first.lora(), first.file_metadata())
    again = job(5, existing_lora=tmp_path / "a.safetensors")
    counters = again.state.counters
    assert (again.done, counters.group, counters.step) == (3, 3, 0)
    assert min(again.dataset.group_at(counters.group).numbers) >= 12
    counters.step, counters.group = 3, 6
    assert again.file_metadata()["lorasmith.samples"] == "30"
