"""Events of trainings as programs read them, beside the page that lists their fields."""

import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY, at_step, lorasmith, made

from lorasmith.reporting.events import Events
from lorasmith.reporting.streams import Printer
from lorasmith.training import loop

PAGE = Path(__file__).parents[2] / "docs" / "events.md"


def documented() -> dict[str, set[str]]:
    """{event: its fields}, by the page."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE.read_text("utf-8"), flags=re.M)
    return {event: set(re.findall(r"`(\w+)`", fields)) for event, fields in rows}


def events(text: str) -> list[dict[str, Any]]:
    """Of what a command printed, each line checked against the page."""
    found = [json.loads(line) for line in text.splitlines()]
    for event in found:
        fields = event.keys() - {"event"}
        assert fields == documented()[event["event"]] or event == {"event": "stopped"}
    return found


@pytest.fixture
def home(tmp_path: Path) -> Path:
    made(tmp_path / "cats", "a cat", "a black cat")
    return tmp_path


def test_a_training_tells_what_it_does(home: Path) -> None:
    sampling = ("--sampling.prompts", "a cat", "--sampling.every", "1", "--sampling.steps", "1")
    ended = lorasmith(home, "train", "cats", *TINY, *sampling, "--output", "run", "--json")
    assert (ended.code, ended.err) == (0, "")
    found = events(ended.out)
    assert found[0]["event"] == "start" and found[-1]["event"] == "done"
    steps = [event for event in found if event["event"] == "step"]
    logged = [json.loads(line) for line in (home / "run" / "steps.jsonl").read_text("utf-8").splitlines()]
    assert [(step["step"], step["loss"], step["lr"]) for step in steps] == [
        (step["step"], step["loss"], step["lr"]) for step in logged
    ]
    assert [(step["steps"], step["epoch"], step["epochs"]) for step in steps] == [(2, 1, 1)] * 2
    for event, count in (("sample", 2), ("checkpoint", 1), ("saved", 1)):
        paths = [home / told["path"] for told in found if told["event"] == event]
        assert len(paths) == count and all(path.is_file() for path in paths)
    ends = [event["stage"] for event in found if event["event"] == "stage" and event["ended"]]
    assert {"loading libraries", "loading the model", "encoding pictures", "packing layers"} <= set(ends)
    assert all(e["done"] == e["total"] for e in found if e["event"] == "stage" and e["ended"] and e["total"])
    assert found[-1]["folder"] == "run" and "training time" in found[-1]["summary"]


def test_a_training_that_is_stopped_says_where(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "sample_losses", at_step(2, lambda: signal.raise_signal(signal.SIGINT)))
    ended = lorasmith(home, "train", "cats", *TINY, "--steps", "4", "--json")
    assert (ended.code, events(ended.out)[-1]) == (130, {"event": "stopped", "step": 2, "steps": 4})


def test_a_training_that_fails_says_why(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> torch.Tensor:
        raise ArithmeticError("what\nwent wrong")

    monkeypatch.setattr(loop, "sample_losses", at_step(1, failing))
    ended = lorasmith(home, "train", "cats", *TINY, "--json")
    assert (ended.code, ended.err) == (2, "lorasmith: what went wrong\n")
    assert events(ended.out)[-1] == {"event": "error", "message": "what went wrong"}
    refused = lorasmith(home, "train", "cats", *TINY, "--json", "--steps", "0")
    assert refused.code == 2 and events(refused.out)[-1]["message"].startswith("steps must be")


def test_of_several_processes_the_first_one_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    for is_first in (False, True):
        with Events(Printer(lambda: sys.stdout), is_first) as display, display.stage("reading"):
            display.warning("something")
        assert [event["event"] for event in events(capsys.readouterr().out)] == [
            "start", "stage", "warning", "stage"
        ] * is_first  # fmt: skip
