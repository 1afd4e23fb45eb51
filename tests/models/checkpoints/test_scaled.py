"""Weights with scales: every place where a scale may be, every tool, against stored number times scale."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import lorasmith
from hypothesis import given, settings
from hypothesis import strategies as st
from originals import original
from safetensors.torch import load_file, save_file
from tiny import made
from tiny_nets import net_of
from torch import Tensor

from lorasmith.models.checkpoints.scaled import Quantisation, StoredWeight, dequantised, requantised
from lorasmith.models.load import load_model
from lorasmith.storage.safetensors_header import Header
from lorasmith.tools.extract import extract
from lorasmith.tools.inspect import inspected
from lorasmith.tools.merge import Source
from lorasmith.tools.merge_into_model import merge_into
from lorasmith.tools.svd import Cut

State = dict[str, Tensor]
PREFIX = "model.diffusion_model."
LAYER = f"{PREFIX}double_blocks.0.img_attn.proj"
FP8, FP8_WIDE = torch.float8_e4m3fn, torch.float8_e5m2


def original_flux() -> State:
    net = net_of("Flux.1", attention_head_dim=128, num_attention_heads=1, axes_dims_rope=(16, 56, 56))
    return {f"{PREFIX}{key}": tensor.clone() for key, tensor in original(net).items()}


PLAIN = original_flux()
WEIGHTS = [key for key, tensor in PLAIN.items() if key.endswith(".weight") and tensor.ndim == 2]


def scaled(name: str, dtype: torch.dtype = FP8, *, by_row: bool = False, extra: State | None = None) -> State:
    """Every matrix in 8 bits; name: a scale's, after the module's."""
    state = dict(PLAIN)
    for key in WEIGHTS:
        module, largest = key.removesuffix(".weight"), 127 if dtype == torch.int8 else torch.finfo(dtype).max
        scale = (PLAIN[key].abs().amax(1, keepdim=True) if by_row else PLAIN[key].abs().max()) / largest
        numbers = PLAIN[key] / scale
        state[key] = (numbers.round() if dtype == torch.int8 else numbers).to(dtype)
        state[module + name] = scale.clone()
        state |= {module + leaf: tensor.clone() for leaf, tensor in (extra or {}).items()}
    return state


def comfyui(note: Any) -> Tensor:
    return torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)


NOTE = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
INPUT = {".scale_input": torch.tensor(3.0)}
PLACES: dict[str, Callable[[], State]] = {
    "scale_weight": lambda: scaled(".scale_weight", extra=INPUT) | {"scaled_fp8": torch.zeros(2, dtype=FP8)},
    "weight_scale": lambda: scaled(
        ".weight_scale", extra={".input_scale": torch.tensor(3.0), ".comfy_quant": comfyui(NOTE)}
    ),
    "weight_scale by row": lambda: scaled(".weight_scale", by_row=True),
    "weight_scale_inv": lambda: scaled(".weight_scale_inv", FP8_WIDE),
    "scale": lambda: scaled(".scale"),
    "weight.scale": lambda: scaled(".weight.scale"),
    "int8": lambda: scaled(".weight_scale", torch.int8, by_row=True),
}
places = pytest.mark.parametrize("place", PLACES)


def formula(state: State) -> State:
    """What the weights are: stored number times scale; nothing that is no weight."""
    found = {}
    for key in PLAIN:
        module = key.removesuffix(".weight")
        names = (".scale_weight", ".weight_scale", ".weight_scale_inv", ".weight.scale", ".scale")
        scales = [state[module + name] for name in names if module + name in state] if key in WEIGHTS else []
        found[key] = state[key].float() * (scales[0] if scales else 1.0)
    return found


def saved(path: Path, state: State, metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, path, metadata)
    return path


def lora(path: Path, size: float = 1.0) -> tuple[Source, Tensor]:
    """One for a layer, and its delta."""
    generator, module = torch.Generator().manual_seed(0), LAYER.removeprefix(PREFIX).replace(".", "_")
    down, up = torch.randn(2, 128, generator=generator), torch.randn(128, 2, generator=generator) * size
    state = {f"lora_unet_{module}.lora_down.weight": down, f"lora_unet_{module}.lora_up.weight": up}
    state[f"lora_unet_{module}.alpha"] = torch.tensor(2.0)
    return Source.parsed(str(saved(path, state))), up @ down


@places
def test_training_loads_stored_numbers_times_their_scales(place: str, tmp_path: Path) -> None:
    state = PLACES[place]()
    family = load_model(saved(tmp_path / "net.safetensors", state))
    plain = load_model(saved(tmp_path / "plain.safetensors", formula(state)))
    found, expected = (f.denoiser.nets["transformer"].state_dict() for f in (family, plain))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor.bfloat16(), rtol=0, atol=0)


@places
@pytest.mark.parametrize("size", [0.002, 2.0], ids=["fits", "needs a greater scale"])
def test_merging_adds_to_the_weight(place: str, size: float, tmp_path: Path) -> None:
    state = PLACES[place]()
    source, delta = lora(tmp_path / "lora.safetensors", size)
    saved(tmp_path / "net.safetensors", state)
    assert merge_into(tmp_path / "net.safetensors", [source], tmp_path / "merged.safetensors") == 1
    merged = load_file(tmp_path / "merged.safetensors")
    before, after = formula(state), formula(merged)
    assert {key: t.dtype for key, t in merged.items()} == {key: t.dtype for key, t in state.items()}
    wanted, dtype = before[f"{LAYER}.weight"] + delta, state[f"{LAYER}.weight"].dtype
    steps = {FP8: 2**-4, FP8_WIDE: 2**-3, torch.int8: 1.0}[dtype]  # half a step, of a number or of the largest
    most = wanted.abs().amax(1, keepdim=True) / (127 if dtype == torch.int8 else 2**9)
    assert (
        (after[f"{LAYER}.weight"] - wanted).abs() <= (most if dtype == torch.int8 else steps * wanted.abs() + most)
    ).all()
    for key in PLAIN.keys() - {f"{LAYER}.weight"}:
        assert torch.equal(before[key], after[key]), key


def test_merging_into_a_folder_adds_to_the_weight(tmp_path: Path) -> None:
    made("FluxPipeline").save_pretrained(tmp_path / "model")
    (file,) = (tmp_path / "model" / "transformer").glob("*.safetensors")
    state, name = load_file(file), "transformer_blocks.0.attn.to_q"
    scale = state[f"{name}.weight"].abs().max() / 448
    state[f"{name}.weight"], state[f"{name}.weight_scale"] = (state[f"{name}.weight"] / scale).to(FP8), scale
    file.unlink()
    saved(file, state)
    down, up = torch.randn(2, 32), torch.randn(32, 2) * 0.1
    lora = {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    source = Source.parsed(str(saved(tmp_path / "lora.safetensors", lora)))
    assert merge_into(tmp_path / "model", [source], tmp_path / "out") == 1
    merged = load_file(tmp_path / "out" / "transformer" / file.name)
    wanted = state[f"{name}.weight"].float() * scale + up @ down
    found = merged[f"{name}.weight"].float() * merged[f"{name}.weight_scale"]
    torch.testing.assert_close(found, wanted, rtol=2**-4, atol=float(wanted.abs().max()) / 2**9)
    assert all(torch.equal(merged[key], tensor) for key, tensor in state.items() if name not in key)


@places
def test_extraction_compares_what_is_stored_times_its_scale(place: str, tmp_path: Path) -> None:
    state, delta = PLACES[place](), lora(tmp_path / "lora.safetensors")[1]
    tuned = formula(state)
    tuned[f"{LAYER}.weight"] += delta
    one, other = saved(tmp_path / "base.safetensors", state), saved(tmp_path / "tuned.safetensors", tuned)
    for base, after, sign in ((one, other, 1.0), (other, one, -1.0)):
        extract(base, after, tmp_path / "out.safetensors", Cut(rank=2), dtype=torch.float32, overwrite=True)
        found = load_file(tmp_path / "out.safetensors")
        (name,) = {key.rpartition(".lora_")[0] for key in found if ".lora_" in key}
        assert len(found) == 3
        up, down = found[f"{name}.lora_up.weight"], found[f"{name}.lora_down.weight"]
        torch.testing.assert_close(up @ down, sign * delta, rtol=1e-3, atol=1e-3)


@places
def test_inspect_says_that_they_are_scaled(place: str, tmp_path: Path) -> None:
    state = PLACES[place]()
    facts = dict(inspected(saved(tmp_path / "net.safetensors", state)).facts_table)
    assert facts["weights"].startswith(f"{len(WEIGHTS)} scaled, in ")


def test_convert_reads_names_beside_a_scaled_model(tmp_path: Path) -> None:
    saved(tmp_path / "net.safetensors", PLACES["scale_weight"]())
    lora(tmp_path / "lora.safetensors")
    given = (
        "convert",
        "lora.safetensors",
        "--model",
        "net.safetensors",
        "--to",
        "diffusers",
        "--output",
        "b.safetensors",
    )
    ended = lorasmith(tmp_path, *given)
    assert ended.code == 0, ended.err
    assert "transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight" in load_file(tmp_path / "b.safetensors")


def test_what_rounding_loses_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path / "net.safetensors", {key: t.to(FP8) if key in WEIGHTS else t for key, t in PLAIN.items()})
    for size, message, changed in (
        (1e-6, "all of the LoRA is lost to rounding, as its changes are too small for float8_e4m3fn", 0),
        (0.01, r"rounding to float8_e4m3fn adds an error of \d+ % of the change itself", 1),
        (30.0, "", 1),
    ):  # fmt: skip
        caplog.clear()
        source, delta = lora(tmp_path / "lora.safetensors", size)
        with caplog.at_level(logging.WARNING, "lorasmith"):
            number = merge_into(tmp_path / "net.safetensors", [source], tmp_path / "out.safetensors", overwrite=True)
        assert number == changed and bool(caplog.text) == bool(message)
        if message:
            assert re.search(message, caplog.text)


NVFP4 = scaled(".weight_scale", extra={".weight_scale_2": torch.tensor(1.0)})
FIRST = WEIGHTS[0].removesuffix(".weight")
PACKED: dict[str, tuple[State, dict[str, str], str]] = {
    "NVFP4": (NVFP4, {}, "NVFP4 with"),
    "nf4": (
        {**PLAIN, WEIGHTS[0]: torch.zeros(8, 1, dtype=torch.uint8), f"{WEIGHTS[0]}.absmax": torch.ones(1)}
        | {f"{WEIGHTS[0]}.quant_map": torch.ones(16)}, {}, "bitsandbytes' 4 bits with",
    ),
    "int8 of bitsandbytes": (
        {**PLAIN, WEIGHTS[0]: PLAIN[WEIGHTS[0]].to(torch.int8), f"{FIRST}.SCB": torch.ones(2)}, {},
        "bitsandbytes' int8",
    ),
    "quanto": ({**PLAIN, f"{WEIGHTS[0]}._data": torch.ones(2, 2, dtype=torch.int8)}, {}, "quanto with"),
    "torchao": ({**PLAIN, f"{FIRST}._weight_qdata": torch.ones(2, 2, dtype=torch.int8)}, {}, "torchao with"),
    "GPTQ": ({**PLAIN, f"{FIRST}.qweight": torch.ones(2, 2, dtype=torch.int32)}, {}, "GPTQ or AWQ with"),
    "no scale": ({**PLAIN, WEIGHTS[0]: PLAIN[WEIGHTS[0]].to(torch.int8)}, {}, "in I8 without a scale"),
    "blocks": (
        {**scaled(".weight_scale"), f"{FIRST}.weight_scale": torch.ones(2, 2)}, {},
        r"scales of blocks: .* F32 \[2, 2\] for",
    ),
    "two scales": ({**scaled(".weight_scale"), f"{FIRST}.scale_weight": torch.tensor(2.0)}, {}, "two scales of"),
    "another format": (
        {**scaled(".weight_scale"), f"{FIRST}.comfy_quant": comfyui({"format": "mxfp8"})}, {}, "ComfyUI's mxfp8 of",
    ),
    "an option": (
        {**scaled(".weight_scale"), f"{FIRST}.comfy_quant": comfyui({**NOTE, "convrot": True})}, {}, "convrot",
    ),
    "metadata": (PLAIN, {"quantization_config": json.dumps({"quant_method": "nunchaku"})}, "nunchaku as quantiz"),
    "ComfyUI's metadata": (
        scaled(".weight_scale"), {"_quantization_metadata": json.dumps({"layers": {FIRST: {"format": "nvfp4"}}})},
        "ComfyUI's nvfp4 of",
    ),
    "other metadata": ({**PLAIN, WEIGHTS[0]: PLAIN[WEIGHTS[0]].to(FP8)}, {"quant_scale": "0.5"}, "quant_scale = 0.5"),
    "a scale elsewhere": ({**PLAIN, "other.weight_scale": torch.tensor(2.0)}, {}, "other.weight_scale without its"),
    "a scale that metadata promise": (
        {**PLAIN, WEIGHTS[0]: PLAIN[WEIGHTS[0]].to(FP8)},
        {"_quantization_metadata": json.dumps({"layers": {FIRST: {"format": "float8_e4m3fn"}}})},
        "without its weight_scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PACKED)
def test_what_is_packed_otherwise_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    state, metadata, message = PACKED[kind]
    path, plain = saved(tmp_path / "net.safetensors", state, metadata), saved(tmp_path / "plain.safetensors", PLAIN)
    source, output = lora(tmp_path / "lora.safetensors")[0], tmp_path / "out.safetensors"
    for action in (
        lambda: load_model(path),
        lambda: merge_into(path, [source], output),
        lambda: extract(path, plain, output, Cut(rank=1), dtype=torch.float32),
        lambda: extract(plain, path, output, Cut(rank=1), dtype=torch.float32),
    ):
        with pytest.raises(ValueError, match=f"net.safetensors must hold plain weights, .* got .*{message}") as raised:
            action()
        assert "\n" not in str(raised.value) and not output.exists()
    assert "quantised and not readable here" in dict(inspected(path).facts_table)["weights"]


def test_comfyui_s_metadata_that_agree_are_read(tmp_path: Path) -> None:
    layers = {key.removeprefix(PREFIX).removesuffix(".weight"): NOTE for key in WEIGHTS}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    path = saved(tmp_path / "net.safetensors", scaled(".weight_scale"), metadata)
    found = Quantisation.of(Header.of(path))
    assert found.refused is None and found.scales.keys() == set(WEIGHTS)


def test_the_scale_of_a_norm_is_no_scale_of_a_weight(tmp_path: Path) -> None:
    state = {"norm.scale": torch.ones(4), "norm.weight": torch.ones(4), "logit_scale": torch.ones(1)}
    found = Quantisation.of(Header.of(saved(tmp_path / "net.safetensors", state)))
    assert not found.scales and not found.beside and found.refused is None


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32 - 1), growth=st.floats(0.1, 50), by_row=st.booleans(),
    dtype=st.sampled_from([FP8, FP8_WIDE, torch.int8]), kept=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_a_weight_comes_back_to_within_half_a_step(
    seed: int, growth: float, by_row: bool, dtype: torch.dtype, kept: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 7, generator=generator)
    largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = (torch.ones(5, 1) if by_row else torch.tensor(1.0)).to(kept) * (weight.abs().max() / largest).to(kept)
    numbers, new = requantised(weight * growth, dtype, scale)
    assert numbers.dtype == dtype and new.shape == scale.shape and new.dtype == kept
    found, reach = dequantised(numbers, new), new.float().max() * largest
    step = {FP8: 2**-4, FP8_WIDE: 2**-3, torch.int8: 0.0}[dtype]
    allowed = step * (weight * growth).abs() + reach * (2**-8 if dtype == torch.int8 else 2**-9) + reach * 2**-8
    assert ((found - weight * growth).abs() <= allowed).all()
    if growth < 0.9:
        assert torch.equal(new, scale)


@pytest.mark.parametrize("dtype", [FP8, FP8_WIDE])
@pytest.mark.parametrize("by_row", [False, True])
def test_a_scale_that_grows_keeps_what_has_not_changed(dtype: torch.dtype, by_row: bool) -> None:
    """One number outgrows the scale; all others, but for the smallest, are still what they were."""
    values = torch.randn(6, 32).mul(100).clamp(-440, 440)
    numbers = torch.where(values.abs() < 1, 0, values).to(dtype)
    scale = torch.rand(6, 1) + 0.5 if by_row else torch.tensor(0.37)
    weight = dequantised(numbers, scale)
    weight[2, 3] = 3.1 * torch.finfo(dtype).max * float(scale.flatten()[2 if by_row else 0])
    stored, new = requantised(weight, dtype, scale)
    assert torch.equal(new[:2], scale[:2]) if by_row else float(new) == 4 * float(scale)
    kept = torch.ones(6, 32, dtype=torch.bool)
    kept[2, 3] = False
    assert torch.equal(dequantised(stored, new)[kept], weight[kept])
    assert float(dequantised(stored, new)[2, 3]) == pytest.approx(float(weight[2, 3]), rel=2**-3)


@pytest.mark.parametrize(
    ("dtype", "largest", "half"), [(FP8, 448, 16), (FP8_WIDE, 57344, 4096), (torch.int8, 127, 0.5)]
)
def test_a_scale_stays_where_rounding_is_all_that_is_lost(dtype: torch.dtype, largest: float, half: float) -> None:
    for over, stays in ((0.0, True), (0.99, True), (1.01, False)):
        stored, new = requantised(torch.tensor([[largest + over * half, 1.0]]), dtype, torch.tensor(1.0))
        assert (float(new) == 1.0) == stays
        if stays:
            assert float(stored[0, 0]) == largest


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32 - 1), size=st.floats(0.01, 4), by_row=st.booleans(),
    dtype=st.sampled_from([FP8, FP8_WIDE, torch.int8]),
)  # fmt: skip
def test_a_scale_stays_unless_it_cuts_off_a_tenth_of_the_change(
    seed: int, size: float, by_row: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, change = torch.randn(2, 8, 12, generator=generator).unbind()
    change = change * size
    largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = (weight.abs().amax(1, keepdim=True) if by_row else weight.abs().max()) / largest
    stored = StoredWeight(requantised(weight, dtype, scale)[0], scale)
    value = stored.value + change
    after = stored.holding(value)
    assert after.scale is not None
    out_of_reach = (value - value.clamp(-largest * scale, largest * scale)).square().sum() / change.square().sum()
    if out_of_reach > 0.1:
        assert (after.scale > scale).any()
        assert (after.value - value).norm() < 0.2 * value.norm()
    elif (after.value - value).square().sum() <= 0.1 * change.square().sum():
        assert torch.equal(after.scale, scale)
