"""Steps a second beside other programs.

`python benchmarks/shared_cores.py` trains alone, beside a busy process, and two at once, each of these
with three ways in which OpenMP's threads wait for each other:

  lorasmith  as `lorasmith train` runs: spinning while the cores are free, asleep while others need them
  spinning   libgomp's own default
  asleep     OMP_WAIT_POLICY=PASSIVE

The nets are the embedded one, whose steps are thousands of short parallel regions, and one of Stable Diffusion 1.5's
shape with random weights. Situations and ways take turns; the table has medians over the rounds, as shares of the speed
of `spinning` alone. No network is needed; the model goes to a temporary folder.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from step_time_model import SIZES, made
from step_time_work import Work, machine

from lorasmith.config.values import configured
from lorasmith.data.dataset import Dataset
from lorasmith.demo import BASE
from lorasmith.models.load import load_model
from lorasmith.ops.cpu.openmp import FIXED_BY, cores_shared
from lorasmith.training.job import Job
from lorasmith.types import Cached

WAYS = ("lorasmith", "spinning", "asleep")
SITUATIONS = {"alone": (1, 0), "beside a busy process": (1, 1), "two at once": (2, 0)}  # (trainings, busy processes)
NETS = ("tiny", "sd15")
RESOLUTION = 256  # of sd15, in pixels
WARM_UP = 3  # steps
SETTLING = 2.0  # seconds until the load counts as known


def dataset_of(net: str, seed: int, group_size: int) -> Dataset:
    """Four random samples: latents [4,h,w] and text [L,D]."""
    generator = torch.Generator().manual_seed(0)
    side, tokens, width = (16, 32, 192) if net == "tiny" else (RESOLUTION // 8, 77, SIZES[net]["cross_attention_dim"])
    samples = [
        Cached(
            str(number),
            torch.randn(4, side, side, generator=generator),
            {"text": torch.randn(tokens, width, generator=generator)},
        )
        for number in range(4)
    ]
    return Dataset.of(samples, [1] * len(samples), seed=seed, group_size=group_size)


def train(net: str, way: str, seconds: float, folder: Path, number: int) -> None:
    """One training: says in the folder that it is warm, waits for the others, and prints its steps a second."""
    family = load_model(str(BASE if net == "tiny" else folder / "unet.safetensors"))
    config = configured({"steps": 100_000, "gradient_checkpointing": False, "sampling": {"prompts": []}})
    job = Job.of(family.denoiser, dataset_of(net, 0, 1), config, device=torch.device("cpu"))
    with cores_shared() if way == "lorasmith" else nullcontext():
        steps = job.steps()
        for _ in range(WARM_UP):
            next(steps)
        (folder / f"warm-{number}").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        began = time.perf_counter()
        while time.perf_counter() - began < SETTLING:
            next(steps)
        began, num_steps = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            next(steps)
            num_steps += 1
    print(num_steps / (time.perf_counter() - began))


def rates(net: str, way: str, situation: str, seconds: float, folder: Path) -> list[float]:
    """Of each training in this situation, measured at the same time."""
    num_trainings, num_busy = SITUATIONS[situation]
    for flag in (*folder.glob("warm-*"), *folder.glob("go")):
        flag.unlink()
    environment = {key: value for key, value in os.environ.items() if key not in (*FIXED_BY, "OMP_NUM_THREADS")}
    environment |= {"HF_HUB_OFFLINE": "1"} | ({"OMP_WAIT_POLICY": "PASSIVE"} if way == "asleep" else {})
    trainings: list[subprocess.Popen[str]] = []
    for number in range(num_trainings):
        command = [sys.executable, __file__, "--train", net, way, str(seconds), str(folder), str(number)]
        trainings.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        while not (folder / f"warm-{number}").exists():  # one after another, so that none disturbs another's warm-up
            if trainings[-1].poll() is not None:
                sys.exit(f"a training ended with {trainings[-1].returncode}")
            time.sleep(0.05)
    with busy(num_busy):
        (folder / "go").touch()
        return [float(training.communicate()[0].split()[-1]) for training in trainings]


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Processes that each keep a core busy, for as long as this is open."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def table(net: str, found: dict[tuple[str, str], list[float]]) -> str:
    """Shares of the speed of `spinning` alone: the slower training's, where there are two."""
    alone = statistics.median(found["spinning", "alone"])
    lines = [
        f"{net}: {alone:.2f} steps/s spinning alone",
        "| | " + " | ".join(SITUATIONS) + " |",
        "|---" * (len(SITUATIONS) + 1) + "|",
    ]
    for way in WAYS:
        shares = (statistics.median(found[way, situation]) / alone for situation in SITUATIONS)
        lines.append(f"| {way} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=NETS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="that each training is timed for")
    parser.add_argument("--train", nargs=5, help=argparse.SUPPRESS)
    asked = parser.parse_args(words)
    if asked.train:
        net, way, seconds, folder, number = asked.train
        return train(net, way, float(seconds), Path(folder), int(number))
    print(", ".join(f"{name}: {value}" for name, value in machine().items()))
    with tempfile.TemporaryDirectory() as folder:
        if "sd15" in asked.nets:
            made(Work("make", folder, "sd15", RESOLUTION, "bf16", "all", "LoRA", rank=16, batch=1, threads=None))
        for net in asked.nets:
            found: dict[tuple[str, str], list[float]] = {}
            for _ in range(asked.rounds):
                for situation in SITUATIONS:
                    for way in WAYS:
                        slowest = min(rates(net, way, situation, asked.seconds, Path(folder)))
                        found.setdefault((way, situation), []).append(slowest)
            print(f"\n{table(net, found)}", flush=True)


if __name__ == "__main__":
    main()
