"""What long work reports of itself, and when."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorasmith.progress import SILENT, Advance, tracked


class Heard:
    """Notes what is reported."""

    def __init__(self) -> None:
        self.reports: list[object] = []

    @contextmanager
    def stage(self, what: str, total: int | None = None) -> Iterator[Advance]:
        self.reports.append((what, total))
        yield self.reports.append
        self.reports.append("done")

    def wrote(self, what: str, path: Path) -> None:
        self.reports.append((what, path))


def test_an_item_is_reported_when_it_is_dealt_with() -> None:
    heard = Heard()
    for item in tracked("ab", "reading", heard, 2):
        heard.reports.append(item)
    assert heard.reports == [("reading", 2), "a", 1, "b", 1, "done"]


def test_without_a_watcher_items_pass_through() -> None:
    assert list(tracked(iter("ab"), "reading", SILENT)) == ["a", "b"]
