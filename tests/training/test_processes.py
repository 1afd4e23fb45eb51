"""Two real processes under torchrun: they train as one does, speak as one does, and survive what happens to them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes
from commands import FILES, TINY, listing, made
from torch import Tensor
from two_processes import BAD, CUT, Cut, Outcome, by_contract, cuts, ended, torchrun, trained

from lorasmith.distributed.process_group import ALONE

PROGRAM = two_processes.__file__
ARGUMENTS = ("cats", *TINY, "--steps", "6", "--checkpoints.steps", "2", "--targets.preset", "attention")


def furthest(some: list[Tensor], others: list[Tensor]) -> float:
    """The greatest difference of two numbers."""
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))


def check_equal(first: Outcome, second: Outcome) -> None:
    """Both processes have the same adapters, bit for bit, and saw, said and sent the same."""
    assert all(map(torch.equal, first.weights, second.weights))
    assert (first.losses, first.counters) == (second.losses, second.counters)
    assert (first.sent, first.heard) == (second.sent, second.heard)


def check_cuts(found: dict[Cut, Outcome], others: dict[Cut, Outcome]) -> None:
    """Processes and micro-batches draw the same; in float64 they give the same to 1e-9."""
    alone = cuts(ALONE)
    assert {size for size, *_ in alone} == {3, 4} and len(alone) == 7 and len(found) == 5
    for (size, _, dtype), one in alone.items():
        whole = alone[size, 4 if size == 4 else 2, dtype]
        assert one.drawn == whole.drawn and not one.sent
        assert furthest(one.weights, whole.weights) < {torch.float64: 1e-9, torch.float32: 1e-4}[dtype]
    for (size, batch_size, dtype), one in found.items():
        whole, other = alone[size, 4 if size == 4 else 2, dtype], others[size, batch_size, dtype]
        check_equal(one, other)
        assert one.drawn | other.drawn == whole.drawn and not one.drawn.keys() & other.drawn.keys()
        assert one.losses == pytest.approx(whole.losses, rel=1e-6 if dtype == torch.float64 else 1e-3)
        assert furthest(one.weights, whole.weights) < {torch.float64: 1e-9, torch.float32: 1e-4}[dtype]
        numbers = sum(w.numel() for w in one.weights)
        assert one.sent == [("allreduce_", (numbers + size + 2) * dtype.itemsize)] * len(one.losses)


def check_interruptions(found: dict[str, Any]) -> None:
    """What happens to process 1 alone happens to both."""
    assert len(found["stopped"].losses) == 3
    short, left_out = found["short of memory"], found["left out"]
    alone = trained(ALONE, CUT.model_copy(update={"batch_size": 4}))
    assert short.counters == alone.counters | {"batch_size": 1} and len(short.sent) == len(alone.losses) + 1
    assert short.heard == ["out of memory: continuing with batches of 1"]
    assert furthest(short.weights, alone.weights) < 1e-4
    alone = trained(ALONE, CUT.model_copy(update={"batch_size": 2}), bad=BAD)
    assert left_out.heard == alone.heard and re.match(r"step 1: sample s1 \(number 0, .*is left out", alone.heard[0])
    assert left_out.counters == alone.counters | {"batch_size": 1} and alone.counters["group"] > len(alone.losses)
    assert furthest(left_out.weights, alone.weights) < 1e-4
    error, heard = found["gone back"]
    assert error.startswith("not finite 1 times in a row: sample 1 ") and "back to step 0" in heard[1]


def check_refusals(said: list[str]) -> None:
    numbers = (("seed", 0, 1), ("learning_rate", 0.2, 0.1), ("steps", 4, 5), ("batch_size", 1, 2))
    expected = [f"{key} must .*, got {one} in process 0 and {other} in process 1" for key, one, other in numbers]
    expected += [rf"{fact} must be the same in all processes, got \w+ in .*" for fact in ("data", "base model")]
    for pattern, message in zip(expected, said, strict=True):
        assert re.fullmatch(pattern, message)


def check_checkpoints(found: Any, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first process alone writes them; one process goes on from what two wrote, with twice the accumulation."""
    names = [f"step-000000{step}.safetensors" for step in (2, 4)]
    assert [path.name for path in sorted((folder / "of 0").glob("step-*"))] == names and not (folder / "of 1").exists()
    state, losses, steps = found
    resumed = by_contract(ALONE, grad_accumulation_steps=2, resume_from=folder / "of 0" / names[0])
    assert "grad_accumulation_steps 1 -> 2, " in caplog.text and "processes 2 -> 1" in caplog.text
    assert resumed.steps == steps == 4 and resumed.loss["loss"] == pytest.approx(losses["loss"], rel=1e-4)
    assert resumed.loss["loss"][:2] == losses["loss"][:2]
    assert furthest([resumed.lora[key] for key in state], list(state.values())) < 1e-4


