"""Weights in few bits in a diffusers folder: every tool reads them as the formula says, or refuses them by name."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import made
from torch import Tensor

from lorasmith.models.load import load_model
from lorasmith.tools.convert import convert
from lorasmith.tools.extract import extract
from lorasmith.tools.inspect import inspected
from lorasmith.tools.merge import Source
from lorasmith.tools.merge_into_model import merge_into
from lorasmith.tools.svd import Cut

LAYER = "transformer_blocks.0.attn.to_q"
WEIGHT, SIDE = f"{LAYER}.weight", 32
FP8 = torch.float8_e4m3fn
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "plain"
    made("FluxPipeline").save_pretrained(folder)
    return folder


def net_file(folder: Path) -> Path:
    (file,) = (folder / "transformer").glob("*.safetensors")
    return file


def variant(plain: Path, folder: Path, change: State | None, config: Any = None) -> Path:
    """The folder with another weight in the place of the layer's; None: without the transformer's safetensors file."""
    shutil.copytree(plain, folder)
    file = net_file(folder)
    state = {key: tensor.clone() for key, tensor in load_file(file).items() if key != WEIGHT}
    file.unlink()
    if change is not None:
        save_file(state | change, file)
    path = folder / "transformer" / "config.json"
    if config is not None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return folder


def lora(path: Path, **parts: Tensor) -> tuple[Path, Tensor]:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, SIDE, generator=generator), torch.randn(SIDE, 2, generator=generator) / 99
    state = {"lora_A.weight": down, "lora_B.weight": up, **parts}
    save_file({f"transformer.{LAYER}.{part}": tensor for part, tensor in state.items()}, path)
    return path, up @ down


def scaled(plain: Path) -> dict[str, State]:
    weight = load_file(net_file(plain))[WEIGHT]
    whole, rows = weight.abs().max() / 448, weight.abs().amax(1, keepdim=True)
    return {
        "weight_scale": {WEIGHT: (weight / whole).to(FP8), f"{LAYER}.weight_scale": whole},
        "scale_weight by row": {WEIGHT: (weight / rows * 448).to(FP8), f"{LAYER}.scale_weight": rows / 448},
        "int8": {WEIGHT: (weight / rows * 127).round().to(torch.int8), f"{LAYER}.weight_scale": rows / 127},
        "fp8 without a scale": {WEIGHT: weight.to(FP8)},
    }


@pytest.mark.parametrize("kind", ["weight_scale", "scale_weight by row", "int8", "fp8 without a scale"])
def test_every_tool_takes_the_stored_number_times_its_scale(kind: str, plain: Path, tmp_path: Path) -> None:
    stored = scaled(plain)[kind]
    base = variant(plain, tmp_path / "base", stored)
    (scale,) = [tensor for key, tensor in stored.items() if "scale" in key] or [torch.tensor(1.0)]
    weight, rest = stored[WEIGHT].float() * scale, load_file(net_file(plain))
    trained = load_model(base).denoiser.nets["transformer"].state_dict()
    for key, tensor in (rest | {WEIGHT: weight}).items():
        torch.testing.assert_close(trained[key], tensor.to(trained[key].dtype), rtol=0, atol=0)

    path, delta = lora(tmp_path / "lora.safetensors")
    assert merge_into(base, [Source.parsed(str(path))], tmp_path / "merged") == 1
    merged = load_file(net_file(tmp_path / "merged"))
    own = next((tensor for key, tensor in merged.items() if "scale" in key), torch.tensor(1.0))
    step = 2**-4 * (weight + delta).abs() + (weight + delta).abs().max() / 200
    reach = (127 if kind == "int8" else 448) * own
    held = (weight + delta).clamp(-reach, reach)
    assert ((merged[WEIGHT].float() * own - held).abs() <= step).all()
    assert (held - weight - delta).square().sum() <= 0.1 * delta.square().sum()

    tuned = variant(plain, tmp_path / "tuned", {WEIGHT: weight + delta})
    for one, other, sign in ((base, tuned, 1), (tuned, base, -1)):
        extract(one, other, tmp_path / "x.safetensors", Cut(rank=2), dtype=torch.float32, overwrite=True)
        found = load_file(tmp_path / "x.safetensors")
        up, down = (found[f"transformer.{LAYER}.lora_{name}.weight"] for name in ("up", "down"))
        torch.testing.assert_close(up @ down, sign * delta, rtol=1e-3, atol=1e-4)

    lengths, _ = lora(tmp_path / "dora.safetensors", dora_scale=torch.ones(SIDE, 1))
    convert(lengths, tmp_path / "c.safetensors", base, "comfyui")
    (comfyui,) = (tensor for key, tensor in load_file(tmp_path / "c.safetensors").items() if "dora_scale" in key)
    expected = weight.norm(dim=1, keepdim=True) / (weight + delta).norm(dim=1, keepdim=True)
    torch.testing.assert_close(comfyui[:SIDE].float(), expected, rtol=1e-2, atol=1e-2)
    says = dict(inspected(base).facts_table)
    assert kind == "fp8 without a scale" or says["weights"].startswith("transformer: 1 scaled, in ")


NF4 = {WEIGHT: torch.zeros(512, 1, dtype=torch.uint8), f"{WEIGHT}.absmax": torch.ones(16)}
BLOCKS = {WEIGHT: torch.zeros(SIDE, SIDE).to(FP8), f"{LAYER}.weight_scale": torch.ones(SIDE, 1, dtype=torch.uint8)}
HALVES = {WEIGHT: torch.zeros(SIDE, 16, dtype=torch.uint8), f"{LAYER}.weight_scale": torch.ones(SIDE, 2).to(FP8)}
INT8 = {WEIGHT: torch.zeros(SIDE, SIDE, dtype=torch.int8)}
PACKED: dict[str, tuple[State | None, Any, str]] = {
    "nf4": (NF4, None, "bitsandbytes' 4 bits with"),
    "nf4 stated": (NF4, {"quant_method": "bitsandbytes"}, "bitsandbytes as quantization_config in"),
    "int8 of bitsandbytes": ({**INT8, f"{LAYER}.SCB": torch.ones(SIDE)}, None, "bitsandbytes' int8 with"),
    "torchao": ({f"{WEIGHT}_x": torch.zeros(1)}, {"quant_method": "torchao"}, "torchao as quantization_config in"),
    "quanto": ({f"{WEIGHT}._data": INT8[WEIGHT], f"{WEIGHT}._scale": torch.ones(SIDE, 1)}, None, "quanto with"),
    "MXFP8": (BLOCKS, None, "scales of blocks"),
    "NVFP4": ({**HALVES, f"{LAYER}.weight_scale_2": torch.tensor(1.0)}, None, "NVFP4 with"),
    "fp8 stated": ({WEIGHT: torch.zeros(SIDE, SIDE).to(FP8)}, {"quant_method": "fp8"}, "fp8 as quantization_config in"),
}  # fmt: skip


def tools(folder: Path, plain: Path, tmp_path: Path) -> dict[str, Callable[[], Any]]:
    """What needs the layer's weight; `convert` does for DoRA alone."""
    out, cut = tmp_path / "out.safetensors", Cut(rank=1)
    path, dora = (
        lora(tmp_path / "a.safetensors")[0],
        lora(tmp_path / "d.safetensors", dora_scale=torch.ones(SIDE, 1))[0],
    )
    return {
        "train, sample": lambda: load_model(folder),
        "merge": lambda: merge_into(folder, [Source.parsed(str(path))], tmp_path / "out"),
        "extract from": lambda: extract(folder, plain, out, cut, dtype=torch.float32),
        "extract": lambda: extract(plain, folder, out, cut, dtype=torch.float32),
        "convert": lambda: convert(dora, out, folder, "comfyui"),
    }


