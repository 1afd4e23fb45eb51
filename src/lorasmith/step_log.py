"""What a run logs of its steps: steps.jsonl, always, and TensorBoard's events where they are asked for."""

import dataclasses
import importlib.util
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter

from lorasmith.installed import needs_extra
from lorasmith.types import Step
from lorasmith.whole import errors_name, flush_folder, write_whole

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


class TensorBoardLog:
    """Loss, rate and gradient norm as TensorBoard's events."""

    def __init__(self, folder: Path, done: int) -> None:
        """Steps after `done` take the place of those that the folder has; ValueError without the extra."""
        self.folder = folder
        self._begin(done)

    def append(self, step: Step) -> None:
        """A step that comes again takes the place of the first; OSError that names the folder."""
        if step.step <= self._done or not self.folder.is_dir():  # gone back, or the run folder was deleted
            self.close()
            self._begin(step.step - 1)
        with errors_name(self.folder):
            for name, value in (("loss", step.loss), ("lr", step.lr), ("grad_norm", step.grad_norm)):
                self._writer.add_scalar(name, value, step.step)
            self._writer.flush()  # a thread writes, whose errors are raised here or by the next call
        self._done = step.step

    def close(self) -> None:
        """OSError that names the folder where events are missing from it."""
        with errors_name(self.folder):
            self._writer.close()

    def _begin(self, done: int) -> None:
        refuse_without_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        with errors_name(self.folder):
            self._writer = SummaryWriter(self.folder, purge_step=done + 1)
            self._writer.flush()
        self._done = done


def refuse_without_tensorboard() -> None:
    """ValueError where TensorBoard's writer is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise needs_extra("tensorboard", "tensorboard")


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
