"""Checkpoints: written atomically, verified by their hash when read; the newest valid one is used.

A checkpoint is a safetensors file. Its metadata contains the counters as JSON and the SHA-256 of the whole file, in
which the 64 digits of the hash itself count as zeros.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from lorasmith.config.schema import Checkpoints, Config
from lorasmith.formats import lora_file
from lorasmith.storage.atomic import errors_name, write_whole
from lorasmith.storage.safetensors_header import Header

log = logging.getLogger(__name__)

NAME = re.compile(r"step-(\d{7})\.safetensors")
FORMAT = 1  # of the numbers and the tensors' names
SUBFOLDER = "checkpoints"  # of a run folder
NO_HASH = "0" * 64
HASH = re.compile(rb'"sha256":"([0-9a-f]{64})"')
SHARE_OF_TIME = 0.01  # that checkpoints by the clock may take


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a step."""

    step: int
    tensors: Mapping[str, Tensor]  # of State.tensors
    numbers: Mapping[str, Any]  # of State.numbers
    config: Mapping[str, Any]  # the run's, as JSON has it
    facts: Mapping[str, str]  # what else decides the result: of the model, the data, the machine

    def pieces(self) -> list[bytes | memoryview]:
        """The file, in which the tensors are not copied."""
        stated = {
            "format": FORMAT,
            "step": self.step,
            "numbers": self.numbers,
            "config": self.config,
            "facts": self.facts,
        }
        metadata = {
            "lorasmith.checkpoint": json.dumps(stated, sort_keys=True),
            "lorasmith.config_hash": config_hash(self.config),
            "sha256": NO_HASH,
        }
        head, *rest = lora_file.file_pieces(self.tensors, metadata)
        digest = hashlib.sha256(head)
        for piece in rest:
            digest.update(piece)
        field_of_hash = b'"sha256":"%s"'
        zeros, own = (field_of_hash % text.encode() for text in (NO_HASH, digest.hexdigest()))
        return [bytes(head).replace(zeros, own, 1), *rest]

    @classmethod
    def of_bytes(cls, content: bytes) -> "Checkpoint":
        """ValueError where the content is not sound."""
        stated = HASH.search(content)
        if stated is None:
            raise ValueError("it states no hash")
        digest = hashlib.sha256(content[: stated.start(1)])
        digest.update(NO_HASH.encode())
        digest.update(memoryview(content)[stated.end(1) :])
        if digest.hexdigest().encode() != stated[1]:
            raise ValueError("its content does not have the hash that it states")
        try:
            length = int.from_bytes(content[:8], "little")
            metadata = json.loads(content[8 : 8 + length])["__metadata__"]
            return cls._stated(metadata, load(content))
        except KeyError as error:
            raise ValueError(f"it must be written by lorasmith, but does not state {error}") from error
        except SafetensorError as error:
            raise ValueError(f"its tensors cannot be read: {error}") from error

    @classmethod
    def of_head(cls, path: Path) -> "Checkpoint":
        """Without the tensors' numbers, and not verified; ValueError or KeyError where the head is not sound."""
        header = Header.of(path)
        shapes = {key: torch.empty(shape, device="meta") for key, shape in header.shapes.items()}
        return cls._stated(header.metadata, shapes)

    @classmethod
    def _stated(cls, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> "Checkpoint":
        rest = json.loads(metadata["lorasmith.checkpoint"])
        if rest["format"] != FORMAT:
            raise ValueError(f"its format must be {FORMAT}, got {rest['format']}")
        return cls(rest["step"], tensors, rest["numbers"], rest["config"], rest["facts"])


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config as JSON has it."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


@dataclass
class CheckpointFolder:
    """The checkpoints of a run, and when the next one is due."""

    path: Path
    rule: Checkpoints
    num_regular: int = 0  # so many of the regular ones are kept, however old
    since: float = field(default_factory=time.monotonic)  # of the last one; the clock on the wall may jump
    cost: float = 0.0  # seconds that the last one took
    last: int | None = None  # step of the last one written

    @classmethod
    def of(cls, path: Path, config: Config) -> "CheckpointFolder":
        """For a run: one that may go back keeps the last regular checkpoint, and one more, as that may be bad.

        The regular ones are the same however it was interrupted: others never push them out.
        """
        rule = config.checkpoints
        return cls(path, rule, num_regular=max(2, rule.keep) if config.non_finite.returns else 0)

    def file_path(self, step: int) -> Path:
        return self.path / f"step-{step:07d}.safetensors"

    def steps(self) -> list[int]:
        """The steps of the checkpoints there are, sound or not, from the first."""
        names = [path.name for path in self.path.iterdir() if path.is_file()] if self.path.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := NAME.fullmatch(name)))

    def is_due(self, step: int) -> bool:
        """Whether one is to be written after this step."""
        if self.is_regular(step):
            return True
        minutes = self.rule.minutes
        return minutes > 0 and time.monotonic() - self.since >= max(60 * minutes, self.cost / SHARE_OF_TIME)

    def is_regular(self, step: int) -> bool:
        """Whether one is written after this step in every run of this config, however it was interrupted."""
        return self.rule.steps is not None and step % self.rule.steps == 0

    def write(self, checkpoint: Checkpoint) -> None:
        """Writes one, then removes those that are too many.

        Those of later steps are of a past that was left, or not sound. They go first: a run that is killed on the way
        must not resume from them.
        """
        began = time.monotonic()
        with errors_name(self.path):
            self.path.mkdir(exist_ok=True)  # not those above it: a run folder that was deleted is not made unlocked
        for later in [step for step in self.steps() if step > checkpoint.step]:
            self._remove(later)
        write_whole(self.file_path(checkpoint.step), *checkpoint.pieces())
        steps = self.steps()
        regular = [step for step in steps if self.is_regular(step)]
        for step in set(steps[: -self.rule.keep]) - set(regular[-self.num_regular :] if self.num_regular else ()):
            self._remove(step)
        self.since, self.last = time.monotonic(), checkpoint.step
        self.cost = self.since - began

    def _remove(self, step: int) -> None:
        path = self.file_path(step)
        with errors_name(path, "remove"):
            path.unlink(missing_ok=True)

    def newest(self) -> Checkpoint | None:
        """The newest sound checkpoint; names those that are not sound."""
        return self._newest_of(self.steps())

    def check(self, check: Callable[[Checkpoint], None]) -> None:
        """ValueError where the newest sound checkpoint does not pass.

        Files are read whole only where the newest one's head does not pass, as that may not be sound. One without a
        sound head is left to whoever reads it.
        """
        head = self._newest_head()
        if head is None:
            return
        try:
            check(head)
        except ValueError:
            newest = self.newest()
            if newest is not None:
                check(newest)

    def _newest_head(self) -> Checkpoint | None:
        steps = self.steps()
        try:
            return Checkpoint.of_head(self.file_path(steps[-1])) if steps else None
        except (ValueError, KeyError, TypeError):
            return None

    def newest_regular(self, before: int) -> Checkpoint | None:
        """The newest sound one of the regular checkpoints before this step; names those that are not sound.

        Of all, where none is regular: a run that was resumed elsewhere begins with one that need not be.
        """
        regular = [step for step in self.steps() if self.is_regular(step)] or self.steps()
        return self._newest_of([step for step in regular if step < before])

    def _newest_of(self, steps: list[int]) -> Checkpoint | None:
        for step in reversed(steps):
            try:
                return read(self.file_path(step))
            except ValueError as error:
                log.warning("%s", error)
        return None


def newest_in(source: Path) -> Checkpoint | None:
    """A checkpoint itself, or the newest sound one of a folder of checkpoints or of a run folder."""
    if source.is_file():
        return read(source)
    return (
        CheckpointFolder(source, Checkpoints()).newest() or CheckpointFolder(source / SUBFOLDER, Checkpoints()).newest()
    )


def read(path: Path) -> Checkpoint:
    """ValueError that names the file where it is not sound; OSError where the disk does not give it, sound or not."""
    with errors_name(path, "read"):
        content = path.read_bytes()
    try:
        return Checkpoint.of_bytes(content)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} is not sound: {error}") from error
