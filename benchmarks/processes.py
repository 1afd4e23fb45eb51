"""Several processes that train one LoRA: what cutting a group changes, what travels, and what each process costs.

`cuts`: one group of 4 samples on 1 x 4, 2 x 2 and 4 x 1 processes and micro-batches, in float64 and float32.
`cost`: steps a second, bytes and calls, and the time of the exchange alone, with 1, 2 and 4 processes on this machine.
`paper`: calculated, not measured: the exchange of an SDXL LoRA among many GPUs.

The net is the embedded UNet. This program starts itself under torchrun, one thread a process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.hooks import attached
from lorasmith.adapters.targets import Targets, adaptable_layers
from lorasmith.config.schema import Config
from lorasmith.data.dataset import Dataset
from lorasmith.demo import BASE
from lorasmith.distributed.process_group import World, joined
from lorasmith.distributed.torchrun import is_under_torchrun
from lorasmith.models.load import load_model
from lorasmith.prepare.share import shared_copy
from lorasmith.training.loop import train
from lorasmith.training.state import State
from lorasmith.types import Cached

CPU = torch.device("cpu")
GROUP = 4
CUTS = {1: (4, 2, 1), 2: (2, 1), 4: (1,)}  # processes -> samples at once
DTYPES = {"float64": torch.float64, "float32": torch.float32}
STEPS = 10
WARM_UP = 3
EXCHANGES = 30
SIZES = (1, 10)  # millions of numbers that are exchanged alone
LINKS = {"NVLink of an H100, 450 GB/s each way": 450e9, "25 Gb Ethernet, 3.125 GB/s each way": 3.125e9}


class Sent(TorchDispatchMode):
    """Notes every collective operation of torch.distributed, with the bytes that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls.append((func._opname, sum(t.nbytes for t in tree_leaves(args) if isinstance(t, Tensor))))
        return func(*args, **(kwargs or {}))


