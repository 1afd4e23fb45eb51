"""Steps that are kept: logged, saved as checkpoints, and gone back from where numbers stop being finite."""

import logging
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lorasmith.checkpoints import CheckpointFolder, newest_in
from lorasmith.devices import is_out_of_memory
from lorasmith.job import Job
from lorasmith.lock import PATIENCE, FolderLock
from lorasmith.step_log import StepLog
from lorasmith.training import NonFiniteError
from lorasmith.types import Step
from lorasmith.whole import make_folder, remove_partial
from lorasmith.world import num_restarts

log = logging.getLogger(__name__)


@contextmanager
def kept(job: Job, folder: Path | None, source: Path | None) -> Iterator["Keeper"]:
    """Keeps a job's checkpoints in a folder that is held as long as this is open, and goes on from those of `source`.

    ValueError where `source` has none, or where the folder has others or is another training's.
    """
    places = () if source is None else (source.resolve(), source.resolve().parent)
    is_source = folder is not None and folder.resolve() in places
    keeper = Keeper(job, None, lambda: False)
    with ExitStack() as stack:
        if folder is not None:
            keeper.checkpoints = CheckpointFolder.of(folder, job.config)
            if job.world.is_first:
                keeper.made_again = stack.enter_context(_held(folder)).made_again
                if keeper.checkpoints.steps() and not is_source:
                    raise ValueError(
                        f"checkpoint_folder must hold no checkpoints but those of resume_from, got {folder}"
                    )
        if source is not None and not keeper.resumed(source) and not is_source:
            raise ValueError(f"resume_from must be a checkpoint or a folder that holds a sound one, got {source}")
        yield keeper


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

    def steps(self, stop: threading.Event | None = None) -> Generator[Step, None, None]:
        """Trains to the end; each step is logged, and a checkpoint is written when one is due, and at the end.

        Whatever breaks the run off, the last whole step is kept if it can be.
        """
        job = self.job
        checkpoints = self.checkpoints if job.world.is_first else None
        if checkpoints is not None and job.config.non_finite.returns and not checkpoints.steps():
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
        world = self.job.world
        if source is None:
            assert self.checkpoints is not None
            source = self.checkpoints.path
        checkpoint = world.from_first(newest_in(source) if world.is_first else None)
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
        self._write()

    def _write(self) -> None:
        assert self.checkpoints is not None
        if self.log is not None:
            self.log.flush_to_disk()
        self.checkpoints.write(self.job.checkpoint())

    def _keep_if_possible(self) -> None:
        """After an error, which is to be told, not another that follows from it."""
        state = self.job.state
        if self.checkpoints is None or not self.job.world.is_first or not state.is_sound or not state.counters.step:
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
            raise error
        job.state.load(checkpoint.tensors, checkpoint.numbers)
        rate = counters.rate * job.config.non_finite.rate_factor
        job.state.counters = replace(
            job.state.counters, returns=counters.returns + 1, rate=rate, returned_to=checkpoint.step
        )
        log.warning("%s: back to step %d, the learning rate times %g", error, job.steps_in_all, rate)
        if job.world.is_first:
            self.keep()
            if self.log is not None:  # after the checkpoint, so that a run that is killed in between lacks no lines
                self.log.cut(job.steps_in_all)
