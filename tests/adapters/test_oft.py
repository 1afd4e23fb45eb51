"""What OFT has of its own: Cayley's rotation, its limit and how others read that, blocks it cannot have."""

from typing import Any

import pytest
import torch
from lycoris.functional.diag_oft import get_r
from torch import Tensor, nn

from lorasmith.adapters.algorithms import OFT
from lorasmith.adapters.base import Layer
from lorasmith.adapters.registry import adapter_from_file

N_OUT, SIZE = 30, 5


def rotation(blocks: Tensor, limit: float = float("inf")) -> Tensor:
    """The paper's R, block by block, Q at most of this norm."""
    q = blocks - blocks.mT
    q = q * min(1, limit / float(q.norm()))
    eye = torch.eye(q.shape[-1])
    return torch.block_diag(*((eye + q) @ torch.linalg.inv(eye - q)))


def outputs(adapter: Any, bias: Tensor) -> tuple[Tensor, Tensor]:
    """y, less its bias, before and after."""
    y = torch.randn(4, N_OUT, generator=torch.Generator().manual_seed(4))
    return y - bias, adapter(torch.randn(4, 24), y, bias).detach() - bias


@pytest.mark.parametrize("std", [0.01, 1.0, 100.0])
def test_what_the_bias_is_added_to_is_turned(filled: Any, std: float) -> None:
    adapter = filled(OFT(rank=SIZE).build(Layer(24, N_OUT), "layer", 0), std=std)
    before, after = outputs(adapter, torch.randn(N_OUT))
    torch.testing.assert_close(after, before @ rotation(adapter.blocks.detach()), rtol=1e-3, atol=1e-4)
    lengths = (z.view(4, -1, SIZE).norm(dim=-1) for z in (before, after))
    torch.testing.assert_close(*lengths, rtol=1e-3, atol=1e-4)


def test_a_symmetric_matrix_turns_nothing(filled: Any) -> None:
    adapter = filled(OFT(rank=SIZE).build(Layer(24, N_OUT), "layer", 0))
    adapter.blocks.data += adapter.blocks.data.mT.clone()
    y = torch.randn(4, N_OUT)
    assert torch.equal(adapter(torch.randn(4, 24), y, None), y)


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (5, 5), (8, 5), (7, 5), (15, 2), (10, 3)])
def test_blocks_have_lycoriss_sizes(rank: int, size: int) -> None:
    adapter = OFT(rank=rank).build(Layer(24, N_OUT), "layer", 0)
    assert tuple(adapter.blocks.shape) == (N_OUT // size, size, size) and adapter.rank == size


@pytest.mark.parametrize("alpha", [0.001, 0.1, 1.0])
def test_the_limit_is_alpha_times_the_outputs(filled: Any, alpha: float) -> None:
    adapter = filled(OFT(rank=SIZE, alpha=alpha).build(Layer(24, N_OUT), "layer", 0))
    before, after = outputs(adapter, torch.zeros(N_OUT))
    expected = before @ rotation(adapter.blocks.detach(), alpha * N_OUT)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert adapter.alpha == alpha


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3, 1.0, 100.0])
def test_both_readings_of_alpha_in_a_file_give_the_same_delta(filled: Any, alpha: float, dtype: torch.dtype) -> None:
    """LyCORIS limits Q's norm to alpha times the outputs, ComfyUI to alpha; 4.15 is the norm here."""
    adapter = filled(OFT(rank=SIZE, alpha=alpha).build(Layer(24, N_OUT), "layer", 0)).to(dtype)
    tensors = adapter.file_tensors(dtype)
    blocks, stored = tensors["oft_blocks"].float(), float(tensors["alpha"])
    limits: tuple[Any, Any] = (stored * N_OUT, stored)
    one, other = (torch.block_diag(*get_r(blocks, constraint=limit)) for limit in limits)
    assert stored >= alpha * 0.999 and torch.equal(one, other)
    expected = rotation(adapter.blocks.detach().float(), alpha * N_OUT)
    torch.testing.assert_close(one, expected, **({"rtol": 0, "atol": 0.01} if dtype == torch.bfloat16 else {}))


def test_no_alpha_or_one_below_zero_is_no_limit(filled: Any) -> None:
    tensors = filled(OFT(rank=SIZE).build(Layer(24, N_OUT), "layer", 0), std=10).file_tensors(torch.float32)
    assert float(tensors["alpha"]) == 0
    free = outputs(adapter_from_file(Layer(24, N_OUT), tensors), torch.zeros(N_OUT))
    for alpha in (torch.tensor(-1.0), None):
        changed = {name: tensor for name, tensor in {**tensors, "alpha": alpha}.items() if tensor is not None}
        torch.testing.assert_close(outputs(adapter_from_file(Layer(24, N_OUT), changed), torch.zeros(N_OUT)), free)


@pytest.mark.parametrize(("n_out", "rank"), [(30, 1), (31, 8), (4, 4), (1, 8)])
def test_blocks_of_one_number_are_refused(n_out: int, rank: int) -> None:
    other = "" if n_out in (1, 31) else "give another rank or "
    message = f"blocks of 2 or more, but rank {rank} cuts {n_out} outputs into single ones; {other}add the layer to"
    with pytest.raises(ValueError, match=message):
        OFT(rank=rank).build(Layer(24, n_out), "layer", 0)


def test_blocks_across_the_groups_of_a_convolution_are_refused() -> None:
    conv = Layer.of("conv", nn.Conv2d(24, 30, 3, groups=2))
    message = "blocks must divide the 15 outputs of a convolution's group, got blocks of 2"
    with pytest.raises(ValueError, match=message):
        OFT(rank=2).build(conv, "conv", 0)
    with pytest.raises(ValueError, match=message):
        adapter_from_file(conv, {"oft_blocks": torch.zeros(15, 2, 2)})
