"""LoRA against PEFT and LyCORIS: the same weights make the same layer; identity, initialisation, file tensors."""

from typing import Any

import peft
import pytest
import torch
from lycoris.modules.locon import LoConModule
from torch import Tensor, nn

from lorasmith.adapters.layer import Layer
from lorasmith.adapters.lora import LoRA, LoRAAdapter

LAYERS = {
    "linear": lambda: nn.Linear(6, 10),
    "conv1d": lambda: nn.Conv1d(6, 10, 3, stride=2, padding=1),
    "conv2d": lambda: nn.Conv2d(6, 10, (3, 1), padding=(1, 0), dilation=(1, 2)),
    "conv2d_1x1": lambda: nn.Conv2d(6, 10, 1),
    "conv3d": lambda: nn.Conv3d(6, 10, 3, padding=1),
}
ALPHA, RANK = 2.0, 4


def trained(layer: nn.Module) -> LoRAAdapter:
    """An adapter whose weights are both random."""
    adapter = LoRA(rank=RANK, alpha=ALPHA).build(Layer.of("layer", layer), "layer", 0)
    nn.init.normal_(adapter.up, generator=torch.Generator().manual_seed(1))
    return adapter


def input_of(layer: Any) -> Tensor:
    axes = len(layer.kernel_size) if not isinstance(layer, nn.Linear) else 0
    shape = (2, 6, *(5, 4, 3)[:axes]) if axes else (2, 3, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", LAYERS)
def test_the_same_weights_make_the_same_layer_as_peft(name: str) -> None:
    layer = LAYERS[name]()
    adapter, x = trained(layer), input_of(layer)
    ours = adapter(x, layer(x))
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"])
    theirs: Any = peft.get_peft_model(nn.Sequential(layer), config)
    wrapped = theirs.base_model.model[0]
    wrapped.lora_A["default"].weight.data = adapter.down.data
    wrapped.lora_B["default"].weight.data = adapter.up.data
    torch.testing.assert_close(ours, theirs(x))


@pytest.mark.parametrize("name", LAYERS)
def test_the_same_weights_make_the_same_layer_as_lycoris(name: str) -> None:
    layer = LAYERS[name]()
    adapter, x = trained(layer), input_of(layer)
    ours = adapter(x, layer(x)).detach()
    theirs: Any = LoConModule("layer", layer, 1.0, RANK, ALPHA)
    theirs.lora_down.weight.data = adapter.down.data.view_as(theirs.lora_down.weight)
    theirs.lora_up.weight.data = adapter.up.data.view_as(theirs.lora_up.weight)
    theirs.apply_to()
    torch.testing.assert_close(ours, layer(x).detach(), atol=1e-5, rtol=1e-5)


def test_a_grouped_convolution_gets_the_delta_of_the_merged_weight() -> None:
    """Readers of LoRA files add up down, in the weight's shape, to the weight."""
    layer = nn.Conv2d(6, 10, 3, padding=1, groups=2)
    adapter, x = trained(layer), input_of(layer)
    ours = adapter(x, layer(x))
    layer.weight.data += ALPHA / RANK * (adapter.up.flatten(1) @ adapter.down.flatten(1)).view_as(layer.weight)
    torch.testing.assert_close(ours, layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_a_new_adapter_is_the_exact_identity(name: str, dtype: torch.dtype) -> None:
    layer = LAYERS[name]().to(dtype)
    x = input_of(layer).to(dtype)
    adapter = LoRA(rank=RANK).build(Layer.of("layer", layer), "layer", 0).to(dtype)
    assert torch.equal(adapter(x, layer(x)), layer(x))


def test_initialisation_is_kaimings_and_depends_on_seed_and_path() -> None:
    """PEFT's kaiming_uniform(a=sqrt(5)) is uniform in ±1 / sqrt(fan-in)."""
    layer = Layer.of("layer", nn.Conv2d(16, 8, 3))
    down = LoRA(rank=64).build(layer, "a", 0).down.detach()
    reference = nn.init.kaiming_uniform_(torch.empty_like(down), a=5**0.5)
    assert float(down.abs().max()) <= 1 / 12 and float(down.abs().max()) > 0.99 / 12
    assert float(down.std()) == pytest.approx(float(reference.std()), rel=0.02)
    again, other_path, other_seed = (
        LoRA(rank=64).build(layer, p, s).down for p, s in (("a", 0), ("b", 0), ("a", 2**32))
    )
    assert torch.equal(down, again) and not torch.equal(down, other_path) and not torch.equal(down, other_seed)


def test_the_file_holds_the_weights_and_alpha_and_gives_the_adapter_back() -> None:
    layer = nn.Conv2d(6, 10, 3)
    adapter = trained(layer)
    tensors = adapter.file_tensors(torch.float32)
    assert float(tensors["alpha"]) == ALPHA
    back = LoRAAdapter.from_file(adapter.layer, tensors)
    x = torch.randn(1, 6, 5, 5)
    assert torch.equal(back(x, layer(x)), adapter(x, layer(x)))


def test_without_alpha_the_scale_is_one() -> None:
    tensors = {"lora_down.weight": torch.ones(2, 6), "lora_up.weight": torch.ones(10, 2)}
    adapter = LoRAAdapter.from_file(Layer(6, 10), tensors)
    assert adapter.alpha / adapter.rank == 1


def test_alpha_is_no_parameter() -> None:
    assert {name for name, _ in trained(nn.Linear(6, 10)).named_parameters()} == {"down", "up"}


def test_what_does_not_fit_is_refused() -> None:
    tensors = {"lora_down.weight": torch.ones(2, 5), "lora_up.weight": torch.ones(10, 2)}
    with pytest.raises(ValueError, match=r"shape must be \[2, 6\], got \[2, 5\]"):
        LoRAAdapter.from_file(Layer(6, 10), tensors)
    with pytest.raises(ValueError, match="mid.conv: convolutions must pad with zeros to be adapted, got 'circular'"):
        Layer.of("mid.conv", nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"))


def test_padding_by_name() -> None:
    layer = nn.Conv2d(6, 10, 3, padding="same", dilation=2)
    adapter, x = trained(layer), torch.randn(1, 6, 8, 8)
    assert adapter(x, layer(x)).shape == layer(x).shape
    with pytest.raises(ValueError, match="padding 'same' must be even"):
        Layer.of("conv", nn.Conv2d(6, 10, 2, padding="same"))
