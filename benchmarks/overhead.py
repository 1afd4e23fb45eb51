"""What a step costs outside the net, and how long a start takes: `python benchmarks/overhead.py`, `--sd15` for more.

A step's overhead is what is left of its seconds without both passes of the UNet and its adapters: draws, batches, the
loss, clipping, the optimizer, logs, the progress bar. `--sd15` trains attention layers of a UNet of Stable Diffusion
1.5's shape with random weights as well, which needs 7 GB of memory.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from step_time_model import NUM_TOKENS, SIZES, net_of
from torch import Tensor, nn
from torch.autograd import Variable

from lorasmith.cli.terminal import opened_display
from lorasmith.config.values import configured, merged
from lorasmith.data.dataset import Dataset
from lorasmith.demo import demo_settings
from lorasmith.diffusion.process import Diffusion
from lorasmith.models.families.sd import StableDiffusionDenoiser
from lorasmith.reporting.display import follow
from lorasmith.reporting.pace import Pace, Training
from lorasmith.runs.checks import checked
from lorasmith.runs.run import opened_run
from lorasmith.training.job import Job
from lorasmith.types import Cached, Step

COMMAND = (sys.executable, "-m", "lorasmith")
WARMUP = 3
Seconds = list[tuple[float, float]]
"""Of each step after the warm-up, and of what is outside the net in it."""


class NetTime:
    """The seconds of both passes of a net, added up."""

    def __init__(self, net: nn.Module) -> None:
        self.seconds = self.began = 0.0
        net.register_forward_pre_hook(self._begin)
        net.register_forward_hook(self._end_forward)

    def _begin(self, *_: Any) -> None:
        self.began = time.perf_counter()

    def _end(self) -> None:
        self.seconds += time.perf_counter() - self.began

    def _end_forward(self, net: nn.Module, inputs: Any, output: Any) -> None:
        self._end()
        output.sample.register_hook(self._begin_backward)

    def _begin_backward(self, grad: Tensor) -> None:
        self._begin()
        Variable._execution_engine.queue_callback(self._end)


def followed(job: Job, steps: Iterator[Step]) -> Seconds:
    """Trains with the progress bar that a run has."""
    net = NetTime(job.denoiser.nets["unet"])
    stamps: list[tuple[float, float]] = []

    def noted() -> Generator[Step, None, None]:
        for step in steps:
            yield step
            stamps.append((time.perf_counter(), net.seconds))

    assert job.config.steps is not None
    training = Training(Pace(job.config.steps), earlier=0, steps_per_epoch=1)
    with opened_display() as display:
        follow(noted(), training, display, threading.Event())
    return [(b - a, b - a - (after - before)) for (a, before), (b, after) in pairwise(stamps[WARMUP:])]


def demo() -> Seconds:
    """Of the demo's run, with its folder."""
    with tempfile.TemporaryDirectory() as folder:
        asked = {"output": str(Path(folder, "run")), "steps": 70}
        with opened_run(checked(configured(merged(demo_settings("line_drawing"), asked)))) as run:
            return followed(run.job, run.steps())


def sd15() -> Seconds:
    """Of a job of Stable Diffusion 1.5's size, 512 pixels, batch 1, bf16, which writes nothing."""
    config = configured({"steps": 12, "targets": {"preset": "attention"}, "gradient_checkpointing": False})
    net = net_of("sd15")
    nn.Module.to(net, torch.bfloat16)
    denoiser = StableDiffusionDenoiser(net, Diffusion(torch.linspace(0.99, 0.01, 1000), "eps"))
    text = torch.randn(NUM_TOKENS, SIZES["sd15"]["cross_attention_dim"])
    samples = [Cached(str(number), torch.randn(4, 64, 64), {"text": text}) for number in range(4)]
    dataset = Dataset.of(samples, [1] * 4, seed=0, group_size=1)
    job = Job.of(denoiser, dataset, config, device=torch.device("cpu"))
    return followed(job, job.steps())


def seconds_of_help() -> float:
    """Of a whole process."""
    began = time.perf_counter()
    subprocess.run([*COMMAND, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def seconds_to_first_step() -> float:
    """From `lorasmith demo` to the first line in its log of steps."""
    with tempfile.TemporaryDirectory() as folder:
        path, began = Path(folder, "run", "steps.jsonl"), time.perf_counter()
        command = [*COMMAND, "demo", "--output", str(path.parent)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not (path.exists() and path.stat().st_size):
                time.sleep(0.01)
            seconds = time.perf_counter() - began
            process.kill()
    return seconds


def show(name: str, seconds: Seconds) -> None:
    whole, outside = (statistics.median(each) for each in zip(*seconds, strict=True))
    print(f"{name}: {1e3 * whole:.1f} ms a step, {1e3 * outside:.2f} of them outside the net ({outside / whole:.1%})")


def main() -> None:
    parser = argparse.ArgumentParser(description="What a step costs outside the net, and how long a start takes.")
    parser.add_argument("--sd15", action="store_true", help="a UNet of Stable Diffusion 1.5's shape too")
    with_sd15 = parser.parse_args().sd15
    print(f"lorasmith --help: {min(seconds_of_help() for _ in range(5)):.2f} s, best of 5")
    print(f"lorasmith demo: {min(seconds_to_first_step() for _ in range(3)):.1f} s to the first step, best of 3")
    show("demo", demo())
    if with_sd15:
        show("sd15", sd15())


if __name__ == "__main__":
    main()
