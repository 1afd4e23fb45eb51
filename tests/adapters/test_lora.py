"""What LoRA has of its own: PEFT's layer, Kaiming's start, kohya's names, matrices for kernels of 1."""

from typing import Any

import peft
import pytest
import torch
from torch import nn

from lorasmith.adapters.algorithms import LoRA
from lorasmith.adapters.base import Layer
from lorasmith.adapters.registry import adapter_from_file
from lorasmith.ops.dense import DenseConv, DenseLinear
from lorasmith.ops.low_rank import LowRankConv, LowRankLinear

ALPHA, RANK = 2, 4


def test_the_same_weights_make_the_same_layer_as_peft(sample: Any, filled: Any) -> None:
    if sample.sizes.groups > 1 or (sample.sizes.conv and max(sample.sizes.conv.dilation) > 1):
        pytest.skip("PEFT splits A between groups, which readers of LoRA files do not, and leaves dilation out")
    adapter = filled(LoRA(rank=RANK, alpha=ALPHA).build(sample.sizes, "layer", 0))
    ours = sample.adapted(adapter)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"])
    theirs: Any = peft.get_peft_model(nn.Sequential(sample.module), config)
    wrapped = theirs.base_model.model[0]
    wrapped.lora_A["default"].weight.data = adapter.down.data
    wrapped.lora_B["default"].weight.data = adapter.up.data
    torch.testing.assert_close(ours, theirs(sample.x), rtol=1e-4, atol=1e-4)


def test_a_grouped_convolution_gets_the_delta_of_the_merged_weight(sample_of: Any, filled: Any) -> None:
    """Readers of LoRA files add up down, in the weight's shape, to the weight."""
    sample = sample_of(nn.Conv2d(6, 10, 3, padding=1, groups=2), torch.randn(2, 6, 5, 4))
    adapter = filled(LoRA(rank=RANK, alpha=ALPHA).build(sample.sizes, "layer", 0))
    delta = ALPHA / RANK * (adapter.up.flatten(1) @ adapter.down.flatten(1)).view_as(sample.module.weight)
    merged = sample.run(sample.x, sample.module.weight + delta)
    torch.testing.assert_close(sample.adapted(adapter), merged, rtol=1e-4, atol=1e-4)


def test_the_start_is_kaimings() -> None:
    """PEFT's kaiming_uniform(a=sqrt(5)) is uniform in ±1 / sqrt(fan-in); B is 0."""
    adapter = LoRA(rank=64).build(Layer.of("layer", nn.Conv2d(16, 8, 3)), "a", 0)
    down = adapter.down.detach()
    reference = nn.init.kaiming_uniform_(torch.empty_like(down), a=5**0.5)
    assert 0.99 / 12 < float(down.abs().max()) <= 1 / 12
    assert float(down.std()) == pytest.approx(float(reference.std()), rel=0.02)
    assert not adapter.up.any()


def test_the_file_holds_the_weights_and_alpha_under_kohyas_names(filled: Any) -> None:
    layer = Layer.of("layer", nn.Conv2d(6, 10, 3))
    tensors = filled(LoRA(rank=RANK, alpha=ALPHA).build(layer, "layer", 0)).file_tensors(torch.float16)
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    assert shapes == {
        "lora_down.weight": ((RANK, 6, 3, 3), torch.float16),
        "lora_up.weight": ((10, RANK, 1, 1), torch.float16),
        "alpha": ((), torch.float32),
    }
    assert float(tensors["alpha"]) == ALPHA


@pytest.mark.parametrize("module", [nn.Conv1d(6, 10, 1), nn.Conv2d(6, 10, 1), nn.Conv3d(6, 10, 1)], ids=str)
def test_a_kernel_of_one_may_be_stored_as_matrices(module: Any) -> None:
    down, up = torch.randn(2, 6), torch.randn(10, 2)
    ones = [1] * len(module.kernel_size)
    layer = Layer.of("layer", module)
    flat = adapter_from_file(layer, {"lora_down.weight": down, "lora_up.weight": up})
    whole = {"lora_down.weight": down.view(2, 6, *ones), "lora_up.weight": up.view(10, 2, *ones)}
    x, y = torch.randn(1, 6, *[3 for _ in ones]), torch.randn(1, 10, *[3 for _ in ones])
    assert torch.equal(flat(x, y, None), adapter_from_file(layer, whole)(x, y, None))
    with pytest.raises(ValueError, match=r"lora_down.weight must have the shape \[2, 6, 3\], got \[2, 6\]"):
        adapter_from_file(Layer.of("layer", nn.Conv1d(6, 10, 3)), {"lora_down.weight": down, "lora_up.weight": up})


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (2.0, 0.5), (12.0, 3.0)])
def test_the_scale_is_alpha_by_rank(filled: Any, alpha: float | None, scale: float) -> None:
    adapter = filled(LoRA(rank=RANK, alpha=alpha).build(Layer(6, 10), "layer", 0))
    x, y = torch.randn(3, 6), torch.randn(3, 10)
    torch.testing.assert_close(adapter(x, y), y + scale * (x @ adapter.down.T @ adapter.up.T))


WAYS = [
    (nn.Linear(24, 30), 8, LowRankLinear),
    (nn.Linear(24, 30), 14, DenseLinear),
    (nn.Linear(24, 4), 4, DenseLinear),
    (nn.Conv2d(24, 4, 3), 8, DenseConv),
    (nn.Conv2d(4, 24, 3), 8, LowRankConv),
    (nn.Conv2d(24, 24, 3, groups=4), 4, LowRankConv),
    (nn.Conv2d(24, 24, 3, groups=4), 8, DenseConv),
]


@pytest.mark.parametrize(("module", "rank", "kind"), WAYS, ids=str)
def test_the_way_takes_the_fewest_multiplications(module: Any, rank: int, kind: type, filled: Any) -> None:
    layer = Layer.of("layer", module)
    adapter = filled(LoRA(rank=rank).build(layer, "layer", 0))
    assert type(adapter.operation) is kind
    macs = rank * (layer.groups * layer.fan_in + layer.n_out), layer.n_out * layer.fan_in
    assert (macs[0] < macs[1]) == (kind in (LowRankLinear, LowRankConv))
