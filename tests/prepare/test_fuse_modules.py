"""Modules that run our kernels for a while."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from lorasmith.models.families.sd import StableDiffusion
from lorasmith.ops.cpu.build import library
from lorasmith.prepare.fuse_modules import FUSED, fused
from lorasmith.prepare.share import shared_copy
from lorasmith.types import Denoiser

pytestmark = pytest.mark.skipif(library() is None, reason="no AVX-512 for bf16, or no compiler")


def channels_last(net: Any) -> Any:
    return net.to(memory_format=torch.channels_last)


def test_a_net_predicts_as_exactly_and_is_as_it_was_afterwards(
    family: StableDiffusion, latents: Tensor, texts: Tensor
) -> None:
    denoiser, exact = (shared_copy(family.denoiser, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    net = channels_last(denoiser.nets["unet"])
    modules = [module for module in net.modules() if type(module) in FUSED]
    assert {type(module) for module in modules} == set(FUSED)

    def results(denoiser: Denoiser, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        x = latents.to(dtype).requires_grad_()
        out = denoiser.predict(x, torch.arange(4) * 200, {"text": texts.to(dtype)})
        return [out, *torch.autograd.grad(out.float().square().mean(), x)]

    plain, names = results(denoiser), [set(vars(module)) for module in modules]
    with fused(denoiser):
        assert all("forward" in vars(module) for module in modules)
        ours = results(denoiser)
    assert [set(vars(module)) for module in modules] == names
    assert all(map(torch.equal, results(denoiser), plain))
    for own, before, right in zip(ours, plain, results(exact, torch.float32), strict=True):
        assert not torch.equal(own, before)
        assert (own - right).norm() <= 1.2 * (before - right).norm()


def test_subclasses_and_replaced_forward_passes_stay(family: StableDiffusion) -> None:
    class Special(nn.GroupNorm):
        pass

    denoiser = shared_copy(family.denoiser)
    replaced = nn.GroupNorm(2, 4)
    replaced.forward = before = lambda input: input
    net = nn.ModuleList([Special(2, 4), replaced, nn.GroupNorm(2, 4)])
    with fused(replace(denoiser, unet=net)):
        assert ["forward" in vars(module) for module in net] == [False, True, True]
        assert replaced.forward is before
    assert ["forward" in vars(module) for module in net] == [False, True, False]


@pytest.mark.parametrize(
    "options",
    [
        {}, {"out_channels": 16}, {"time_embedding_norm": "scale_shift"}, {"down": True}, {"up": True},
        {"output_scale_factor": 2.0}, {"temb_channels": None}, {"skip_time_act": True}, {"non_linearity": "gelu"},
    ],
    ids=str,
)  # fmt: skip
def test_residual_blocks_of_every_kind(family: StableDiffusion, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    block = ResnetBlock2D(**{"in_channels": 8, "temb_channels": 12, "groups": 4, **options})
    exact, x = copy.deepcopy(block), torch.randn(2, 8, 6, 4, requires_grad=True)
    block = channels_last(block.bfloat16().requires_grad_(False))
    temb = None if "temb_channels" in options else torch.randn(2, 12)

    def results(block: Any, dtype: torch.dtype) -> list[Tensor]:
        own = x.to(dtype, memory_format=torch.channels_last)
        out = block(own, None if temb is None else temb.to(dtype))
        return [out.float(), *torch.autograd.grad(out.float().square().sum(), x)]

    plain = results(block, torch.bfloat16)
    with fused(replace(family.denoiser, unet=nn.ModuleList([block]))):
        ours = results(block, torch.bfloat16)
    for own, before, right in zip(ours, plain, results(exact, torch.float32), strict=True):
        assert own.shape == right.shape and (own - right).norm() <= 1.3 * (before - right).norm()
