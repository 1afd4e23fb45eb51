"""How help is laid out: headings, names and what they mean, as wide as the terminal; in a pipe nothing is wrapped."""

import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from cyclopts.help import HelpEntry, HelpPanel
from rich.console import Console, ConsoleOptions

WIDEST = 100  # longer lines are hard to read
NARROW = 60  # below it, what a name means stands under it
LEFT = 28  # longer names have their meaning under them too
Rows = Sequence[tuple[str, str]]


def width_of_output() -> int | None:
    """Columns of the terminal; None for a pipe or a file, where lines may be of any length."""
    if sys.stdout is None or not sys.stdout.isatty():  # None: the program was started without one
        return None
    return shutil.get_terminal_size().columns


def section(heading: str, rows: Rows, width: int | None) -> str:
    """A heading and below it names with their meanings, in two columns where there is room."""
    left = max((len(name) for name, _ in rows if len(name) <= LEFT), default=0)
    lines = [f"{heading}:"]
    for name, meaning in rows:
        if width is not None and (width < NARROW or len(name) > LEFT):
            lines += [f"  {name}", *paragraph(meaning, width, indent=6)]
        else:
            first, *more = paragraph(meaning, width, indent=left + 4) or [""]
            lines += [f"  {name:{left}}  {first.lstrip()}".rstrip(), *more]
    return "\n".join(lines)


def paragraph(text: str, width: int | None, indent: int = 0, hanging: int = 0) -> list[str]:
    """A text's lines; those after the first are indented by `hanging` more."""
    if width is None:
        return [" " * indent + text] if text else []
    margin = " " * indent
    columns = max(min(width, WIDEST), indent + 20)
    after = margin + " " * hanging
    return textwrap.wrap(
        text, columns, initial_indent=margin, subsequent_indent=after, break_long_words=False, break_on_hyphens=False
    )


class HelpPages:
    """The help of the commands, in the layout of `train --help`."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        rows = [(_name(entry), _meaning(entry)) for entry in panel.entries]
        if rows:
            print(section(_plain(panel.title), rows, width_of_output()), end="\n\n")

    def render_usage(self, console: Console, options: ConsoleOptions, usage: Any) -> None:
        print("\n".join(paragraph(f"Usage: {_plain(usage)}", width_of_output())), end="\n\n")

    def render_description(self, console: Console, options: ConsoleOptions, description: Any) -> None:
        for text in re.split(r"\n\s*\n", _plain(description)):
            if text:
                print("\n".join(paragraph(" ".join(text.split()), width_of_output())), end="\n\n")


def _name(entry: HelpEntry) -> str:
    return ", ".join(entry.display_labels_with_metavar)


def _meaning(entry: HelpEntry) -> str:
    more = [
        f"one of {', '.join(entry.choices)}" if entry.choices else "",
        f"default {entry.default}" if entry.default not in (None, "False") else "",
        "must be given" if entry.required else "",
    ]
    return "; ".join(part for part in (_plain(entry.description), *more) if part)


def _plain(text: Any) -> str:
    """The words of what rich would show."""
    console = Console(width=10_000, color_system=None)
    with console.capture() as capture:
        console.print(text, end="", soft_wrap=True)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
