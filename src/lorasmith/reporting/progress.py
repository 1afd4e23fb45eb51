"""How far long work has come, reported to whoever watches it. No torch: the first report precedes its import."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal, Protocol, TypeVar

T = TypeVar("T")
Advance = Callable[[int], None]
MEGABYTE = 10**6


class Progress(Protocol):
    """Watches long work, stage by stage; a stage may be opened inside another."""

    def stage(self, what: str, total: int | None = None, unit: str = "") -> AbstractContextManager[Advance]:
        """A stage of `total` pieces of work (None: unknown); its value is called with how many more are done.

        what: stands in front of a bar, so it reads as "encoding pictures". unit: what is counted, if not such things.
        """
        ...

    def wrote(self, what: Literal["checkpoint", "sample"], path: Path) -> None:
        """A file is there that the run goes on after."""
        ...


def unwatched(count: int) -> None:
    """Nobody is told that more pieces of work are done."""


class Silent:
    """Nobody watches."""

    def stage(self, what: str, total: int | None = None, unit: str = "") -> AbstractContextManager[Advance]:
        return nullcontext(unwatched)

    def wrote(self, what: Literal["checkpoint", "sample"], path: Path) -> None:
        pass


SILENT = Silent()


def tracked(items: Iterable[T], what: str, progress: Progress, total: int | None = None) -> Iterator[T]:
    """The items, `total` in number where that is known; each is reported as done when the next one is asked for."""
    with progress.stage(what, total) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def megabytes(what: str, num_bytes: int, progress: Progress) -> Iterator[Advance]:
    """A stage of this many bytes, shown in megabytes; its value is called with how many more bytes are done."""
    done = 0
    with progress.stage(what, num_bytes // MEGABYTE, "MB") as advance:

        def take(count: int) -> None:
            nonlocal done
            before, done = done, min(done + count, num_bytes)
            advance(done // MEGABYTE - before // MEGABYTE)

        yield take
