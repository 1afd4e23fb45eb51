"""Folders of pictures: which files are samples, their captions and repeats, and a picture's pixels."""

import logging
import re
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from lorasmith.types import Example

HEIF_SUFFIXES = (".heic", ".heif")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".tif", ".tiff", *HEIF_SUFFIXES)
MAX_REPEATS = 10_000
CAPTION_SUFFIXES = (".txt", ".caption")  # in order of preference

# What Pillow and pillow-heif raise on damaged files, besides OSError.
_DAMAGE = (SyntaxError, ValueError, RuntimeError, EOFError, IndexError, struct.error, Image.DecompressionBombError)

# EXIF orientation -> what undoes it. ImageOps.exif_transpose also rewrites the EXIF data, and fails on odd ones.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def examples(folder: Path) -> list[Example]:
    """The pictures below folder, sorted by relative path; hidden files are skipped, links to folders not followed.

    A picture NAME.png has the caption in NAME.txt or else NAME.caption. Pictures in a folder named N_name, as kohya's
    trainer has it, are repeated N times, and name is the caption of those without a caption file.
    ValueError without pictures, for a caption that is not UTF-8, and for 0 repeats.
    """
    if not folder.exists():
        raise ValueError(f"picture folder {folder} does not exist")
    if not folder.is_dir():
        raise ValueError(f"picture folder {folder} must be a folder, it is a file")
    paths = sorted((path.relative_to(folder) for path in folder.rglob("*")), key=Path.as_posix)
    visible = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    # A link to nowhere counts as a file: reading it then says what is wrong, rather than leaving it out in silence.
    files = [path for path in visible if not (folder / path).is_dir()]
    pictures = [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES]
    if not pictures:
        found = _inventory(files, num_folders=len(visible) - len(files))
        found = found or ("only hidden files" if paths else "an empty folder")
        raise ValueError(f"no pictures ({' '.join(PICTURE_SUFFIXES)}) in or below {folder}: found {found}")

    caption_files = [path for path in files if path.suffix.lower() in CAPTION_SUFFIXES]
    captions = {(path.with_suffix(""), path.suffix.lower()): path for path in caption_files}
    found_examples: list[Example] = []
    without_caption: list[Path] = []
    for path in pictures:
        repeats, caption = _repeats_and_name(path)
        keys = [(path.with_suffix(""), suffix) for suffix in CAPTION_SUFFIXES]
        caption_path = next((captions[key] for key in keys if key in captions), None)
        if caption_path is not None:
            caption = _caption(folder / caption_path)
        elif not caption:
            without_caption.append(path)
        found_examples.append(Example(folder / path, caption, repeats))

    stems = {path.with_suffix("") for path in pictures}
    warn_of("pictures without a caption", without_caption)
    warn_of("caption files without a picture", [path for path in caption_files if path.with_suffix("") not in stems])
    return found_examples


def picture(path: Path) -> Image.Image:
    """The picture, decoded, as 8-bit RGB: turned as its EXIF data say, on white where transparent, the first frame.

    ValueError that names the file and the reason when it cannot be read, or needs an extra that is not installed.
    """
    opened = _opener(path)
    try:
        with opened(path) as image:
            image.load()  # first, since it turns a TIFF, and then takes the orientation out of its EXIF data
            turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
            return _rgb(image if turn is None else image.transpose(turn))
    except UnidentifiedImageError:
        reason = "it is not in a picture format" if path.stat().st_size else "it is empty"
    except OSError as error:
        reason = error.strerror or str(error)
    except _DAMAGE as error:
        reason = str(error)
    raise ValueError(f"cannot read picture {path}: {' '.join(reason.split())}")


def _opener(path: Path) -> Callable[[Path], Image.Image]:
    """What opens a file with this path's suffix."""
    if path.suffix.lower() not in HEIF_SUFFIXES:
        return Image.open
    try:
        import pillow_heif  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ValueError(f"{path} needs the extra 'heif': pip install 'lorasmith[heif]'") from None
    return lambda path: pillow_heif.open_heif(path).to_pillow()  # upright already, and its EXIF data say so


def _rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode -> RGB."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 0 to 255
        grey = np.asarray(image).clip(0, 65535)
        return Image.fromarray(np.rint(grey / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _repeats_and_name(path: Path) -> tuple[int, str]:
    """(N, name) of the nearest folder N_name that the picture at this relative path lies in, or else (1, "")."""
    for parent in path.parents:
        if match := re.fullmatch(r"([0-9]+)_(.*)", parent.name, re.DOTALL):
            repeats = int(match[1])
            if not 1 <= repeats <= MAX_REPEATS:
                raise ValueError(f"repeats must be 1 to {MAX_REPEATS}, got {repeats} from the name of folder {parent}")
            return repeats, match[2]
    return 1, ""


def _caption(path: Path) -> str:
    """The file's text on one line."""
    try:
        # Not utf-8-sig: it counts an error's offset from behind the mark.
        text = path.read_bytes().decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#04x} at offset {error.start}"
        raise ValueError(f"caption {path} must be UTF-8, got {got}") from None
    lines = (line.strip() for line in text.splitlines())
    return " ".join(line for line in lines if line)


def _inventory(files: list[Path], num_folders: int) -> str:
    """What there is, by suffix: "3 .txt, 1 .mp4, 2 folders"."""
    counts = Counter(path.suffix.lower() or "without a suffix" for path in files)
    parts = [f"{count} {suffix}" for suffix, count in counts.most_common()]
    if num_folders:
        parts.append(f"{num_folders} folder{'s' if num_folders > 1 else ''}")
    return ", ".join(parts)


def warn_of(what: str, paths: list[Path]) -> None:
    """Logs one line with the count and the first three names; nothing for no paths."""
    if paths:
        names = ", ".join(path.as_posix() for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
        logging.getLogger(__name__).warning("%s: %d (%s)", what, len(paths), names)
