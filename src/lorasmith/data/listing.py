"""What a folder of pictures holds: the samples, their captions, and everything else, by the reason it is left out."""

import os
import re
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lorasmith.data import captions as caption_files
from lorasmith.data.images import PICTURE_SUFFIXES

CAPTION_SUFFIXES = (".txt", ".caption")  # in order of preference
CaptionLines = Literal["join", "first"]

SYSTEM = re.compile(
    r"\._.*|\.ds_store|\.localized|\.apple.*|\.trash.*|\.spotlight-.*|\.fseventsd|\.temporaryitems|__macosx|icon\r"
    r"|thumbs\.db.*|ehthumbs.*\.db|desktop\.ini|\$recycle\.bin|system volume information"
    r"|@eadir|#recycle|\.@__thumb|\.thumbnails|\.directory|lost\+found|\.nfs.*"
    r"|\.ipynb_checkpoints|\.git.*|\.hg|\.svn|\.cache|\.idea|\.vscode|\.venv"
)
"""What systems, desktops and editors leave in folders, thumbnails included, in lower case: skipped silently."""
TABLES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
SIDECARS = (".yaml", ".yml", ".xml", ".xmp", ".md", ".html", ".rtf", ".tags", ".cap", ".captions", ".text", ".prompt")
"""Where other programs keep captions: in tables, or in files that are called as the picture is."""
_CONTROL = (
    r"masks?|alpha|matte|trimap|cond|conditioning|control|canny|openpose|lineart|softedge|mlsd|hed"
    r"|depth(?:[-_ ]?map)?|normal[-_ ]?map|seg(?:mentation)?[-_ ]?map"
)
MASK = re.compile(rf"(.+)[-_. ](?:{_CONTROL})", re.IGNORECASE)
MASK_BEFORE = re.compile(r"(?:mask|depth)[-_. ](.+)", re.IGNORECASE)
MASK_OF_ONETRAINER = re.compile(r".+-(?:masklabel|condlabel)", re.IGNORECASE)
MASK_FOLDER = re.compile(
    r"(?:(?:(?:loss|alpha)[-_ ])?masks?|conditionings?|controls?|depths?|canny|openpose)"
    r"(?:[-_ ](?:data|maps?|images?))?",
    re.IGNORECASE,
)
RUN = ("run.toml", "steps.jsonl")
"""What every run folder of this program holds."""
OF_RUN = re.compile(
    r"run\.toml|steps\.jsonl|report\.html|lora(?:_\w+)?\.safetensors|(?:before_after|loss|norms)\.png"
    r"|samples/step-\d+\.png|(?:checkpoints|tensorboard)/.+"
)


@dataclass(frozen=True)
class Reason:
    """Why a file is left out, said of one and of several."""

    one: str
    many: str
    is_harmless: bool = False


MASKS = Reason("mask or control image of another program", "masks or control images of other programs")
OWN = Reason("file of a lorasmith run", "files of a lorasmith run", is_harmless=True)
TABLE = Reason(
    "file that may hold captions, in a form that is not read",
    "files that may hold captions, in a form that is not read",
)
ORPHANS = Reason("caption file without a picture", "caption files without a picture")
SECOND = Reason("second caption file of a picture", "second caption files of a picture")
LOOP = Reason("linked folder that contains the link itself", "linked folders that contain the link itself")
TWICE = Reason("folder that was reached before", "folders that were reached before")
DANGLING = Reason("link that leads nowhere", "links that lead nowhere")
UNREADABLE = Reason("folder that may not be read", "folders that may not be read")
SPECIAL = Reason("pipe, socket or device", "pipes, sockets or devices")
HIDDEN = Reason("hidden picture", "hidden pictures")
HIDDEN_FOLDER = Reason("hidden folder", "hidden folders", is_harmless=True)
OTHER = Reason("file in another format", "files in other formats", is_harmless=True)


@dataclass
class Listing:
    """Paths below the folder, relative to it, sorted."""

    pictures: list[Path] = field(default_factory=list)
    captions: dict[Path, Path] = field(default_factory=dict)  # {picture: the caption file that is read}
    tables: list[Path] = field(default_factory=list)  # of captions, the preferred one of a folder last
    left_out: dict[Reason, list[Path]] = field(default_factory=dict)

    def leave_out(self, reason: Reason, paths: Iterable[Path]) -> None:
        for path in paths:
            self.left_out.setdefault(reason, []).append(path)

    @property
    def is_harmless(self) -> bool:
        """Whether nobody would have taken for a sample or a caption what is left out."""
        return all(reason.is_harmless for reason in self.left_out)

    @property
    def said(self) -> str:
        """ "2 links that lead nowhere (a, b); 3 .psd, 2 .mp4"; "" where nothing is left out."""
        parts = []
        for reason, paths in self.left_out.items():
            if reason is not OTHER:
                what = reason.one if len(paths) == 1 else reason.many
                parts.append(f"{len(paths)} {what} ({named([path.as_posix() for path in paths])})")
        formats = Counter(path.suffix.lower() or "without a suffix" for path in self.left_out.get(OTHER, ()))
        parts += [", ".join(f"{count} {suffix}" for suffix, count in formats.most_common())] if formats else []
        return "; ".join(parts)


