"""One run at a time in a run folder: a lock that the operating system keeps, and a note beside it that says whose."""

import errno
import logging
import os
import platform
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import AwareDatetime, BaseModel

from lorasmith.storage.atomic import make_folder, write_whole

log = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds for the processes of torchrun's last start to be gone
LOCK = ".lock"
HOLDER = ".holder.json"  # a file of its own: Windows lets nobody read a locked one
# what file systems without locks answer; EINVAL stands for Windows's ERROR_NOT_SUPPORTED
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


class Holder(BaseModel, frozen=True):
    """For people: nothing is decided by it, and it outlives a process that was killed."""

    pid: int
    host: str
    since: AwareDatetime

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


class FolderLock:
    """This process's hold on a run folder, which the operating system ends with the process, however it ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: FileLock | None = None
        self._file: os.stat_result | None = None  # the lock file that is held
        self._place: os.stat_result | None = None  # the folder that it is in

    def acquire(self, patience: float = 0.0) -> None:
        """Waits up to `patience` seconds for a holder to end; ValueError that names it, OSError that names the path.

        Where the file system has no locks it goes on without, and says so.
        """
        assert self._file is None
        if not self.folder.is_dir():  # FileLock would make it
            raise OSError(f"cannot lock {self.folder}: no folder is there")
        self._place = self.folder.stat()
        path = self.folder / LOCK
        lock = FileLock(path, thread_local=False, preserve_lock_file=True, on_acquired=self._note)
        try:
            lock.acquire(patience)
        except Timeout:
            raise ValueError(
                f"run folder {self.folder} is in use by {self._holder()}: stop that run or choose another output"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise OSError(f"cannot lock {self.folder}: {error.strerror or error}") from error
            log.warning("run folder %s cannot be locked (%s): start no other run in it", self.folder, error.strerror)
            self._file = path.stat()
            return
        self._lock = lock
        try:
            holder = Holder(pid=os.getpid(), host=platform.node(), since=datetime.now(UTC))
            write_whole(self.folder / HOLDER, holder.model_dump_json().encode())
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Harmless where nothing is held. The lock file stays, as others may have opened it already."""
        if self._lock is not None:
            with suppress(OSError):
                if self._lock.is_locked and self.is_intact:  # a folder that replaced ours may be another run's
                    (self.folder / HOLDER).unlink(missing_ok=True)
            with suppress(OSError):  # a network drive that is gone; the hold ends with the process then
                self._lock.release()
        self._lock = self._file = None

    def made_again(self) -> bool:
        """Whether the folder had been deleted, or is just being deleted; it is there again, and held.

        ValueError where another folder has taken its place, which is left alone; OSError that names the path.
        """
        if self.is_intact:
            return False
        self.release()
        if self._is_replaced():
            raise ValueError(f"run folder {self.folder} was replaced by another, which is left alone")
        log.warning("run folder %s was deleted: making it again", self.folder)
        make_folder(self.folder)
        self.acquire()
        return True

    @property
    def is_intact(self) -> bool:
        """False once the folder was deleted or replaced, and where it is not held."""
        try:
            there = (self.folder / LOCK).stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return self._file is not None and os.path.samestat(there, self._file)

    def _is_replaced(self) -> bool:
        """Whether something else is there now, not what is left of the folder while it is being deleted."""
        if not self.folder.is_dir() or all(path.name.startswith(".") for path in self.folder.iterdir()):
            return False
        is_left = self._place is not None and os.path.samestat(self.folder.stat(), self._place)
        return not is_left or (self.folder / LOCK).exists()

    def _note(self, descriptor: int) -> None:
        self._file = os.fstat(descriptor)

    def _holder(self) -> str:
        try:
            return str(Holder.model_validate_json((self.folder / HOLDER).read_bytes()))
        except (OSError, ValueError):
            return "another process"
