"""Faults as users meet them: disks, folders, other runs, flipped bits, clocks.

Each ends in one clear message; checkpoints stay sound, and a run that is resumed ends as one that nothing befell.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import FILES, listing, made, with_a_small_disk
from faults import (
    CAPTIONS,
    STEPS,
    Outcome,
    call_in_child,
    contents,
    in_child,
    outcome,
    quickly,
    sound_steps,
    stop,
    struck,
    told,
    trained,
)
from PIL import Image

from lorasmith.demo import BASE
from lorasmith.models.load import Family, load_model
from lorasmith.runs import run
from lorasmith.storage.folder_lock import LOCK, FolderLock

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module", autouse=True)
def quick(family: Family) -> Iterator[None]:
    with quickly(family):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, quick: None) -> Outcome:
    """What a run that nothing befalls makes."""
    folder = tmp_path_factory.mktemp("whole")
    made(folder / "cats", *CAPTIONS)
    assert trained(folder).code == 0
    return outcome(folder / "run")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    made(tmp_path / "cats", *CAPTIONS)
    return tmp_path


@pytest.fixture
def disk(home: Path) -> list[str]:
    """The start of a command that runs with a disk of 160 KiB and 40 files of its own, in the folder "disk"."""
    return with_a_small_disk(home / "disk", "size=160k,nr_inodes=40")


def run_out_of_pages(home: Path) -> None:
    fill_disks(home, fill_pages)


def run_out_of_names(home: Path) -> None:
    fill_disks(home, fill_names)


@pytest.mark.parametrize("function", [run_out_of_pages, run_out_of_names])
def test_a_full_disk(home: Path, disk: list[str], function: Callable[[Path], None]) -> None:
    call_in_child(function, home, *disk)


def fill_disks(home: Path, fill: Callable[[Path, int], None]) -> None:
    """Runs with ever more room, so that each write in turn finds the disk full."""
    disk, arguments = home / "disk", ("--steps", "2", "--output", "disk/run")
    with quickly(load_model(BASE)):
        assert trained(home, *arguments).code == 0
        whole = outcome(disk / "run")
        failed = set()
        for num_free in itertools.count():
            shutil.rmtree(disk / "run")
            fill(disk, num_free)
            ended = trained(home, *arguments)
            shutil.rmtree(disk / "ballast")
            if not ended.code:
                break
            match = re.fullmatch(r"cannot (write|lock) (disk/run.*): No space left on device", told(ended))
            assert match, ended.err
            failed.add(Path(match[2]).name)
            assert sound_steps(disk / "run") == [1, 2][: len(sound_steps(disk / "run"))]
            resume = ["--resume"] if (disk / "run").exists() else []
            if resume and (disk / "run" / "lora.safetensors").exists() and not sound_steps(disk / "run"):
                assert "nothing there was changed" in told(trained(home, *arguments, *resume))
                (disk / "run" / "lora.safetensors").unlink()
            assert trained(home, *arguments, *resume).code == 0
            assert outcome(disk / "run") == whole
        files = {"run.toml", "steps.jsonl", "lora.safetensors", "loss.png", "report.html", ".holder.json"}
        files |= {"step-0000001.safetensors", "step-0000002.safetensors"}
        assert failed == (files if fill is fill_pages else files | {"run", "checkpoints"}), failed


def fill_pages(disk: Path, num_free: int) -> None:
    (disk / "ballast").mkdir()
    found = os.statvfs(disk)
    (disk / "ballast" / "zeros").write_bytes(bytes(found.f_frsize * (found.f_bfree - num_free)))


def fill_names(disk: Path, num_free: int) -> None:
    (disk / "ballast").mkdir()
    for number in range(os.statvfs(disk).f_ffree - num_free):
        (disk / "ballast" / str(number)).touch()


def test_a_read_only_disk(home: Path, disk: list[str]) -> None:
    call_in_child(make_read_only, home, *disk)


def make_read_only(home: Path) -> None:
    """Before a run, and in its third step."""
    disk, arguments, refused = home / "disk", ("--output", "disk/run"), "Read-only file system"

    def mount(*words: Any) -> None:
        subprocess.run(["mount", *words], check=True)

    def cover() -> None:
        mount("--bind", disk / "run", disk / "run")
        mount("-o", "remount,bind,ro", disk / "run")

    with quickly(load_model(BASE)):
        mount("-o", "remount,ro", disk)
        protected = "output must be where files can be written, got disk/run: disk is write-protected"
        assert told(trained(home, *arguments)) == protected
        mount("-o", "remount,rw", disk)
        assert not list(disk.iterdir())
        path = "disk/run/checkpoints/step-0000003.safetensors"
        assert told(struck(home, 3, cover, *arguments)) == f"cannot write {path}: {refused}"
        assert sound_steps(disk / "run") == [1, 2]
        assert told(trained(home, *arguments, "--resume")).endswith("disk/run is write-protected")
        subprocess.run(["umount", disk / "run"], check=True)
        assert trained(home, *arguments, "--resume").code == 0
        assert trained(home).code == 0
        assert outcome(disk / "run") == outcome(home / "run")


@pytest.mark.parametrize("step", [1, 3, STEPS])
def test_a_deleted_run_folder_is_made_again(
    home: Path, whole: Outcome, caplog: pytest.LogCaptureFixture, step: int
) -> None:
    assert struck(home, step, lambda: shutil.rmtree(home / "run")).code == 0
    assert "run folder run was deleted: making it again" in caplog.messages
    assert outcome(home / "run") == whole and listing(home / "run") == FILES
    assert sound_steps(home / "run") == [s for s in (3, 4) if s >= step]


@pytest.mark.parametrize("name", ["run.toml", LOCK, "steps.jsonl", "checkpoints"])
def test_a_part_that_is_deleted_is_there_again(home: Path, whole: Outcome, name: str) -> None:
    """As while `rm -r` is at work, in whatever order."""

    def delete() -> None:
        path = home / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    assert struck(home, 3, delete).code == 0
    assert outcome(home / "run") == whole and listing(home / "run") == FILES and sound_steps(home / "run")[-1] == STEPS
    assert trained(home, "--resume").code == 0


def test_a_folder_deleted_while_pictures_are_drawn_on_the_way(
    home: Path, whole: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deleting(*args: Any) -> list[Image.Image]:
        shutil.rmtree(home / "run", ignore_errors=True)
        return [Image.new("RGB", (8, 8))]

    monkeypatch.setattr(run, "pictures", deleting)
    assert trained(home, "--sampling.every", "2", "--sampling.prompts", "['a']").code == 0
    assert outcome(home / "run") == whole and listing(home / "run") == FILES | {"before_after.png"}


def test_a_run_that_fails_in_its_first_step_leaves_anothers_folder(home: Path) -> None:
    others = FolderLock(home / "run")

    def replace() -> None:
        (home / "run").rename(home / "moved")
        (home / "run").mkdir()
        others.acquire()
        (home / "run" / "run.toml").write_text("another run's")
        raise ValueError("nothing works")

    assert told(struck(home, 1, replace)) == "nothing works"
    assert others.is_intact and (home / "run" / "run.toml").read_text() == "another run's"
    others.release()


def test_a_folder_deleted_while_the_last_pictures_are_drawn(
    home: Path, whole: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = run.held_out_losses

    def deleting(*args: Any) -> torch.Tensor:
        shutil.rmtree(home / "run", ignore_errors=True)
        return measure(*args)

    monkeypatch.setattr(run, "held_out_losses", deleting)
    made(home / "dogs", *["a dog"] * 5)
    assert trained(home, "--data.held_out", "dogs").code == 0
    assert outcome(home / "run") == whole and listing(home / "run") == FILES


def test_a_file_in_the_place_of_the_run_folder_stays(home: Path) -> None:
    def replace() -> None:
        shutil.rmtree(home / "run")
        (home / "run").write_text("a file")

    assert re.fullmatch(r"(cannot \w+|run folder) run\b.*", told(struck(home, 3, replace)))
    assert (home / "run").read_text() == "a file"


RUN = ("run.toml", "steps.jsonl", "checkpoints/step-0000009.safetensors")


@pytest.mark.parametrize("files", [(), RUN[:1], RUN])
@pytest.mark.parametrize("is_locked", [True, False])
def test_another_run_in_the_place_of_the_folder_is_left_alone(
    home: Path, files: tuple[str, ...], is_locked: bool
) -> None:
    """One that has just begun, too, or one that has ended."""
    if not files and not is_locked:
        pytest.skip("nothing that could be left alone")
    others = FolderLock(home / "run")

    def replace() -> None:
        (home / "run").rename(home / "moved")
        for name in files:
            (home / "run" / name).parent.mkdir(parents=True, exist_ok=True)
            (home / "run" / name).write_text("another run's")
        if is_locked:
            (home / "run").mkdir(exist_ok=True)
            others.acquire()

    message = told(struck(home, 3, replace))
    in_use = rf"run folder run is in use by process {os.getpid()} on .* choose another output"
    assert re.fullmatch("run folder run was replaced by another, which is left alone" if files else in_use, message)
    assert others.is_intact == is_locked
    others.release()
    left = {home / "run" / name: b"another run's" for name in files}
    assert contents(home / "run") == left | ({home / "run" / LOCK: b""} if is_locked else {})
    assert sound_steps(home / "moved") == [1, 2]


def test_a_second_run_is_refused_until_the_first_is_gone(home: Path, whole: Outcome) -> None:
    command = in_child(hold_the_third_step, home)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as first:
        assert first.stdout is not None and first.stdout.readline() == b"in step 3\n"
        before = contents(home / "run")
        message = told(trained(home, "--resume"))
        assert re.fullmatch(rf"run folder run is in use by process {first.pid} on \S+ since .* UTC: .*", message)
        assert told(trained(home)).startswith("output must be a folder that does not exist yet")
        assert contents(home / "run") == before
        first.kill()
    assert sound_steps(home / "run") == [1, 2]
    assert trained(home, "--resume").code == 0
    assert outcome(home / "run") == whole


def hold_the_third_step(home: Path) -> None:
    def hold() -> None:
        print("in step 3", file=sys.__stdout__, flush=True)
        sys.stdin.readline()

    struck(home, 3, hold)


def test_two_runs_that_begin_at_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the second comes to be while it loads its model."""
    model = run.load_model
    monkeypatch.setattr(
        run, "load_model", lambda *names, **given: (made(home / "run", "not ours"), model(*names, **given))[1]
    )
    assert re.fullmatch(r"output must be a folder that does not exist yet.*, got run", told(trained(home)))
    assert listing(home / "run") == {"0.png", "0.txt"}


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("others", [(), ("--non_finite.returns", "2")])
def test_flipped_bits(home: Path, whole: Outcome, caplog: pytest.LogCaptureFixture, others: tuple[str, ...]) -> None:
    assert struck(home, 3, stop, *others).code == 130
    folder = home / "run" / "checkpoints"
    flip_a_bit(folder / "step-0000003.safetensors")
    assert struck(home, 1, stop, *others, "--resume").code == 130
    path = Path("run", "checkpoints", "step-0000003.safetensors")
    assert f"checkpoint {path} is not sound: its content does not have the hash that it states" in caplog.messages
    assert f"resuming run after step 2 of {STEPS}" in caplog.messages
    assert sound_steps(home / "run") == [2, 3]
    for path in folder.iterdir():
        flip_a_bit(path)
    caplog.clear()
    left = contents(home / "run")
    assert told(trained(home, *others, "--resume")) == (
        "run must hold a sound checkpoint to resume from, but none is: nothing there was changed; begin again with "
        f"another --output (lora.safetensors can be continued: --existing_lora {Path('run', 'lora.safetensors')})"
    )
    assert len([message for message in caplog.messages if "is not sound" in message]) == 2
    assert contents(home / "run") == left
    shutil.rmtree(folder)
    assert "but it holds none: nothing there was changed" in told(trained(home, *others, "--resume"))
    (home / "run" / "lora.safetensors").unlink()
    assert trained(home, *others, "--resume").code == 0
    assert outcome(home / "run") == whole and sound_steps(home / "run") == [3, 4]


def test_clocks_that_jump(home: Path, whole: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    """By years, back and forth, whenever they are read; files have odd dates."""
    years, year = itertools.count(1), 365.25 * 86400
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + (-1) ** (number := next(years)) * (number % 40) * year)
    assert struck(home, 3, stop).code == 130
    for number, path in enumerate(sorted((home / "run").rglob("*"), reverse=True)):
        os.utime(path, (4e9 - number * 2e9, 4e9 - number * 2e9))  # the newest checkpoint is the oldest file
    assert trained(home, "--resume").code == 0
    assert outcome(home / "run") == whole
