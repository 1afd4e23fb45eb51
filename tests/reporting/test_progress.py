"""What long work reports of itself, and when."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hearing import Heard

from lorasmith.formats import lora_file
from lorasmith.reporting import progress
from lorasmith.reporting.progress import MEGABYTE, SILENT, Advance, megabytes, tracked
from lorasmith.training.base_hash import BaseHash
from lorasmith.types import Denoiser


def test_an_item_is_reported_when_it_is_dealt_with() -> None:
    heard = Heard()
    for item in tracked("ab", "reading", heard, 2):
        heard.reports.append(item)
    assert heard.reports == [("reading", 2, ""), "a", 1, "b", 1, "done"]


def test_without_a_watcher_items_pass_through() -> None:
    assert list(tracked(iter("ab"), "reading", SILENT)) == ["a", "b"]


def test_bytes_are_shown_in_megabytes_and_never_more_than_there_are() -> None:
    heard = Heard()
    with megabytes("copying", 2 * MEGABYTE + 1, heard) as advance:
        for count in (MEGABYTE - 1, 1, 1, MEGABYTE, MEGABYTE):
            advance(count)
    assert heard.reports == [("copying", 2, "MB"), 0, 1, 0, 1, 0, "done"]


def test_the_hash_of_a_base_model_shows_how_far_it_has_come(
    flow_denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_seen, true_hash = threading.Event(), lora_file.base_hash
    size = sum(value.nbytes for net in flow_denoiser.nets.values() for value in net.state_dict().values())
    monkeypatch.setattr(progress, "MEGABYTE", size // 4)

    class Hearing(Heard):
        @contextmanager
        def stage(self, what: str, total: int | None = None, unit: str = "") -> Iterator[Advance]:
            with super().stage(what, total, unit) as advance:
                yield lambda count: (advance(count), is_seen.set())[0]

    def half_way(denoiser: Denoiser, advance: Advance) -> str:
        advance(size // 2)
        assert is_seen.wait(60)
        return true_hash(denoiser)

    monkeypatch.setattr(lora_file, "base_hash", half_way)
    hashing, heard = BaseHash(flow_denoiser), Hearing()
    assert hashing.result(heard) == true_hash(flow_denoiser)
    assert heard.reports == [("hashing the base model", 4, "MB"), 2, "done"]
    assert hashing.result(heard) == true_hash(flow_denoiser) and heard.reports.count("done") == 1, "it is known then"
