"""What processes that torchrun starts do: `two_processes.py checks FOLDER`, or `dying` or `stopping` with a command.

The checks write what each process found to FOLDER/RANK.pt; the others are `lorasmith`, and something happens to it.
"""

import hashlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from commands import Ended, at_step
from diffusers import SD3Transformer2DModel
from flow_denoiser import FlowDenoiser
from processes import Sent
from torch import Tensor, nn

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.hooks import attached
from lorasmith.adapters.targets import Targets
from lorasmith.api import train_lora
from lorasmith.cli import main as cli
from lorasmith.config.schema import Checkpoints, Config, NonFinite
from lorasmith.data.dataset import Dataset
from lorasmith.diffusion.process import Flow
from lorasmith.distributed.process_group import World, joined
from lorasmith.prepare.share import shared_copy
from lorasmith.training import loop
from lorasmith.training.loop import NonFiniteError
from lorasmith.training.objective import noised
from lorasmith.training.state import State
from lorasmith.types import Batch, Cached, Denoiser, Result

PATIENCE = 300  # seconds for a whole command
TARGETS = Targets(preset="all", exclude=(r"blocks\.1\.attn\.add_q_proj",))  # whose output the net throws away
CUT = Config(steps=5, targets=TARGETS, learning_rate=1e-2)
DTYPES: Sequence[torch.dtype] = (torch.float64, torch.float32)
Cut = tuple[int, int, torch.dtype]  # samples a group, samples at once
BAD = 1  # the sample whose numbers are not finite once they are noised


def torchrun(
    folder: Path, *arguments: str, start: Sequence[str] = (), options: Sequence[str] = ("--standalone",)
) -> subprocess.Popen[str]:
    """Begins a program or `-m MODULE` in two processes, on this machine or as `options` say."""
    options = (*options, "--nproc-per-node", "2") if "--nnodes" not in options else options
    command = [*start, sys.executable, "-m", "torch.distributed.run", *options, *arguments]
    path = os.pathsep.join(sys.path)  # on which pytest has put the benchmarks
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(*launched: subprocess.Popen[str]) -> list[Ended]:
    """Waits for each torchrun to end."""
    try:
        printed = [process.communicate(timeout=PATIENCE) for process in launched]
        return [Ended(process.returncode, *texts) for process, texts in zip(launched, printed, strict=True)]
    finally:
        for process in launched:
            process.terminate()  # it ends what it has started
            process.communicate()


def denoiser(dtype: torch.dtype = torch.float32, seed: int = 0) -> FlowDenoiser:
    """A transformer of Stable Diffusion 3's kind with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
        )  # fmt: skip
        nn.init.normal_(net.proj_out.weight, std=0.1)
    return FlowDenoiser(net.double() if dtype == torch.float64 else net, Flow(shift=3.0))


def samples(bad: int | None = None) -> list[Cached]:
    generator = torch.Generator().manual_seed(0)
    made = [
        Cached(
            f"s{i}", torch.randn(4, 8, 8, generator=generator),
            {"text": torch.randn(5, 16, generator=generator), "pooled": torch.randn(8, generator=generator)},
        )
        for i in range(6)
    ]  # fmt: skip
    if bad is not None:
        made[bad].latent[0, 0, 0] = 3e38
    return made


class Heard(logging.Handler):
    """Notes what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@dataclass
class Outcome:
    """What one process saw of a training."""

    weights: list[Tensor]
    losses: list[float]
    drawn: dict[int, str]  # a sample's number -> its name and the hash of its noised latent, time and target
    sent: list[tuple[str, int]]
    heard: list[str]
    counters: dict[str, Any]


def trained(
    world: World, config: Config, *, dtype: torch.dtype = torch.float32, group_size: int | None = None,
    bad: int | None = None, on_step: Callable[[int, threading.Event], None] = lambda step, stop: None,
) -> Outcome:  # fmt: skip
    """Trains adapters of the dtype on a net of the dtype, through the library's parts."""
    copy = shared_copy(denoiser(dtype))
    adapters = AdapterSet.new(copy, config.adapter, config.targets, config.seed).to(torch.device("cpu"), dtype)
    size = group_size or config.group_size * world.size
    dataset = Dataset.of(samples(bad), [1] * 6, seed=config.seed, group_size=size)
    state, stop, drawn = State(adapters, config, is_fp16=False), threading.Event(), {}
    plain = loop.sample_losses

    def noting(denoiser: Denoiser, batch: Batch, config: Config) -> Tensor:
        for number, name, *tensors in zip(batch.numbers, batch.names, *noised(denoiser, batch, config), strict=True):
            drawn[number] = name + hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()
        return plain(denoiser, batch, config)

    heard, sent = Heard(), Sent()
    logging.getLogger("lorasmith").addHandler(heard)
    with patch.object(loop, "sample_losses", noting), attached(copy, adapters), sent:
        for step in loop.train(copy, adapters, dataset, config, state=state, world=world, stop=stop):
            on_step(step.step, stop)
    logging.getLogger("lorasmith").removeHandler(heard)
    weights = [p.detach() for p in adapters.parameters()]
    return Outcome(weights, state.losses, drawn, sent.calls, heard.lines, asdict(state.counters))


