"""extract: a model merged with a LoRA gives that LoRA back; numpy's SVD of the differences; what is refused."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import lorasmith
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiers import table
from tiny import made
from torch import Tensor

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import LoRA
from lorasmith.adapters.targets import Targets
from lorasmith.demo import BASE
from lorasmith.formats import lora_file
from lorasmith.formats.read import adapters_from
from lorasmith.models.load import load_model
from lorasmith.tools.extract import extract
from lorasmith.tools.merge import Source
from lorasmith.tools.merge_into_model import merge_into
from lorasmith.tools.svd import Cut

UNET = "unet/diffusion_pytorch_model.safetensors"


def unet_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / UNET)


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """The embedded model with other weights in a linear layer, a convolution, a norm and a bias of its UNet."""
    shutil.copytree(BASE, tmp_path / "tuned")
    state = unet_of(BASE)
    generator = torch.Generator().manual_seed(0)
    for key in ("time_embedding.linear_1.weight", "conv_out.weight", "conv_norm_out.weight", "conv_out.bias"):
        state[key] = (state[key].float() + torch.randn(state[key].shape, generator=generator)).to(state[key].dtype)
    save_file(state, tmp_path / "tuned" / UNET)
    return tmp_path / "tuned"


def difference(tuned: Path, key: str) -> Any:
    return (unet_of(tuned)[key].double() - unet_of(BASE)[key].double()).flatten(1).numpy()


@pytest.mark.parametrize("rank", [1, 3])
def test_each_weight_is_the_nearest_of_its_rank(tmp_path: Path, tuned: Path, rank: int) -> None:
    losses = extract(BASE, tuned, tmp_path / "a.safetensors", Cut(rank=rank), dtype=torch.float32)
    state = load_file(tmp_path / "a.safetensors")
    names = {
        "lora_unet_time_embedding_linear_1": "time_embedding.linear_1.weight",
        "lora_unet_conv_out": "conv_out.weight",
    }
    errors = norms = 0.0
    for name, key in names.items():
        left, values, right = np.linalg.svd(difference(tuned, key), full_matrices=False)
        found = state[f"{name}.lora_up.weight"].flatten(1) @ state[f"{name}.lora_down.weight"].flatten(1)
        np.testing.assert_allclose(found.numpy(), left[:, :rank] * values[:rank] @ right[:rank], atol=1e-4)
        assert float(state[f"{name}.alpha"]) == rank
        errors, norms = errors + (values[rank:] ** 2).sum(), norms + (values**2).sum()
    assert losses.overall == pytest.approx((errors / norms) ** 0.5, rel=1e-4)
    norm = unet_of(tuned)["conv_norm_out.weight"].float() - unet_of(BASE)["conv_norm_out.weight"].float()
    torch.testing.assert_close(state["lora_unet_conv_norm_out.diff"], norm)
    assert state["lora_unet_conv_out.diff_b"].shape == (4,) and len(state) == 8
    adapters_from(state, load_model(BASE).denoiser)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata()["ss_network_dim"] == str(rank) and file.metadata()["ss_sd_model_name"] == "base"


def test_energy_decides_the_ranks(tmp_path: Path, tuned: Path) -> None:
    losses = extract(BASE, tuned, tmp_path / "a.safetensors", Cut(keep=0.9), dtype=torch.float32)
    energy = np.cumsum(np.linalg.svd(difference(tuned, "conv_out.weight"), compute_uv=False) ** 2)
    assert losses.ranks["lora_unet_conv_out"] == 1 + int((energy < 0.9 * energy[-1]).sum())
    assert losses.overall <= 0.1**0.5


@table("name", ["StableDiffusionXLPipeline", "FluxPipeline"], quick=["FluxPipeline"])
def test_a_merged_lora_comes_back(tmp_path: Path, name: str) -> None:
    made(name).save_pretrained(tmp_path / "base")
    family = load_model(tmp_path / "base")
    adapters = AdapterSet.new(family.denoiser, LoRA(rank=2), Targets(), 0)
    for parameter in adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    lora_file.write(tmp_path / "a.safetensors", adapters.file_state(family.denoiser, torch.float32), {})
    merge_into(tmp_path / "base", [Source.parsed(str(tmp_path / "a.safetensors"))], tmp_path / "tuned")
    losses = extract(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "b.safetensors", Cut(rank=2), dtype=torch.float32
    )
    assert losses.overall < 1e-4
    again = adapters_from(load_file(tmp_path / "b.safetensors"), family.denoiser)
    assert again.adapters.keys() == adapters.adapters.keys() and not again.offsets
    for path, adapter in adapters.adapters.items():
        zero = torch.zeros(adapter.up.shape[0], adapter.down.shape[1])  # pyright: ignore
        with torch.no_grad():
            torch.testing.assert_close(again.adapters[path].merged(zero), adapter.merged(zero), rtol=1e-3, atol=1e-4)


def test_refusals(tmp_path: Path, tuned: Path) -> None:
    def refused(message: str, base: Path = BASE, other: Path = tuned) -> None:
        with pytest.raises(ValueError, match=message):
            extract(base, other, tmp_path / "a.safetensors", Cut(rank=1), dtype=torch.float32)
        assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob(".*"))

    refused("must differ in a weight or bias of a layer, but they do not", other=BASE)
    refused("must be a diffusers folder with a model_index.json", base=tmp_path)
    state = unet_of(tuned)
    save_file(state | {"conv_in.weight": torch.ones(2, 2)}, tuned / UNET)
    refused(r"conv_in.weight must be of one shape in both models, got \[\d+, 4, 3, 3\] and \[2, 2\]")
    save_file({key: value for key, value in state.items() if key != "conv_in.weight"}, tuned / UNET)
    refused("must hold the same tensors, but .*tuned lacks 1 of .*base, such as conv_in.weight")
    save_file(state | {"conv_in.weight": torch.full_like(state["conv_in.weight"], torch.nan)}, tuned / UNET)
    refused("conv_in.weight must be finite in both models, got NaN or infinity")


def test_another_autoencoder_is_left_out_with_a_warning(tmp_path: Path, tuned: Path, caplog: Any) -> None:
    def warned() -> str:
        caplog.clear()
        extract(BASE, tuned, tmp_path / "a.safetensors", Cut(rank=1), dtype=torch.float32, overwrite=True)
        return caplog.text

    assert "left out" not in warned()
    vae = tuned / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(vae)
    key = next(iter(state))
    save_file(state | {key: state[key] + 1}, vae)
    assert "has another vae than" in warned()


def test_what_no_lora_holds_is_left_out_with_a_line(tmp_path: Path, caplog: Any) -> None:
    name = "model.diffusion_model"
    same = {f"{name}.x.weight": torch.ones(3, 3), "text_model.position_ids": torch.arange(3)[None]}
    own = {"v_pred": torch.zeros(0), "text_model.logit_scale": torch.tensor(4.0)}
    save_file(
        {**same, **own, f"{name}.table": torch.ones(3, 3), "denoiser.sigmas": torch.ones(3)},
        tmp_path / "one.safetensors",
    )
    other = {f"{name}.table": torch.zeros(3, 3), "denoiser.sigmas": torch.ones(4)}
    save_file({**same, **other, f"{name}.x.weight": torch.zeros(3, 3)}, tmp_path / "two.safetensors")
    one, two, lora = (tmp_path / f"{n}.safetensors" for n in ("one", "two", "lora"))
    extract(one, two, lora, Cut(rank=1), dtype=torch.float32)
    assert {key.rpartition("_x.")[2] for key in load_file(tmp_path / "lora.safetensors")} == {
        "lora_up.weight", "lora_down.weight", "alpha",
    }  # fmt: skip
    first, second = caplog.messages
    assert first.endswith("one.safetensors holds 2 tensors: text_model.logit_scale; v_pred")
    assert second.startswith("left out, as a LoRA cannot hold") and second.endswith(f"1 tensor: {name}.table")


def test_parts_that_one_model_lacks_are_left_out_with_a_line(tmp_path: Path, tuned: Path, caplog: Any) -> None:
    shutil.rmtree(tuned / "text_encoder")
    extract(BASE, tuned, tmp_path / "a.safetensors", Cut(rank=1), dtype=torch.float32)
    assert caplog.messages == [f"left out, as only {BASE} holds it: text_encoder"]
    assert len(load_file(tmp_path / "a.safetensors")) == 8


def test_the_command(tmp_path: Path, tuned: Path) -> None:
    ended = lorasmith(tmp_path, "extract", "demo", "tuned", "--rank", "2", "--output", "a.safetensors")
    assert ended.code == 0 and "relative error" in ended.out and "lora_unet_conv_out" in ended.out
    assert {tensor.dtype for key, tensor in load_file(tmp_path / "a.safetensors").items() if "alpha" not in key} == {
        torch.bfloat16
    }
    for name, hint in (
        ("nowhere", ""),
        ("nowhere/none", ": download nowhere/none from the hub first"),
        ("SDXL", ": download stabilityai/stable-diffusion-xl-base-1.0 from the hub first"),
    ):
        message = f"{name} must be a diffusers folder or a safetensors file, got no such folder or file{hint}"
        for command in (
            ["extract", "demo", name, "--rank", "2", "--output", "b.safetensors"],
            ["extract", name, "demo", "--rank", "2", "--output", "b.safetensors"],
            ["merge", "a.safetensors", "--model", name, "--output", "m"],
            ["inspect", name],
        ):
            refused = lorasmith(tmp_path, *command)
            assert (refused.code, refused.err) == (2, f"lorasmith: {message}\n")
