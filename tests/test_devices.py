"""Devices: where bf16 is computed, and that doing without it is said once."""

import logging
from collections.abc import Iterator

import pytest
import torch

from lorasmith import devices
from lorasmith.devices import DTYPES, best_device, compute_dtype, has_bf16

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_said_yet() -> Iterator[None]:
    compute_dtype.cache_clear()
    yield
    compute_dtype.cache_clear()


def test_without_bf16_fp32_is_computed_in_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices, "has_bf16", lambda device: False)
    caplog.set_level(logging.INFO, "lorasmith")
    assert [compute_dtype("bf16", CPU) for _ in range(3)] == [torch.float32] * 3
    assert [record.getMessage() for record in caplog.records] == ["cpu has no bf16: computing in fp32 instead"]
    compute_dtype("bf16", torch.device("mps"))
    assert [record.getMessage() for record in caplog.records[1:]] == ["mps has no bf16: computing in fp32 instead"]


def test_bf16_is_used_where_there_is_some(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(devices, "has_bf16", lambda device: True)
    caplog.set_level(logging.INFO, "lorasmith")
    assert compute_dtype("bf16", CPU) == torch.bfloat16
    assert not caplog.records


@pytest.mark.parametrize("there", [False, True])
def test_fp32_stays(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, there: bool) -> None:
    monkeypatch.setattr(devices, "has_bf16", lambda device: there)
    caplog.set_level(logging.INFO, "lorasmith")
    assert compute_dtype("fp32", CPU) == torch.float32
    assert not caplog.records


def test_this_machine_answers() -> None:
    device = best_device()
    assert device.type in ("cuda", "mps", "cpu")
    expected = torch.bfloat16 if has_bf16(device) else torch.float32
    assert compute_dtype("bf16", device) == expected
    assert torch.ones(2, device=device, dtype=expected).sum().item() == 2
    assert not has_bf16(torch.device("mps"))
    assert set(DTYPES) == {"bf16", "fp32"}


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_the_best_device(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert best_device() == torch.device(expected)
