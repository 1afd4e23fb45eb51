"""The log of steps: bytes equal however a run was interrupted, full disks, folders made again, TensorBoard's events."""

import json
import logging
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from commands import with_a_small_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.reporting.step_log import StepLog
from lorasmith.reporting.tensorboard import TensorBoardLog
from lorasmith.types import Step

FINITE = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.lists(st.tuples(FINITE, FINITE, FINITE, FINITE), min_size=1, max_size=8)
TORN = st.binary(max_size=40) | st.text(max_size=20).map(str.encode)
quick = settings(max_examples=100, deadline=None)


def steps_to(last: int, before: int = 0) -> list[Step]:
    return [Step(number, 1 / number, 1e-4, 0.3 * number, 0.5) for number in range(before + 1, last + 1)]


def timeless(steps: list[Step]) -> list[Step]:
    """As a checkpoint knows them."""
    return [replace(step, seconds=0.0) for step in steps]


def content_of(steps: list[Step]) -> bytes:
    return b"".join(json.dumps(asdict(step)).encode() + b"\n" for step in steps)


def written(path: Path, steps: list[Step]) -> Path:
    log = StepLog.opened(path, [])
    for step in steps:
        log.append(step)
    log.close()
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all examples of a property."""
    return tmp_path_factory.mktemp("run") / "steps.jsonl"


@pytest.fixture
def full_disk(tmp_path: Path) -> list[str]:
    """A command to which a program's words are added: it runs them with a disk of 8 KiB at tmp_path / "disk"."""
    return with_a_small_disk(tmp_path / "disk", "size=8k")


def test_a_line_is_a_step_as_strict_json(tmp_path: Path) -> None:
    log = StepLog.opened(tmp_path / "steps.jsonl", [])
    log.append(Step(1, 0.5, 1e-4, 2.0, 0.25))
    line = b'{"step": 1, "loss": 0.5, "lr": 0.0001, "grad_norm": 2.0, "seconds": 0.25}\n'
    assert log.path.read_bytes() == line  # before it is closed, too
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.append(Step(2, float("nan"), 1e-4, 2.0, 0.25))
    log.close()
    assert log.path.read_bytes() == line
    assert log.steps == [Step(1, 0.5, 1e-4, 2.0, 0.25)]


@given(values=VALUES, before=st.integers(0, 10**6), torn=TORN, data=st.data())
@quick
def test_an_interrupted_log_equals_one_that_was_not(
    path: Path, values: list[tuple[float, float, float, float]], before: int, torn: bytes, data: st.DataObject
) -> None:
    steps = [Step(before + number, *these) for number, these in enumerate(values, 1)]
    num_written = data.draw(st.integers(0, len(steps)), label="steps before the interruption")
    num_kept = data.draw(st.integers(0, num_written), label="steps of the checkpoint")
    path.unlink(missing_ok=True)
    if num_written:
        written(path, steps[:num_written])
    next_line = content_of(steps[num_written : num_written + 1])
    begun = next_line[: data.draw(st.integers(0, max(0, len(next_line) - 1)), label="of the next line")]
    with path.open("ab") as file:
        file.write(begun + torn)
    log = StepLog.opened(path, timeless(steps[:num_kept]))
    assert log.steps == steps[:num_kept]
    for step in steps[num_kept:]:
        log.append(step)
    log.close()
    assert path.read_bytes() == content_of(steps)
    assert log.steps == steps


@given(size=st.integers(0, len(content_of(steps_to(5)))))
@quick
def test_a_log_that_was_cut_anywhere_is_made_whole(path: Path, size: int) -> None:
    path.write_bytes(content_of(steps_to(5))[:size])
    log = StepLog.opened(path, timeless(steps_to(5)))
    log.close()
    num_whole = (size + 1) // len(content_of(steps_to(1)))  # a line that lacks its end of line only is whole
    whole = [step for step in log.steps if step.seconds]
    assert whole == steps_to(len(whole)) and len(content_of(whole)) <= size + 1 and len(whole) >= num_whole - 1
    assert timeless(log.steps) == timeless(steps_to(5))
    assert path.read_bytes() == content_of(log.steps)


