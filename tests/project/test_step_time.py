"""Step times of a tiny net: every contender computes the same loss, and the JSON holds all that was measured."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import step_time
from step_time_report import Line, table
from step_time_work import Work

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="memory is measured on Linux and macOS")
QUICK = ("--size", "small", "--rounds", "1", "--steps", "1", "--warmup", "1", "--threads", "1")


def found(path: Path, *words: str) -> dict[str, Any]:
    """What the program writes of a quick run."""
    step_time.main([*QUICK, "--json", str(path), *words])
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A model and data for checks alone."""
    folder = str(tmp_path_factory.mktemp("work"))
    base = Work("make", folder, "small", 64, "bf16", layers="all", algorithm="OFT", rank=8, batch=1, threads=1)
    step_time.answered(base)
    return base


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_lorasmith_beside_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["lorasmith:adapter.rank=4,gradient_checkpointing", "peft"]
    result = found(tmp_path / "found.json", "--contenders", *names)
    own, peft = result["contenders"]
    assert [line["name"] for line in result["lines"]] == names
    assert own["loss"] == pytest.approx(peft["loss"], rel=1e-3) and peft["difference"] < 1e-2
    assert own["layers"] == peft["layers"] == 32 and 2 * own["numbers"] == peft["numbers"]
    for contender in (own, peft):
        (turn,) = contender["turns"]
        assert len(turn["seconds"]) == 1 and turn["seconds"][0] > 0 and turn["warmup"] == []
        assert 0 < turn["memory"]["above_imports"] < turn["memory"]["peak"]
    assert result["flops"] > 1e7 and result["peak_flops"][0] > 1e8 and "torch" in result["versions"]
    assert "| peft " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_who_cannot_is_left_out(base: Work) -> None:
    entries = [step_time.Entry("lycoris"), step_time.Entry("peft")]
    step_time.check(base, entries)
    lycoris, peft = entries
    assert lycoris.left_out is None and lycoris.check["layers"] == 83
    assert "identity" in (peft.left_out or "")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_another_loss_ends_the_program(base: Work) -> None:
    entries = [step_time.Entry("lorasmith", {"loss": 1.0, "difference": 0.0, "layers": 1, "numbers": 1})]
    with pytest.raises(step_time.Failed, match="peft computes something else than lorasmith: loss 1.02, not 1.0"):
        step_time.compare(base, [*entries, step_time.Entry("peft", {**entries[0].check, "loss": 1.02})])
    with pytest.raises(step_time.Failed, match="peft computes something else"):
        step_time.compare(base, [*entries, step_time.Entry("peft", {**entries[0].check, "difference": 0.2})])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_unknown_options_are_refused(base: Work) -> None:
    with pytest.raises(step_time.Failed, match="channels_last"):
        step_time.check(base, [step_time.Entry("peft:chanels_last")])
    with pytest.raises(step_time.Failed, match="did you mean adapter.rank"):
        step_time.check(base, [step_time.Entry("lorasmith:adapter.rnk=4")])


def test_comfyui_is_left_out_where_layers_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COMFYUI_PATH", "COMFYUI_PYTHON"):
        monkeypatch.setenv(name, "somewhere")
    entry = step_time.Entry("comfyui:bypass_mode")
    assert "all" in (step_time.reason_to_leave_out(entry, step_time.arguments([])) or "")
    assert step_time.reason_to_leave_out(entry, step_time.arguments(["--layers", "all"])) is None
    monkeypatch.delenv("COMFYUI_PATH")
    assert "COMFYUI_PATH" in (step_time.reason_to_leave_out(entry, step_time.arguments(["--layers", "all"])) or "")


@pytest.mark.slow
@pytest.mark.skipif(
    not all(os.environ.get(name) for name in ("COMFYUI_PATH", "COMFYUI_PYTHON")),
    reason="COMFYUI_PATH and COMFYUI_PYTHON not set: a checkout of ComfyUI, and a Python with what it needs",
)
@pytest.mark.timeout(600)
def test_comfyui(tmp_path: Path) -> None:
    names = ["lorasmith", "comfyui", "comfyui:bypass_mode"]
    result = found(tmp_path / "found.json", "--layers", "all", "--contenders", *names)
    assert [line["name"] for line in result["lines"]] == names
    assert {contender["layers"] for contender in result["contenders"]} == {83}


def test_the_arithmetic_of_a_line() -> None:
    def turn(*seconds: float, gigabytes: float) -> dict[str, Any]:
        memory = {"above_imports": gigabytes}
        return {"seconds": seconds, "first_step": 9.0, "memory": memory, "busy_elsewhere": 0.0}

    base = {"layers": 1, "numbers": 2, "left_out": None}
    first = {"name": "a", **base, "turns": [turn(1.0, 1.0, 4.0, gigabytes=1.0), turn(2.0, 2.0, 2.0, gigabytes=3.0)]}
    second = {"name": "b", **base, "turns": [turn(2.0, 2.0, 2.0, gigabytes=1.0), turn(1.0, 1.0, 1.0, gigabytes=1.0)]}
    out = {"name": "c", "turns": [], "left_out": "too slow\nand more"}
    result: dict[str, Any] = {"contenders": [first, second, out], "flops": 30.0, "peak_flops": [10.0, 20.0, 99.0]}
    one, other = Line.all_of(result)
    assert (one.median, one.min, one.max, one.ratio, one.gigabytes) == (2.0, 1.0, 4.0, 1.0, 3.0)
    assert (other.median, other.ratio, other.share) == (1.5, 1.25, 1.0)
    result |= {"machine": {"processor": "p", "cores": 1, "threads": 1}, "versions": {}}
    result["settings"] = vars(step_time.arguments([]))
    assert table(result, [one, other]).splitlines()[-1] == "c: left out: too slow"
