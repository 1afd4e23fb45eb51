"""Which layers are packed, and what is said of them."""

import logging
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from flow_denoiser import FlowDenoiser
from hearing import Heard
from plain_net import Plain, packed_in
from torch import nn

from lorasmith.devices import has_int8, has_packed_products
from lorasmith.models.families.sd import StableDiffusion
from lorasmith.prepare.fsdp import shard
from lorasmith.prepare.int8_backward import quantize_backward
from lorasmith.prepare.prepack import pack
from lorasmith.prepare.quantize import LowBitLinear, low_bit_copy
from lorasmith.prepare.share import shared_copy

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not has_packed_products(CPU, torch.float32), reason="torch is built without oneDNN")


def net_of(*layers: nn.Module) -> Plain:
    """Behind a first layer, which stays as it is; frozen."""
    return Plain(nn.Sequential(nn.Conv2d(4, 4, 1), *layers).requires_grad_(False))


def test_the_first_convolution_is_plain_and_what_comes_out_has_its_channels_last() -> None:
    denoiser = Plain(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 1)).requires_grad_(False))
    net, x = denoiser.net, torch.randn(2, 4, 6, 5)
    before, weight = net(x), net[0].weight  # pyright: ignore[reportIndexIssue]
    pack(denoiser, "all")
    first = net[0](x)  # pyright: ignore[reportIndexIssue]
    assert packed_in(denoiser) == ["1"] and first.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(net[0].weight, weight) and weight.is_contiguous()  # pyright: ignore[reportIndexIssue]
    torch.testing.assert_close(net(x), before)


def test_a_weight_that_is_changed_is_plain_wherever_it_is_used() -> None:
    layers = [nn.Conv2d(4, 4, 1) for _ in range(3)]
    layers[1].weight = layers[2].weight
    denoiser = net_of(*layers)
    heard = Heard()
    assert pack(denoiser, "all", ["net.2.weight"], heard) == 1 and packed_in(denoiser) == ["1"]
    assert heard.reports == [("packing layers", 1, ""), 1, "done"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_log_says_what_the_blocks_take(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    if not has_packed_products(CPU, dtype):
        pytest.skip("the processor has no bf16")
    caplog.set_level(logging.DEBUG, "lorasmith")
    layers = (nn.Linear(512, 1024), nn.Conv2d(128, 256, 3), nn.Conv2d(64, 128, 3, stride=2), nn.Conv2d(256, 512, 1))
    numbers = sum(layer.weight.numel() for layer in layers)  # of sizes that fill their blocks
    assert pack(Plain(net_of(*layers).net.to(dtype)), "all") == 4
    size = 2 * numbers * dtype.itemsize / 1e6
    assert [record.getMessage() for record in caplog.records] == [
        f"4 layers prepacked for the CPU: {size:.1f} MB (pack)"
    ]
    caplog.clear()
    assert pack(net_of(), "all") == pack(net_of(*layers), "none") == 0 and not caplog.records


class Own(nn.Linear):
    """A class of its own may have a forward pass of its own."""


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


def with_a_hook() -> nn.Module:
    layer = frozen(nn.Linear(4, 4))

    def doubled(layer: nn.Module, args: Any, y: Any) -> Any:
        return 2 * y

    layer.register_forward_hook(doubled)
    return layer


def with_a_forward() -> nn.Module:
    layer = frozen(nn.Linear(4, 4))
    layer.forward = torch.neg
    return layer


LEFT: dict[str, Callable[[], nn.Module]] = {
    "float64": lambda: frozen(nn.Linear(4, 4).double()),
    "float16": lambda: frozen(nn.Linear(4, 4).half()),
    "meta": lambda: frozen(nn.Linear(4, 4, device="meta")),
    "trained": lambda: nn.Linear(4, 4),
    "empty": lambda: frozen(nn.Linear(0, 4)),
    "subclass": lambda: frozen(Own(4, 4)),
    "parametrised": lambda: frozen(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
    "hooked": with_a_hook,
    "own forward": with_a_forward,
    "reflect": lambda: frozen(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
    "same": lambda: frozen(nn.Conv2d(4, 4, 3, padding="same")),
    "Conv1d": lambda: frozen(nn.Conv1d(4, 4, 1)),
    "Conv3d": lambda: frozen(nn.Conv3d(4, 4, 1)),
    "ConvTranspose2d": lambda: frozen(nn.ConvTranspose2d(4, 4, 1)),
    "Embedding": lambda: frozen(nn.Embedding(4, 4)),
}


@pytest.mark.parametrize("layer", LEFT.values(), ids=list(LEFT))
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_is_no_plain_frozen_layer_stays(layer: Callable[[], nn.Module]) -> None:
    denoiser, made = net_of(), layer()
    cast(nn.Sequential, denoiser.net).append(made)
    before = type(made), sorted(vars(made))
    assert pack(denoiser, "all") == 0 and (type(made), sorted(vars(made))) == before


def test_layers_in_few_bits_stay_and_convolutions_are_packed(family: StableDiffusion) -> None:
    pytest.importorskip("torchao")
    copy = low_bit_copy(family.denoiser, "int8", CPU, torch.float32)
    low = [path for path, m in copy.unet.named_modules() if isinstance(m, LowBitLinear)]
    pack(copy, "all")
    modules = dict(copy.unet.named_modules())
    assert low and all(type(modules[path]) is LowBitLinear for path in low)
    assert "down_blocks.0.resnets.0.conv1" in packed_in(copy)


@pytest.mark.skipif(not has_int8(CPU), reason="int8 products overflow on this processor")
def test_layers_with_int8_gradients_stay_and_convolutions_are_packed(family: StableDiffusion) -> None:
    pytest.importorskip("torchao")
    copy = shared_copy(family.denoiser, CPU, torch.float32)
    linear = {path for path, m in copy.unet.named_modules() if type(m) is nn.Linear}
    quantize_backward(copy, CPU)
    pack(copy, "all")
    assert not linear & set(packed_in(copy)) and "down_blocks.0.resnets.0.conv1" in packed_in(copy)


def test_shared_out_weights_stay(flow_denoiser: FlowDenoiser) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        copy = shared_copy(flow_denoiser)
        shard(copy, CPU)
        assert pack(copy, "all") == 0
    finally:
        dist.destroy_process_group()
