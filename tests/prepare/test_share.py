"""Copies that share weights, checkpointing at each depth, offloading, int8 gradients: what they save, what stays."""

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, WanTransformer3DModel
from flow_denoiser import FlowDenoiser
from frozen_nets import Case, equal, gradients
from measure_checkpointing import Subject, measured
from tiny import several
from torch import Tensor, nn

from lorasmith.adapters.targets import Targets, adaptable_layers
from lorasmith.api import train_lora
from lorasmith.config.schema import Config
from lorasmith.devices import has_int8
from lorasmith.diffusion.process import Flow
from lorasmith.models.families.sd import StableDiffusion, StableDiffusionDenoiser
from lorasmith.prepare.activation_checkpointing import blocks, checkpointed
from lorasmith.prepare.int8_backward import quantize_backward
from lorasmith.prepare.offload import offload
from lorasmith.prepare.share import shared_copy
from lorasmith.types import Denoiser

CPU = torch.device("cpu")


def test_a_copy_shares_weights_and_nothing_else(family: StableDiffusion) -> None:
    twin = shared_copy(family.denoiser)
    pairs = list(zip(family.denoiser.unet.named_parameters(), twin.unet.named_parameters(), strict=True))
    assert all(name == other and a.data_ptr() == b.data_ptr() for (name, a), (other, b) in pairs)
    assert all(a.requires_grad and not b.requires_grad for (_, a), (_, b) in pairs)
    twin.unet.register_forward_hook(lambda *args: None)
    assert not family.denoiser.unet._forward_hooks


def test_weights_of_inference_mode_are_shared_and_can_be_trained_through() -> None:
    with torch.inference_mode():
        net: Any = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(1, 2, 3))
        net[0].weight.data = net[0].weight.data.double().float().t().contiguous().t()  # not in order in memory
    model: Any = FlowDenoiser(net, Flow())
    twin = shared_copy(model)
    for one, other in zip(net.parameters(), twin.transformer.parameters(), strict=True):
        assert one.is_inference() and not other.is_inference() and one.data_ptr() == other.data_ptr()
        assert torch.equal(one, other) and one.stride() == other.stride()
    x = torch.randn(2, 3, requires_grad=True)
    twin.transformer[0](x).sum().backward()
    torch.testing.assert_close(x.grad, net[0].weight.detach().sum(0).expand(2, 3).clone())


def test_another_dtype_makes_new_weights(family: StableDiffusion) -> None:
    stored = family.denoiser.unet.dtype
    twin = shared_copy(family.denoiser, CPU, torch.float64)
    assert twin.unet.dtype == torch.float64 and family.denoiser.unet.dtype == stored


KINDS = {
    1: {
        "DownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnUpBlock2D",
        "UpBlock2D",
        "ResnetBlock2D",
        "Transformer2DModel",
    },
    2: {"ResnetBlock2D", "Transformer2DModel", "BasicTransformerBlock"},
    3: {"ResnetBlock2D", "BasicTransformerBlock"},
    5: {"ResnetBlock2D", "BasicTransformerBlock"},
}


@pytest.mark.parametrize("depth", KINDS)
def test_blocks_go_a_list_deeper_with_each_depth(family: StableDiffusion, depth: int) -> None:
    unet = family.denoiser.unet
    assert {type(block).__name__ for block in blocks(unet, depth)} == KINDS[depth]
    stages = {*unet.down_blocks, *unet.up_blocks}
    assert stages <= set(blocks(unet, 1)) and not stages & set(blocks(unet, 2))


def test_lists_of_transformers_do_not_nest(case: Case) -> None:
    if isinstance(case.net, WanTransformer3DModel):
        assert all(blocks(case.net, depth) == list(case.net.blocks) for depth in range(1, 6))


