"""Weights shared out over two processes: same losses and gradients, half the bytes. As a program, one of the two."""

import gc
import json
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import ModelMixin, SD3Transformer2DModel
from flow_denoiser import FlowDenoiser
from plain_net import Plain
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import OFT, Algorithm, LoHa, LoKr, LoRA
from lorasmith.adapters.hooks import attached
from lorasmith.adapters.targets import Targets
from lorasmith.demo import BASE
from lorasmith.devices import has_int8
from lorasmith.diffusion.process import Flow
from lorasmith.diffusion.sampling import pictures_of
from lorasmith.diffusion.validation import held_out_losses
from lorasmith.models.families.sd import StableDiffusion
from lorasmith.models.load import load_model
from lorasmith.prepare.activation_checkpointing import blocks, checkpointed
from lorasmith.prepare.fsdp import shard
from lorasmith.prepare.int8_backward import quantize_backward
from lorasmith.prepare.share import shared_copy
from lorasmith.types import Cached, Cond, Denoiser

CPU = torch.device("cpu")
ALGORITHMS: tuple[Algorithm, ...] = (LoRA(rank=2), LoHa(rank=2), LoKr(rank=2), OFT())
DEPTHS = (None, 1, 2, 5)


@dataclass(frozen=True)
class Case:
    """A denoiser with inputs."""

    denoiser: Denoiser
    x: Tensor
    t: Tensor
    cond: Cond


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def sd3() -> Case:
    torch.manual_seed(0)
    net = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
    )  # fmt: skip
    cond = {"text": numbers(2, 32, 16), "pooled": numbers(2, 8)}
    return Case(FlowDenoiser(net, Flow()), numbers(2, 4, 8, 8), torch.tensor([0.1, 0.7]), cond)


def unet(family: StableDiffusion) -> Case:
    cond = {"text": numbers(1, 32, 192)}
    return Case(shared_copy(family.denoiser, CPU, torch.float32), numbers(1, 4, 8, 8), torch.tensor([500]), cond)


class Rounded(nn.Module):
    """Adds numbers of another dtype than its input's."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return (x.bfloat16() + self.shift).float()


class Odd(nn.Module):
    """Blocks of two dtypes, parameters in two places, memory of another layout."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.exit = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        one, two, three, four = (nn.Linear(4, 4) for _ in range(4))
        two.weight, three.bias, self.exit.weight = one.weight, one.bias, self.entry.weight
        self.blocks = nn.ModuleList([nn.Sequential(one, nn.SiLU(), two), nn.Sequential(three, Rounded(), four)])
        self.entry.weight.data = self.entry.weight.data.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.entry(x).movedim(1, -1)
        for block in self.blocks:
            rows = rows + block(rows)
        return self.exit(rows.movedim(-1, 1))


def odd() -> Case:
    torch.manual_seed(0)
    return Case(Plain(Odd()), numbers(1, 4, 6, 6), torch.tensor([0.5]), {})


def net_of(denoiser: Denoiser) -> nn.Module:
    return next(iter(denoiser.nets.values()))


def size_of(modules: Any) -> int:
    """Bytes of the modules' parameters."""
    return sum(p.nbytes for p in {p for module in modules for p in module.parameters()})


class _Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