def test_a_sound_file_is_not_written_again(tmp_path: Path) -> None:
    path = written(tmp_path / "steps.jsonl", steps_to(5))
    before = path.stat()
    StepLog.opened(path, timeless(steps_to(5))).close()
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize(
    ("content", "lacking"),
    [
        (None, [11, 12, 13, 14, 15, 16]),
        (b"", [11, 12, 13, 14, 15, 16]),
        (content_of(steps_to(14, 10)), [15, 16]),
        (content_of([step for step in steps_to(18, 10) if step.step != 12]), [12]),
        (content_of(steps_to(12, 10)) * 2 + content_of(steps_to(16, 12)), []),
        (content_of(steps_to(16, 10)).replace(b"\n", b"\r\n"), []),
        (content_of(steps_to(16, 10)).replace(b'"step": 13', b'"step": "13"'), [13]),
        (content_of(steps_to(16, 10)).replace(b'"step": 13', b'"step": 13.5'), [13]),
        (content_of(steps_to(16, 10)).replace(b'"loss": 0.09', b'"loss": 0.08', 1), [11]),
        (content_of(steps_to(16)), []),
        (content_of(steps_to(15, 10)) + content_of([Step(16, float("nan"), 1, 1, 1)]), [16]),
        (b"[" * 10**6 + b"\n" + content_of(steps_to(16, 10)), []),
    ],
    ids=[
        "deleted", "empty", "end", "middle", "twice", "CRLF", "text", "part", "digit", "begins too early", "NaN",
        "nested",
    ],
)  # fmt: skip
def test_lines_that_the_run_knows_otherwise_are_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None, lacking: list[int]
) -> None:
    path = tmp_path / "steps.jsonl"
    if content is not None:
        path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        log = StepLog.opened(path, timeless(steps_to(16, 10)))
    again = "of the steps 11 to 16: they are there again, without their seconds"
    assert caplog.messages == ([f"{path} lacked {len(lacking)} {again}"] if lacking else [])
    log.append(Step(17, 1.0, 1.0, 1.0, 1.0))
    log.close()
    expected = [replace(step, seconds=0.0) if step.step in lacking else step for step in steps_to(16, 10)]
    assert path.read_bytes() == content_of([*expected, Step(17, 1.0, 1.0, 1.0, 1.0)])


def test_cut_takes_later_lines_from_file_and_list(tmp_path: Path) -> None:
    path = written(tmp_path / "steps.jsonl", steps_to(5))
    log = StepLog.opened(path, timeless(steps_to(5)))
    held = log.steps
    log.cut(2)
    assert held == log.steps == steps_to(2)
    assert path.read_bytes() == content_of(steps_to(2))
    for step in steps_to(4, 2):
        log.append(step)
    log.cut(4)
    log.close()
    assert path.read_bytes() == content_of(steps_to(4))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows deletes no folder with an open file")
