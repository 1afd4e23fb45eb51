"""What a folder holds: links and loops, masks, files of runs and of other programs, each left out for its reason."""

import os
import sys
from pathlib import Path

import pytest

from lorasmith.data.listing import Listing, listed

links = pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")


def with_files(folder: Path, *names: str) -> Path:
    """A folder with these files, which are empty: what is in them does not matter here."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def pictures(listing: Listing) -> list[str]:
    return [path.as_posix() for path in listing.pictures]


@links
def test_linked_folders_are_read(tmp_path: Path) -> None:
    with_files(tmp_path, "elsewhere/5_dogs/a.png", "elsewhere/5_dogs/sub/b.png", "data/z.png", "data/a/1.png")
    (tmp_path / "data" / "5_dogs").symlink_to(tmp_path / "elsewhere" / "5_dogs")
    found = listed(tmp_path / "data")
    assert pictures(found) == ["5_dogs/a.png", "5_dogs/sub/b.png", "a/1.png", "z.png"] and found.said == ""


@links
def test_linked_pictures_count_and_so_do_missing_ones(tmp_path: Path) -> None:
    with_files(tmp_path, "elsewhere/a.png", "elsewhere/b.png", "data/c.png")
    for link, target in {"a.png": "elsewhere/a.png", "gone.png": "gone", "gone": "gone", "self": "data/self"}.items():
        (tmp_path / "data" / link).symlink_to(tmp_path / target)
    found = listed(tmp_path / "data")
    assert pictures(found) == ["a.png", "c.png", "gone.png"]  # reading the last one says what is wrong
    assert found.said == "2 links that lead nowhere (gone, self)"


@links
def test_loops_end_and_are_said(tmp_path: Path) -> None:
    with_files(tmp_path, "outer/secret.png", "outer/data/a.png", "outer/data/sub/b.png", "else/where/c.png")
    data = tmp_path / "outer" / "data"
    (data / "itself").symlink_to(data)
    (data / "up").symlink_to(tmp_path / "outer")
    (data / "sub" / "root").symlink_to("/")
    (data / "else").symlink_to(tmp_path / "else" / "where")
    (tmp_path / "else" / "where" / "back").symlink_to(tmp_path / "else")
    (tmp_path / "else" / "where" / "home").symlink_to(data)
    found = listed(data)
    assert pictures(found) == ["a.png", "else/c.png", "sub/b.png"]
    assert found.said == (
        "4 linked folders that contain the link itself (itself, up, sub/root, ...); "
        "1 folder that was reached before (else/home)"
    )


@links
def test_a_folder_reached_by_two_ways_is_read_once(tmp_path: Path) -> None:
    with_files(tmp_path, "data/z/a.png", "elsewhere/deep/b.png")
    data = tmp_path / "data"
    (data / "a").symlink_to(data / "z")  # before z in order: what really lies there is read under its own name
    (data / "b").symlink_to(tmp_path / "elsewhere" / "deep")
    (data / "c").symlink_to(tmp_path / "elsewhere")
    found = listed(data)
    assert pictures(found) == ["b/b.png", "z/a.png"]
    assert found.said == "2 folders that were reached before (a, c/deep)"


@pytest.mark.parametrize(
    ("mask", "others"),
    [
        ("p0-masklabel.png", ["p0.jpg"]),
        ("p0-condlabel.png", ["p0.jpg", "p0-condlabel.txt"]),
        ("sub/p0_mask.png", ["sub/p0.jpg"]),
        ("p.0.mask.png", ["p.0.jpg"]),
        ("p0-MASK.PNG", ["p0.png"]),
        ("p0_alpha.png", ["p0.webp"]),
        ("mask_p0.png", ["p0.jpg", "p0.txt"]),
        ("p0_depth.png", ["p0.png"]),
        ("p0_depth_map.png", ["p0.png"]),
        ("p0-openpose.png", ["p0.png"]),
        ("masks/p0.png", ["p0.jpg"]),
        ("Mask/sub/p0.png", ["img/sub/p0.jpg"]),
        ("conditioning_images/p0.png", ["images/p0.png"]),
        ("depth_maps/p0.png", ["p0.png"]),
        ("loss_masks/p0.png", ["p0.png"]),
    ],
)
def test_masks_of_other_programs_are_no_samples(tmp_path: Path, mask: str, others: list[str]) -> None:
    found = listed(with_files(tmp_path, mask, "x.png", *others))
    assert mask not in pictures(found) and len(found.pictures) == 2
    assert f"1 mask or control image of another program ({mask})" in found.said and not found.is_harmless


@pytest.mark.parametrize(
    "names",
    [
        ["venetian_mask.png", "other.png"],
        ["mask_of_gold.png", "gold.png"],
        ["cat.png", "cat_pose.png", "cat_normal.png"],
        ["in_depth.png", "sub/in.png"],
        ["venetian.png", "venetian_mask.png", "venetian_mask.txt"],
        ["masks/1.png", "hats/2.png"],
        ["masks/1.png", "hats/1.png", "masks/1.caption"],
        ["5_masks/1.png", "5_hats/1.png"],
        ["mask/1.png"],
        ["unmask.png", "un.png"],
    ],
)
def test_pictures_of_masks_are_samples(tmp_path: Path, names: list[str]) -> None:
    found = listed(with_files(tmp_path, *names))
    assert pictures(found) == sorted(name for name in names if name.endswith(".png")) and not found.left_out


OF_RUN = [
    "before_after.png", "checkpoints/step-1.safetensors", "lora.safetensors", "loss.png", "norms.png", "report.html",
    "run.toml", "samples/step-0000010.png", "steps.jsonl",
]  # fmt: skip


def test_what_a_run_has_left_is_no_sample(tmp_path: Path) -> None:
    with_files(tmp_path, "cat.png", "loss.png", *(f"runs/cats/{name}" for name in OF_RUN), "runs/cats/mine.png")
    found = listed(tmp_path)
    assert pictures(found) == ["cat.png", "loss.png", "runs/cats/mine.png"]
    first = ", ".join(f"runs/cats/{name}" for name in OF_RUN[:3])
    assert found.said == f"9 files of a lorasmith run ({first}, ...)" and found.is_harmless
    for folder in ("runs/cats", "runs/cats/samples"):
        assert "before_after.png" not in pictures(listed(tmp_path / folder))
    assert pictures(listed(tmp_path / "runs" / "cats" / "samples")) == []


def test_a_settings_file_makes_no_run_folder(tmp_path: Path) -> None:
    assert pictures(listed(with_files(tmp_path, "run.toml", "loss.png"))) == ["loss.png"]


def test_captions_elsewhere_are_named(tmp_path: Path) -> None:
    found = listed(
        with_files(tmp_path, "a.png", "a.json", "b.png", "b.tags", "metadata.jsonl", "notes.md", "dataset.yaml")
    )
    why = "files that may hold captions, in a form that is not read"
    assert found.said == f"2 {why} (a.json, b.tags); 1 .yaml, 1 .md" and not found.is_harmless
    assert found.tables == [Path("metadata.jsonl")]


def test_an_accent_belongs_to_its_letter_or_stands_alone(tmp_path: Path) -> None:
    """An e with an accent is one character or two: what macOS has written and what is typed elsewhere are one name."""
    found = listed(with_files(tmp_path, "caf\u00e9.png", "cafe\u0301.txt", "sub/b.png"))
    assert found.captions == {Path("caf\u00e9.png"): Path("cafe\u0301.txt")} and found.said == ""


def test_other_formats_are_counted(tmp_path: Path) -> None:
    found = listed(with_files(tmp_path, "a.png", "a.psd", "b.PSD", "clip.mp4", "LICENSE", "c.psd", "d.mp4"))
    assert found.said == "3 .psd, 2 .mp4, 1 without a suffix" and found.is_harmless


def test_what_systems_leave_is_skipped_silently(tmp_path: Path) -> None:
    junk = [
        ".DS_Store", "._a.png", "Thumbs.db", "desktop.ini", "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/._a.png",
        ".ipynb_checkpoints/a-checkpoint.png", ".git/a.png", "Icon\r", "$RECYCLE.BIN/b.png", ".note.txt",
    ]  # fmt: skip
    found = listed(with_files(tmp_path, "a.png", *junk))
    assert pictures(found) == ["a.png"] and found.said == ""


def test_hidden_pictures_are_said(tmp_path: Path) -> None:
    found = listed(with_files(tmp_path, "a.png", ".b.png", "sub/.c.jpg", ".mine/d.png"))
    assert pictures(found) == ["a.png"]
    assert found.said == "2 hidden pictures (.b.png, sub/.c.jpg); 1 hidden folder (.mine)"


@pytest.mark.skipif(sys.platform == "win32", reason="there are none")
def test_pipes_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(with_files(tmp_path, "a.png") / "b.png")
    found = listed(tmp_path)
    assert pictures(found) == ["a.png"] and found.said == "1 pipe, socket or device (b.png)"


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may read everything")
def test_folders_that_may_not_be_read_are_said(tmp_path: Path) -> None:
    with_files(tmp_path, "a.png", "locked/b.png")
    (tmp_path / "locked").chmod(0)
    try:
        found = listed(tmp_path)
    finally:
        (tmp_path / "locked").chmod(0o700)
    assert pictures(found) == ["a.png"] and found.said == "1 folder that may not be read (locked)"
