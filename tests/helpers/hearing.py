"""What long work reports of itself, noted down."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorasmith.reporting.progress import Advance


class Heard:
    """Notes what is reported, in its order."""

    def __init__(self) -> None:
        self.reports: list[Any] = []

    @contextmanager
    def stage(self, what: str, total: int | None = None, unit: str = "") -> Iterator[Advance]:
        self.reports.append((what, total, unit))
        yield self.reports.append
        self.reports.append("done")

    def wrote(self, what: str, path: Path) -> None:
        self.reports.append((what, path))
