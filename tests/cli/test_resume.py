"""Interrupting and resuming at the command line, and what is drawn and logged on the way."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from commands import FILES, TINY, Ended, at_step, listing, lorasmith, made
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiers import table

from lorasmith.runs import run
from lorasmith.training import loop

STEPS = 5
ARGUMENTS = ("cats", *TINY, "--steps", str(STEPS), "--checkpoints.steps", "2", "--targets.preset", "attention")


def outcome(run: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """The LoRA and the log but for its times."""
    steps = [json.loads(line) for line in (run / "steps.jsonl").read_text("utf-8").splitlines()]
    return (run / "lora.safetensors").read_bytes(), [{**step, "seconds": 0} for step in steps]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[dict[str, Any]]]:
    """What a run that is not interrupted makes."""
    folder = tmp_path_factory.mktemp("whole")
    made(folder / "cats", "a cat", "a black cat")
    assert lorasmith(folder, "train", *ARGUMENTS).code == 0
    return outcome(folder / "runs" / "cats")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    made(tmp_path / "cats", "a cat", "a black cat")
    return tmp_path


def interrupted(home: Path, *arguments: str, at: int = 3, by: signal.Signals = signal.SIGINT) -> Ended:
    """Runs a command that gets a signal in this step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "sample_losses", at_step(at, lambda: signal.raise_signal(by)))
        return lorasmith(home, *arguments)


@table("by", [signal.SIGINT, signal.SIGTERM], quick=[signal.SIGINT])
def test_the_same_command_with_resume_goes_on(
    home: Path, whole: Any, by: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    usual = signal.getsignal(by)
    ended = interrupted(home, "train", *ARGUMENTS, by=by)
    assert ended.code == 130 and ended.out.endswith(f"stopped after step 3 of {STEPS}; continue with --resume\n")
    assert signal.getsignal(by) is usual
    assert listing(home / "runs" / "cats") == FILES
    assert lorasmith(home, "train", *ARGUMENTS, "--resume").code == 0
    assert f"resuming {Path('runs', 'cats')} after step 3 of {STEPS}" in caplog.text and "changed" not in caplog.text
    assert listing(home / "runs") == {"cats"} | {f"cats/{name}" for name in FILES}
    assert outcome(home / "runs" / "cats") == whole
    names = sorted(path.name for path in (home / "runs" / "cats" / "checkpoints").iterdir())
    assert names == ["step-0000004.safetensors", "step-0000005.safetensors"]


@pytest.mark.slow
def test_a_run_is_resumed_by_its_own_toml(home: Path, whole: Any) -> None:
    (home / "runs" / "cats").mkdir(parents=True)
    interrupted(home, "train", *ARGUMENTS)
    assert interrupted(home, "train", "runs/cats-2/run.toml", "--resume", at=1).code == 130
    assert lorasmith(home, "train", "runs/cats-2/run.toml", "--resume").code == 0
    assert outcome(home / "runs" / "cats-2") == whole and not listing(home / "runs" / "cats")


@pytest.mark.slow
def test_a_run_that_ended_is_resumed_for_more_steps(home: Path, whole: Any, caplog: pytest.LogCaptureFixture) -> None:
    lorasmith(home, "train", *ARGUMENTS, "--steps", "3")
    assert lorasmith(home, "train", *ARGUMENTS, "--resume").code == 0
    assert "changed since the checkpoint, without effect on the weights: steps 3 -> 5" in caplog.text
    assert outcome(home / "runs" / "cats") == whole
    assert lorasmith(home, "train", *ARGUMENTS, "--resume").code == 0
    assert f"resuming {Path('runs', 'cats')} after step 5 of 5" in caplog.text
    assert outcome(home / "runs" / "cats") == whole


@pytest.mark.parametrize(("arguments", "path"), [((), "runs/cats"), (("--output", "runs/typo"), "runs/typo")])
def test_a_run_that_is_not_there_is_not_resumed(home: Path, arguments: tuple[str, ...], path: str) -> None:
    ended = lorasmith(home, "train", *ARGUMENTS, *arguments, "--resume")
    message = f"there is no run to resume: {Path(path)} does not exist; without --resume a new run begins"
    assert ended == Ended(2, "", f"lorasmith: {message}\n") and not (home / "runs").exists()


@pytest.mark.slow
def test_a_run_that_had_no_checkpoint_begins(home: Path, whole: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A folder whose run was killed before its first checkpoint."""
    for found in ((), ("run.toml",), (".lock", ".run.toml.123.partial")):
        folder = home / f"x{len(found)}" / "cats"
        folder.mkdir(parents=True)
        for name in found:
            (folder / name).touch()
        caplog.clear()
        assert lorasmith(home, "train", *ARGUMENTS, "--output", str(folder.relative_to(home)), "--resume").code == 0
        assert "holds no checkpoint to resume from: starting with step 1" in caplog.text
        assert outcome(folder) == whole and listing(folder) == FILES


@pytest.mark.slow
def test_run_toml_works_from_another_folder(home: Path, whole: Any, caplog: pytest.LogCaptureFixture) -> None:
    interrupted(home, "train", *ARGUMENTS)
    (home / "elsewhere").mkdir()
    assert lorasmith(home / "elsewhere", "train", "../runs/cats/run.toml", "--resume").code == 0
    assert outcome(home / "runs" / "cats") == whole and "changed" not in caplog.text
    assert not listing(home / "elsewhere")


@pytest.mark.slow
def test_other_pictures_are_not_called_without_effect(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    interrupted(home, "train", *ARGUMENTS)
    made(home / "copy", "a cat", "a black cat")
    made(home / "dogs", "a dog", "a black dog")
    for folder, level in (("copy", "INFO"), ("dogs", "WARNING")):
        caplog.clear()
        again = ("train", folder, *ARGUMENTS[1:], "--output", "runs/cats", "--resume")
        assert lorasmith(home, *again).code == 0
        (told,) = [record for record in caplog.records if "changed since" in record.getMessage()]
        assert told.levelname == level and re.search(rf"data\.folder \S+ -> {home / folder}", told.getMessage())


def test_a_folder_of_something_else_is_not_resumed(home: Path) -> None:
    (home / "thesis").mkdir()
    (home / "thesis" / "chapter.tex").write_text("…")
    for output in ("thesis", "cats/0.png"):
        ended = lorasmith(home, "train", *ARGUMENTS, "--output", output, "--resume")
        message = f"lorasmith: output must be a run folder to resume, got {Path(output)} without run.toml\n"
        assert ended == Ended(2, "", message)
    assert listing(home / "thesis") == {"chapter.tex"}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was stopped after step 3."""
    folder = tmp_path_factory.mktemp("stopped")
    made(folder / "cats", "a cat", "a black cat")
    interrupted(folder, "train", *ARGUMENTS)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "2"), "steps must be at least the 3 of the checkpoint, got 2"),
        (("--adapter.rank", "3"), "adapter.rank must be 8, as in the run that is resumed, got 3"),
        (("--adapter.name", "LoHa"), "adapter.name must be LoRA, as in the run that is resumed, got LoHa"),
        (("--optimizer.name", "SGD"), "optimizer.name must be AdamW, as in the run that is resumed, got SGD"),
    ],
)
def test_what_settings_show_is_not_resumed_at_once(stopped: Path, arguments: tuple[str, ...], message: str) -> None:
    before = {path: path.read_bytes() for path in (stopped / "runs").rglob("*") if path.is_file()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "skeleton_for", lambda *args, **kwargs: pytest.fail("the model's classes were needed"))
        ended = lorasmith(stopped, "train", *ARGUMENTS, "--resume", *arguments)
    assert ended == Ended(2, "", f"lorasmith: {message}\n")
    assert {path: path.read_bytes() for path in (stopped / "runs").rglob("*") if path.is_file()} == before


