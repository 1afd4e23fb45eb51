"""A folder of pictures -> samples with captions and repeats, and one log line for ignored files."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lorasmith.data.captions import captions_in, lines, text_of
from lorasmith.data.images import PICTURE_SUFFIXES, opener
from lorasmith.data.listing import CaptionLines, Listing, Reason, listed, named, normal
from lorasmith.types import Example

MAX_REPEATS = 10_000
NO_ROWS = Reason("table without captions by file_name", "tables without captions by file_name")
UNUSED = Reason("table for pictures with caption files", "tables for pictures with caption files")

log = logging.getLogger(__name__)


def examples(folder: Path, caption_lines: CaptionLines = "join") -> list[Example]:
    """The pictures in folder and its subfolders, sorted by relative path; links are followed.

    The caption of NAME.png is in NAME.txt, else NAME.caption, else in the metadata.jsonl or metadata.csv of its folder
    or a parent. Pictures in a folder named N_name, as in kohya's trainer, are repeated N times, and those without a
    caption get the caption name. The lines of a caption are joined, or only the first is used. ValueError if there are
    no pictures, for one that needs an extra, for a caption that is not text, and for 0 repeats.
    """
    if not folder.exists():
        raise ValueError(f"picture folder {folder} does not exist")
    if not folder.is_dir():
        raise ValueError(f"picture folder {folder} must be a folder, it is a file")
    listing = listed(folder)
    if not listing.pictures:
        found = listing.said or "nothing else"
        raise ValueError(f"no pictures ({' '.join(PICTURE_SUFFIXES)}) in or below {folder}: found {found}")
    for suffix in sorted({path.suffix for path in listing.pictures}):
        opener(suffix)

    texts = _from_tables(folder, listing)
    sources = {path: path for path in texts} | listing.captions
    texts |= {path: lines(text_of(folder / caption)) for path, caption in listing.captions.items()}
    found_examples: list[Example] = []
    without_caption: list[str] = []
    num_empty = 0
    for path in listing.pictures:
        repeats, caption = _repeats_and_name(path)
        if (text := texts.get(path)) is not None:
            caption = " ".join(text if caption_lines == "join" else text[:1])
            num_empty += not caption and path in listing.captions
        if not caption:
            without_caption.append(path.as_posix())
        found_examples.append(Example(folder / path, caption, repeats))
    done = "joined into one" if caption_lines == "join" else "of which the first is read"
    of_several_lines = sorted({sources[path].as_posix() for path in texts if len(texts[path]) > 1})
    tell_of(f"captions of several lines in {folder}, {done} (data.caption_lines)", of_several_lines, logging.INFO)
    counts = Counter(listing.captions.values())
    sharing = [path.as_posix() for path, caption in listing.captions.items() if counts[caption] > 1]
    tell_of(f"pictures in {folder} that share a caption file, as only their suffixes differ", sharing)
    empty = f", {num_empty} of them with an empty caption file" if num_empty else ""
    tell_of(f"pictures without a caption in {folder}{empty}", without_caption)
    if listing.left_out:
        log.log(logging.INFO if listing.is_harmless else logging.WARNING, "left out of %s: %s", folder, listing.said)
    return found_examples


def _from_tables(folder: Path, listing: Listing) -> dict[Path, list[str]]:
    """{picture without a caption file: the lines of its caption in a table}; tables that serve none are left out."""
    pictures = {normal(path.as_posix()): path for path in listing.pictures}
    found: dict[Path, list[str]] = {}
    for table in sorted(listing.tables, key=lambda path: len(path.parts)):  # the nearest comes last
        captions = captions_in(folder / table)
        named_here = {normal((table.parent / name).as_posix()): text for name, text in captions.items()}
        known = {pictures[name]: lines(text) for name, text in named_here.items() if name in pictures}
        tell_of(f"rows of {folder / table} that name no picture", sorted(named_here.keys() - pictures.keys()))
        unused = known.keys() & listing.captions.keys()
        found |= {path: text for path, text in known.items() if path not in unused}
        if not captions or (known and unused == known.keys()):
            listing.leave_out(UNUSED if captions else NO_ROWS, [table])
    return found


def _repeats_and_name(path: Path) -> tuple[int, str]:
    """(N, name) of the nearest folder N_name that the picture at this relative path lies in, or else (1, "")."""
    for parent in path.parents:
        if match := re.fullmatch(r"([0-9]+)_(.*)", parent.name, re.DOTALL):
            repeats = int(match[1])
            if not 1 <= repeats <= MAX_REPEATS:
                raise ValueError(f"repeats must be 1 to {MAX_REPEATS}, got {repeats} from the name of folder {parent}")
            return repeats, match[2]
    return 1, ""


def tell_of(what: str, names: Sequence[str], level: int = logging.WARNING) -> None:
    """Logs one line with the count and the first three names; nothing for no names."""
    if names:
        log.log(level, "%s: %d (%s)", what, len(names), named(names))