@pytest.mark.processes
@pytest.mark.timeout(400)  # on a machine that is busy
def test_two_processes_train_as_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (end,) = ended(torchrun(tmp_path, PROGRAM, "checks", str(tmp_path)))
    assert end.code == 0, end.err
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert (first["world"], second["world"]) == tuple({"rank": r, "size": 2, "local_rank": r} for r in range(2))
    check_cuts(first["cuts"], second["cuts"])
    for name in ("stopped", "short of memory", "left out"):
        check_equal(first[name], second[name])
    check_interruptions(first)
    assert first["gone back"] == second["gone back"] and first["refused"] == second["refused"]
    check_refusals(first["refused"])
    assert all(torch.equal(value, second["contract"][0][key]) for key, value in first["contract"][0].items())
    assert first["contract"][1:] == second["contract"][1:]
    check_checkpoints(first["contract"], tmp_path, caplog)


def outcome(run: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """The LoRA and the log but for its times."""
    steps = [json.loads(line) for line in (run / "steps.jsonl").read_text("utf-8").splitlines()]
    return (run / "lora.safetensors").read_bytes(), [{**step, "seconds": 0} for step in steps]


@pytest.mark.processes
@pytest.mark.timeout(400)  # on a machine that is busy
def test_two_processes_of_the_command_line(tmp_path: Path) -> None:
    """In peace; one of them killed; all told to stop, and resumed: the same bytes."""
    whole, dying, stopping = (made(tmp_path / name / "cats", "a cat", "").parent for name in ("a", "b", "c"))
    for folder in (whole, dying, stopping):
        (folder / "cats" / "1.txt").unlink()
    (end,) = ended(torchrun(whole, "-m", "lorasmith", "train", *ARGUMENTS))
    assert end.code == 0 and end.err.count("pictures without a caption in cats: 1") == 1, end.err
    assert end.out.count("LoRA of 6 steps: ") == end.out.count("run folder: ") == 1
    assert listing(whole / "runs") - {"cats/.launch"} == {"cats", *(f"cats/{name}" for name in FILES)}
    assert {path.name for path in whole.iterdir()} == {"cats", "runs"}

    options = ("--standalone", "--max-restarts", "2")
    (end,) = ended(torchrun(dying, PROGRAM, "dying", "train", *ARGUMENTS, options=options))
    lost, told = "process 0 has lost another process", "lorasmith: stopped"  # as the loss or torchrun comes first
    assert end.code == 0 and (lost in end.err or told in end.err), end.err
    assert end.err.count("resuming runs/cats after step 3 of 6") == 1
    assert outcome(dying / "runs" / "cats") == outcome(whole / "runs" / "cats")

    (end,) = ended(torchrun(stopping, PROGRAM, "stopping", "train", *ARGUMENTS))
    (last,) = re.findall(r"stopped after step (\d) of 6; continue with --resume", end.out)
    run = stopping / "runs" / "cats"
    assert listing(run) - {".launch"} == FILES
    assert len(outcome(run)[1]) == int(last) and (run / "checkpoints" / f"step-000000{last}.safetensors").is_file()
    (end,) = ended(torchrun(stopping, "-m", "lorasmith", "train", *ARGUMENTS, "--resume"))
    assert end.code == 0 and f"resuming runs/cats after step {last} of 6" in end.err, end.err
    assert outcome(run) == outcome(whole / "runs" / "cats")
