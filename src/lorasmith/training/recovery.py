"""Steps that are kept: logged, saved as checkpoints, and gone back from where numbers stop being finite."""

import logging
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from lorasmith.distributed.torchrun import num_restarts
from lorasmith.errors import is_out_of_memory
from lorasmith.reporting.progress import SILENT, Progress
from lorasmith.reporting.step_log import StepLog
from lorasmith.storage.atomic import make_folder, remove_partial
from lorasmith.storage.folder_lock import PATIENCE, FolderLock
from lorasmith.training.checkpoints import SUBFOLDER, CheckpointFolder, newest_in
from lorasmith.training.job import Job
from lorasmith.training.loop import NonFiniteError
from lorasmith.training.state import Counters
from lorasmith.types import Step

log = logging.getLogger(__name__)


@contextmanager
def kept(job: Job, folder: Path | None, source: Path | None) -> Iterator["Keeper"]:
    """Keeps a job's checkpoints in a folder that is held as long as this is open, and goes on from those of `source`.

    ValueError where `source` has none, or where the folder has others or is another training's.
    """
    keeper = Keeper(job, None if folder is None else CheckpointFolder.of(folder, job.config), lambda: False)
    is_own = folder is not None and source is not None and _same(folder, source, source / SUBFOLDER)
    if source is not None and not is_own and not keeper.resumed(source):
        raise ValueError(f"resume_from must be a checkpoint or a folder that holds a sound one, got {source}")
    with nullcontext() if folder is None or not job.world.is_first else _held(folder) as lock:
        if keeper.checkpoints is not None and lock is not None:
            keeper.made_again = lock.made_again
            if keeper.checkpoints.steps() and not (
                is_own or (source and _same(keeper.checkpoints.path, source.parent))
            ):
                raise ValueError(f"checkpoint_folder must hold no checkpoints but those of resume_from, got {folder}")
        if is_own:
            keeper.resumed()
        yield keeper


def _same(path: Path, *others: Path) -> bool:
    """Whether it is one of the others."""
    return path.resolve() in [other.resolve() for other in others]


@contextmanager
def _held(folder: Path) -> Iterator[FolderLock]:
    """The hold on a folder, made where it is not there."""
    make_folder(folder)
    lock = FolderLock(folder)
    lock.acquire(PATIENCE if num_restarts() else 0.0)
    try:
        remove_partial([folder])
        yield lock
    finally:
        lock.release()


@dataclass
class Keeper:
    """Trains a job and keeps its steps; of several processes, the first one writes."""

    job: Job
    checkpoints: CheckpointFolder | None
    made_again: Callable[[], bool]  # makes the folder again if it was deleted, and tells whether it was
    log: StepLog | None = None
    progress: Progress = SILENT
    written: Counters | None = None  # of the last checkpoint: groups may be left out after it, in the same step

    def steps(self, stop: threading.Event | None = None) -> Generator[Step, None, None]:
        """Trains to the end; each step is logged, and a checkpoint is written when one is due, and at the end.

        Whatever breaks the run off, the last whole step is kept if it can be.
        """
        job = self.job
        checkpoints = self.checkpoints if job.world.is_first else None
        if checkpoints is not None and job.config.non_finite.returns and not job.state.counters.step:
            self.keep()  # to have one to go back to from the first steps
        while True:
            try:
                for step in job.steps(stop):
                    if self.log is not None:
                        self.log.append(step)
                    yield step
                    if checkpoints is not None and checkpoints.is_due(job.state.counters.step):
                        self.keep()
                break
            except NonFiniteError as error:
                if job.state.counters.returns == job.config.non_finite.returns:
                    self._keep_if_possible()
                    raise
                self._go_back(error)
            except BaseException as error:
                if is_out_of_memory(error):
                    traceback.clear_frames(error.__traceback__)  # which hold activations
                self._keep_if_possible()
                raise
        if checkpoints is not None and checkpoints.last != job.state.counters.step:
            self.keep()

    def resumed(self, source: Path | None = None) -> bool:
        """Goes on from the newest sound checkpoint that the first process finds there; False where there is none.

        source: a checkpoint or a folder; None: where this keeps its own.
        """
        world, checkpoint = self.job.world, None
        if world.is_first and source is not None:
            checkpoint = newest_in(source)
        elif world.is_first and self.checkpoints is not None:
            checkpoint = self.checkpoints.newest()
        checkpoint = world.from_first(checkpoint)
        if checkpoint is not None:
            self.job.resume(checkpoint)
        return checkpoint is not None

    def restored(self) -> bool:
        """Whether the folder had been deleted; log and checkpoint are then there again."""
        if not self.made_again():
            return False
        self._write()
        return True

    def keep(self) -> None:
        """Writes a checkpoint, after the log that belongs to it."""
        self.made_again()
        try:
            self._write()
        except FileNotFoundError:  # deleted at this very moment
            if not self.made_again():
                raise
            self._write()

    def _write(self) -> None:
        if self.checkpoints is None:
            return
        if self.log is not None:
            self.log.flush_to_disk()
        checkpoint = self.job.checkpoint()
        self.checkpoints.write(checkpoint)
        self.progress.wrote("checkpoint", self.checkpoints.file_path(checkpoint.step))
        self.written = replace(self.job.state.counters)

    def _keep_if_possible(self) -> None:
        """After an error, which is to be told, not another that follows from it."""
        state = self.job.state
        if self.checkpoints is None or not self.job.world.is_first or not state.is_sound:
            return
        if not state.counters.step or state.counters == self.written:
            return
        try:
            self.keep()
        except (OSError, MemoryError, RuntimeError, ValueError) as error:
            log.debug("no checkpoint of the last step", exc_info=error)

    def _go_back(self, error: NonFiniteError) -> None:
        """To the last checkpoint that every run of this config has, with a lower rate.

        Where not one step was possible from there, its weights are bad already: to the one before it.
        """
        job, counters = self.job, self.job.state.counters
        assert self.checkpoints is not None  # refused at the start
        before = counters.step if counters.step == counters.returned_to else counters.step + 1
        checkpoint = job.world.from_first(self.checkpoints.newest_regular(before) if job.world.is_first else None)
        if checkpoint is None:
            self._keep_if_possible()
            raise error
        job.load(checkpoint)
        rate = counters.rate * job.config.non_finite.rate_factor
        job.state.counters = replace(
            job.state.counters, returns=counters.returns + 1, rate=rate, returned_to=checkpoint.step
        )
        log.warning("%s: back to step %d, the learning rate times %g", error, job.steps_in_all, rate)
        if job.world.is_first:
            self.keep()
            if self.log is not None:  # after the checkpoint, so that a run that is killed in between lacks no lines
                self.log.cut(job.steps_in_all)
