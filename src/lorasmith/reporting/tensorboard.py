"""Steps as events of TensorBoard."""

import importlib.util
from pathlib import Path

from lorasmith.errors import needs_extra
from lorasmith.storage.atomic import errors_name
from lorasmith.types import Step


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
