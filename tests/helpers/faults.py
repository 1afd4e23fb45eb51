"""Runs that something happens to, small and quick, and what they leave."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import Ended, at_step, lorasmith
from PIL import Image

from lorasmith.formats import lora_file
from lorasmith.models.load import Family
from lorasmith.runs import run
from lorasmith.storage.atomic import write_whole
from lorasmith.training import checkpoints, loop

STEPS = 4
ARGUMENTS = (
    "cats", "--model", "demo", "--device", "cpu", "--steps", str(STEPS), "--sampling.prompts", "[]",
    "--data.resolution", "32", "--targets.preset", "none", "--targets.include", r"mid_block.*attn1\.to_q",
    "--adapter.rank", "1", "--gradient_checkpointing", "false", "--checkpoints.steps", "1", "--output", "run",
)  # fmt: skip
CAPTIONS = ("a cat", "a black cat")
Outcome = tuple[bytes, list[tuple[Any, ...]]]
"""The bytes of the LoRA, and the log but for its times."""


@contextmanager
def quickly(family: Family) -> Iterator[None]:
    """The model is loaded once, and the plot, which takes longer than the training, is a tiny picture."""
    png = Image.new("RGB", (60, 40))._repr_png_()
    assert png is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_model", lambda model, encoders, with_texts: family)
        patch.setattr(run, "save_loss_plot", lambda steps, path: write_whole(path, png))
        yield


def trained(home: Path, *arguments: str) -> Ended:
    return lorasmith(home, "train", *ARGUMENTS, *arguments)


def struck(home: Path, step: int, fault: Callable[[], Any], *arguments: str) -> Ended:
    """A run in whose step this happens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "sample_losses", at_step(step, fault))
        return trained(home, *arguments)


def stop() -> None:
    signal.raise_signal(signal.SIGINT)


def outcome(folder: Path) -> Outcome:
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text("utf-8").splitlines()]
    return (folder / "lora.safetensors").read_bytes(), [(s["step"], s["loss"], s["lr"], s["grad_norm"]) for s in steps]


def sound_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints: all are sound and finite, as is the LoRA if there is one; nothing is torn."""
    assert not list(folder.rglob("*.partial"))
    found = [checkpoints.read(path) for path in sorted((folder / "checkpoints").glob("*"))]
    held = [tensor for checkpoint in found for tensor in checkpoint.tensors.values()]
    if (folder / "lora.safetensors").exists():
        held += lora_file.read(folder / "lora.safetensors")[0].values()
    assert all(tensor.isfinite().all() for tensor in held)
    return [checkpoint.step for checkpoint in found]


def told(ended: Ended) -> str:
    """The one line of a run that failed."""
    assert ended.code == 2 and ended.err.startswith("lorasmith: ") and ended.err.count("\n") == 1, ended
    return ended.err.removeprefix("lorasmith: ").removesuffix("\n")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_child(function: Callable[[Path], None], home: Path) -> list[str]:
    """The command that calls a function of a test file in a process of its own."""
    file, name = Path(function.__code__.co_filename), function.__name__
    program = f"import sys; sys.path[:0] = sys.argv[2:]; import {file.stem} as t; t.{name}(t.Path(sys.argv[1]))"
    return [sys.executable, "-c", program, str(home), str(file.parent), *sys.path]


def call_in_child(function: Callable[[Path], None], home: Path, *before: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LORASMITH_LOG": "warning"}
    command = [*before, *in_child(function, home)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def interrupt() -> None:
    raise KeyboardInterrupt