def cuts(world: World) -> dict[Cut, Outcome]:
    """The same group of 4 in every way that these processes can cut it, and one of 3, unevenly."""
    share = 4 // world.size
    found = {}
    for size, batch_size, dtype in (*product((4,), (4, 2, 1), DTYPES), (3, 2, torch.float64)):
        if batch_size <= share:
            config = CUT.model_copy(update={"batch_size": batch_size})
            found[size, batch_size, dtype] = trained(world, config, dtype=dtype, group_size=size)
    return found


def by_contract(world: World, steps: int = 4, **inputs: Any) -> Result:
    """The contract's function on these samples; other inputs may be given."""
    these = samples()
    return train_lora(
        **{
            "model": denoiser(), "latents": [s.latent[None] for s in these], "positive": [s.cond for s in these],
            "steps": steps, "learning_rate": 1e-2, "training_dtype": "fp32", "lora_dtype": "fp32", "rank": 4,
            "targets": TARGETS, "bucket_mode": True, "world": world, **inputs,
        }
    )  # fmt: skip


def refused(world: World) -> list[str]:
    """What is said where process 1 has other inputs than process 0."""
    is_other = world.rank == 1
    latents = [s.latent[None] * (2 if is_other else 1) for s in samples()]
    others: list[dict[str, Any]] = [
        {"seed": world.rank}, {"learning_rate": 0.1 if is_other else 0.2}, {"steps": 4 + world.rank},
        {"batch_size": 1 + world.rank}, {"latents": latents}, {"model": denoiser(seed=world.rank)},
    ]  # fmt: skip
    said = []
    for inputs in others:
        try:
            by_contract(world, **inputs)
        except ValueError as error:
            said.append(str(error))
    return said


def gone_back(world: World, folder: Path) -> tuple[str, list[str]]:
    """The error that ends a run which went back once, and what was said before it."""
    heard = Heard()
    logging.getLogger("lorasmith").addHandler(heard)
    latents = [s.latent[None] for s in samples(BAD)]
    rules = {"non_finite": NonFinite(limit=1, returns=1), "checkpoints": Checkpoints(steps=1, minutes=0)}
    try:
        by_contract(world, latents=latents, checkpoint_folder=folder, **rules)
    except NonFiniteError as error:
        return str(error), heard.lines
    finally:
        logging.getLogger("lorasmith").removeHandler(heard)
    raise AssertionError("it ended")


def stopped(world: World) -> Outcome:
    """Process 1 alone is asked to stop, after its second step."""
    return trained(world, CUT, on_step=lambda step, stop: stop.set() if world.rank == 1 and step == 2 else None)


def short_of_memory(world: World) -> Outcome:
    """Process 1 alone is short of memory, once."""

    def failing() -> None:
        raise MemoryError("out of memory")

    losses = at_step(1, failing) if world.rank == 1 else loop.sample_losses
    with patch.object(loop, "sample_losses", losses):
        return trained(world, CUT.model_copy(update={"batch_size": 2, "memory_ladder": True}))


def check(folder: Path) -> None:
    torch.set_num_threads(1)
    with joined("cpu") as world:
        rules = Checkpoints(steps=2, minutes=0)
        found = {
            "world": asdict(world),
            "cuts": cuts(world),
            "stopped": stopped(world),
            "short of memory": short_of_memory(world),
            "left out": trained(world, CUT, bad=BAD),
            "refused": refused(world),
            "contract": by_contract(world, checkpoint_folder=folder / f"of {world.rank}", checkpoints=rules)[1:],
            "gone back": gone_back(world, folder / "shared"),
        }
        torch.save(found, folder / f"{world.rank}.pt")


def die_once() -> None:
    """Process 1 is killed in the fourth step of its first start."""
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        loop.sample_losses = at_step(4, lambda: os.kill(os.getpid(), signal.SIGKILL))


def be_stopped() -> None:
    """torchrun is told to end in the third step; it tells its processes while that step goes on."""

    def tell() -> None:
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(1)

    if os.environ["RANK"] == "0":
        loop.sample_losses = at_step(3, tell)


def main(what: str, *arguments: str) -> None:
    if what == "checks":
        check(Path(arguments[0]))
        return
    {"dying": die_once, "stopping": be_stopped}[what]()
    sys.argv = ["lorasmith", *arguments]
    cli.main()


if __name__ == "__main__":
    import two_processes  # so that its classes are known by the same name where the test reads what was found

    two_processes.main(*sys.argv[1:])