class Nest(nn.Module):
    """Lists in lists: a branch this many deep, beside one that is a single list deep."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.here = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.inner = nn.ModuleList([Nest(levels - 1)] if levels else [])
        self.side = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))])


def test_a_net_that_nests_deeper_gives_its_innermost_blocks_at_5() -> None:
    net = Nest(7)
    chain: list[Any] = [net]
    while chain[-1].inner:
        chain.append(chain[-1].inner[0])
    for depth in range(1, 5):
        assert blocks(net, depth) == [chain[depth], *(level.side[0] for level in reversed(chain[:depth]))]
    assert blocks(net, 5) == [level.side[0] for level in reversed(chain)]


def test_a_list_in_a_list_is_no_block() -> None:
    pair = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net = nn.Module()
    net.stages = nn.ModuleList([nn.ModuleList([pair, nn.Linear(2, 2)]), nn.ModuleList([pair])])
    assert blocks(net, 1) == blocks(net, 5) == [pair]


@pytest.mark.slow
def test_every_depth_holds_less_and_gives_the_same_gradients(case: Case) -> None:
    plain = measured(case.denoiser, case.x, case.t, case.cond, None)
    by_depth = {depth: measured(case.denoiser, case.x, case.t, case.cond, depth) for depth in range(1, 6)}
    for depth, row in by_depth.items():
        assert row.kept < plain.kept / 3 and row.peak < 0.8 * plain.peak, depth
        assert equal(row.gradients, plain.gradients), depth
    default = by_depth[Config().checkpoint_depth]
    assert default.peak == min(row.peak for row in by_depth.values())


def test_layers_run_twice_with_a_gradient_and_once_without(case: Case) -> None:
    layer = next(iter(adaptable_layers({"": blocks(case.net, 5)[0]}).values()))
    runs: list[int] = []
    layer.register_forward_hook(lambda *args: runs.append(1))
    gradients(case.denoiser, case, 2)
    assert len(runs) == 2
    with torch.no_grad(), checkpointed(case.denoiser, 2):
        out = case.denoiser.predict(case.x, case.t, case.cond)
    assert len(runs) == 3 and not out.requires_grad


def test_checkpointing_ends_with_its_context(family: StableDiffusion) -> None:
    denoiser = shared_copy(family.denoiser)
    block = blocks(denoiser.unet, 2)[0]
    before = block.forward
    with checkpointed(denoiser, 2):
        assert block.forward != before
    assert block.forward == before


@pytest.mark.parametrize("depth", [None, 1, 2, 5])
def test_offloaded_weights_come_back_for_each_run_and_gradients_stay_equal(case: Case, depth: int | None) -> None:
    pytest.importorskip("accelerate")
    expected = gradients(case.denoiser, case)
    copy = shared_copy(case.denoiser)
    offload(copy, CPU)
    net = next(iter(copy.nets.values()))
    inside = {id(p) for block in blocks(net, 1) for p in block.parameters()}
    assert all(p.is_meta == (id(p) in inside) for p in net.parameters()) and inside
    assert equal(gradients(copy, case, depth), expected)
    assert not any(p.is_meta for p in case.net.parameters())


def test_what_cannot_be_is_refused_before_training(
    family: StableDiffusion, latents: Tensor, texts: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasmith.training.job.train", lambda *args, **kwargs: pytest.fail("trained"))
    with pytest.raises(ValueError, match="offloading must be False on cpu: the weights are there already"):
        train_lora(family.denoiser, latents, list(texts), offloading=True)
    monkeypatch.setitem(sys.modules, "torchao", None)
    for module in [name for name in sys.modules if name.startswith("torchao.")]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"quantized_backward needs the extra 'quantized': pip install"):
        train_lora(family.denoiser, latents, list(texts), quantized_backward=True)
    with pytest.raises(ValueError, match="checkpoint_depth must be .*5.*, got 6"):
        train_lora(family.denoiser, latents, list(texts), checkpoint_depth=6)


needs_int8 = pytest.mark.skipif(not has_int8(CPU), reason="int8 products overflow on this processor")


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_gradients_are_close_and_weights_stay(case: Case, dtype: torch.dtype) -> None:
    pytest.importorskip("torchao")
    case = replace(case, denoiser=shared_copy(case.denoiser, CPU, dtype), x=case.x.to(dtype))
    case.cond.update({name: value.to(dtype) for name, value in case.cond.items()})
    expected = torch.cat([g.flatten() for g in gradients(case.denoiser, case)])
    copy = shared_copy(case.denoiser)
    quantize_backward(copy, torch.device("cpu"))
    twin = next(iter(copy.nets.values()))
    pairs = zip(case.net.named_parameters(), twin.named_parameters(), strict=True)
    assert all(one == other and a.data_ptr() == b.data_ptr() for (one, a), (other, b) in pairs)
    assert any(type(layer) is nn.Linear for layer in case.net.modules())
    found = gradients(copy, case)
    assert equal(found, gradients(copy, case, 2))
    error = torch.cat([g.flatten() for g in found]) - expected
    assert 0 < error.norm() < 0.06 * expected.norm()
    if dtype == torch.float32:
        pytest.importorskip("accelerate")
        offload(copy, CPU)
        assert equal(gradients(copy, case, 2), found)


def test_products_that_overflow_are_refused(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr("lorasmith.prepare.int8_backward.has_int8", lambda device: False)
    with pytest.raises(ValueError, match="^quantized_backward must be False here: this processor's int8 products"):
        quantize_backward(shared_copy(family.denoiser), torch.device("cpu"))


@needs_int8
def test_a_model_without_linear_layers_has_no_int8_gradients() -> None:
    pytest.importorskip("torchao")
    convolutions = Subject(nn.Conv2d(4, 4, 1), lambda net, x, t, cond: net(x))
    with pytest.raises(ValueError, match="quantized_backward must be False: the model has no torch.nn.Linear"):
        quantize_backward(convolutions, torch.device("cpu"))


class Own(nn.Module):
    """A net of no library: blocks that mix the channels of each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.exit = nn.Conv2d(4, 64, 3, padding=1), nn.Conv2d(64, 4, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.entry(x).movedim(1, -1)
        for block in self.blocks:
            h = h + block(h)
        return self.exit(h.movedim(-1, 1))


def own() -> Denoiser:
    return Subject(Own(), lambda net, x, t, cond: net(x.to(net.get_parameter("entry.weight").dtype)).float())


def version_2(family: StableDiffusion) -> Denoiser:
    """A UNet of Stable Diffusion 2's shape: linear projections, heads of one width."""
    net = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), cross_attention_dim=192, attention_head_dim=several(2, 4),
        use_linear_projection=True, layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return StableDiffusionDenoiser(net, family.denoiser.process)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["version 1", "version 2", "own"])
@pytest.mark.parametrize("pack", ["none", "all"])
def test_checkpointing_lowers_the_bytes_that_autograd_saves(
    family: StableDiffusion, latents: Tensor, texts: Tensor, kind: str, pack: Any
) -> None:
    """Of a step as every face of the program trains it; what two operations save is counted once."""
    denoiser = {"version 1": lambda: family.denoiser, "version 2": lambda: version_2(family), "own": own}[kind]()
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    counts = {}
    for depth in (None, 1, 2, 5):
        saved.clear()
        values: dict[str, Any] = {"gradient_checkpointing": depth is not None, "checkpoint_depth": depth or 2}
        values |= {"steps": 1, "batch_size": 4, "targets": Targets(preset="all"), "pack": pack}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            train_lora(denoiser, latents, list(texts), **values)
        counts[depth] = sum(saved.values())
    assert all(0 < counts[depth] < counts[None] / 2 for depth in (1, 2, 5)), counts
