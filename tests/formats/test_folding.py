"""What other programs write beside plain factors: every tool reads it as the formula says, or refuses it by name."""

import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers
from safetensors.torch import load_file, save_file
from tiers import table
from tiny import made
from torch import Tensor

from lorasmith.api import train_lora
from lorasmith.demo import BASE
from lorasmith.formats import lora_file
from lorasmith.formats.read import adapters_from
from lorasmith.models.load import load_model
from lorasmith.tools.convert import convert
from lorasmith.tools.inspect import inspected, layer_norms
from lorasmith.tools.lora_layers import LoRAFile
from lorasmith.tools.merge import Source, merge
from lorasmith.tools.merge_into_model import merge_into
from lorasmith.tools.resize import resize
from lorasmith.tools.svd import Cut

MODULE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
KOHYA, DIFFUSERS, PEFT = f"lora_unet_{MODULE.replace('.', '_')}", f"unet.{MODULE}", f"base_model.model.{MODULE}"
SIDE, RANK = 160, 4
DOWN, UP = torch.randn(2, RANK, SIDE, generator=torch.Generator().manual_seed(0)) / 4
UP = (UP.T @ torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))).contiguous()  # of rank 2, so that resizing is exact
FP8 = torch.float8_e4m3fn


def factors(layer: str, down: Tensor = DOWN, up: Tensor = UP, names: str = "AB") -> dict[str, Tensor]:
    a, b = ("lora_A.weight", "lora_B.weight") if names == "AB" else ("lora_down.weight", "lora_up.weight")
    return {f"{layer}.{a}": down, f"{layer}.{b}": up}


@dataclass
class Place:
    """A file whose scale lies somewhere, and by what up down is multiplied."""

    state: dict[str, Tensor]
    scale: float | Tensor
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None  # of adapter_config.json beside it
    name: str = "a.safetensors"
    up: Tensor = UP
    down: Tensor = DOWN

    def written(self, folder: Path) -> Path:
        if self.config is not None:
            (folder / "adapter_config.json").write_text(json.dumps(self.config))
        save_file(self.state, folder / self.name, self.metadata)
        return folder / self.name

    @property
    def delta(self) -> Tensor:
        return self.scale * self.up.float() @ self.down.float()


