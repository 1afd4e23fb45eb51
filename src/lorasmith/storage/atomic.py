"""Files that are written whole or not at all, and read in pieces."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial"
PIECE = 2**24  # bytes


def write_whole(path: Path, *content: bytes | memoryview) -> None:
    """All of the content, on disk once this returns, or what was there before; OSError that names the file."""
    write_pieces(path, content)


def write_pieces(path: Path, content: Iterable[bytes | memoryview]) -> None:
    """The same of pieces that are made one after another; an error that makes them raise leaves what was there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with errors_name(path):
            with temporary.open("wb") as file:
                for piece in content:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            flush_folder(path.parent)
    finally:
        with suppress(OSError):  # a read-only disk refuses even where there is nothing to remove
            temporary.unlink(missing_ok=True)


def copied(path: Path, begin: int, end: int) -> Iterator[bytes]:
    """The bytes of a file from one place up to another, in pieces; ValueError where it ends before."""
    with errors_name(path, "read"), path.open("rb") as file:
        file.seek(begin)
        while begin < end:
            piece = file.read(min(PIECE, end - begin))
            if not piece:
                raise ValueError(f"{path} must not change while it is read, but it ends at byte {begin} of {end}")
            yield piece
            begin += len(piece)


def make_folder(path: Path, *, exist_ok: bool = True) -> None:
    """With those above it; OSError that names it, FileExistsError where something is there that must not be."""
    with errors_name(path):
        path.mkdir(parents=True, exist_ok=exist_ok)


@contextmanager
def errors_name(path: Path, verb: str = "write") -> Iterator[None]:
    """An OSError in here becomes one of its kind that names the path."""
    try:
        yield
    except OSError as error:
        raise type(error)(f"cannot {verb} {path}: {error.strerror or error}") from error


def flush_folder(folder: Path) -> None:
    """Brings a folder's names to disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_partial(folders: Iterable[Path]) -> None:
    """Removes what writers that were killed left in these folders; no other may be writing there."""
    for folder in folders:
        for path in folder.glob(f".*{PARTIAL}"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
