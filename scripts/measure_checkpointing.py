"""Prints what checkpointing saves at each depth, the table of docs/memory.md: bytes kept and held, and time."""

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel, WanTransformer3DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import LoRA
from lorasmith.adapters.hooks import attached
from lorasmith.adapters.targets import Targets
from lorasmith.demo import BASE
from lorasmith.diffusion.process import Flow
from lorasmith.prepare.activation_checkpointing import INNERMOST, blocks, checkpointed
from lorasmith.prepare.quantize import LowBitLinear
from lorasmith.types import Cond, Denoiser

ROUNDS = 7


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make while it is open, each once, from its making until it is freed.

    Hooks on saved tensors see less: a block's keyword arguments, which most of a UNet's inputs are, stay in a closure,
    and what is recomputed is saved under hooks of checkpoint's own.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        """known: tensors made before that do not count, such as weights."""
        super().__init__()
        self.known = [tensor.untyped_storage() for tensor in known]
        self.live: dict[int, weakref.ref[Any]] = {storage._cdata: weakref.ref(storage) for storage in self.known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.live:
            self.live[key] = weakref.ref(storage, lambda _: self._drop(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        del self.live[key]
        self.now -= size


@dataclass(frozen=True)
class Measured:
    """One forward and backward pass."""

    kept: int  # bytes held when the forward pass is over
    peak: int  # the most bytes held at once, in the forward and the backward pass
    gradients: list[Tensor]


def measured(denoiser: Denoiser, x: Tensor, t: Tensor, cond: Cond, depth: int | None) -> Measured:
    """x [B,C,…], t [B], cond {name: [B,…]}, depth None: without checkpointing. Weights and gradients do not count."""
    adapters = new_adapters(denoiser)
    nets = denoiser.nets.values()
    weights = [tensor for net in nets for tensor in (*net.parameters(), *net.buffers())]
    weights += [
        tensor for net in nets for m in net.modules() if isinstance(m, LowBitLinear) for tensor in m.packed.kept
    ]
    gradients = [torch.zeros_like(p) for p in adapters.parameters()]
    for parameter, gradient in zip(adapters.parameters(), gradients, strict=True):
        parameter.grad = gradient
    live = LiveBytes([*weights, *adapters.parameters(), *gradients, x, t, *cond.values()])
    with predicting(denoiser, adapters, depth), live:
        loss = denoiser.predict(x, t, cond).square().mean()
        kept = live.now
        loss.backward()
    return Measured(kept, live.peak, gradients)


def new_adapters(denoiser: Denoiser) -> AdapterSet:
    """On all layers, no parameter zero, so that a gradient reaches every one."""
    adapters = AdapterSet.new(denoiser, LoRA(rank=4), Targets(preset="all"), 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapters.parameters():
        parameter.data.normal_(0, 0.01, generator=generator)
    return adapters


def predicting(denoiser: Denoiser, adapters: AdapterSet, depth: int | None) -> ExitStack:
    """The context in which the denoiser predicts with adapters, checkpointed at this depth."""
    stack = ExitStack()
    stack.enter_context(attached(denoiser, adapters))
    if depth is not None:
        stack.enter_context(checkpointed(denoiser, depth))
    return stack


def seconds(denoiser: Denoiser, x: Tensor, t: Tensor, cond: Cond, depth: int | None) -> float:
    """The time of a forward and a backward pass."""
    adapters = new_adapters(denoiser)
    with predicting(denoiser, adapters, depth):
        began = time.perf_counter()
        denoiser.predict(x, t, cond).square().mean().backward()
        return time.perf_counter() - began


@dataclass(frozen=True)
class Subject:
    """A frozen net and how it is called, as a Denoiser."""

    net: nn.Module
    call: Callable[[nn.Module, Tensor, Tensor, Cond], Tensor]
    process: Flow = Flow()

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.call(self.net, x_t, t, cond)

    def file_key(self, path: str) -> str:
        return path


Case = tuple[str, Subject, tuple[Tensor, Tensor, Cond]]  # name, net, its input x, t, cond


def sd3(*, num_blocks: int, num_heads: int) -> Case:
    """A transformer of Stable Diffusion 3's kind, 16 channels a head."""
    width = 16 * num_heads
    net = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_layers=num_blocks, attention_head_dim=16,
        num_attention_heads=num_heads, joint_attention_dim=64, caption_projection_dim=width, pooled_projection_dim=8,
        out_channels=4,
    )  # fmt: skip
    subject = Subject(net, lambda net, x, t, cond: net(x, cond["text"], cond["pooled"], t).sample)
    cond = {"text": torch.randn(4, 32, 64), "pooled": torch.randn(4, 8)}
    return f"SD3, {num_blocks} blocks {width} wide", subject, (torch.randn(4, 4, 32, 32), torch.rand(4) * 1000, cond)


def subjects() -> Iterator[Case]:
    """The nets but the first have random weights."""
    torch.manual_seed(0)
    base = UNet2DConditionModel.from_pretrained(BASE / "unet", torch_dtype=torch.float32)
    sd15 = UNet2DConditionModel(
        sample_size=32, block_out_channels=(64, 128, 256, 256), cross_attention_dim=96, attention_head_dim=8
    )
    sdxl = UNet2DConditionModel(
        sample_size=32, block_out_channels=(64, 128, 256), cross_attention_dim=128, use_linear_projection=True,
        attention_head_dim=(1, 2, 4),  # pyright: ignore[reportArgumentType]
        transformer_layers_per_block=(1, 2, 10),  # pyright: ignore[reportArgumentType]
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    for name, net, width in (("demo base", base, 192), ("SD 1.5, narrow", sd15, 96), ("SDXL, narrow", sdxl, 128)):
        inputs = (torch.randn(1, 4, 32, 32), torch.tensor([500]), {"text": torch.randn(1, 77, width)})
        yield name, Subject(net, lambda net, x, t, cond: net(x, t, cond["text"]).sample), inputs
    yield sd3(num_blocks=6, num_heads=4)
    wan = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=64, freq_dim=16,
        ffn_dim=256, num_layers=6,
    )  # fmt: skip
    subject = Subject(wan, lambda net, x, t, cond: net(x, t, cond["text"]).sample)
    yield (
        "Wan, 6 blocks",
        subject,
        (torch.randn(2, 4, 4, 16, 16), torch.rand(2) * 1000, {"text": torch.randn(2, 32, 64)}),
    )


def distinct_depths(net: nn.Module) -> dict[int | None, str]:
    """{depth: label}: None for no checkpointing, and the depths that give other blocks than the one before."""
    labels: dict[int | None, str] = {None: "off"}
    for depth in range(1, INNERMOST + 1):
        first = next((d for d in labels if d is not None and blocks(net, d) == blocks(net, depth)), depth)
        labels[first] = f"{first} to {depth}" if first < depth else str(depth)
    return labels


def main() -> None:
    torch.set_num_threads(1)
    print(
        "| net | depth | blocks | MiB kept by the forward pass | MiB held at most | time |\n|---|---|---|---|---|---|"
    )
    for name, subject, inputs in subjects():
        subject.net.requires_grad_(False).eval()
        labels = distinct_depths(subject.net)
        rows = {depth: measured(subject, *inputs, depth) for depth in labels}
        times = {depth: [] for depth in labels}
        for _ in range(ROUNDS):  # interleaved, so that all depths see the same machine
            for depth in labels:
                times[depth].append(seconds(subject, *inputs, depth))
        for depth, row in rows.items():
            pairs = zip(row.gradients, rows[None].gradients, strict=True)
            assert all(torch.equal(one, other) for one, other in pairs), "the gradients must be equal bit for bit"
            ratio = min(times[depth]) / min(times[None])  # the fastest round is the least disturbed one
            num_blocks = len(blocks(subject.net, depth)) if depth else 0
            kept, peak = row.kept / 2**20, row.peak / 2**20
            print(f"| {name} | {labels[depth]} | {num_blocks} | {kept:.1f} | {peak:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
