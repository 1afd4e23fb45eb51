"""LoRAs in Tucker's form, made by LyCORIS: read with the same delta, converted, refused where a core fits nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorasmith.adapters.base import Layer
from lorasmith.adapters.registry import adapter_from_file
from lorasmith.demo import BASE
from lorasmith.formats import lora_file
from lorasmith.formats.keys import by_layer
from lorasmith.formats.read import adapters_from
from lorasmith.models.load import load_model
from lorasmith.tools.convert import convert

KINDS = pytest.mark.parametrize("kind", [LoConModule, LohaModule, LokrModule])
CORE = r"lora_mid|_t\d"


def made(kind: Any, conv: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """What LyCORIS saves of a layer, and its delta."""
    theirs = kind("layer", conv, lora_dim=2, alpha=1, use_tucker=True)
    generator = torch.Generator().manual_seed(2)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    shape: Any = conv.weight.shape
    delta = theirs.get_diff_weight(shape=shape)[0] if kind is LoConModule else theirs.get_weight(shape)
    return {key: tensor.detach().clone() for key, tensor in theirs.state_dict().items()}, delta.detach().view(shape)


@KINDS
@pytest.mark.parametrize("conv", [nn.Conv2d(24, 30, 3), nn.Conv1d(24, 30, 5), nn.Conv3d(24, 30, (1, 3, 3))], ids=str)
def test_the_delta_is_lycoris_s(tmp_path: Path, kind: Any, conv: Any) -> None:
    state, delta = made(kind, conv)
    assert any(key.startswith(("lora_mid", "hada_t", "lokr_t")) for key in state)
    save_file({f"lora_unet_layer.{key}": tensor for key, tensor in state.items()}, tmp_path / "a.safetensors")
    ((_, parts),) = by_layer(lora_file.read(tmp_path / "a.safetensors")[0]).items()
    adapter = adapter_from_file(Layer.of("layer", conv), parts)
    assert (adapter.rank, adapter.alpha) == (2, 1)
    torch.testing.assert_close(adapter.merged(torch.zeros(conv.weight.shape)), delta, rtol=1e-5, atol=1e-6)


@KINDS
def test_converted(tmp_path: Path, kind: Any) -> None:
    """Beside a linear layer, in a file of 16 bits, whose core is one too."""
    denoiser, path = load_model(BASE).denoiser, "unet.down_blocks.0.resnets.0.conv1"
    conv = denoiser.nets["unet"].get_submodule(path.removeprefix("unet."))
    state, _ = made(kind, conv)
    name = f"lora_{path.replace('.', '_')}"
    other = "lora_unet_time_embedding_linear_1"
    size: Any = denoiser.nets["unet"].get_submodule("time_embedding.linear_1").weight
    linear = {"lora_down.weight": torch.randn(2, size.shape[1]), "lora_up.weight": torch.randn(size.shape[0], 2)}
    lora = {f"{name}.{key}": t for key, t in state.items()} | {f"{other}.{key}": t for key, t in linear.items()}
    save_file({key: tensor.half() for key, tensor in lora.items()}, tmp_path / "a.safetensors")
    expected = adapters_from(lora_file.read(tmp_path / "a.safetensors")[0], denoiser)
    assert convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", BASE, "comfyui") == 2
    found = adapters_from(lora_file.read(tmp_path / "b.safetensors")[0], denoiser)
    assert not any(core in key for key in load_file(tmp_path / "b.safetensors") for core in ("mid", "_t1", "_t2"))
    for layer, adapter in expected.adapters.items():
        weight: Any = denoiser.nets["unet"].get_submodule(layer.removeprefix("unet.")).weight
        torch.testing.assert_close(found.adapters[layer].merged(weight), adapter.merged(weight), rtol=0, atol=0)


@KINDS
@pytest.mark.parametrize("fault", ["another rank", "no kernel", "whole numbers", "no up"])
def test_a_core_that_fits_nothing_is_refused(tmp_path: Path, kind: Any, fault: str) -> None:
    conv: Any = nn.Conv2d(24, 30, 3)
    state, _ = made(kind, conv)
    core = next(key for key in state if key.startswith(("lora_mid", "hada_t", "lokr_t")))
    up = {"lora_mid.weight": "lora_up.weight", "hada_t1": "hada_w1_a", "lokr_t2": "lokr_w2_a"}[core]
    if fault == "no up":
        del state[up]
    else:
        state[core] = {
            "another rank": torch.ones(4, 3, 3, 3), "no kernel": torch.ones(2, 2),
            "whole numbers": torch.ones(2, 2, 3, 3, dtype=torch.int32),
        }[fault]  # fmt: skip
    save_file({f"lora_unet_layer.{key}": tensor for key, tensor in state.items()}, tmp_path / "a.safetensors")
    ((_, parts),) = by_layer(lora_file.read(tmp_path / "a.safetensors")[0]).items()
    with pytest.raises(ValueError, match=f"({CORE}).* (is|are) not read"):
        adapter_from_file(Layer.of("layer", conv), parts)