@pytest.mark.parametrize("kind", PACKED)
def test_every_tool_refuses_the_others_by_name(kind: str, plain: Path, tmp_path: Path) -> None:
    change, config, name = PACKED[kind]
    folder = variant(plain, tmp_path / "model", change, config)
    message = f"{re.escape(str(net_file(folder)))} must hold plain weights, .*, got {re.escape(name.strip())}"
    for action in tools(folder, plain, tmp_path).values():
        with pytest.raises(ValueError, match=message) as raised:
            action()
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "out.safetensors").exists() and not (tmp_path / "out").exists()
    assert (
        f"transformer: quantised and not readable here: {name}".rstrip()
        in dict(inspected(folder).facts_table)["weights"]
    )


def test_every_tool_refuses_gguf_by_name(plain: Path, tmp_path: Path) -> None:
    folder = variant(plain, tmp_path / "model", None)
    (folder / "transformer" / "flux-Q4.gguf").write_bytes(b"GGUF")
    for action in tools(folder, plain, tmp_path).values():
        with pytest.raises(
            ValueError, match="/transformer holds flux-Q4.gguf, which is a GGUF file, which cannot be read"
        ):
            action()
    assert "transformer holds flux-Q4.gguf" in dict(inspected(folder).facts_table)["weights"]
