"""A run's folder: who may write in it, what is in it from the start, and what becomes of it when it is deleted."""

import itertools
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lorasmith.config.schema import Checkpoints, Config
from lorasmith.distributed.torchrun import launch
from lorasmith.storage.atomic import make_folder, remove_partial, write_whole
from lorasmith.storage.folder_lock import PATIENCE, FolderLock
from lorasmith.training.checkpoints import SUBFOLDER, CheckpointFolder

log = logging.getLogger(__name__)

LAUNCH = ".launch"


class RunFolder:
    """The folder of a run, made or found, and locked while the run has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = FolderLock(path)
        self.is_new = not path.exists()
        self.is_made = False  # by this run, and not replaced since
        self.toml = ""

    @property
    def lora_path(self) -> Path:
        return self.path / "lora.safetensors"

    def expert_path(self, name: str) -> Path:
        """Of what one expert has of the LoRA."""
        return self.path / f"lora_{name}.safetensors"

    @property
    def toml_path(self) -> Path:
        return self.path / "run.toml"

    @property
    def steps_path(self) -> Path:
        return self.path / "steps.jsonl"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / SUBFOLDER

    @property
    def samples_path(self) -> Path:
        return self.path / "samples"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Locks a folder that is there, and lets go of it at the end; ValueError where another run has it.

        A folder that was made in between is taken away again where an error comes before there is a step to keep.
        """
        if not self.is_new:
            self.lock.acquire(PATIENCE if _is_of_this_launch(self.path) else 0.0)
        try:
            yield
        except BaseException:
            if self.is_made and self.lock.is_intact and not self._has_steps():  # else it is another's by now
                self.lock.release()
                shutil.rmtree(self.path, ignore_errors=True)
            raise
        finally:
            self.lock.release()

    def refuse_to_lose(self, steps: Sequence[int]) -> None:
        """ValueError where a run that would start anew has left a LoRA or checkpoints, of these steps, here."""
        has_lora = self.lora_path.exists()
        if has_lora or steps:
            found = "none is" if steps else "it holds none"
            advice = f" (lora.safetensors can be continued: --existing_lora {self.lora_path})" if has_lora else ""
            raise ValueError(
                f"{self.path} must hold a sound checkpoint to resume from, but {found}: nothing there was changed; "
                f"begin again with another --output{advice}"
            )

    def begin(self, toml: str) -> None:
        """Makes and locks the folder where it is not there, and writes run.toml."""
        self.toml = toml
        if self.is_new:
            try:
                make_folder(self.path, exist_ok=False)
            except FileExistsError:
                raise ValueError(_taken(self.path)) from None
            self._lock_new()
            self.is_made = True
        remove_partial((self.path, self.checkpoints_path, self.samples_path))
        self._write_first_files()

    def made_again(self) -> bool:
        """Whether the folder had been deleted; then it is there again, locked, with run.toml alone.

        ValueError where another has taken its place.
        """
        if self.lock.is_intact and self.toml_path.exists():
            return False
        if not self.lock.made_again():
            log.warning("%s was deleted: writing it again", self.toml_path)
        self._write_first_files()
        return True

    def _lock_new(self) -> None:
        """Locks the folder that was just made; takes it away where the disk has no room for a lock."""
        try:
            self.lock.acquire()
        except OSError:
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    def _write_first_files(self) -> None:
        found = launch()
        if found is not None:  # before what makes it a run folder
            write_whole(self.path / LAUNCH, found.encode())
        write_whole(self.toml_path, self.toml.encode())

    def _has_steps(self) -> bool:
        return self.checkpoints_path.is_dir() or (self.steps_path.is_file() and self.steps_path.stat().st_size > 0)


def chosen_folder(config: Config, *, is_resuming: bool) -> Path:
    """The folder that a run is to have: a new one or, to resume, the one that the last run had.

    A group that torchrun starts again resumes the run that it made before.

    ValueError where it cannot have it.
    """
    assert config.data.folder is not None
    pictures = config.data.folder.resolve()
    last = config.output or numbered_folder(pictures.name, is_there=True)
    if is_resuming or _is_of_this_launch(last):
        path = last
        if not path.exists():
            raise ValueError(f"there is no run to resume: {path} does not exist; without --resume a new run begins")
        if not _is_run_folder(path):
            raise ValueError(f"output must be a run folder to resume, got {path} without run.toml")
    else:
        path = config.output or numbered_folder(pictures.name, is_there=False)
        if path.exists():
            raise ValueError(_taken(path))
    if path.resolve().is_relative_to(pictures):
        raise ValueError(f"output must be outside the picture folder, lest its plots be trained on, got {path}")
    return path


def usable_anywhere(config: Config) -> Config:
    """The config with its paths from the root, so that run.toml means the same in any working folder."""
    data = {name: path.absolute() for name, path in config.data if isinstance(path, Path)}
    own = {name: path.absolute() for name, path in config if isinstance(path, Path)}
    sources = {"model": config.model, "encoders": config.encoders}  # paths or hub ids
    paths = {name: Path(source).expanduser() for name, source in sources.items() if source is not None}
    own |= {name: str(path.absolute()) for name, path in paths.items() if path.exists()}
    return config.model_copy(update={**own, "data": config.data.model_copy(update=data)})


def _taken(path: Path) -> str:
    return f"output must be a folder that does not exist yet, unless --resume is given, got {path}"


def numbered_folder(name: str, *, is_there: bool) -> Path:
    """Of runs/NAME, runs/NAME-2 and so on, the first that is not there, or the one before it, if there is one."""
    last = None
    for number in itertools.count(1):
        path = Path("runs", name if number == 1 else f"{name}-{number}")
        if not path.exists():
            return last if is_there and last is not None else path
        last = path
    raise AssertionError  # the count does not end


def _is_of_this_launch(path: Path) -> bool:
    """Whether the torchrun that started this process made the run there."""
    try:
        return launch() is not None and (path / LAUNCH).read_text() == launch()
    except OSError:
        return False


def _is_run_folder(path: Path) -> bool:
    """Whether a run was there, or was killed before it had written anything."""
    if not path.is_dir():
        return False
    is_begun = (path / "run.toml").is_file() or bool(CheckpointFolder(path / SUBFOLDER, Checkpoints()).steps())
    return is_begun or all(entry.name.startswith(".") for entry in path.iterdir())
