"""What `train` is asked for: pictures, a settings file or a run folder, and what is said where it is none."""

import re
from pathlib import Path

import pytest
from commands import lorasmith

from lorasmith.config import other_files
from lorasmith.config.invocation import Invocation, invocation, with_model
from lorasmith.config.values import configured, toml_of
from lorasmith.demo import BASE


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run, seen from its parent."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs", "cats")
    (folder / "checkpoints").mkdir(parents=True)
    config = configured({"model": "demo", "data": {"folder": "cats"}, "steps": 7})
    (folder / "run.toml").write_text(toml_of(config), encoding="utf-8")
    return folder


def asked(command: str, *, resume: bool = False) -> Invocation:
    return invocation(command.split(), is_resuming=resume)


def refused(command: str, *, resume: bool = False) -> str:
    with pytest.raises(ValueError) as refusal:
        asked(command, resume=resume)
    return str(refusal.value)


def test_a_run_folder_is_continued(run: Path) -> None:
    whole, file = asked("runs/cats --steps 9", resume=True), asked("runs/cats/run.toml --steps 9", resume=True)
    assert whole == file and whole.folder == run
    assert (whole.config.steps, whole.config.model, whole.config.data.folder) == (9, str(BASE), Path("cats"))


def test_a_run_is_resumed_in_its_own_folder(run: Path) -> None:
    assert asked(f"runs/cats --output {run.resolve()}", resume=True).folder == run
    message = "output must be the run that is resumed, runs/cats, or not be given, got runs/dogs"
    assert refused("runs/cats --output runs/dogs", resume=True) == message
    assert refused("runs/cats/run.toml --output runs/dogs", resume=True) == message


def test_what_is_no_run_is_not_resumed(run: Path) -> None:
    Path("begun").mkdir()
    Path("begun", "run.toml").write_text('model = "demo"\n')
    for source, found in (
        ("nowhere", "none that exists"), ("runs", "one without run.toml"),
        ("begun", "one with run.toml but none of .lock, steps.jsonl, checkpoints"),
    ):  # fmt: skip
        message = f"{source} must be a run folder to resume, or pictures with --model, got {found}"
        assert refused(source, resume=True) == message


def test_a_run_folder_is_not_trained_on(run: Path) -> None:
    message = refused("runs/cats --model demo")
    assert message == (
        "runs/cats is the folder of a run, and not of pictures: lorasmith train runs/cats --resume continues the run, "
        "and lorasmith train runs/cats/run.toml --output runs/cats-2 repeats it"
    )
    again = asked(message.rpartition("lorasmith train ")[2].removesuffix(" repeats it"))
    assert again.config.output == Path("runs", "cats-2") and again.folder is None
    Path("runs", "cats-2").mkdir()
    assert "runs/cats-3 repeats it" in refused("runs/cats")


def test_pictures_beside_a_file_of_settings_are_pictures(run: Path) -> None:
    Path("pictures").mkdir()
    Path("pictures", "run.toml").write_text("steps = 1\n")
    for resume in (False, True):
        found = asked("pictures --model demo", resume=resume)
        assert found.config.data.folder == Path("pictures") and found.folder is None


def test_the_folder_may_be_given_as_a_setting() -> None:
    assert asked("--data.folder cats --model demo") == asked("cats --model demo")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "none: lorasmith train PICTURES --model MODEL"),
        ("a b", "a b"),
        (
            "cats --sampling.prompts red apple",
            "cats apple: a value of several words needs quotes: --sampling.prompts 'red apple'; several values need "
            "the key each time: --sampling.prompts red --sampling.prompts apple",
        ),
        ("cats --model my model.safetensors", "cats model.safetensors: a value of several words needs quotes: "
         "--model 'my model.safetensors'"),
        ("--sampling.prompts red apple .", "apple .: a value of several words needs quotes: --sampling.prompts "
         "'red apple'; several values need the key each time: --sampling.prompts red --sampling.prompts apple"),
        ("cats --steps 3 dogs", "cats dogs"),
    ],
)  # fmt: skip
def test_one_source_is_wanted(command: str, message: str) -> None:
    assert refused(command) == f"train needs one folder of pictures or one TOML file, got {message}"


def test_resume_takes_no_value() -> None:
    assert refused("cats state", resume=True).endswith("got cats state: --resume takes no value")


def test_a_fault_in_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('model = "demo"\nsteps = 0\n', encoding="utf-8")
    assert refused(str(path)) == f"{path} line 2: steps must be 1 to 100000, got 0"
    assert refused(f"{path} --steps -1") == "steps must be 1 to 100000, got '-1'"
    assert asked(f"{path} --steps 1").config.steps == 1
    path.write_text('# my run\nmodel = "sdxl"\n', encoding="utf-8")
    assert re.match(
        rf"{re.escape(str(path))} line 2: model must be .*: for Stable Diffusion XL, --model ", refused(str(path))
    )


@pytest.mark.parametrize("suffix", other_files.SUFFIXES)
def test_files_of_other_programs_are_answered(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"config{suffix}"
    path.write_text('{"network_dim": 4}', encoding="utf-8")
    assert refused(f"{path} --model demo").endswith("As config.toml:\n[adapter]\nrank = 4")


@pytest.mark.parametrize("name", ["SDXL", "sd-1.5", "FLUX.1-dev"])
def test_the_name_of_a_family_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^model must be .*, got '{name}': for .*, --model [\w-]+/[\w.-]+$"):
        with_model({"model": name})
    Path(name).mkdir()
    assert with_model({"model": name}) == {"model": name}
    assert with_model({"model": "demo"}) == {"model": str(BASE)} and with_model({}) == {}


def test_several_faults_are_shown_line_by_line(tmp_path: Path) -> None:
    ended = lorasmith(tmp_path, "train", "pics", "--network_dim", "32", "--lr", "1e-4")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.splitlines() == [
        "lorasmith: 2 of the settings are not lorasmith's:",
        "  --network_dim is kohya's name: here it is --adapter.rank 32",
        "  --lr is another trainer's name: here it is --learning_rate 1e-4",
        "  together: lorasmith train pics --adapter.rank 32 --learning_rate 1e-4",
    ]
