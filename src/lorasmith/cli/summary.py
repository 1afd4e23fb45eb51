"""What is said of a training when it has come to its end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from lorasmith.cli.terminal import show_table, stdout
from lorasmith.reporting.pace import counted


class Report(Protocol):
    """Hears what has become of a run."""

    def saved(self, steps: int, paths: Sequence[Path]) -> None:
        """The LoRA's file, and those of its parts for one expert each."""
        ...

    def stopped(self, done: int, total: int) -> None: ...

    def done(self, summary: Sequence[tuple[str, str]], folder: Path) -> None: ...


class Printed:
    """On stdout."""

    def saved(self, steps: int, paths: Sequence[Path]) -> None:
        for number, path in enumerate(paths):
            whole = f"LoRA of {counted(steps, 'step')}"
            stdout.line(f"{'its part for one expert' if number else whole}: {path}")

    def stopped(self, done: int, total: int) -> None:
        stdout.line(f"stopped after step {done} of {total}; continue with --resume")

    def done(self, summary: Sequence[tuple[str, str]], folder: Path) -> None:
        show_table(summary)
        stdout.line(f"run folder: {folder}")
