"""A training as a command: shown while it goes on, kept when it is stopped, and what is said of it at the end."""

import logging

from lorasmith.cli.summary import Report
from lorasmith.errors import is_out_of_memory
from lorasmith.ops.cpu.openmp import cores_shared
from lorasmith.reporting.display import Display, follow
from lorasmith.reporting.pace import Pace, Training
from lorasmith.reporting.signals import INTERRUPTED, interruptible
from lorasmith.runs.checks import Request
from lorasmith.runs.run import Run, opened_run

log = logging.getLogger(__name__)


def execute(request: Request, display: Display, report: Report) -> int:
    """Runs a request from its data to its report; Ctrl-C and errors keep what was trained. Returns the exit code."""
    with cores_shared(), opened_run(request, display) as run:
        try:
            with interruptible() as stop:
                follow(run.steps(stop), _training(run), display, stop)
                _save(run, report)
        except (ArithmeticError, OSError, RuntimeError, MemoryError, ValueError) as error:
            _save_if_possible(run, report)
            if is_out_of_memory(error):
                ladder = "" if request.config.memory_ladder else "--memory_ladder, or "
                advice = f"try {ladder}a smaller batch_size or data.resolution, and --resume"
                raise MemoryError(f"out of memory: {advice} ({error})") from error
            raise
        if run.num_done < run.num_steps or (request.world.size == 1 and stop.is_set()):
            return _stopped(run, report)
        try:
            summary = run.finish()
        except KeyboardInterrupt:
            return _stopped(run, report)
        if run.folder is not None:
            report.done(summary, run.folder.path)
    return 0


def _stopped(run: Run, report: Report) -> int:
    """Reports on the steps that are done; returns the exit code."""
    run.report_so_far()
    if run.folder is not None:
        report.stopped(run.num_done, run.num_steps)
    return INTERRUPTED


def _training(run: Run) -> Training:
    order = run.job.dataset.order
    steps_per_epoch = sum(map(len, order.classes)) / order.group_size
    pace = Pace(run.num_steps, run.num_done)
    return Training(pace, earlier=run.job.done, steps_per_epoch=steps_per_epoch)


def _save(run: Run, report: Report) -> None:
    """Keeps the LoRA of the steps done, if any, and says where."""
    paths = run.save()
    if paths:
        report.saved(run.num_done, paths)


def _save_if_possible(run: Run, report: Report) -> None:
    """After an error, which is to be told, not another that follows from it."""
    try:
        _save(run, report)
    except (OSError, RuntimeError, MemoryError, ValueError) as error:
        log.debug("no LoRA of the last step", exc_info=error)
