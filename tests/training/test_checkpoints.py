"""Checkpoints: what is written is read, whatever is damaged is noticed, the newest sound one is taken."""

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from lorasmith.config.schema import Checkpoints, Config, NonFinite
from lorasmith.formats import lora_file
from lorasmith.storage.atomic import PARTIAL
from lorasmith.training.checkpoints import NO_HASH, Checkpoint, CheckpointFolder, newest_in, read

TENSORS = {
    "master/a/down": torch.linspace(-1, 1, 6).reshape(2, 3),
    "master/ä/up": torch.tensor([[1e-40], [3e38]], dtype=torch.bfloat16),
    "optimizer/a/down/step": torch.tensor(3.0),
    "losses": torch.tensor([0.1, 1 / 3], dtype=torch.float64),
}
FACTS = {"data": "猫", "torch": "2"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def checkpoint(step: int, **values: Any) -> Checkpoint:
    parts = {"tensors": TENSORS, "numbers": {"counters": {"step": step}}, "config": {"seed": 2**64 - 1}, "facts": FACTS}
    return Checkpoint(step, **{**parts, **values})


def content_of(step: int, **values: Any) -> bytes:
    return b"".join(checkpoint(step, **values).pieces())


def bits(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.flatten().view(torch.uint8).tolist()


def folder_with(path: Path, *steps: int, **rule: Any) -> CheckpointFolder:
    """A folder of sound checkpoints, empty before, of a run that may go back."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    folder = CheckpointFolder.of(path, Config(checkpoints=Checkpoints(**rule), non_finite=NonFinite(returns=1)))
    for step in steps:
        folder.file_path(step).write_bytes(content_of(step))
    return folder


def step_of(found: Checkpoint | None) -> int | None:
    return None if found is None else found.step


@given(values=st.dictionaries(st.text(), JSON, max_size=3), facts=st.dictionaries(st.text(), st.text(), max_size=3))
@quick
def test_what_is_written_is_read(tmp_path: Path, values: dict[str, Any], facts: dict[str, str]) -> None:
    written = checkpoint(7, numbers=values, config=values, facts=facts)
    CheckpointFolder(tmp_path, Checkpoints()).write(written)
    found = read(tmp_path / "step-0000007.safetensors")
    assert (found.step, found.numbers, found.config, found.facts) == (7, values, values, facts)
    assert {key: bits(t) for key, t in found.tensors.items()} == {key: bits(t) for key, t in TENSORS.items()}


def test_no_tensor_is_too_small() -> None:
    empty = {"losses": torch.zeros(0, dtype=torch.float64), "a": torch.zeros(0, 3)}
    found = Checkpoint.of_bytes(content_of(0, tensors=empty))
    assert {key: bits(t) for key, t in found.tensors.items()} == {key: bits(t) for key, t in empty.items()}


def test_equal_content_makes_equal_bytes() -> None:
    turned = dict(reversed(TENSORS.items()))
    assert content_of(1, tensors=turned, facts=dict(reversed(FACTS.items()))) == content_of(1)


def test_other_programs_can_read_it(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content_of(1))
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert {key: bits(file.get_tensor(key)) for key in file.keys()} == {k: bits(t) for k, t in TENSORS.items()}
        assert set(file.metadata()) == {"lorasmith.checkpoint", "lorasmith.config_hash", "sha256"}


def test_any_flipped_bit_and_any_missing_or_added_byte_is_noticed() -> None:
    content = content_of(1)
    Checkpoint.of_bytes(content)
    for place in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            with pytest.raises(ValueError, match="^it(s content does not have the| states no) hash"):
                Checkpoint.of_bytes(bytes(damaged))
        for damaged in (content[:place], content[:place] + content[place + 1 :], content[:place] + b"0" * 64):
            with pytest.raises(ValueError, match="^it"):
                Checkpoint.of_bytes(damaged)
    with pytest.raises(ValueError, match="its content does not have the hash that it states"):
        Checkpoint.of_bytes(content + b"\0")


def flipped(content: bytes, place: int) -> bytes:
    damaged = bytearray(content)
    damaged[place // 8] ^= 1 << place % 8
    return bytes(damaged)


SIZE = len(content_of(5))
DAMAGED = st.one_of(
    st.integers(0, 8 * SIZE - 1).map(lambda place: flipped(content_of(5), place)),
    st.integers(0, SIZE - 1).map(lambda size: content_of(5)[:size]),
    st.binary(min_size=1, max_size=100).map(lambda rest: content_of(5) + rest),
    st.integers(1, SIZE).map(lambda size: content_of(5)[: SIZE - size] + bytes(size)),  # blocks that were never written
    st.binary(max_size=300),
)


@given(damaged=DAMAGED)
@quick
def test_the_newest_sound_one_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: bytes) -> None:
    folder = folder_with(tmp_path / "checkpoints", 3, 4, 5)
    assert step_of(folder.newest()) == 5
    folder.file_path(5).write_bytes(damaged)
    caplog.clear()
    assert step_of(folder.newest()) == 4
    (warning,) = caplog.messages
    assert re.match(f"checkpoint {re.escape(str(folder.file_path(5)))} is not sound: it", warning)
    folder.file_path(4).write_bytes(b"")
    assert step_of(newest_in(tmp_path)) == 3  # of the run folder, too
    folder.file_path(3).write_bytes(damaged)
    assert folder.newest() is None
    with pytest.raises(ValueError, match="is not sound: it"):
        newest_in(folder.file_path(5))


def test_another_programs_file_with_a_true_hash_is_no_checkpoint() -> None:
    plain = b"".join(lora_file.file_pieces(TENSORS, {"sha256": NO_HASH}))
    content = plain.replace(NO_HASH.encode(), hashlib.sha256(plain).hexdigest().encode(), 1)
    with pytest.raises(
        ValueError, match="^it must be written by lorasmith, but does not state 'lorasmith.checkpoint'$"
    ):
        Checkpoint.of_bytes(content)


def test_a_checkpoint_that_the_disk_does_not_give_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be sound, so that no older one is taken unasked."""
    folder = folder_with(tmp_path / "checkpoints", 1, 2)

    def failing(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(OSError, match=f"^cannot read {re.escape(str(folder.file_path(2)))}: {os.strerror(errno.EIO)}$"):
        folder.newest()


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "checkpoints", 2, 10)
    for name in ("step-3.safetensors", "step-0000003.safetensors.bak", "xstep-0000003.safetensors", f".a{PARTIAL}"):
        (folder.path / name).touch()
    folder.file_path(12).mkdir()
    folder.file_path(1).symlink_to("nowhere")
    assert folder.steps() == [2, 10]
    folder.file_path(12).rmdir()
    folder.file_path(1).unlink()
    folder.write(checkpoint(11))
    assert folder.steps() == [10, 11] and len(list(folder.path.iterdir())) == 6
    assert CheckpointFolder(tmp_path / "none", Checkpoints()).steps() == []
    assert CheckpointFolder(tmp_path / "none", Checkpoints()).newest() is None


def test_the_newest_is_that_of_the_last_step_whatever_the_dates(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "checkpoints", 1, 2, 3)
    for step, seconds in ((1, 4e9), (2, 0.0), (3, -1e9)):
        os.utime(folder.file_path(step), (seconds, seconds))
    assert step_of(folder.newest()) == 3


@pytest.mark.parametrize(
    ("rule", "there", "left"),
    [
        ({"keep": 1}, [1, 2, 3], [4]),
        ({"keep": 2}, [1, 2, 3], [3, 4]),
        ({"keep": 9}, [1, 2, 3], [1, 2, 3, 4]),
        ({"keep": 1, "steps": 2}, [0, 1, 2, 3], [2, 4]),  # the last two regular ones, which a run goes back to
        ({"keep": 1, "steps": 3}, [1, 2, 3], [3, 4]),
        ({"keep": 1, "steps": 5}, [0, 1, 2, 3], [0, 4]),
        ({"keep": 2, "steps": 2}, [0, 2, 3], [2, 3, 4]),
        ({"keep": 2, "steps": 3}, [0, 1, 2, 3], [0, 3, 4]),
        ({"keep": 2}, [3, 5, 8], [3, 4]),  # later ones are of a past that was left, or not sound
        ({"keep": 2}, [4, 9], [4]),
    ],
)
def test_which_are_kept(tmp_path: Path, rule: dict[str, int], there: list[int], left: list[int]) -> None:
    folder = folder_with(tmp_path / "checkpoints", *there, **rule)
    folder.write(checkpoint(4))
    assert folder.steps() == left and folder.last == 4
    assert all(read(folder.file_path(step)).step == step for step in left)


def test_later_ones_go_before_one_is_written_and_earlier_ones_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with(tmp_path / "checkpoints", 1, 2, 3, 8, keep=1)
    folder.file_path(8).write_bytes(b"not sound")

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match=f"^cannot write .*step-0000004.safetensors: {os.strerror(errno.ENOSPC)}$"):
            folder.write(checkpoint(4))
    assert folder.steps() == [1, 2, 3] and folder.last is None and len(list(folder.path.iterdir())) == 3
    folder.write(checkpoint(4))
    assert folder.steps() == [4]


def test_the_regular_ones_alone(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "checkpoints", 0, 3, 6, 7, steps=3)
    assert step_of(folder.newest()) == 7 and step_of(folder.newest_regular(8)) == 6
    assert step_of(folder.newest_regular(6)) == 3
    folder.file_path(6).write_bytes(b"")
    assert step_of(folder.newest_regular(8)) == 3
    assert folder.newest_regular(3) is not None and folder.newest_regular(0) is None
    assert step_of(folder_with(tmp_path / "checkpoints", 4, 5, steps=3).newest_regular(5)) == 4  # none is regular


def test_a_run_that_never_goes_back_keeps_as_many_as_asked_for(tmp_path: Path) -> None:
    folder = CheckpointFolder.of(tmp_path, Config(checkpoints=Checkpoints(steps=2, keep=1)))
    for step in range(1, 5):
        folder.write(checkpoint(step))
        assert folder.steps() == [step]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time that never jumps, in its only element; the clock on the wall jumps by years whenever it is read."""
    now = [1e6]
    years = iter(range(1, 10**9))
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now[0])
        patch.setattr(time, "time", lambda: (-1) ** (year := next(years)) * year * 3e7)
        yield now


def test_checkpoints_by_minutes(tmp_path: Path, clock: list[float]) -> None:
    folder = CheckpointFolder(tmp_path, Checkpoints(minutes=1), since=clock[0])
    for step in range(1, 4):
        clock[0] += 59
        assert not folder.is_due(step)
        clock[0] += 1
        assert folder.is_due(step)
        folder.write(checkpoint(step))
        assert not folder.is_due(step)


def test_checkpoints_by_minutes_take_at_most_a_hundredth_of_the_time(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, replace = CheckpointFolder(tmp_path, Checkpoints(minutes=1), since=clock[0]), os.replace

    def slow(source: Path, target: Path) -> None:
        clock[0] += 10
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", slow)
        folder.write(checkpoint(1))
    assert folder.cost == 10
    clock[0] += 999
    assert not folder.is_due(2)
    clock[0] += 1
    assert folder.is_due(2)
    folder.write(checkpoint(2))  # quick this time
    clock[0] += 60
    assert folder.is_due(3)


def test_checkpoints_by_steps_alone(tmp_path: Path, clock: list[float]) -> None:
    folder = CheckpointFolder(tmp_path, Checkpoints(minutes=0, steps=3), since=clock[0])
    clock[0] += 1e9
    assert [step for step in range(1, 10) if folder.is_due(step)] == [3, 6, 9]
    never = CheckpointFolder(tmp_path, Checkpoints(minutes=0), since=clock[0])
    assert not never.is_due(100) and not never.is_regular(0)
    both = CheckpointFolder(tmp_path, Checkpoints(minutes=1, steps=3), since=clock[0])
    assert [step for step in range(1, 5) if both.is_due(step)] == [3]
    clock[0] += 60
    assert both.is_due(4)
