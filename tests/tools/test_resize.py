"""resize: against numpy's SVD of the whole matrices; alpha, dtypes, names; what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import lorasmith
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasmith.tools.resize import resize
from lorasmith.tools.svd import Cut

LAYERS = {"lora_unet_down_blocks_0_attn1_to_q": (20, (24,)), "lora_unet_up_blocks_1_conv1": (12, (5, 3, 3))}


def lora(rank: int = 6, alpha: float = 3.0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A linear layer and a convolution."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, (n_out, shape) in LAYERS.items():
        ones = [1] * (len(shape) - 1)
        state[f"{name}.lora_up.weight"] = torch.randn(n_out, rank, *ones, generator=generator).to(dtype)
        state[f"{name}.lora_down.weight"] = torch.randn(rank, *shape, generator=generator).to(dtype)
        state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


def delta(state: dict[str, Tensor], name: str) -> Any:
    """alpha / rank up down [n_out, fan-in], float64; without alpha: up down."""
    up, down = (state[f"{name}.lora_{which}.weight"].flatten(1).double() for which in ("up", "down"))
    alpha = float(state.get(f"{name}.alpha", torch.tensor(float(len(down)))))
    return (alpha / len(down) * up @ down).numpy()


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_each_layer_is_the_nearest_of_its_rank(tmp_path: Path, rank: int) -> None:
    before = lora()
    save_file(before, tmp_path / "a.safetensors", {"ss_network_dim": "6", "ss_network_alpha": "3.0", "other": "kept"})
    losses = resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", Cut(rank=rank))
    after = load_file(tmp_path / "b.safetensors")
    assert after.keys() == before.keys()
    errors = norms = 0.0
    for name, (n_out, shape) in LAYERS.items():
        whole = delta(before, name)
        left, values, right = np.linalg.svd(whole, full_matrices=False)
        expected = left[:, :rank] * values[:rank] @ right[:rank]
        np.testing.assert_allclose(delta(after, name), expected, atol=1e-5)
        assert after[f"{name}.lora_down.weight"].shape == (rank, *shape)
        assert after[f"{name}.lora_up.weight"].shape == (n_out, rank, *[1] * (len(shape) - 1))
        assert after[f"{name}.alpha"] == 3.0
        error, norm = losses.layers[name]
        assert error == pytest.approx((values[rank:] ** 2).sum(), rel=1e-4)
        errors, norms = errors + error, norms + norm
    assert losses.overall == pytest.approx((errors / norms) ** 0.5)
    with safe_open(tmp_path / "b.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == str(rank) and metadata["ss_network_alpha"] == "3.0"
    assert metadata["other"] == "kept" and f"resize to rank {rank}" in json.loads(metadata["lorasmith.history"])[0]


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_energy_decides_each_layer_s_rank(tmp_path: Path, keep: float) -> None:
    before = lora()
    save_file(before, tmp_path / "a.safetensors")
    losses = resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", Cut(keep=keep))
    for name in LAYERS:
        energy = np.cumsum(np.linalg.svd(delta(before, name), compute_uv=False) ** 2)
        assert losses.ranks[name] == 1 + int((energy < keep * energy[-1] * (1 - 1e-9)).sum())


def test_all_of_the_energy_keeps_all_of_the_rank(tmp_path: Path) -> None:
    save_file(lora(), tmp_path / "a.safetensors")
    losses = resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", Cut(keep=1.0))
    assert set(losses.ranks.values()) <= {6} and losses.overall < 1e-6


def test_layers_of_less_rank_stay_bit_for_bit(tmp_path: Path) -> None:
    state = lora(dtype=torch.bfloat16)
    small = {key: value for key, value in lora(2).items() if "conv1" in key}
    save_file(state | small, tmp_path / "a.safetensors")
    resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", Cut(rank=2))
    after = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(after[key], small[key]) for key in small)
    assert {v.dtype for k, v in after.items() if "attn1" in k and "alpha" not in k} == {torch.bfloat16}


def test_peft_s_alpha_goes_into_the_factors(tmp_path: Path) -> None:
    kohya = lora()
    spelt = {"lora_up": "lora_B", "lora_down": "lora_A"}
    state = {}
    for key, value in kohya.items():
        for old, new in spelt.items():
            if old in key:
                state[key.replace("lora_unet_", "unet.").replace(old, new)] = value
    header = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 3.0, "unet.r": 6})}
    save_file(state, tmp_path / "a.safetensors", header)
    resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", Cut(rank=4))
    after = load_file(tmp_path / "b.safetensors")
    assert after.keys() == state.keys()
    with safe_open(tmp_path / "b.safetensors", framework="pt") as file:
        assert "lora_adapter_metadata" not in file.metadata()
    for name in LAYERS:
        path = name.replace("lora_unet_", "unet.")
        found = after[f"{path}.lora_B.weight"].flatten(1) @ after[f"{path}.lora_A.weight"].flatten(1)
        left, values, right = np.linalg.svd(delta(kohya, name), full_matrices=False)
        np.testing.assert_allclose(found.numpy(), left[:, :4] * values[:4] @ right[:4], atol=1e-5)


REFUSED = [
    ({}, "must be a LoRA, got no tensors"),
    ({"x.weight": torch.ones(2)}, "must be a LoRA, got tensors such as x.weight"),
    ({"a.hada_w1_a": torch.ones(2, 2)}, "must hold LoRA or DoRA alone to be resized, got LoHa in a"),
    ({"a.lora_down.weight": torch.ones(4, 3)}, "lora_up.weight is missing"),
    ({"a.lora_up.weight": torch.ones(4, 3)}, r"lora_down.weight must be a matrix or a kernel, got none"),
    ({"a.lora_down.weight": torch.ones(4, 3), "a.lora_up.weight": torch.ones(5, 3)}, r"must have the shape \[5, 4\]"),
    ({"a.lora_down.weight": torch.ones(0, 3), "a.lora_up.weight": torch.ones(5, 0)}, "must not be empty|below that of"),
    ({"a.lora_down.weight": torch.full((4, 3), torch.nan), "a.lora_up.weight": torch.ones(5, 4)}, "must be finite"),
    (
        {"a.lora_down.weight": torch.ones(4, 3), "a.lora_up.weight": torch.ones(5, 4), "a.foo": torch.ones(1)},
        "foo is not read",
    ),
    ({"a.lora_down.weight": torch.ones(4, 3), "a.lora_A.weight": torch.ones(4, 3)}, "must be the only"),
    (
        {"a.lora_down.weight": torch.ones(4, 3).int(), "a.lora_up.weight": torch.ones(5, 4)},
        "got lora_down.weight of torch.int32",
    ),
    (
        {"a.lora_down.weight": torch.ones(2, 3), "a.lora_up.weight": torch.ones(5, 2)},
        "rank must be below that of .*, 2",
    ),
]


@pytest.mark.parametrize(("state", "message"), REFUSED)
def test_refusals(tmp_path: Path, state: dict[str, Tensor], message: str) -> None:
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", Cut(rank=2))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_command(tmp_path: Path) -> None:
    save_file(lora(), tmp_path / "a.safetensors")
    ended = lorasmith(tmp_path, "resize", "a.safetensors", "--rank", "2", "--output", "b.safetensors")
    assert ended.code == 0 and "relative error" in ended.out and "all layers" in ended.out
    again = lorasmith(tmp_path, "resize", "a.safetensors", "--rank", "3", "--output", "b.safetensors")
    assert again.code == 2 and "must not be there yet without --overwrite, got b.safetensors" in again.err
    assert lorasmith(
        tmp_path, "resize", "a.safetensors", "--keep", "0.9", "--output", "a.safetensors", "--overwrite"
    ).code == 0  # fmt: skip
    for arguments, message in (
        ([], "either rank or keep must be given, got none"),
        (["--rank", "1", "--keep", "0.5"], "either rank or keep must be given, got both"),
        (["--rank", "0"], "rank must be 1 or more, got 0"),
        (["--keep", "1.5"], "keep must be above 0 and at most 1, got 1.5"),
        (["--keep", "nan"], "keep must be above 0 and at most 1, got nan"),
    ):
        ended = lorasmith(tmp_path, "resize", "a.safetensors", "--output", "c.safetensors", *arguments)
        assert (ended.code, ended.err) == (2, f"lorasmith: {message}\n")
    assert not (tmp_path / "c.safetensors").exists()
