"""What holds of every algorithm on every kind of layer: identity, learning, files, memory, seeds, refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorasmith.adapters.algorithms import OFT, DoRA, LoHa, LoKr, LoRA
from lorasmith.adapters.base import Layer
from lorasmith.adapters.registry import adapter_from_file

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("layers", DTYPES, ids=["layer_fp32", "layer_bf16"])
@pytest.mark.parametrize("ours", DTYPES, ids=["fp32", "bf16"])
def test_a_new_adapter_is_the_exact_identity(
    algorithm: Any, sample: Any, layers: torch.dtype, ours: torch.dtype
) -> None:
    adapter = algorithm.build(sample.sizes, "layer", 0, sample.module).to(ours)
    module, x = sample.module.to(layers), sample.x.to(layers)
    adapted = adapter(x, module(x), module.bias, module)
    assert adapted.dtype == layers and torch.equal(adapted, module(x))


def test_no_factor_is_dead(algorithm: Any, sample: Any) -> None:
    """A gradient reaches the adapter at step 0, and each of its factors after the first."""
    adapter = algorithm.build(sample.sizes, "layer", 0, sample.module)
    target = torch.randn(sample.module(sample.x).shape, generator=torch.Generator().manual_seed(3))

    def gradients() -> list[Tensor]:
        loss = (sample.adapted(adapter) - target).square().mean()
        return list(torch.autograd.grad(loss, list(adapter.parameters())))

    first = gradients()
    assert any(grad.any() for grad in first)
    with torch.no_grad():
        for parameter, grad in zip(adapter.parameters(), first, strict=True):
            parameter -= 0.1 * grad
    assert all(grad.any() and grad.isfinite().all() for grad in gradients())


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_a_file_gives_the_adapter_back_bit_for_bit(
    algorithm: Any, sample: Any, adapter: Any, dtype: torch.dtype
) -> None:
    tensors = adapter.to(dtype).file_tensors(dtype)
    back = adapter_from_file(sample.sizes, tensors, sample.module)
    again = back.file_tensors(dtype)
    assert list(again) == list(tensors)
    assert all(torch.equal(again[name], tensors[name]) and again[name].dtype == tensors[name].dtype for name in again)
    plain = {"alpha", "dora_scale"}
    assert {tensor.dtype for name, tensor in tensors.items() if name not in plain} == {dtype}
    assert {tensor.dtype for name, tensor in tensors.items() if name in plain} == {torch.float32}
    assert tensors["alpha"].ndim == 0
    assert (back.algorithm, back.rank) == (algorithm.name, adapter.rank)
    if back.alpha == adapter.alpha:  # OFT's may be raised, with blocks that hold the limit already
        assert torch.equal(sample.adapted(back), sample.adapted(adapter))


def test_a_read_adapter_shares_no_memory_with_the_file(sample: Any, adapter: Any) -> None:
    tensors = {name: tensor.clone() for name, tensor in adapter.file_tensors(torch.float32).items()}
    back = adapter_from_file(sample.sizes, tensors, sample.module)
    before = sample.adapted(back)
    for tensor in tensors.values():
        tensor.zero_()
    assert torch.equal(sample.adapted(back), before)


def test_factors_are_the_only_state(adapter: Any) -> None:
    """alpha is a constant: neither a parameter nor a buffer."""
    assert not list(adapter.buffers())
    assert len(list(adapter.parameters())) == len(adapter.file_tensors(torch.float32)) - 1


class Sizes(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operation made; views of what it took are none."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = made if isinstance(made, tuple | list) else (made,)
        taken = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        new = [t for t in tensors if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in taken]
        self.largest = max([self.largest, *(t.numel() for t in new)])
        return made


def largest_tensor(algorithm: Any, module: Any, x: Tensor, filled: Any) -> int:
    """Of the adapter's forward and backward pass."""
    adapter = filled(algorithm.build(Layer.of("layer", module), "layer", 0, module))
    x, y = x.requires_grad_(), module(x).detach().requires_grad_()
    with Sizes() as sizes:
        adapted = adapter(x, y, module.bias, module)
        torch.autograd.grad(adapted, [x, y, *adapter.parameters()][isinstance(algorithm, OFT) :], torch.ones_like(y))
    return sizes.largest


LARGE = {
    "linear": (lambda: nn.Linear(96, 120), (2, 3, 96)),
    "conv2d": (lambda: nn.Conv2d(24, 30, 3, padding=1), (1, 24, 3, 3)),
    "conv3d_groups": (lambda: nn.Conv3d(24, 30, (1, 3, 3), groups=2), (1, 24, 2, 3, 3)),
}
LEAN = (
    LoRA(rank=4), LoHa(rank=3), LoKr(rank=2), LoKr(rank=2, factor=1), LoKr(rank=2, factor=4), LoKr(rank=64),
    OFT(rank=8), DoRA(rank=4),
)  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("algorithm", LEAN, ids=repr)
def test_no_tensor_as_large_as_the_layers_weight_is_made(algorithm: Any, name: str, filled: Any) -> None:
    make, shape = LARGE[name]
    module: Any = make()
    largest = largest_tensor(algorithm, module, torch.randn(shape), filled)
    if isinstance(algorithm, LoKr) and algorithm.factor != 1 and name == "conv3d_groups":
        assert largest == module.weight.numel()  # groups may cut across its blocks
    else:
        assert largest < module.weight.numel()


def test_a_delta_of_full_rank_is_made(filled: Any) -> None:
    """And the measure above sees it."""
    assert largest_tensor(LoHa(rank=64), nn.Linear(96, 120), torch.randn(2, 96), filled) == 96 * 120


@pytest.mark.parametrize("algorithm", [LoRA(rank=4), LoHa(rank=4), LoKr(rank=2), DoRA(rank=4)], ids=repr)
def test_initialisation_depends_on_seed_and_path_alone(algorithm: Any) -> None:
    sizes, base = Layer(36, 36), nn.Linear(36, 36)

    def start(seed: int, path: str) -> tuple[float, ...]:
        return tuple(
            value
            for factor in algorithm.build(sizes, path, seed, base).parameters()
            for value in factor.flatten().tolist()
        )

    seeds = (0, 1, 2**32, 2**64 - 1)
    starts = {(seed, path): start(seed, path) for seed in seeds for path in ("a", "b")}
    assert len(set(starts.values())) == len(starts)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert start(2**32, "b") == starts[2**32, "b"]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("algorithm", [LoHa(rank=6), LoKr(rank=6), LoKr(rank=6, factor=6)], ids=repr)
def test_factors_start_different_from_each_other(algorithm: Any) -> None:
    starts = [p.flatten()[:36].detach() for p in algorithm.build(Layer(360, 360), "a", 0).parameters() if p.any()]
    assert len(starts) >= 2
    for index, one in enumerate(starts):
        for other in starts[:index]:
            assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.6
