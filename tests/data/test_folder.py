"""Picture folders: captions and repeats of the samples, and what is said of those without."""

import csv
import json
import logging
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from lorasmith.data.folder import examples
from lorasmith.types import Example


def made(path: Path, text: str | None = None) -> Path:
    """A small picture, or a file with this text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if text is None:
        Image.new("RGB", (4, 3), "red").save(path, "PNG")
    else:
        path.write_text(text, encoding="utf-8")
    return path


def captions(folder: Path) -> dict[str, str]:
    return {example.image_path.relative_to(folder).as_posix(): example.caption for example in examples(folder)}


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_pictures_are_found_below_the_folder_sorted_by_relative_path(tmp_path: Path) -> None:
    for name in ("b.png", "B2.PNG", "a/z.JpEg", "a.webp", "a-1/x.tiff", "c/d/e.JFIF", "10.bmp", "9.avif"):
        made(tmp_path / name)
    for hidden in (".git/a.png", "._a.png", "c/.hidden.png", "c/.cache/deep/a.png"):
        made(tmp_path / hidden)
    made(tmp_path / "clip.mp4", "")
    # By the characters of the path: "-" before "." before "/", capitals before small letters.
    expected = ["10.bmp", "9.avif", "B2.PNG", "a-1/x.tiff", "a.webp", "a/z.JpEg", "b.png", "c/d/e.JFIF"]
    assert list(captions(tmp_path)) == expected


def test_a_folder_is_named_like_a_picture(tmp_path: Path) -> None:
    made(tmp_path / "cat.png" / "a.png")
    assert examples(tmp_path) == [Example(tmp_path / "cat.png" / "a.png", "")]


def test_captions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = {
        "a.txt": " a red  cat \n",
        "b.caption": "from .caption",
        "both.txt": "from .txt",
        "both.caption": "not this",
        "bom.txt": "\ufeffwith a mark",
        "dotted.name.txt": "dots",
        "empty.txt": "",
        "lines.txt": "one,\r\n\r\n  two\nthree",
        "upper.TXT": "capitals",
        "umlaut.txt": "grün 猫",
    }
    for name, text in texts.items():
        made(tmp_path / name, text)
        made(tmp_path / f"{Path(name).stem}.png")
    made(tmp_path / "sub" / "a.png")
    made(tmp_path / "sub" / "a.txt", "another a")
    assert captions(tmp_path) == {
        "a.png": "a red  cat",
        "b.png": "from .caption",
        "bom.png": "with a mark",
        "both.png": "from .txt",
        "dotted.name.png": "dots",
        "empty.png": "",
        "lines.png": "one, two three",
        "sub/a.png": "another a",
        "umlaut.png": "grün 猫",
        "upper.png": "capitals",
    }
    assert messages(caplog) == [
        f"pictures without a caption in {tmp_path}, 1 of them with an empty caption file: 1 (empty.png)",
        f"left out of {tmp_path}: 1 second caption file of a picture (both.caption)",
    ]


def test_missing_captions_and_pictures_give_one_warning_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b", "c", "sub/d", "sub/e"):
        made(tmp_path / f"{name}.png")
    made(tmp_path / "a.txt", "a caption")
    made(tmp_path / "readme.txt", "words")
    made(tmp_path / "sub" / "a.caption", "of no picture: a.png is in another folder")
    assert set(captions(tmp_path).values()) == {"a caption", ""}
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, f"pictures without a caption in {tmp_path}: 4 (b.png, c.png, sub/d.png, ...)"),
        (logging.WARNING, f"left out of {tmp_path}: 2 caption files without a picture (readme.txt, sub/a.caption)"),
    ]


def test_kohya_folders_give_repeats_and_captions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "7_root"  # what the folder itself is called means nothing
    for name in ("plain/a", "010_sks_big cat/a", "010_sks_big cat/b", "10_x/3_y/a", "10_x/sub/a", "5_/a", "cat_10/a"):
        made(folder / f"{name}.png")
    made(folder / "010_sks_big cat" / "b.txt", "its own")
    made(folder / "plain" / "a.txt", "plain")
    made(folder / "cat_10" / "a.txt", "not kohya's")
    found = {item.image_path.relative_to(folder).as_posix(): (item.repeats, item.caption) for item in examples(folder)}
    assert found == {
        "010_sks_big cat/a.png": (10, "sks_big cat"),
        "010_sks_big cat/b.png": (10, "its own"),
        "10_x/3_y/a.png": (3, "y"),
        "10_x/sub/a.png": (10, "x"),
        "5_/a.png": (5, ""),
        "cat_10/a.png": (1, "not kohya's"),
        "plain/a.png": (1, "plain"),
    }
    assert messages(caplog) == [f"pictures without a caption in {folder}: 1 (5_/a.png)"]


def test_zero_repeats_are_refused(tmp_path: Path) -> None:
    made(tmp_path / "0_cat" / "a.png")
    with pytest.raises(ValueError, match="^repeats must be 1 to 10000, got 0 from the name of folder 0_cat$"):
        examples(tmp_path)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    missing, file = tmp_path / "missing", made(tmp_path / "a.png")
    with pytest.raises(ValueError, match=f"^picture folder {re.escape(str(missing))} does not exist$"):
        examples(missing)
    with pytest.raises(ValueError, match=f"^picture folder {re.escape(str(file))} must be a folder, it is a file$"):
        examples(file)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], "nothing else"),
        ([".DS_Store", "sub/.a.txt"], "nothing else"),
        (
            ["a.mp4", "a.txt", "sub/deep/README"],
            r"1 caption file without a picture \(a.txt\); 1 .mp4, 1 without a suffix",
        ),
        (["sub/.a.png"], r"1 hidden picture \(sub/\.a\.png\)"),
    ],
)
def test_no_pictures_says_what_is_there(tmp_path: Path, names: list[str], found: str) -> None:
    for name in names:
        made(tmp_path / name, "")
    where = re.escape(f"in or below {tmp_path}")
    with pytest.raises(ValueError, match=rf"^no pictures \(\.png \.jpg .*\.hif\) {where}: found {found}$"):
        examples(tmp_path)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"gr\xfcn", "byte 0xfc at offset 2"),
        (b"\xef\xbb\xbfgr\xfcn", "byte 0xfc at offset 5"),
        ("cat".encode("utf-16-le"), "a NUL at character 1"),
        ("cat".encode("utf-32"), "a NUL at character 0"),
        (b"\xff\xfec\x00a", "byte 0x61 at offset 4"),
    ],
)
def test_a_caption_that_is_no_text_is_refused(tmp_path: Path, content: bytes, got: str) -> None:
    made(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^caption {re.escape(str(tmp_path / 'a.txt'))} must be UTF-8, got {got}$"):
        examples(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_caption_with_a_mark_is_decoded_by_it(tmp_path: Path, encoding: str) -> None:
    made(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("grün 猫\r\n".encode(encoding))
    assert captions(tmp_path) == {"a.png": "grün 猫"}


def test_empty_caption_files_are_counted_with_the_pictures_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, content in {"a": b"", "b": b"  \r\n\t", "c": b"\xef\xbb\xbf", "d": b"\xff\xfe\r\0\n\0"}.items():
        made(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(content)
    made(tmp_path / "3_cats" / "e.png")
    made(tmp_path / "3_cats" / "e.txt", "\n")  # there is a caption file, so that the folder's name is none
    made(tmp_path / "f.png")
    assert set(captions(tmp_path).values()) == {""}
    (message,) = messages(caplog)
    what = f"pictures without a caption in {tmp_path}, 5 of them with an empty caption file"
    assert message == f"{what}: 6 (3_cats/e.png, a.png, b.png, ...)"


def test_captions_of_several_lines_are_joined_or_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for name, text in {"a": "one\ntwo\n", "b": "\n only this \n\n", "c": "\r\nfirst,\r\n\r\nsecond"}.items():
        made(tmp_path / f"{name}.png")
        made(tmp_path / f"{name}.txt", text)
    assert captions(tmp_path) == {"a.png": "one two", "b.png": "only this", "c.png": "first, second"}
    assert [example.caption for example in examples(tmp_path, "first")] == ["one", "only this", "first,"]
    assert messages(caplog) == [
        f"captions of several lines in {tmp_path}, joined into one (data.caption_lines): 2 (a.txt, c.txt)",
        f"captions of several lines in {tmp_path}, of which the first is read (data.caption_lines): 2 (a.txt, c.txt)",
    ]


@pytest.mark.parametrize(
    ("suffix", "package", "extra"), [("HEIC", "pillow_heif", "heif"), ("jxl", "pillow_jxl.JpegXLImagePlugin", "jxl")]
)
def test_an_extra_that_is_missing_is_said_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    made(tmp_path / f"a.{suffix}", "no picture at all")
    message = f".{suffix.lower()} pictures need the extra '{extra}': pip install 'lorasmith[{extra}]'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        examples(tmp_path)


def test_pictures_that_share_a_caption_file_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "a.jpg", "b.png"):
        made(tmp_path / name)
    made(tmp_path / "a.txt", "both")
    made(tmp_path / "b.txt", "b")
    assert captions(tmp_path) == {"a.jpg": "both", "a.png": "both", "b.png": "b"}
    what = f"pictures in {tmp_path} that share a caption file, as only their suffixes differ"
    assert messages(caplog) == [f"{what}: 2 (a.jpg, a.png)"]


ROWS = [
    {"file_name": "a.png", "text": "a red cat"},
    {"file_name": "sub/b.png", "text": "first, line\nsecond"},
    {"file_name": "own.png", "text": "not this"},
    {"file_name": "gone.png", "text": "of no picture"},
    {"file_name": "3_cats/c.png", "text": "\u2028 caf\u00e9"},
]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_captions_in_a_table_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    for path in ("a.png", "sub/b.png", "own.png", "3_cats/c.png", "3_cats/d.png"):
        made(tmp_path / path)
    made(tmp_path / "own.txt", "its own")
    if name.endswith(".csv"):
        with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        made(tmp_path / name, "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS))
    assert captions(tmp_path) == {
        "3_cats/c.png": "caf\u00e9",
        "3_cats/d.png": "cats",
        "a.png": "a red cat",
        "own.png": "its own",
        "sub/b.png": "first, line second",
    }
    assert messages(caplog) == [f"rows of {tmp_path / name} that name no picture: 1 (gone.png)"]


def test_the_nearest_table_counts_and_jsonl_before_csv(tmp_path: Path) -> None:
    made(tmp_path / "sub" / "a.png")
    made(tmp_path / "metadata.jsonl", '{"file_name": "sub/a.png", "text": "far"}')
    assert captions(tmp_path) == {"sub/a.png": "far"}
    made(tmp_path / "sub" / "metadata.csv", "file_name,prompt\na.png,near")
    assert captions(tmp_path) == {"sub/a.png": "near"}
    made(tmp_path / "sub" / "metadata.jsonl", '{"file_name": "a.png", "caption": "nearest", "prompt": "no"}\n\n')
    assert captions(tmp_path) == {"sub/a.png": "nearest"}


def test_tables_that_give_no_caption_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "sub/b.png"):
        made(tmp_path / name)
        made((tmp_path / name).with_suffix(".txt"), "its own")
    made(tmp_path / "metadata.jsonl", '{"image": "a.png", "label": 3}')
    made(tmp_path / "sub" / "metadata.csv", "file_name,text\nb.png,not this")
    assert set(captions(tmp_path).values()) == {"its own"}
    assert messages(caplog) == [
        f"left out of {tmp_path}: 1 table without captions by file_name (metadata.jsonl); "
        "1 table for pictures with caption files (sub/metadata.csv)"
    ]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("metadata.jsonl", '{"file_name": "a.png"}\n{"file_', "a JSON object a line, line 2 is none: Unterminated .*"),
        ("metadata.jsonl", "[1]", "a JSON object a line, line 1 is a list"),
        ("metadata.csv", 'file_name,text\na.png,"cut', "a CSV table: unexpected end of data"),
    ],
)
def test_a_broken_table_is_refused(tmp_path: Path, name: str, content: str, reason: str) -> None:
    made(tmp_path / "a.png")
    made(tmp_path / name, content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / name))} must be {reason}$"):
        examples(tmp_path)
