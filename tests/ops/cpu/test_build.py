"""Kernels in C that are not there: one line of the log at most, and PyTorch's own operations."""

import logging
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_denoiser import FlowDenoiser

from lorasmith.api import train_lora
from lorasmith.ops.cpu import build
from lorasmith.types import Result

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="they are for Linux alone")
HAS_KERNELS = build.library() is not None
ENDING = ": PyTorch's are used, which are slower here"


@pytest.fixture(autouse=True)
def as_if_never_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """On a processor that has what they need."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.library.cache_clear()
    yield
    build.library.cache_clear()


def compiler(folder: Path, script: str) -> str:
    """A program in the place of a C compiler; $OUT is the file that it should make."""
    path = folder / "planted-cc"
    path.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nOUT=$2\n{script}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def without_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)


def no_such_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("CC", str(folder / "nothing"))


def failing_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("CC", compiler(folder, "echo warning: odd >&2; echo error: planted >&2; exit 1"))


def silent_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("CC", compiler(folder, "exit 0"))


def broken_library(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("CC", compiler(folder, 'echo "not a library" > "$OUT"'))


ABSENT = {
    without_compiler: r"there is no C compiler: cc, gcc or clang",
    no_such_compiler: r".*No such file or directory: '.*nothing'",
    failing_compiler: r"error: planted",
    silent_compiler: r".*No such file or directory.*",
    broken_library: r".*kernels-.*\.so: .*",
}


@pytest.mark.parametrize("absent", ABSENT, ids=lambda absent: absent.__name__)
def test_their_absence_is_said_once_and_changes_nothing(
    absent: Any, flow_denoiser: FlowDenoiser, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    absent(monkeypatch, tmp_path)
    caplog.set_level(logging.INFO, build.__name__)
    result, plain = trained(flow_denoiser), trained(flow_denoiser, native_kernels=False)
    assert build.library() is None
    (line,) = [record.getMessage() for record in caplog.records if record.name == build.__name__]
    assert line.startswith("no kernels of our own (") and line.endswith(f"){ENDING}")
    assert re.fullmatch(ABSENT[absent], line[23 : -len(ENDING) - 1])
    assert result.loss == plain.loss
    assert all(torch.equal(tensor, plain.lora[key]) for key, tensor in result.lora.items())


def test_other_processors_are_not_told_of_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(build, "_built", lambda: pytest.fail("built"))
    caplog.set_level(logging.INFO, build.__name__)
    assert build.library() is None and not caplog.records


@pytest.mark.slow
@pytest.mark.skipif(not HAS_KERNELS, reason="no AVX-512 for bf16, or no compiler")
def test_a_cache_that_cannot_be_written_to_is_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, build.__name__)
    (tmp_path / "file").touch()
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build.library() is not None and not caplog.records
    assert len(list(tmp_path.glob("lorasmith-*/kernels-*.so"))) == 1


@pytest.mark.slow
@pytest.mark.skipif(not HAS_KERNELS, reason="no AVX-512 for bf16, or no compiler")
def test_a_library_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    """Loading it would end the process."""
    path = build._built()
    whole = path.read_bytes()
    for share in (0.0, 0.2, 0.5, 0.9):
        path.unlink()
        path.write_bytes(whole[: int(share * len(whole))])
        build.library.cache_clear()
        assert build._built().read_bytes() == whole and build.library() is not None


@pytest.mark.parametrize(("is_there", "is_granted"), [(False, True), (True, False), (True, True)])
def test_products_are_by_tiles_where_the_processor_has_them_and_the_system_grants_them(
    is_there: bool, is_granted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: is_there)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: is_granted)
    compiled: list[str] = []
    monkeypatch.setattr(build.subprocess, "run", lambda command, **_: compiled.extend(command))
    assert build.library() is None  # nothing was made
    assert ("-mamx-bf16" in compiled) is (is_there and is_granted)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_KERNELS, reason="no AVX-512 for bf16, or no compiler")
def test_results_agree_to_rounding(flow_denoiser: FlowDenoiser) -> None:
    own, plain = trained(flow_denoiser), trained(flow_denoiser, native_kernels=False)
    assert own.loss["loss"] == pytest.approx(plain.loss["loss"], rel=1e-2)
    one, other = (torch.cat([t.flatten().float() for t in result.lora.values()]) for result in (own, plain))
    assert 0 < (one - other).norm() < 0.1 * other.norm()


def trained(denoiser: FlowDenoiser, **values: Any) -> Result:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    cond = [{"text": torch.randn(5, 16, generator=generator), "pooled": torch.randn(8, generator=generator)}]
    return train_lora(denoiser, latents, cond, batch_size=2, steps=3, rank=2, **values)
