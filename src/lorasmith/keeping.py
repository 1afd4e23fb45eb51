"""Steps that are kept: logged, saved as checkpoints, and gone back from where numbers stop being finite."""

import logging
import threading
import traceback
from collections.abc import Generator
from pathlib import Path

from lorasmith.checkpoints import CheckpointFolder, newest_in
from lorasmith.devices import is_out_of_memory
from lorasmith.job import Job
from lorasmith.step_log import StepLog
from lorasmith.training import NonFiniteError
from lorasmith.types import Step

log = logging.getLogger(__name__)


def resumed(job: Job, source: Path) -> bool:
    """Goes on from the newest sound checkpoint that the first process finds there; False where there is none."""
    checkpoint = job.world.from_first(newest_in(source) if job.world.is_first else None)
    if checkpoint is not None:
        job.resume(checkpoint)
    return checkpoint is not None


def kept_steps(
    job: Job, checkpoints: CheckpointFolder | None, step_log: StepLog | None, stop: threading.Event | None = None
) -> Generator[Step, None, None]:
    """Trains to the end; the first process logs each step and writes a checkpoint when one is due, and at the end.

    Whatever breaks the run off, the last whole step is kept if it can be.
    """
    is_writing = job.world.is_first
    if is_writing and checkpoints is not None and job.config.non_finite.returns and not checkpoints.steps():
        keep(job, checkpoints, step_log)  # to have one to go back to from the first steps
    while True:
        try:
            for step in job.steps(stop):
                if is_writing and step_log is not None:
                    step_log.append(step)
                yield step
                if is_writing and checkpoints is not None and checkpoints.is_due(job.state.counters.step):
                    keep(job, checkpoints, step_log)
            break
        except NonFiniteError as error:
            if checkpoints is None or job.state.counters.returns == job.config.non_finite.returns:
                _keep_if_possible(job, checkpoints, step_log)
                raise
            _go_back(job, checkpoints, step_log, error)
        except BaseException as error:
            if is_out_of_memory(error):
                traceback.clear_frames(error.__traceback__)  # which hold activations
            _keep_if_possible(job, checkpoints, step_log)
            raise
    if is_writing and checkpoints is not None and checkpoints.last != job.state.counters.step:
        keep(job, checkpoints, step_log)


def keep(job: Job, checkpoints: CheckpointFolder, step_log: StepLog | None) -> None:
    """Writes a checkpoint, after the log that belongs to it."""
    if step_log is not None:
        step_log.flush_to_disk()
    checkpoints.write(job.checkpoint())


def _keep_if_possible(job: Job, checkpoints: CheckpointFolder | None, step_log: StepLog | None) -> None:
    """After an error, which is to be told, not another that follows from it."""
    if checkpoints is None or not job.world.is_first or not job.state.is_sound or not job.state.counters.step:
        return
    try:
        keep(job, checkpoints, step_log)
    except (OSError, MemoryError, RuntimeError) as error:
        log.debug("no checkpoint of the last step", exc_info=error)


def _go_back(job: Job, checkpoints: CheckpointFolder, step_log: StepLog | None, error: NonFiniteError) -> None:
    """To the last checkpoint that every run of this config has, with a lower rate."""
    is_writing = job.world.is_first
    checkpoint = job.world.from_first(checkpoints.newest(regular=True) if is_writing else None)
    if checkpoint is None:
        raise error
    job.state.load(checkpoint.tensors, checkpoint.numbers)
    counters = job.state.counters
    counters.returns += 1
    counters.rate *= job.config.non_finite.rate_factor
    log.warning("%s: back to step %d, the learning rate times %g", error, job.steps_in_all, counters.rate)
    if is_writing:
        keep(job, checkpoints, step_log)
        if step_log is not None:  # after the checkpoint, so that a run that is killed in between lacks no lines
            step_log.cut(job.steps_in_all)
