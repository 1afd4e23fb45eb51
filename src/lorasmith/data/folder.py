"""A folder of pictures -> samples: their captions and repeats, and one line for what is left out."""

import codecs
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from lorasmith.data.listing import CaptionLines, listed, named
from lorasmith.data.pictures import PICTURE_SUFFIXES, opener
from lorasmith.types import Example

MAX_REPEATS = 10_000

log = logging.getLogger(__name__)


def examples(folder: Path, caption_lines: CaptionLines = "join") -> list[Example]:
    """The pictures below folder, sorted by relative path; links are followed.

    A picture NAME.png has the caption in NAME.txt or else NAME.caption. Pictures in a folder named N_name, as kohya's
    trainer has it, are repeated N times, and name is the caption of those without a caption file. Of a caption of
    several lines, all are joined into one, or the first is taken.
    ValueError without pictures, for one that needs an extra, for a caption that is no text, and for 0 repeats.
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

    lines = {path: _lines(folder / path) for path in listing.captions.values()}
    found_examples: list[Example] = []
    without_caption: list[str] = []
    num_empty = 0
    for path in listing.pictures:
        repeats, caption = _repeats_and_name(path)
        caption_path = listing.captions.get(path.with_suffix(""))
        if caption_path is not None:
            caption = " ".join(lines[caption_path] if caption_lines == "join" else lines[caption_path][:1])
            num_empty += not caption
        if not caption:
            without_caption.append(path.as_posix())
        found_examples.append(Example(folder / path, caption, repeats))
    done = "joined into one" if caption_lines == "join" else "of which the first is read"
    of_several_lines = sorted(path.as_posix() for path in lines if len(lines[path]) > 1)
    tell_of(f"captions of several lines in {folder}, {done} (data.caption_lines)", of_several_lines, logging.INFO)
    empty = f", {num_empty} of them with an empty caption file" if num_empty else ""
    tell_of(f"pictures without a caption in {folder}{empty}", without_caption)
    if listing.left_out:
        log.log(logging.INFO if listing.is_harmless else logging.WARNING, "left out of %s: %s", folder, listing.said)
    return found_examples


def _repeats_and_name(path: Path) -> tuple[int, str]:
    """(N, name) of the nearest folder N_name that the picture at this relative path lies in, or else (1, "")."""
    for parent in path.parents:
        if match := re.fullmatch(r"([0-9]+)_(.*)", parent.name, re.DOTALL):
            repeats = int(match[1])
            if not 1 <= repeats <= MAX_REPEATS:
                raise ValueError(f"repeats must be 1 to {MAX_REPEATS}, got {repeats} from the name of folder {parent}")
            return repeats, match[2]
    return 1, ""


def _lines(path: Path) -> list[str]:
    """The lines of a caption file that are not empty: UTF-8, or UTF-16 with its mark."""
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    try:
        text = content.decode(encoding).removeprefix("\ufeff")  # not utf-8-sig: its errors count from behind the mark
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#04x} at offset {error.start}"
        raise ValueError(f"caption {path} must be UTF-8, got {got}") from None
    if "\0" in text:
        raise ValueError(f"caption {path} must be UTF-8, got a NUL at character {text.index(chr(0))}")
    return [stripped for line in text.splitlines() if (stripped := line.strip())]


def tell_of(what: str, names: Sequence[str], level: int = logging.WARNING) -> None:
    """Logs one line with the count and the first three names; nothing for no names."""
    if names:
        log.log(level, "%s: %d (%s)", what, len(names), named(names))