def test_rewrite_after_the_folder_was_deleted(tmp_path: Path) -> None:
    path = tmp_path / "run" / "steps.jsonl"
    path.parent.mkdir()
    log = StepLog.opened(written(path, steps_to(2)), steps_to(2))
    shutil.rmtree(path.parent)
    log.append(steps_to(3)[-1])
    with pytest.raises(OSError, match=r"cannot write .*steps\.jsonl: No such file or directory"):
        log.rewrite()
    path.parent.mkdir()
    log.rewrite()
    assert path.read_bytes() == content_of(steps_to(3))
    log.append(steps_to(4)[-1])
    log.flush_to_disk()
    log.close()
    assert path.read_bytes() == content_of(steps_to(4))
    assert [entry.name for entry in path.parent.iterdir()] == ["steps.jsonl"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write .*gone.steps\.jsonl: No such file or directory"):
        StepLog.opened(tmp_path / "gone" / "steps.jsonl", [])


def appended_with_no_room(log: StepLog, step: Step, room: int) -> None:
    """Appends while no file may be longer than this one and so many bytes."""
    resource = pytest.importorskip("resource", reason="Windows has no limit on the size of files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + room, hard))
    try:
        log.append(step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 1, 30])
def test_a_torn_line_is_finished_where_the_run_goes_on_and_cut_off_where_it_does_not(tmp_path: Path, room: int) -> None:
    *first, third, fourth = steps_to(4)
    path = written(tmp_path / "steps.jsonl", first)
    log = StepLog.opened(path, first)
    with pytest.raises(OSError, match=r"^cannot write .*steps\.jsonl: File too large$"):
        appended_with_no_room(log, third, room)
    torn = path.read_bytes()
    assert torn == content_of([*first, third])[: len(content_of(first)) + room]
    log.flush_to_disk()
    assert path.read_bytes() == content_of([*first, third])
    log.append(fourth)
    log.close()
    assert path.read_bytes() == content_of([*first, third, fourth])

    path.write_bytes(torn)
    log = StepLog.opened(path, first)
    log.append(third)
    log.close()
    assert path.read_bytes() == content_of([*first, third])


FULL_LOG = """
import sys
from pathlib import Path
from lorasmith.reporting.step_log import StepLog
from lorasmith.types import Step

disk = Path(sys.argv[1])
(disk / "filler").write_bytes(bytes(4096))
log = StepLog.opened(disk / "steps.jsonl", [])
try:
    for number in range(1, 1000):
        log.append(Step(number, 0.5, 1e-4, 0.5, 1.0))
except OSError as error:
    print(error)
assert len(log.path.read_bytes()) == 4096
for method in (log.flush_to_disk, log.rewrite):
    try:
        method()
    except OSError as error:
        print(error)
(disk / "filler").unlink()
log.flush_to_disk()
log.close()
whole = log.path.read_bytes()
assert StepLog.opened(log.path, log.steps).steps == log.steps
assert log.path.read_bytes() == whole
"""


def test_a_full_disk_is_one_error_that_names_the_log(tmp_path: Path, full_disk: list[str]) -> None:
    disk = tmp_path / "disk"
    ran = subprocess.run([*full_disk, sys.executable, "-c", FULL_LOG, str(disk)], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines() == [f"cannot write {disk / 'steps.jsonl'}: No space left on device"] * 3


FULL_TENSORBOARD = """
import sys
from pathlib import Path
from lorasmith.reporting.tensorboard import TensorBoardLog
from lorasmith.types import Step

log = TensorBoardLog(Path(sys.argv[1]) / "tensorboard", 0)
try:
    for number in range(1, 1000):
        log.append(Step(number, 0.5, 1e-4, 0.5, 1.0))
except OSError as error:
    print(error)
for method in (log.close, lambda: TensorBoardLog(log.folder, number)):
    try:
        method()
    except OSError as error:
        print(error)
"""


def test_a_full_disk_is_one_error_that_names_the_tensorboard(tmp_path: Path, full_disk: list[str]) -> None:
    disk = tmp_path / "disk"
    command = [*full_disk, sys.executable, "-c", FULL_TENSORBOARD, str(disk)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0
    assert ran.stdout.splitlines() == [f"cannot write {disk / 'tensorboard'}: No space left on device"] * 3


def events_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: (step, value) of each curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    curves = {tag: shown.Scalars(tag) for tag in shown.Tags()["scalars"]}
    return {tag: [(event.step, event.value) for event in curve] for tag, curve in curves.items()}


def curves_of(steps: list[Step]) -> dict[str, list[tuple[int, Any]]]:
    return {
        tag: [(step.step, pytest.approx(asdict(step)[tag])) for step in steps] for tag in ("loss", "lr", "grad_norm")
    }


def test_tensorboard_shows_the_steps_before_they_are_closed(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path / "tensorboard", 0)
    for step in steps_to(4):
        log.append(step)
    assert events_of(tmp_path / "tensorboard") == curves_of(steps_to(4))
    log.close()
    assert events_of(tmp_path / "tensorboard") == curves_of(steps_to(4))


@pytest.mark.parametrize("is_new", [True, False], ids=["resumed", "gone back"])
def test_tensorboard_shows_a_step_once(tmp_path: Path, is_new: bool) -> None:
    log = TensorBoardLog(tmp_path, 0)
    for step in steps_to(6):
        log.append(replace(step, loss=7.0) if step.step > 3 else step)
    time.sleep(1)  # the files are read in the order of their names, which hold seconds
    if is_new:
        log.close()
        log = TensorBoardLog(tmp_path, 3)
        assert events_of(tmp_path) == curves_of(steps_to(3))
    for step in steps_to(8, 3):
        log.append(step)
    log.close()
    assert events_of(tmp_path) == curves_of(steps_to(8))


def test_tensorboard_goes_on_where_its_folder_was_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "tensorboard"
    log = TensorBoardLog(folder, 0)
    for step in steps_to(3):
        log.append(step)
    shutil.rmtree(tmp_path / "run")
    for step in steps_to(5, 3):
        log.append(step)
    log.close()
    assert events_of(folder) == curves_of(steps_to(5, 3))


def test_a_file_in_the_place_of_the_tensorboard_is_named(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").touch()
    with pytest.raises(OSError, match="^cannot write .*tensorboard: File exists$"):
        TensorBoardLog(tmp_path / "tensorboard", 0)


def test_a_missing_tensorboard_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match=r"^tensorboard needs the extra 'tensorboard': pip install 'lorasmith\[tens"):
        TensorBoardLog(tmp_path / "tensorboard", 0)
    assert not (tmp_path / "tensorboard").exists()


QUIET = """
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

from lorasmith.reporting.tensorboard import TensorBoardLog
from lorasmith.types import Step

def states():
    return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist(), torch.initial_seed()

assert "tensorboard" not in sys.modules
torch.manual_seed(3)
before = states()
warnings.simplefilter("error")
log = TensorBoardLog(Path(sys.argv[1]), 0)
log.append(Step(1, 0.5, 1e-4, 0.5, 1.0))
log.close()
assert states() == before
"""


def test_tensorboard_draws_nothing_and_says_nothing(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", QUIET, str(tmp_path)], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_a_deleted_log_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    log = StepLog.opened(path, [])
    log.append(Step(1, 0.5, 1e-3, 2.0, 0.1))
    whole = path.read_bytes()
    path.unlink()
    log.flush_to_disk()
    assert path.read_bytes() == whole
    log.append(Step(2, 0.5, 1e-3, 2.0, 0.1))
    log.close()
    assert len(path.read_bytes().splitlines()) == 2