def summed_first(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Gradients of a module's inputs become one sum each before others are added, as FSDP2 makes them."""
    leaves, spec = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if places and torch.is_grad_enabled():
        for i, same in zip(places, _Same.apply(*(leaves[i] for i in places)), strict=True):  # pyright: ignore
            leaves[i] = same
    return tree_unflatten(leaves, spec)


def whole_copy(denoiser: Denoiser) -> Denoiser:
    """A copy with whole weights that adds gradients up in the order of a sharded one."""
    copy, held = shared_copy(denoiser), set()
    net = net_of(copy)
    for module in dict.fromkeys([b for depth in (5, 4, 3, 2, 1) for b in blocks(net, depth)] + [net]):
        own = set(module.parameters()) - held
        held |= own
        if own:
            module.register_forward_pre_hook(summed_first, with_kwargs=True)
    return copy


def trained(case: Case, denoiser: Denoiser, algorithm: Algorithm, depth: int | None) -> list[Tensor]:
    """Predictions in inference mode, losses and gradients of two steps, adapters on all layers."""
    adapters = AdapterSet.new(case.denoiser, algorithm, Targets(preset="all"), 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapters.parameters():
        parameter.data.normal_(0, 0.01, generator=generator)
    found = []
    with attached(denoiser, adapters), nullcontext() if depth is None else checkpointed(denoiser, depth):
        for _ in range(2):
            with torch.inference_mode():
                found.append(denoiser.predict(case.x, case.t, case.cond))
            loss = denoiser.predict(case.x, case.t, case.cond).square().mean()
            loss.backward()
            found.append(loss.detach())
            for parameter in adapters.parameters():
                assert parameter.grad is not None
                found.append(parameter.grad)
                parameter.data.sub_(parameter.grad)
                parameter.grad = None
    return found


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def furthest(some: list[Tensor], others: list[Tensor]) -> float:
    """The greatest difference, relative to each tensor's greatest number."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(some, others, strict=True))


class Whole:
    """Counts the bytes of parameters that are whole, each time a layer has run or a gradient reaches its output."""

    def __init__(self, net: nn.Module) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.peak = 0
        for layer in net.modules():
            if not list(layer.children()):
                layer.register_forward_hook(self._see)

    @property
    def now(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())

    def _see(self, layer: nn.Module, args: Any, output: Any) -> None:
        for parameter in layer.parameters():
            assert not isinstance(parameter, DTensor)
            storage = parameter.untyped_storage()
            self.storages[storage._cdata] = storage
        self._look()
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self._look)

    def _look(self, _: Any = None) -> None:
        self.peak = max(self.peak, self.now)


def shared_out(case: Case) -> tuple[Denoiser, dict[str, Any]]:
    """A sharded copy, and what became of the weights."""
    net = net_of(case.denoiser)
    before = [(p, p.data_ptr(), p.detach().clone()) for p in net.parameters()]
    copy = shared_copy(case.denoiser)
    whole = [weakref.ref(p) for p in net_of(copy).parameters()]
    shard(copy, CPU)
    gc.collect()
    parts = [p for p in net_of(copy).parameters() if isinstance(p, DTensor)]
    return copy, {
        "share": sum(p.to_local().untyped_storage().nbytes() for p in parts) / size_of([net]),
        "whole parameters left": sum(ref() is not None for ref in whole),
        "all are parts": all(isinstance(p, DTensor) for p in net_of(copy).parameters()),
        "caller's are the same": all(
            p is q and p.data_ptr() == pointer and torch.equal(p, value)
            for p, (q, pointer, value) in zip(net.parameters(), before, strict=True)
        ),
    }


def memory_of(case: Case, copy: Denoiser) -> dict[str, Any]:
    """Bytes that are whole over one step without checkpoints, and the most that may be."""
    net = net_of(case.denoiser)
    innermost, whole = blocks(net, 5), Whole(net_of(copy))
    adapters = AdapterSet.new(case.denoiser, LoRA(rank=2), Targets(), 0)
    with attached(copy, adapters):
        loss = copy.predict(case.x, case.t, case.cond).square().mean()
        kept = whole.now
        loss.backward()
    return {
        "total": size_of([net]),
        "most allowed": max(size_of([b]) for b in innermost) + size_of([net]) - size_of(innermost),
        "peak": whole.peak,
        "root": size_of([net]) - size_of(blocks(net, 1)),
        "after forward": kept,
        "after backward": whole.now,
    }


def compared(case: Case, copy: Denoiser, variants: Any) -> dict[str, Any]:
    """Where training the sharded copy gives other bits than whole weights do."""
    other = [
        f"{algorithm.name} at depth {depth}"
        for algorithm, depth in variants
        if not equal(trained(case, copy, algorithm, depth), trained(case, whole_copy(case.denoiser), algorithm, depth))
    ]
    _, loss, *gradients = trained(case, shared_copy(case.denoiser), LoRA(rank=2), 2)
    _, own_loss, *own = trained(case, copy, LoRA(rank=2), 2)
    return {"other": other, "loss": torch.equal(loss, own_loss), "furthest": furthest(own, gradients)}


def about_sd3() -> dict[str, Any]:
    case = sd3()
    copy, found = shared_out(case)
    net = net_of(copy)
    assert isinstance(net, ModelMixin)
    found |= compared(case, copy, product(ALGORITHMS, DEPTHS)) | {"device": str(net.device), "dtype": str(net.dtype)}
    if find_spec("torchao") and has_int8(CPU):
        whole, copy = whole_copy(case.denoiser), shared_copy(case.denoiser)
        quantize_backward(whole, torch.device("cpu"))
        quantize_backward(copy, torch.device("cpu"))
        shard(copy, CPU)
        found["int8"] = equal(*(trained(case, d, LoRA(rank=2), 2) for d in (copy, whole)))
    return found


def about_unet() -> dict[str, Any]:
    family = load_model(BASE)
    assert isinstance(family, StableDiffusion)
    case, codec = unet(family), family.codec(CPU)
    copy, found = shared_out(case)
    samples = [Cached(str(i), case.x[0] * i, {"text": case.cond["text"][0]}) for i in (1, 2)]
    drawn = [
        [
            *pictures_of(d, codec, {0: "a", 1: "b"}, size=(32, 32), seed=0, steps=2, guidance=2.0),
            held_out_losses(d, samples),
        ]
        for d in (copy, case.denoiser)
    ]
    found |= compared(case, copy, zip(ALGORITHMS, DEPTHS, strict=True))  # after inference mode
    return found | memory_of(case, copy) | {"drawn": equal(*drawn)}


def about_odd() -> dict[str, Any]:
    with pytest.raises(ValueError, match="^sharded must be False: the model has no lists of blocks"):
        shard(Plain(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), CPU)
    case = odd()
    copy, found = shared_out(case)
    gradients, own = (trained(case, d, LoRA(rank=2), 1) for d in (whole_copy(case.denoiser), copy))
    return found | {"furthest": furthest(own, gradients)}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
    found = {"sd3": about_sd3(), "unet": about_unet(), "odd": about_odd()}
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def told_by_two(folder: Path) -> list[dict[str, Any]]:
    """What each process found."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=500)[0] for process in processes]
        assert not any(process.returncode for process in processes), "\n".join(printed)
        return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.processes
def test_two_processes_hold_a_half_each_and_train_as_one_does(tmp_path: Path) -> None:
    for found in told_by_two(tmp_path):
        for name in ("sd3", "unet", "odd"):
            case = found[name]
            assert case["caller's are the same"] and case["all are parts"] and not case["whole parameters left"], name
            assert 0.5 <= case["share"] < 0.51 or name == "odd", name
        for name in ("sd3", "unet"):
            case = found[name]
            assert not case["other"] and case["loss"] and case["furthest"] < 1e-3, name
        assert found["odd"]["furthest"] < 1e-5
        assert (found["sd3"]["device"], found["sd3"]["dtype"]) == ("cpu", "torch.float32")
        assert found["sd3"].get("int8", True)
        unet = found["unet"]
        assert unet["drawn"]
        assert unet["peak"] <= unet["most allowed"] < unet["total"] / 4
        assert unet["after forward"] == unet["root"] and unet["after backward"] == 0


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
