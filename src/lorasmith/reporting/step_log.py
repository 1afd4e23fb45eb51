"""What a run logs of its steps: steps.jsonl, always, and TensorBoard's events where they are asked for."""

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter

from lorasmith.storage.atomic import errors_name, flush_folder, write_whole
from lorasmith.types import Step

log = logging.getLogger(__name__)


class StepLog:
    """steps.jsonl: a line for each optimizer step, as they were made.

    What a failed write left out of the file is kept, and goes there before anything that is written later.
    """

    def __init__(self, path: Path, steps: list[Step]) -> None:
        """The file must hold these steps, or be missing where there are none."""
        self.path = path
        self.steps = steps
        with errors_name(path):
            self._file = path.open("ab")

    @classmethod
    def opened(cls, path: Path, known: Sequence[Step]) -> "StepLog":
        """Goes on after the steps that the run knows of, whose seconds the file alone knows.

        Lines that tell of none of them are cut off. Steps that it does not tell of are put in, with a warning.
        """
        with errors_name(path, "read"):
            content = path.read_bytes() if path.exists() else b""
        told = {replace(step, seconds=0.0): step for step in _sound_steps(content)}
        steps = [told.get(replace(step, seconds=0.0), step) for step in known]
        if content != _lines(steps):
            write_whole(path, _lines(steps))
        lacking = sum(replace(step, seconds=0.0) not in told for step in known)
        if lacking:
            log.warning(
                "%s lacked %d of the steps %d to %d: they are there again, without their seconds",
                path, lacking, known[0].step, known[-1].step,
            )  # fmt: skip
        return cls(path, steps)

    def append(self, step: Step) -> None:
        """OSError that names the file; the line may be torn then, which the next opening cuts off."""
        line = _line(step)
        with errors_name(self.path):
            self._file.write(line)
            self.steps.append(step)
            self._file.flush()

    def flush_to_disk(self) -> None:
        """All lines are on disk once this returns, also where the file was deleted; OSError that names the file."""
        if not self.path.exists():
            self.rewrite()
        with errors_name(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            flush_folder(self.path.parent)

    def cut(self, done: int) -> None:
        """Takes the steps after `done` away; OSError that names the file."""
        kept = [step for step in self.steps if step.step <= done]
        with errors_name(self.path):
            self._file.truncate(len(_lines(kept)))
        self.steps[:] = kept

    def rewrite(self) -> None:
        """Puts the file back where its folder was deleted and made again; OSError that names the file."""
        write_whole(self.path, _lines(self.steps))
        with errors_name(self.path):
            old, self._file = self._file, self.path.open("ab")
        with suppress(OSError):  # what it lacked is in the new one
            old.close()

    def close(self) -> None:
        """OSError that names the file where lines are missing from it."""
        with errors_name(self.path):
            self._file.close()


def _sound_steps(content: bytes) -> Iterator[Step]:
    """The steps that a file tells of."""
    reader = TypeAdapter(Step)
    for line in content.split(b"\n"):
        with suppress(ValueError):  # not JSON, or not a step
            yield reader.validate_json(line, strict=True)


def _line(step: Step) -> bytes:
    return json.dumps(dataclasses.asdict(step), allow_nan=False).encode() + b"\n"


def _lines(steps: Iterable[Step]) -> bytes:
    return b"".join(map(_line, steps))
