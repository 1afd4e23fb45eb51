"""What PEFT and diffusers say of alpha outside the tensors: read as they read it, or refused in one line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorasmith.formats import lora_file, peft
from lorasmith.formats.lora_weights import LoRAWeights
from lorasmith.formats.peft import CONFIG
from lorasmith.storage.safetensors_header import PEFT_CONFIG


def lora(rank: int, names: tuple[str, str] = ("lora_A.weight", "lora_B.weight")) -> dict[str, Tensor]:
    return {f"unet.a.to_q.{names[0]}": torch.ones(rank, 3), f"unet.a.to_q.{names[1]}": torch.ones(3, rank)}


def header(**config: Any) -> dict[str, str]:
    return {PEFT_CONFIG: json.dumps({f"unet.{key}": value for key, value in config.items()})}


def with_alphas(state: dict[str, Tensor], metadata: dict[str, str], path: Path) -> dict[str, Tensor]:
    return peft.with_alphas(LoRAWeights.of(state, metadata, path)).state


PATH = Path("a.safetensors")
ALPHAS = [
    ({"lora_alpha": 8}, 8.0),
    ({"alpha": 8}, 8.0),
    ({}, None),
    ({"r": 2}, 4.0),
    ({"lora_alpha": 8, "r": 2}, 8.0),
    ({"lora_alpha": 8, "use_rslora": True}, 16.0),
    ({"lora_alpha": 8, "use_rslora": False}, 8.0),
    ({"lora_alpha": 8, "alpha_pattern": {}}, 8.0),
    ({"lora_alpha": 8, "alpha_pattern": None}, 8.0),
    ({"lora_alpha": 8, "alpha_pattern": {"to_q": 2}}, 2.0),
    ({"lora_alpha": 8, "alpha_pattern": {r"a\.to_q": 2}}, 2.0),
    ({"lora_alpha": 8, "alpha_pattern": {"o_q": 2, "to_k": 3}}, 8.0),
    ({"lora_alpha": 8, "alpha_pattern": {".*q": 2, "to_q": 3}, "use_rslora": True}, 4.0),
]


@pytest.mark.parametrize(("config", "expected"), ALPHAS)
def test_alpha_is_peft_s(config: dict[str, Any], expected: float | None) -> None:
    """PEFT scales by alpha / rank, with rslora by alpha / sqrt(rank); here rank is 4."""
    found = with_alphas(lora(4), header(**config), PATH)
    alpha = found.get("unet.a.to_q.alpha")
    assert (None if alpha is None else float(alpha)) == expected
    assert {key: found[key].shape for key in lora(4)} == {key: tensor.shape for key, tensor in lora(4).items()}


@pytest.mark.parametrize("names", [("lora_down.weight", "lora_up.weight"), ("hada_w1_b", "hada_w1_a")])
def test_every_algorithm_with_a_rank_is_scaled(names: tuple[str, str]) -> None:
    found = with_alphas(lora(4, names), header(alpha=8, use_rslora=True), PATH)
    assert float(found["unet.a.to_q.alpha"]) == 16


def test_whole_kronecker_factors_are_scaled_themselves() -> None:
    """Only PEFT scales them, so what it scales by goes into the first."""
    state = {"unet.a.lokr_w1": torch.ones(2, 2), "unet.a.lokr_w2": torch.ones(3, 3)}
    found = with_alphas(state, header(alpha=8, r=16), PATH)
    assert torch.equal(found["unet.a.lokr_w1"], torch.full((2, 2), 0.5))
    assert torch.equal(found["unet.a.lokr_w2"], state["unet.a.lokr_w2"]) and len(found) == 2


def test_a_layer_s_own_alpha_holds() -> None:
    state = {**lora(4), "unet.a.to_q.alpha": torch.tensor(3.0)}
    assert with_alphas(state, header(lora_alpha=8), PATH) == state


def test_each_net_has_its_own_configuration() -> None:
    state = {**lora(4), **{key.replace("unet", "text_encoder"): tensor for key, tensor in lora(4).items()}}
    metadata = {PEFT_CONFIG: json.dumps({"unet.lora_alpha": 8, "text_encoder.lora_alpha": 2})}
    found = with_alphas(state, metadata, PATH)
    assert float(found["unet.a.to_q.alpha"]) == 8 and float(found["text_encoder.a.to_q.alpha"]) == 2
    for_all = with_alphas(state, {PEFT_CONFIG: json.dumps({"lora_alpha": 5})}, PATH)
    assert float(for_all["unet.a.to_q.alpha"]) == float(for_all["text_encoder.a.to_q.alpha"]) == 5


def test_the_file_beside_counts_for_peft_s_name_alone(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text('{"lora_alpha": 8}')
    for name, expected in (("adapter_model", 8.0), ("other", None)):
        save_file(lora(4), tmp_path / f"{name}.safetensors")
        alpha = lora_file.read(tmp_path / f"{name}.safetensors")[0].get("unet.a.to_q.alpha")
        assert (None if alpha is None else float(alpha)) == expected
    found = with_alphas(lora(4), header(lora_alpha=2), tmp_path / "adapter_model.safetensors")
    assert float(found["unet.a.to_q.alpha"]) == 2


def test_layers_that_nothing_says_the_alpha_of_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """Biases' and norms' differences have none."""
    state = {**lora(4), "unet.norm.diff": torch.ones(3), "unet.norm.diff_b": torch.ones(3)}
    assert with_alphas(state, {}, PATH) == state
    assert [record.getMessage() for record in caplog.records] == [
        "a.safetensors: 1 layer without an alpha: taken to be the rank, so that the scale is 1"
    ]
    caplog.clear()
    found = with_alphas(state, header(lora_alpha=8), PATH)
    assert found.keys() - state.keys() == {"unet.a.to_q.alpha"} and not caplog.records


def test_alphas_are_float32_whatever_the_default() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        found = with_alphas(lora(4), header(lora_alpha=8), PATH)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found["unet.a.to_q.alpha"].dtype == torch.float32


BROKEN = {
    "": "Expecting value",
    "{": "Expecting property name",
    "[]": "list",
    "3": "int",
    "null": "NoneType",
    '"text"': "str",
    "[" * 100_000: "recursion",
}
BROKEN_VALUES = [
    {"lora_alpha": "many"},
    {"lora_alpha": None},
    {"lora_alpha": [1]},
    {"alpha_pattern": [1]},
    {"alpha_pattern": {"(": 1}},
    {"alpha_pattern": {"to_q": None}},
    {"alpha_pattern": {"to_q": "many"}},
]


def refusal(metadata: dict[str, str], path: Path, state: dict[str, Tensor] | None = None) -> str:
    with pytest.raises(ValueError, match=f"^cannot read the PEFT configuration of .*{path.name}: ") as info:
        with_alphas(state or lora(4), metadata, path)
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_configuration_is_one_clear_line(tmp_path: Path, text: str) -> None:
    assert BROKEN[text] in refusal({PEFT_CONFIG: text}, PATH)
    (tmp_path / CONFIG).write_text(text)
    assert BROKEN[text] in refusal({}, tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("config", BROKEN_VALUES)
def test_broken_values_are_one_clear_line(tmp_path: Path, config: dict[str, Any]) -> None:
    refusal(header(**config), PATH)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    refusal({}, tmp_path / "adapter_model.safetensors")


def test_other_ways_to_be_broken(tmp_path: Path) -> None:
    kronecker = {"unet.a.lokr_w1": torch.ones(2, 2), "unet.a.lokr_w2": torch.ones(3, 3)}
    assert "division by zero" in refusal(header(alpha=8, r=0), PATH, kronecker)
    (tmp_path / CONFIG).write_bytes(b"\xff\xfe{}")
    assert "can't decode" in refusal({}, tmp_path / "adapter_model.safetensors")


def test_what_is_broken_elsewhere_is_left_to_the_loader() -> None:
    """An alpha that is not finite, a rank that a tensor has no axis for."""
    assert math.isnan(float(with_alphas(lora(4), header(lora_alpha=math.nan), PATH)["unet.a.to_q.alpha"]))
    scalar = {"unet.a.lora_A.weight": torch.tensor(1.0), "unet.a.lora_B.weight": torch.tensor(1.0)}
    assert with_alphas(scalar, header(lora_alpha=8), PATH) == scalar