ROWS = torch.linspace(0.5, 2, SIDE).view(-1, 1)
UP8, DOWN8 = UP.to(FP8), DOWN.to(torch.float8_e5m2)
CODES: dict[str, Any] = {"up": UP8, "down": DOWN8}
CONFIG = {"r": 16, "lora_alpha": 8, "alpha_pattern": {"^mid_block.*to_out.0": 6}, "use_rslora": True}
BY_CONFIG = 6 / math.sqrt(RANK)
PLACES: dict[str, Callable[[], Place]] = {
    "alpha": lambda: Place({**factors(KOHYA, names="du"), f"{KOHYA}.alpha": torch.tensor(2.0)}, 0.5),
    "nothing": lambda: Place(factors(DIFFUSERS), 1.0),
    "header": lambda: Place(
        factors(DIFFUSERS), BY_CONFIG,
        {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in CONFIG.items()})},
    ),
    "config beside PEFT's file": lambda: Place(factors(PEFT), BY_CONFIG, {}, CONFIG, "adapter_model.safetensors"),
    "config beside diffusers' file": lambda: Place(
        factors(PEFT), BY_CONFIG, {}, CONFIG, "pytorch_lora_weights.safetensors"
    ),
    "config beside the only file": lambda: Place(factors(PEFT), BY_CONFIG, {}, CONFIG),
    "8 bits": lambda: Place(factors(DIFFUSERS, DOWN8, UP8), 1.0, **CODES),
    "scale_weight": lambda: Place(
        {
            **factors(KOHYA, DOWN8, UP8, "du"), f"{KOHYA}.lora_up.scale_weight": torch.tensor(3.0),
            f"{KOHYA}.lora_down.scale_weight": torch.tensor([0.5]), f"{KOHYA}.alpha": torch.tensor(2.0),
            "scaled_fp8": torch.empty(0).to(FP8),
        },
        0.75, **CODES,
    ),
    "weight_scale by rows": lambda: Place(
        {**factors(DIFFUSERS, DOWN8, UP8), f"{DIFFUSERS}.lora_B.weight_scale": ROWS}, ROWS, **CODES
    ),
    "a scale of each tensor": lambda: Place(
        {**factors(DIFFUSERS, DOWN8, UP8), f"{DIFFUSERS}.lora_A.weight.scale": torch.tensor(0.25)}, 0.25, **CODES
    ),
    "metadata": lambda: Place(
        factors(DIFFUSERS, DOWN8, UP8), 0.125, {f"{DIFFUSERS}.lora_B.weight_scale": "0.125"}, **CODES
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def base_weight() -> Tensor:
    return load_file(BASE / "unet/diffusion_pytorch_model.safetensors")[f"{MODULE}.weight"].float()


def delta_of(path: Path) -> Tensor:
    """What the file adds to its layer, as train and sample read it."""
    state, metadata = lora_file.read(path)
    (adapter,) = adapters_from(state, load_model(BASE).denoiser, metadata).adapters.values()
    return adapter.merged(torch.zeros(SIDE, SIDE)).detach()


@table("place", PLACES, quick=["alpha", "nothing", "header", "config beside PEFT's file"])
def test_every_tool_honours_every_place_of_a_scale(place: str, tmp_path: Path, base_weight: Tensor) -> None:
    made_of = PLACES[place]()
    (tmp_path / "in").mkdir()
    path, expected = made_of.written(tmp_path / "in"), made_of.delta
    tolerance: dict[str, Any] = {"atol": 1e-5 * float(expected.abs().max()), "rtol": 1e-4}
    torch.testing.assert_close(delta_of(path), expected, **tolerance)
    assert layer_norms(path)[0].norm == pytest.approx(float(expected.norm()), rel=1e-4)

    resize(path, tmp_path / "resized.safetensors", Cut(rank=2))
    convert(path, tmp_path / "converted.safetensors", BASE, "comfyui")
    save_file(factors(KOHYA, torch.ones(1, SIDE), torch.zeros(SIDE, 1), "du"), tmp_path / "zero.safetensors")
    merge([Source.parsed(str(path)), Source.parsed(str(tmp_path / "zero.safetensors"))], tmp_path / "sum.safetensors")
    for name in ("resized", "converted", "sum"):
        torch.testing.assert_close(delta_of(tmp_path / f"{name}.safetensors"), expected, **tolerance, msg=name)

    merge_into(BASE, [Source.parsed(str(path))], tmp_path / "model")
    merged = load_file(tmp_path / "model/unet/diffusion_pytorch_model.safetensors")[f"{MODULE}.weight"]
    torch.testing.assert_close(merged, (base_weight + expected).to(merged.dtype), atol=2e-3, rtol=2e-3)


def tools(path: Path, folder: Path) -> list[Callable[[], Any]]:
    """What reads a file and would write into the folder."""
    return [
        lambda: delta_of(path),
        lambda: convert(path, folder / "b.safetensors", BASE, "kohya"),
        lambda: resize(path, folder / "b.safetensors", Cut(rank=2)),
        lambda: merge_into(BASE, [Source.parsed(str(path))], folder / "model"),
    ]


BAD_SCALES = [
    (
        {**factors("x", DOWN8, UP8), "x.lora_A.scale_weight": torch.ones(3)}, {},
        r"x.lora_A.scale_weight must be one number or \[4, 1\], got \[3\]$",
    ),
    (
        {**factors("x", DOWN8, UP8), "x.lora_A.scale_weight": torch.tensor(math.nan)}, {},
        "x.lora_A.scale_weight must hold finite floating-point numbers, got nan$",
    ),
    (
        {**factors("x", DOWN.to(torch.int8)), "x.lora_A.weight_scale": torch.tensor(2.0)}, {},
        "x.lora_A.weight must hold floating-point numbers, got torch.int8 with x.lora_A.weight_scale$",
    ),
    (factors("x", DOWN8, UP8), {"weight_scale": "2"}, "as a number for each tensor, got weight_scale = 2$"),
    (factors("x"), {"x.lora_A.weight_scale": "[1, 2]"}, r"as a number for each tensor, got .*_scale = \[1, 2\]$"),
]  # fmt: skip


@pytest.mark.parametrize(("state", "metadata", "message"), BAD_SCALES)
def test_a_scale_that_does_not_fit_is_refused(
    state: dict[str, Tensor], metadata: dict[str, str], message: str, tmp_path: Path
) -> None:
    save_file(state, tmp_path / "a.safetensors", metadata)
    for read in (lora_file.read, LoRAFile.opened, inspected):
        with pytest.raises(ValueError, match=f"a.safetensors.*{message}"):
            read(tmp_path / "a.safetensors")


def test_whole_numbers_are_refused_by_every_tool(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(factors(KOHYA, DOWN.to(torch.int8), UP, "du"), path)
    for tool in tools(path, tmp_path):
        with pytest.raises(ValueError, match="lora_down.weight .*torch.int8"):
            tool()


def test_biases_of_factors_become_a_change_of_the_layer_s(tmp_path: Path) -> None:
    """PEFT's lora_bias adds s b, and a bias of the first factor is multiplied by the second."""
    up_bias, down_bias, before = torch.randn(SIDE), torch.randn(RANK), torch.randn(SIDE)
    state = {
        **factors(DIFFUSERS), f"{DIFFUSERS}.lora_B.bias": up_bias, f"{DIFFUSERS}.lora_A.bias": down_bias,
        f"{DIFFUSERS}.alpha": torch.tensor(2.0), f"{DIFFUSERS}.diff_b": before,
    }  # fmt: skip
    save_file(state, tmp_path / "a.safetensors")
    x, denoiser = torch.randn(3, SIDE), load_model(BASE).denoiser
    adapters = adapters_from(lora_file.read(tmp_path / "a.safetensors")[0], denoiser)
    update = 0.5 * ((x @ DOWN.T + down_bias) @ UP.T + up_bias) + before
    (adapter,), (offset,) = adapters.adapters.values(), adapters.offsets.values()
    torch.testing.assert_close(adapter(x, torch.zeros(3, SIDE), None) + offset, update, atol=1e-5, rtol=1e-4)

    merge_into(BASE, [Source.parsed(str(tmp_path / "a.safetensors"))], tmp_path / "model")
    biases = [
        load_file(f / "unet/diffusion_pytorch_model.safetensors")[f"{MODULE}.bias"] for f in (BASE, tmp_path / "model")
    ]
    expected = biases[0].float() + 0.5 * (UP @ down_bias + up_bias) + before
    torch.testing.assert_close(biases[1], expected.to(biases[1].dtype))


def test_biases_that_are_zero_or_have_no_place(tmp_path: Path) -> None:
    """to_q has no bias, so that only one of zeros can be left out."""
    query = DIFFUSERS.replace("to_out.0", "to_q")
    for bias, message in ((torch.zeros(SIDE), None), (torch.ones(SIDE), "the layer has no bias")):
        save_file({**factors(query), f"{query}.lora_B.bias": bias}, tmp_path / "a.safetensors")
        state = lora_file.read(tmp_path / "a.safetensors")[0]
        if message is None:
            assert adapters_from(state, load_model(BASE).denoiser).offsets == {}
        else:
            with pytest.raises(ValueError, match=message):
                adapters_from(state, load_model(BASE).denoiser)


def test_alphas_of_layers_without_factors_are_left_out_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {**factors(KOHYA, names="du"), "lora_te_nowhere.alpha": torch.tensor(math.nan)}
    state |= {f"{KOHYA.replace('to_out_0', 'norm')}.{part}": torch.ones(SIDE) for part in ("diff", "alpha")}
    save_file(state, tmp_path / "a.safetensors")
    with caplog.at_level(logging.WARNING):
        found = lora_file.read(tmp_path / "a.safetensors")[0]
    assert not any(key.endswith("alpha") for key in found) and len(found) == 3
    assert (
        "a.safetensors: 2 layers without factors have an alpha, which is ignored, such as lora_te_nowh" in caplog.text
    )


def test_whole_kronecker_factors_with_an_alpha_of_no_meaning(tmp_path: Path, base_weight: Tensor) -> None:
    w1, w2 = torch.randn(10, 10).half(), (torch.randn(16, 16) * 0.01).half()
    state = {f"{KOHYA}.lokr_w1": w1, f"{KOHYA}.lokr_w2": w2, f"{KOHYA}.alpha": torch.tensor(9999999999.0).half()}
    path = tmp_path / "a.safetensors"
    save_file(state, path)
    expected = torch.kron(w1.float(), w2.float())
    torch.testing.assert_close(delta_of(path), expected)
    inspection = inspected(path)
    assert not inspection.facts["alphas"] and "not finite" not in dict(inspection.facts_table)
    convert(path, tmp_path / "b.safetensors", BASE, "lycoris")
    torch.testing.assert_close(delta_of(tmp_path / "b.safetensors"), expected)
    merge_into(BASE, [Source.parsed(str(path))], tmp_path / "model")
    merged = load_file(tmp_path / "model/unet/diffusion_pytorch_model.safetensors")[f"{MODULE}.weight"]
    torch.testing.assert_close(merged, (base_weight + expected).to(merged.dtype), atol=2e-3, rtol=2e-3)


def test_an_alpha_that_counts_must_be_a_number(tmp_path: Path) -> None:
    save_file({**factors(KOHYA, names="du"), f"{KOHYA}.alpha": torch.tensor(math.nan)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"{KOHYA}: alpha must be one finite number, got nan"):
        delta_of(tmp_path / "a.safetensors")


STRANGE = {
    "set_weight": "set_weight .which replaces the layer's weight. is not read",
    "reshape_weight": "reshape_weight .* is not read",
    "diff_m": "diff_m .a change of a block's modulation, .* is not read",
    "vera_lambda_b": "vera_lambda_b .of VeRA. is not read",
    "oft_diag": "oft_diag .of an OFT whose .* is not read",
    "oft_R.weight": "oft_R.weight .of PEFT's OFT, which turns inputs in a way that its .* is not read",
    "oft_R.default.weight": "oft_R.weight .of PEFT's OFT, .* is not read",
    "boft_R": "boft_R .of PEFT's BOFT. is not read",
    "ia3_l.default": r"ia3_l .of PEFT's \(IA\)\^3. is not read",
    "on_input": r"on_input .of \(IA\)\^3. is not read",
    "weight": "weight .a whole weight, no change of one. is not read",
    "new_part": "new_part is not read",
}


@pytest.mark.parametrize("layer", [KOHYA, "diffusion_model.blocks.0"], ids=["a layer", "no layer of the model"])
@table("part", STRANGE, quick=["weight", "new_part"])
def test_parts_that_are_not_read_are_named_by_every_tool(part: str, layer: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({**factors(KOHYA, names="du"), f"{layer}.{part}": torch.ones(SIDE, SIDE)}, path)
    for tool in tools(path, tmp_path):
        with pytest.raises(ValueError, match=f"{layer}: {STRANGE[part]}"):
            tool()
    assert not (tmp_path / "b.safetensors").exists() and not (tmp_path / "model").exists()
    assert re.match(STRANGE[part].partition(" is not")[0], dict(inspected(path).facts_table)["not read"])


def test_oft_of_four_axes_is_called_boft_by_every_tool(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({f"{KOHYA}.oft_blocks": torch.zeros(3, 20, 8, 8), f"{KOHYA}.alpha": torch.tensor(0.0)}, path)
    for tool in tools(path, tmp_path):
        with pytest.raises(ValueError, match=f"{KOHYA}: oft_blocks .of BOFT, as it has 4 axes. is not read"):
            tool()


def test_what_the_model_lacks_is_left_out_where_that_is_asked_for(tmp_path: Path, caplog: Any) -> None:
    """Whether anybody could read it or not."""
    path, denoiser = tmp_path / "a.safetensors", load_model(BASE).denoiser
    save_file({**factors(KOHYA, names="du"), "diffusion_model.blocks.0.diff_m": torch.ones(1, 6, 8)}, path)
    assert len(adapters_from(lora_file.read(path)[0], denoiser, ignore_unknown=True).adapters) == 1
    assert convert(path, tmp_path / "b.safetensors", BASE, "kohya", ignore_unknown=True) == 1
    assert merge_into(BASE, [Source.parsed(str(path))], tmp_path / "model", ignore_unknown=True) == 1
    said = "1 layer that the model does not have is left out: diffusion_model.blocks.0"
    assert [said in message for message in caplog.messages].count(True) == 3


def test_differences_alone_are_a_lora(tmp_path: Path, base_weight: Tensor) -> None:
    """They are applied and converted; there is nothing to train."""
    path, difference = tmp_path / "a.safetensors", torch.randn(SIDE, SIDE)
    save_file({f"{DIFFUSERS}.diff": difference}, path)
    assert convert(path, tmp_path / "b.safetensors", BASE, "comfyui") == 1
    for file in (path, tmp_path / "b.safetensors"):
        found = adapters_from(lora_file.read(file)[0], load_model(BASE).denoiser)
        assert found.adapters == {} and torch.equal(found.offsets[f"unet.{MODULE}.weight"], difference)
        assert dict(inspected(file).facts_table)["kind"] == "LoRA"
        merge_into(BASE, [Source.parsed(str(file))], tmp_path / "model", overwrite=True)
        merged = load_file(tmp_path / "model/unet/diffusion_pytorch_model.safetensors")[f"{MODULE}.weight"]
        torch.testing.assert_close(merged, (base_weight + difference).to(merged.dtype))
    with pytest.raises(ValueError, match="existing_lora: .* must hold an adapter to be trained, got differences of"):
        train_lora(BASE, torch.zeros(1, 4, 8, 8), ["x"], existing_lora=str(path))


def test_xlabs_files_are_diffusers_own_reading_of_them(tmp_path: Path) -> None:
    """Each module's delta, q, k and v of single blocks too, as diffusers takes the file."""
    pipe, generator = made("FluxPipeline"), torch.Generator().manual_seed(0)
    side = pipe.transformer.config.attention_head_dim * pipe.transformer.config.num_attention_heads
    sizes = {
        **{f"double_blocks.0.processor.qkv_lora{n}": (3 * side, side) for n in (1, 2)},
        **{f"double_blocks.0.processor.proj_lora{n}": (side, side) for n in (1, 2)},
        "single_blocks.0.processor.qkv_lora": (3 * side, side), "single_blocks.0.processor.proj_lora": (side, 5 * side),
    }  # fmt: skip
    state = {}
    for layer, (n_out, n_in) in sizes.items():
        state[f"{layer}.down.weight"] = torch.randn(2, n_in, generator=generator)
        state[f"{layer}.up.weight"] = torch.randn(n_out, 2, generator=generator)
    save_file(state, tmp_path / "a.safetensors")
    theirs = _convert_xlabs_flux_lora_to_diffusers(dict(state))
    found = adapters_from(lora_file.read(tmp_path / "a.safetensors")[0], load_model(pipe).denoiser).adapters
    assert {f"{path}.lora_A.weight" for path in found} == {key for key in theirs if "lora_A" in key}
    for path, adapter in found.items():
        expected = theirs[f"{path}.lora_B.weight"] @ theirs[f"{path}.lora_A.weight"]
        torch.testing.assert_close(adapter.merged(torch.zeros_like(expected)), expected, msg=path)

    resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", Cut(keep=0.999999))
    again = adapters_from(lora_file.read(tmp_path / "b.safetensors")[0], load_model(pipe).denoiser).adapters
    for path, adapter in again.items():
        expected = theirs[f"{path}.lora_B.weight"] @ theirs[f"{path}.lora_A.weight"]
        torch.testing.assert_close(adapter.merged(torch.zeros_like(expected)), expected, atol=1e-2, rtol=1e-2, msg=path)


@pytest.mark.parametrize(
    "layer",
    [
        f"pipe.dit.{MODULE}",
        f"model.diffusion_model.{MODULE}",
        f"unet.base_model.model.{MODULE}",
        f"unet._orig_mod.{MODULE}",
    ],
)
def test_prefixes_of_other_programs(layer: str, tmp_path: Path) -> None:
    save_file(
        {key.replace("weight", "default.weight"): t for key, t in factors(layer).items()}, tmp_path / "a.safetensors"
    )
    torch.testing.assert_close(delta_of(tmp_path / "a.safetensors"), UP @ DOWN, atol=1e-4, rtol=1e-4)
