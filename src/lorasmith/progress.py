"""How far long work has come, reported to whoever watches it. No torch: the first report precedes its import."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal, Protocol, TypeVar

T = TypeVar("T")
Advance = Callable[[int], None]


class Progress(Protocol):
    """Watches long work, stage by stage; a stage may be opened inside another."""

    def stage(self, what: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """A stage of `total` pieces of work (None: unknown); its value is called with how many more are done.

        what: stands in front of a bar, so it reads as "encoding pictures".
        """
        ...

    def wrote(self, what: Literal["checkpoint", "sample"], path: Path) -> None:
        """A file is there that the run goes on after."""
        ...


def unwatched(count: int) -> None:
    """Nobody is told that more pieces of work are done."""


class Silent:
    """Nobody watches."""

    def stage(self, what: str, total: int | None = None) -> AbstractContextManager[Advance]:
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
