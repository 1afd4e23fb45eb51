"""What several tests share: calling the command line, folders of pictures, notes of what a model saw."""

import io
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lorasmith.cli.main import main
from lorasmith.training import loop

UNFINISHED = {".lock", "checkpoints", "run.toml", "steps.jsonl"}
FILES = UNFINISHED | {"lora.safetensors", "loss.png", "report.html"}

TINY = ("--model", "demo", "--device", "cpu", "--steps", "2", "--sampling.prompts", "[]")


STAGES = (
    "converting",
    "copying",
    "encoding",
    "extracting",
    "generating",
    "hashing",
    "loading",
    "matching",
    "measuring",
    "merging",
    "packing",
    "preparing",
    "resizing",
    "writing",
)
WORK = re.compile(rf"lorasmith \d[\w.]*|stopped: \d.*|(?:training|{'|'.join(STAGES)})\b.*")
"""A line about the work in hand."""


@dataclass(frozen=True)
class Ended:
    """How a call ended: its exit code and what it printed, but for lines about its work."""

    code: int
    out: str
    err: str


def lorasmith(folder: Path, *arguments: str) -> Ended:
    """Calls `lorasmith ARGUMENTS` in this folder."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["lorasmith", *arguments])
        patch.chdir(folder)
        with pytest.raises(SystemExit) as exit:
            main()
    logging.getLogger("lorasmith").setLevel(logging.NOTSET)
    assert exit.value.code is None or isinstance(exit.value.code, int)
    return Ended(exit.value.code or 0, out.getvalue(), without_work(err.getvalue()))


def without_work(text: str) -> str:
    """What a command printed on stderr besides what it was doing."""
    return "".join(line for line in text.splitlines(keepends=True) if not WORK.fullmatch(line.rstrip("\n")))


def made(folder: Path, *captions: str) -> Path:
    """A folder with a picture for each caption."""
    folder.mkdir(parents=True)
    for number, caption in enumerate(captions):
        Image.new("RGB", (64, 64), (40 * number, 90, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
    return folder


def with_a_small_disk(folder: Path, options: str) -> list[str]:
    """The start of a command that runs with a tmpfs of its own in this folder; skips where it may not have one."""
    folder.mkdir()
    mount = f'mount -t tmpfs -o {options} none "$0" && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(folder)]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("only where a user may mount a disk of his own")
    return command


class Notes(list[Any]):
    """What a model saw: one list for all copies of the model."""

    def __deepcopy__(self, memo: Any) -> "Notes":
        return self


def listing(folder: Path) -> set[str]:
    """Every path below the folder, but for the checkpoints themselves."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.parent.name != "checkpoints"}


def at_step(number: int, action: Callable[[], torch.Tensor | None], times: int = 1) -> Callable[..., torch.Tensor]:
    """A stand-in for the loss of a batch: that loss but, from this one on, what the action returns, if anything."""
    losses, calls = loop.sample_losses, 0

    def counted(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        replaced = action() if number <= calls < number + times else None
        return losses(*args) if replaced is None else replaced

    return counted
