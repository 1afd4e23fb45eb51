"""One run at a time in a folder: real processes that hold, end, are killed, and folders that vanish under them."""

import errno
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lorasmith.storage.folder_lock import HOLDER, LOCK, FolderLock

HOLD = """
import os, sys
from pathlib import Path
from lorasmith.storage.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.acquire()
"""
UNTIL_TOLD = """
print("held", flush=True)
sys.stdin.readline()
lock.release()
print("released", flush=True)
sys.stdin.readline()
"""
IN_A_FORK = """
if os.fork() == 0:
    lock.release()
    print("released", flush=True)
sys.stdin.readline()
"""
READ_ONLY = """
mount -t tmpfs none "$1" && mkdir "$1/cats" && {} && mount -o remount,ro "$1" && exec "$2" -c "$3" "$1/cats"
"""
deletes_open_files = pytest.mark.skipif(os.name == "nt", reason="Windows deletes no folder with an open file in it")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cats").mkdir()
    return tmp_path / "cats"


@contextmanager
def process(program: str, folder: Path, says: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has said this; killed at the end."""
    command = [sys.executable, "-c", program, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        try:
            await_line(started, says)
            yield started
        finally:
            started.kill()


def await_line(started: subprocess.Popen[str], says: str) -> None:
    assert started.stdout is not None
    assert started.stdout.readline() == f"{says}\n"


def tell(started: subprocess.Popen[str]) -> None:
    assert started.stdin is not None
    started.stdin.write("\n")
    started.stdin.flush()


def refusal(folder: Path, pid: int) -> str:
    return (
        f"^run folder {re.escape(str(folder))} is in use by process {pid} on {re.escape(platform.node())} "
        r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC: stop that run or choose another output$"
    )


def can_be_locked(folder: Path) -> bool:
    lock = FolderLock(folder)
    lock.acquire()
    lock.release()
    return not (folder / HOLDER).exists()


def test_a_second_process_is_refused_until_the_first_lets_go(folder: Path) -> None:
    lock = FolderLock(folder)
    with process(HOLD + UNTIL_TOLD, folder, "held") as holder:
        for patience in (0.0, 0.1):
            with pytest.raises(ValueError, match=refusal(folder, holder.pid)):
                lock.acquire(patience)
        assert not lock.is_intact
        lock.release()
        assert (folder / HOLDER).exists()
        tell(holder)
        await_line(holder, "released")
        assert not (folder / HOLDER).exists()
        lock.acquire()
        assert lock.is_intact
    with pytest.raises(ValueError, match=refusal(folder, os.getpid())):
        FolderLock(folder).acquire()
    lock.release()
    lock.release()
    assert not lock.is_intact
    assert [p.name for p in folder.iterdir()] == [LOCK]


def test_a_killed_holder_leaves_no_lock(folder: Path) -> None:
    with process(HOLD + UNTIL_TOLD, folder, "held") as holder:
        holder.kill()
        holder.wait()
        assert (folder / HOLDER).exists()
        assert can_be_locked(folder)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fork")
def test_a_fork_of_the_holder_has_no_part_in_the_lock(folder: Path) -> None:
    with process(HOLD + IN_A_FORK, folder, "released") as holder:
        with pytest.raises(ValueError, match=refusal(folder, holder.pid)):
            FolderLock(folder).acquire()
        holder.kill()
        holder.wait()
        assert can_be_locked(folder)  # with the fork still there


def test_patience_waits_for_a_holder_that_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = FolderLock(folder)
    with process(HOLD + UNTIL_TOLD, folder, "held") as holder:

        def end_holder(seconds: float) -> None:
            holder.kill()
            holder.wait()

        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", end_holder)
            lock.acquire(patience=60.0)
        assert holder.returncode is not None
        assert lock.is_intact
    lock.release()


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"pid": 1}', b'{"pid": 1, "host": "a", "since": "soon"}'])
def test_a_holder_that_cannot_be_read_is_another_process(folder: Path, content: bytes | None) -> None:
    lock = FolderLock(folder)
    lock.acquire()
    (folder / HOLDER).unlink()
    if content is not None:
        (folder / HOLDER).write_bytes(content)
    with pytest.raises(ValueError, match="is in use by another process: stop that run"):
        FolderLock(folder).acquire()
    lock.release()


@deletes_open_files
def test_a_deleted_folder_can_be_locked_again(folder: Path) -> None:
    lock = FolderLock(folder)
    lock.acquire()
    for _ in range(2):
        shutil.rmtree(folder)
        assert not lock.is_intact
        folder.mkdir()
        assert not lock.is_intact
        (folder / LOCK).touch()
        assert not lock.is_intact
        lock.release()
        lock.acquire()
        assert lock.is_intact
        with pytest.raises(ValueError, match=refusal(folder, os.getpid())):
            FolderLock(folder).acquire()
    lock.release()


@deletes_open_files
def test_what_another_run_has_put_in_its_place_is_left_alone(folder: Path) -> None:
    lock = FolderLock(folder)
    lock.acquire()
    folder.rename(folder.with_name("moved"))
    assert not lock.is_intact
    folder.mkdir()
    with process(HOLD + UNTIL_TOLD, folder, "held") as holder:
        assert not lock.is_intact
        lock.release()
        assert (folder / HOLDER).exists()
        with pytest.raises(ValueError, match=refusal(folder, holder.pid)):
            lock.acquire()
    folder.rename(folder.with_name("file"))
    folder.touch()
    assert not lock.is_intact
    lock.release()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    fail_to_lock(monkeypatch, code)
    lock = FolderLock(folder)
    lock.acquire()
    expected = f"run folder {folder} cannot be locked ({os.strerror(code)}): start no other run in it"
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [expected]
    assert lock.is_intact
    (folder / HOLDER).touch()
    lock.release()
    assert (folder / HOLDER).exists()  # it is not ours
    lock.acquire()
    shutil.rmtree(folder)
    assert not lock.is_intact
    lock.release()


def test_a_lock_that_fails_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_to_lock(monkeypatch, errno.EIO)
    lock = FolderLock(folder)
    with pytest.raises(OSError, match=f"^cannot lock {re.escape(str(folder))}: {os.strerror(errno.EIO)}$"):
        lock.acquire()
    monkeypatch.undo()
    lock.acquire()
    fail_to_lock(monkeypatch, errno.EIO)
    lock.release()
    assert not lock.is_intact


def fail_to_lock(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", flock)


def test_there_must_be_a_folder(folder: Path) -> None:
    (folder / "file").touch()
    for path in (folder / "file", folder / "none", folder / "none" / "cats"):
        with pytest.raises(OSError, match=f"^cannot lock {re.escape(str(path))}: no folder is there$"):
            FolderLock(path).acquire()
    assert [p.name for p in folder.iterdir()] == ["file"]
    (folder / LOCK).mkdir()
    with pytest.raises(OSError, match=f"^cannot lock {re.escape(str(folder))}: "):
        FolderLock(folder).acquire()


def test_a_holder_file_that_cannot_be_written_ends_the_hold(folder: Path) -> None:
    (folder / HOLDER).mkdir()
    lock = FolderLock(folder)
    with pytest.raises(OSError, match=f"^cannot write {re.escape(str(folder / HOLDER))}: "):
        lock.acquire()
    assert not lock.is_intact
    (folder / HOLDER).rmdir()
    assert can_be_locked(folder)


@pytest.mark.parametrize("before", ["true", 'touch "$1/cats/.lock"'])
def test_a_read_only_file_system_is_said(tmp_path: Path, before: str) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mounts of our own here")
    script = ["unshare", "-rm", "sh", "-c", READ_ONLY.format(before), "sh", str(tmp_path), sys.executable, HOLD]
    ended = subprocess.run(script, capture_output=True, text=True)
    assert ended.stderr.endswith(f"OSError: cannot lock {tmp_path / 'cats'}: Read-only file system\n")