class Training:
    """A LoRA on a copy of the embedded UNet, from the library's parts, so that it may be in float64."""

    def __init__(self, world: World, *, dtype: torch.dtype, batch_size: int, group_size: int) -> None:
        family = load_model(BASE)
        self.world, self.denoiser = world, shared_copy(family.denoiser, CPU, dtype)
        self.config = Config(batch_size=batch_size, steps=1000, learning_rate=1e-3, gradient_checkpointing=False)
        self.adapters = AdapterSet.new(self.denoiser, self.config.adapter, self.config.targets, 0).to(CPU, dtype)
        generator = torch.Generator().manual_seed(0)
        shapes = {"latent": (4, 16, 16), "text": (32, 192)}
        drawn = [{n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(8)]
        samples = [Cached(str(i), d["latent"], {"text": d["text"]}) for i, d in enumerate(drawn)]
        self.dataset = Dataset.of(samples, [1] * len(samples), seed=0, group_size=group_size)
        self.state = State(self.adapters, self.config, is_fp16=False)

    @property
    def num_numbers(self) -> int:
        return sum(p.numel() for p in self.adapters.parameters())

    def seconds(self, steps: int) -> Iterator[float]:
        """Trains so many steps more."""
        config = self.config.model_copy(update={"steps": self.state.counters.step + steps})
        with attached(self.denoiser, self.adapters):
            for step in train(self.denoiser, self.adapters, self.dataset, config, state=self.state, world=self.world):
                yield step.seconds


def cut(world: World, folder: Path) -> None:
    """Trains the group in every way that so many processes can cut it; the first writes what came of it."""
    for batch_size in CUTS[world.size]:
        for name, dtype in DTYPES.items():
            training = Training(world, dtype=dtype, batch_size=batch_size, group_size=GROUP)
            for _ in training.seconds(STEPS):
                pass
            if world.is_first:
                weights = torch.cat([p.detach().flatten() for p in training.adapters.parameters()])
                losses = torch.tensor(training.state.losses, dtype=torch.float64)
                torch.save((weights, losses), folder / f"{world.size}-{batch_size}-{name}.pt")


def measure(world: World, folder: Path) -> None:
    """The costs of so many processes; the first writes them down, once all agree on what travels."""
    found: dict[str, Any] = {}
    for name, batch_size, group_size in (("shared", GROUP // world.size, GROUP), ("added", 2, 2 * world.size)):
        training, sent = Training(world, dtype=torch.float32, batch_size=batch_size, group_size=group_size), Sent()
        for _ in training.seconds(WARM_UP):
            pass
        with sent:
            for _ in training.seconds(STEPS):
                pass
        expected = (training.num_numbers + group_size + 2) * 4
        one_call_a_step = [("allreduce_", expected)] * STEPS if world.size > 1 else []
        assert world.of_all(sent.calls) == [one_call_a_step] * world.size
        before, began = loopback_bytes(), time.perf_counter()
        seconds = list(training.seconds(STEPS))
        found[name] = {
            "samples": group_size, "numbers": training.num_numbers, "bytes": expected if world.size > 1 else 0,
            "seconds": statistics.median(seconds), "all": time.perf_counter() - began,
            "loopback": (loopback_bytes() - before) / STEPS,
        }  # fmt: skip
        found[f"exchange {training.num_numbers}"] = exchange_seconds(world, training.num_numbers)
    for millions in SIZES:
        found[f"exchange {millions * 10**6}"] = exchange_seconds(world, millions * 10**6)
    if world.is_first:
        (folder / f"{world.size}.json").write_text(json.dumps(found))


def exchange_seconds(world: World, numbers: int) -> float:
    """The median time of adding up so many numbers, when all processes are ready."""
    flat, seconds = torch.zeros(numbers), []
    for _ in range(EXCHANGES if numbers < 5e6 else 8):
        world.of_all(None)
        began = time.perf_counter()
        world.add_up(flat)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def loopback_bytes() -> int:
    """What this machine, or network namespace, has sent to itself; Linux only."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split()[9])
    return 0


def started(what: str, num_processes: int, folder: Path) -> None:
    """Runs this program under torchrun."""
    options = ("--standalone", "--nproc-per-node", str(num_processes))
    command = [sys.executable, "-m", "torch.distributed.run", *options, __file__, what, "--folder", str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def show_cuts(folder: Path) -> None:
    print(
        "| processes x micro-batches x samples | dtype | largest difference of weights | of losses |\n|---|---|---|---|"
    )
    for num_processes, sizes in CUTS.items():
        for batch_size in sizes:
            for name in DTYPES:
                whole = torch.load(folder / f"1-{GROUP}-{name}.pt")
                own = torch.load(folder / f"{num_processes}-{batch_size}-{name}.pt")
                weights, losses = (float((a - b).abs().max()) for a, b in zip(own, whole, strict=True))
                label = f"{num_processes} x {GROUP // num_processes // batch_size} x {batch_size}"
                print(f"| {label} | {name} | {weights:.1e} | {losses:.1e} |")


def show_cost(folder: Path) -> None:
    found = {number: json.loads((folder / f"{number}.json").read_text()) for number in CUTS}
    print("| processes | samples a step | steps/s | samples/s | bytes a step and process | on the loopback a step |")
    print("|---|---|---|---|---|---|")
    for name in ("shared", "added"):
        for number, costs in found.items():
            row = costs[name]
            rate = STEPS / row["all"]
            print(
                f"| {number} | {row['samples']} | {rate:.2f} | {rate * row['samples']:.2f} | {row['bytes']:,} "
                f"| {row['loopback']:,.0f} |"
            )
    print("\n| numbers | " + " | ".join(f"{number} processes" for number in found if number > 1) + " |\n|---|---|---|")
    for key in (key for key in found[1] if key.startswith("exchange")):
        times = " | ".join(f"{1000 * found[number][key]:.1f} ms" for number in found if number > 1)
        print(f"| {int(key.split()[1]):,} | {times} |")


def show_paper(num_gpus: int, rank: int) -> None:
    """Ring all-reduce (Patarasuk and Yuan 2009): each GPU sends 2 (N - 1) / N times the bytes, in 2 (N - 1) turns."""
    with torch.device("meta"):
        net = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
            use_linear_projection=True, attention_head_dim=(5, 10, 20),  # pyright: ignore[reportArgumentType]
            transformer_layers_per_block=(1, 2, 10),  # pyright: ignore[reportArgumentType]
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
    layers: list[Any] = [m for path, m in adaptable_layers({"unet": net}).items() if Targets().matches(path)]
    numbers = sum(rank * (m.weight.shape[0] + m.weight[0].numel()) for m in layers)
    total = sum(p.numel() for p in net.parameters())
    size = 4 * (numbers + num_gpus + 2)
    print(f"SDXL's UNet, {total:,} weights: LoRA of rank {rank} on {len(layers)} layers: {numbers:,} numbers")
    print(f"{size:,} bytes a step; each of {num_gpus} GPUs sends {2 * (num_gpus - 1) / num_gpus * size:,.0f}")
    for link, bandwidth in LINKS.items():
        print(f"{link}: {1000 * 2 * (num_gpus - 1) / num_gpus * size / bandwidth:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cuts", "cost", "paper"))
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if is_under_torchrun():
        torch.set_num_threads(1)
        with joined("cpu") as world:
            {"cuts": cut, "cost": measure}[asked.what](world, asked.folder)
        return
    if asked.what == "paper":
        show_paper(asked.gpus, asked.rank)
        return
    with tempfile.TemporaryDirectory() as name:
        for num_processes in CUTS:
            started(asked.what, num_processes, Path(name))
        {"cuts": show_cuts, "cost": show_cost}[asked.what](Path(name))


if __name__ == "__main__":
    main()