def named(names: Sequence[str]) -> str:
    """The first three."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def listed(folder: Path) -> Listing:
    """Of every file below the folder what it is; links are followed, each folder is read once."""
    found = Listing()
    files = sorted(_walked(folder, found), key=Path.as_posix)
    own = set(_of_runs(folder, files))
    pictures = [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES and path not in own]
    captions = [path for path in files if path.suffix.lower() in CAPTION_SUFFIXES]
    masks = set(_masks(pictures, captions))
    found.pictures = [path for path in pictures if path not in masks]
    stems = {_stem(path) for path in found.pictures}
    read = {*pictures, *captions, *own}
    others = [path for path in files if path not in read]
    of_stem: dict[str, Path] = {}
    for path in sorted(captions, key=lambda path: CAPTION_SUFFIXES.index(path.suffix.lower()), reverse=True):
        of_stem[_stem(path)] = path  # the preferred one comes last
    found.captions = {path: of_stem[stem] for path in found.pictures if (stem := _stem(path)) in of_stem}
    for name in reversed(caption_files.TABLES):
        found.tables += [path for path in others if path.name == name]
    others = [path for path in others if path not in found.tables]
    unread = {path for path in others if _may_hold_captions(path, stems)}
    found.leave_out(MASKS, (path for path in pictures if path in masks))
    found.leave_out(OWN, sorted(own))
    found.leave_out(ORPHANS, (path for path in captions if _stem(path) not in stems))
    found.leave_out(SECOND, (p for p in captions if (stem := _stem(p)) in stems and of_stem[stem] != p))
    found.leave_out(TABLE, (path for path in others if path in unread))
    found.leave_out(OTHER, (path for path in others if path not in unread))
    return found


def normal(path: str) -> str:
    """A path as one string, however it was typed: macOS takes letters and their accents apart."""
    return unicodedata.normalize("NFC", path)


def _stem(path: Path) -> str:
    return normal(path.with_suffix("").as_posix())


def _walked(root: Path, found: Listing) -> Iterator[Path]:
    """Every file that is not hidden; folders that are not read are noted.

    Folders that really lie there come before linked ones, so that of two ways to a folder the link is left out.
    """
    real, links = deque([Path()]), deque[Path]()
    seen: set[tuple[int, int] | str] = set()
    while real or links:
        folder = real.popleft() if real else links.popleft()
        place = Path(os.path.realpath(root / folder))
        status = os.stat(place)
        identity = (
            (status.st_dev, status.st_ino) if status.st_ino else str(place)
        )  # some network drives have no numbers
        if identity in seen:
            found.leave_out(TWICE, [folder])
            continue
        seen.add(identity)
        try:
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except PermissionError:
            found.leave_out(UNREADABLE, [folder])
            continue
        for entry in entries:
            path = folder / entry.name
            if _is_skipped(entry, path, found):
                continue
            if not os.path.isdir(entry.path):
                yield path
                continue
            target = Path(os.path.realpath(entry.path))
            if target == place / entry.name:
                real.append(path)
            elif place.is_relative_to(target):
                found.leave_out(LOOP, [path])
            else:
                links.append(path)


def _is_skipped(entry: os.DirEntry[str], path: Path, found: Listing) -> bool:
    """Whether it is hidden, or nothing that can be read; notes what might have been a sample."""
    if SYSTEM.fullmatch(entry.name.lower()):
        return True
    is_picture = path.suffix.lower() in PICTURE_SUFFIXES
    if entry.name.startswith("."):
        if os.path.isdir(entry.path):
            found.leave_out(HIDDEN_FOLDER, [path])
        elif is_picture:
            found.leave_out(HIDDEN, [path])
        return True
    if os.path.isdir(entry.path) or os.path.isfile(entry.path):  # entry.is_dir() fails on a link to itself
        return False
    if not os.path.exists(entry.path):
        # A picture that is linked and missing counts as a sample: reading it says what is wrong.
        if not is_picture:
            found.leave_out(DANGLING, [path])
        return not is_picture
    found.leave_out(SPECIAL, [path])
    return True


def _of_runs(folder: Path, files: Sequence[Path]) -> Iterator[Path]:
    """What runs of this program have left in their folders, of which this folder may itself be one."""
    known = set(files)
    runs = {path.parent for path in files if path.name == RUN[0] and all(path.with_name(name) in known for name in RUN)}
    above = folder.resolve()
    is_inside = all((above.parent / name).is_file() for name in RUN)
    for path in files if runs or is_inside else ():
        if any(parent in runs and OF_RUN.fullmatch(path.relative_to(parent).as_posix()) for parent in path.parents):
            yield path
        elif is_inside and OF_RUN.fullmatch(f"{above.name}/{path.as_posix()}"):
            yield path


def _masks(pictures: Sequence[Path], captions: Sequence[Path]) -> Iterator[Path]:
    """Pictures that say something of another one: by their name beside it, or by the folder that they are in.

    One with a caption of its own is a sample, unless it has the name that OneTrainer keeps for masks.
    """
    captioned = {_stem(path) for path in captions}
    beside = {path.with_suffix("") for path in pictures}
    outside = {path.stem for path in pictures if not _mask_folder(path)}
    for path in pictures:
        if MASK_OF_ONETRAINER.fullmatch(path.stem):
            yield path
        elif _stem(path) not in captioned:
            name = MASK.fullmatch(path.stem) or MASK_BEFORE.fullmatch(path.stem)
            if (name and path.with_name(name[1]) in beside) or (_mask_folder(path) and path.stem in outside):
                yield path


def _mask_folder(path: Path) -> bool:
    return any(MASK_FOLDER.fullmatch(part) for part in path.parent.parts)


def _may_hold_captions(path: Path, stems: set[str]) -> bool:
    suffix = path.suffix.lower()
    return suffix in TABLES or (suffix in SIDECARS and _stem(path) in stems)
