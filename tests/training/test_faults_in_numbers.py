"""Faults in numbers and memory: what is not finite is never written, and what does not fit is said or halved."""

import gc
import itertools
import math
import mmap
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import at_step, made
from faults import CAPTIONS, call_in_child, interrupt, outcome, quickly, sound_steps, stop, struck, told, trained
from tiers import table

from lorasmith.formats import lora_file
from lorasmith.models.load import Family
from lorasmith.training import loop


@pytest.fixture(scope="module", autouse=True)
def quick(family: Family) -> Iterator[None]:
    with quickly(family):
        yield


@pytest.fixture
def home(tmp_path: Path) -> Path:
    made(tmp_path / "cats", *CAPTIONS)
    return tmp_path


@table("exponent", [0, 6, 12, 18, 21, 30, 38], quick=[18])
def test_weights_that_blow_up_are_never_written(
    home: Path, monkeypatch: pytest.MonkeyPatch, exponent: int, caplog: pytest.LogCaptureFixture
) -> None:
    losses = loop.sample_losses
    monkeypatch.setattr(loop, "sample_losses", lambda *args: losses(*args) * 10.0**exponent)
    ended = trained(home, "--optimizer", "SGD", "--learning_rate", "1.0", "--max_grad_norm", "0")
    assert not ended.code or re.match("not finite 3 times in a row|the weights of step .* are not finite", told(ended))
    if (home / "run").exists():  # else not even the first step was finite
        steps = sound_steps(home / "run")
        log = outcome(home / "run")[1]
        assert steps and steps[-1] == log[-1][0] and all(map(math.isfinite, itertools.chain(*log)))


RETURNING = (
    "--steps", "6", "--checkpoints.steps", "2", "--non_finite.returns", "2", "--non_finite.rate_factor", "1e-10",
    "--optimizer", "SGD", "--learning_rate", "1e-3", "--max_grad_norm", "0", "--targets.include", "conv_out",
)  # fmt: skip


@pytest.mark.faults
def test_a_run_goes_back_and_lowers_the_rate(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The fourth sample has so great a loss that its step, and the checkpoint of it, lead where no loss is finite."""
    losses = loop.sample_losses

    def great(denoiser: Any, batch: Any, config: Any) -> torch.Tensor:
        return losses(denoiser, batch, config) * (1e18 if batch.numbers[0] == 3 else 1)

    monkeypatch.setattr(loop, "sample_losses", great)
    assert trained(home, *RETURNING).code == 0
    returns = [message for message in caplog.messages if message.startswith("not finite 3 times in a row: sample ")]
    assert [message.rpartition(": ")[2] for message in returns] == [
        "back to step 4, the learning rate times 1e-10", "back to step 2, the learning rate times 1e-20",
    ]  # fmt: skip
    whole = outcome(home / "run")
    assert [(step, lr) for step, _, lr, _ in whole[1]] == [
        (n, 1e-3 if n < 3 else 1e-3 * (1e-10 * 1e-10)) for n in range(1, 7)
    ]
    for number in (2, 5, 7, 9, 10, 12):
        shutil.rmtree(home / "run")
        assert struck(home, number, interrupt, *RETURNING).code == 130
        assert struck(home, 2, stop, *RETURNING, "--resume").code == 130
        assert trained(home, *RETURNING, "--resume").code == 0
        assert outcome(home / "run") == whole, number


needs_limits = pytest.mark.skipif(sys.platform != "linux", reason="address spaces are limited and measured on Linux")
GREAT = ("--steps", "3", "--data.resolution", "64", "--targets.include", "conv_in", "--training_dtype", "fp32")
EXACT = ("env", "MALLOC_MMAP_THRESHOLD_=65536", "MALLOC_ARENA_MAX=1")
"""What is freed goes back to the system at once, and no thread keeps memory of its own."""


def taken(what: str = "VmSize:") -> int:
    """Bytes of this process's addresses, garbage not counted; or with "VmPeak:" the most there ever were."""
    gc.collect()
    return int(Path("/proc/self/status").read_text().split(what)[1].split()[0]) * 1024


def limit_memory(num_bytes: float) -> None:
    """What this process may take from now on."""
    resource.setrlimit(resource.RLIMIT_AS, (taken() + int(num_bytes), resource.RLIM_INFINITY))


def unlimit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.faults
@needs_limits
def test_memory_that_runs_out(home: Path) -> None:
    call_in_child(run_out_of_memory, home, *EXACT)


def most_taken(home: Path, *arguments: str) -> int:
    """Bytes that the fifth batch of a run takes at its peak."""
    padding: list[mmap.mmap] = []
    found: list[int] = []

    def begin() -> None:
        padding.append(mmap.mmap(-1, max(mmap.PAGESIZE, taken("VmPeak:") - taken())))  # so that this is the peak
        found.append(taken())

    def end() -> None:
        found.append(taken("VmPeak:") - found.pop())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "sample_losses", at_step(5, begin))
        assert struck(home, 6, end, *arguments).code == 0
    padding.pop().close()
    return found.pop()


def run_out_of_memory(home: Path) -> None:
    """With checkpointing, a step takes about twice as much as one with half a batch, and without it three times that.

    The first run measures it, and makes oneDNN know the shapes, which it keeps memory for.
    """
    loop.freed_memory_kept = lambda device: nullcontext()  # a step's memory would serve the next, limit or not
    halves = ("--batch_size", "16", "--grad_accumulation_steps", "2", "--gradient_checkpointing", "true")
    enough = 2**0.5 * most_taken(home, *GREAT, *halves, "--output", "peace")
    ended = struck(home, 3, lambda: limit_memory(enough), *GREAT, "--batch_size", "32")
    unlimit_memory()
    assert told(ended).startswith("out of memory: try --memory_ladder, or a smaller batch_size or data.resolution")
    assert sound_steps(home / "run") == [1, 2]
    assert lora_file.read(home / "run" / "lora.safetensors")[1]["lorasmith.steps"] == "2"
    ladder = ("--batch_size", "32", "--memory_ladder", "--resume")
    ended = struck(home, 1, lambda: limit_memory(enough), *GREAT, *ladder)
    unlimit_memory()
    assert ended.code == 0, ended.err
    rungs = ("gradient_checkpointing", "batches of 16")
    assert all(f"out of memory: continuing with {rung}" in " ".join(ended.err.split()) for rung in rungs), ended.err
    losses, peaceful = ([loss for _, loss, _, _ in outcome(home / name)[1]] for name in ("run", "peace"))
    assert losses == pytest.approx(peaceful, rel=1e-3) and sound_steps(home / "run") == [2, 3]


@pytest.mark.faults
@needs_limits
def test_memory_that_does_not_hold_a_checkpoint(home: Path) -> None:
    call_in_child(leave_no_memory, home, *EXACT)


def leave_no_memory(home: Path) -> None:
    loop.freed_memory_kept = lambda device: nullcontext()  # a step's memory would serve the next, limit or not
    great = (*GREAT[2:], "--steps", "4", "--targets.preset", "attention", "--adapter.rank", "64", "--batch_size", "32")
    ended = struck(home, 3, lambda: limit_memory(2**20), *great)
    unlimit_memory()
    assert told(ended).startswith("out of memory: try --memory_ladder")
    assert sound_steps(home / "run") in ([1], [1, 2])
    assert trained(home, *great, "--resume").code == 0
    assert sound_steps(home / "run") == [3, 4]