def test_other_layers_are_not_resumed(stopped: Path) -> None:
    before = {path: path.read_bytes() for path in (stopped / "runs").rglob("*") if path.is_file()}
    ended = lorasmith(stopped, "train", *ARGUMENTS, "--resume", "--targets.preset", "all")
    assert ended.code == 2 and re.search("cannot resume from the checkpoint of step 3: it must hold", ended.err)
    assert {path: path.read_bytes() for path in (stopped / "runs").rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_an_unsound_checkpoint_refuses_nothing(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The newest one says that more steps are done than are asked for, but is damaged: the one before it counts."""
    lorasmith(home, "train", *ARGUMENTS)
    newest = home / "runs" / "cats" / "checkpoints" / "step-0000005.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    assert lorasmith(home, "train", *ARGUMENTS, "--resume", "--steps", "4").code == 0
    assert "step-0000005.safetensors is not sound" in caplog.text and "after step 4 of 4" in caplog.text


@pytest.mark.slow
def test_pictures_and_logs_on_the_way_change_nothing(home: Path, whole: Any) -> None:
    made(home / "dogs", *["a dog"] * 3)
    arguments = (*ARGUMENTS, "--sampling.prompts", "['a cat']", "--sampling.steps", "1", "--sampling.every", "2")
    extras = ("--tensorboard", "--checkpoints.minutes", "0.001", "--data.held_out", "dogs")
    interrupted(home, "train", *arguments, *extras)
    assert lorasmith(home, "train", *arguments, *extras, "--resume").code == 0
    run = home / "runs" / "cats"
    assert outcome(run) == whole
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-0000002.png", "step-0000004.png"]
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    losses = [step["loss"] for step in whole[1]]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)


@pytest.mark.slow
def test_the_demo_is_resumed(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    quick = ("--device", "cpu", "--steps", "3", "--sampling.prompts", "[]", "--data.held_out", "none")
    values = (*quick, "--data.drift", "none", "--targets.preset", "attention", "--batch_size", "1")
    assert interrupted(home, "demo", *values, at=2).code == 130
    assert lorasmith(home, "demo", *values, "--resume").code == 0
    assert "after step 2 of 3" in caplog.text
    assert {path.name for path in (home / "runs").iterdir()} == {"demo-line_drawing"}
