"""The command line, called as a user calls it: what it makes, what it says, and how it ends."""

import errno
import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import FILES, TINY, UNFINISHED, Ended, at_step, listing, lorasmith, made
from PIL import Image

from lorasmith import __version__
from lorasmith.cli import main as cli
from lorasmith.cli import tools
from lorasmith.demo import BASE
from lorasmith.formats import lora_file
from lorasmith.training import loop

NOT_YET = "output must be a folder that does not exist yet, unless --resume is given"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder that holds the folder `cats` of two pictures."""
    made(tmp_path / "cats", "a cat", "a black cat")
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A folder with `cats` and the LoRA that was trained on them in `first/lora`."""
    folder = tmp_path_factory.mktemp("trained")
    made(folder / "cats", "a cat", "a black cat")
    return folder, lorasmith(folder, "train", "cats", *TINY, "--output", "first/lora")


def test_training_makes_a_run_folder(trained: tuple[Path, Ended]) -> None:
    folder, ended = trained
    assert (ended.code, ended.err) == (0, "")
    run = folder / "first" / "lora"
    assert listing(run) == FILES
    assert f"LoRA of 2 steps: {Path('first', 'lora', 'lora.safetensors')}\n" in ended.out
    assert ended.out.endswith(f"run folder: {Path('first', 'lora')}\n")
    steps = [json.loads(line) for line in (run / "steps.jsonl").read_text("utf-8").splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(0 < step["loss"] < 10 and step["lr"] == 5e-4 and step["seconds"] > 0 for step in steps)
    with Image.open(run / "loss.png") as picture:
        assert picture.size == (1000, 600)
    tensors, metadata = lora_file.read(run / "lora.safetensors")
    assert metadata["lorasmith.steps"] == "2"
    assert any(value.any() for key, value in tensors.items() if key.endswith("lora_up.weight"))


def test_a_toml_file_gives_the_same_bytes(trained: tuple[Path, Ended]) -> None:
    folder, _ = trained
    text = 'model = "demo"\ndevice = "cpu"\nsteps = 5\noutput = "second/lora"\noptimizer = "SGD"\n'
    text += '[data]\nfolder = "cats"\n[sampling]\nprompts = ["not drawn"]\n'
    (folder / "cats.toml").write_text(text, encoding="utf-8")
    overrides = ("--steps", "2", "--sampling.prompts=[]", "--optimizer", "AdamW")
    assert lorasmith(folder, "train", "cats.toml", *overrides).code == 0
    assert listing(folder / "second" / "lora") == FILES
    first, second = (folder / name / "lora" / "lora.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_a_run_can_be_made_again_from_its_toml(trained: tuple[Path, Ended]) -> None:
    folder, _ = trained
    assert lorasmith(folder, "train", "first/lora/run.toml", "--output", "third/lora").code == 0
    first, third = (folder / name / "lora" for name in ("first", "third"))
    assert (first / "lora.safetensors").read_bytes() == (third / "lora.safetensors").read_bytes()
    again = lorasmith(folder, "train", "first/lora/run.toml")
    assert again == Ended(
        2,
        "",
        f"lorasmith: {NOT_YET}, got {first}\n",
    )


def test_pictures_are_drawn_and_losses_measured_before_and_after(home: Path) -> None:
    made(home / "others", "a house", "a tree")
    ended = lorasmith(
        home, "train", "cats", "--model", "demo", "--device=cpu", "--steps=1", "--sampling.steps=1",
        "--data.held-out", "others", "--data.drift", "others", "--targets.preset", "attention",
    )  # fmt: skip
    assert ended.code == 0
    assert listing(home / "runs" / "cats") == FILES | {"before_after.png"}
    assert re.search(r"validation loss\t.* before, .* after", ended.out)
    assert re.search(r"drift loss\t.* before, .* after", ended.out)
    with Image.open(home / "runs" / "cats" / "before_after.png") as picture:
        assert picture.width > 2 * 192 and picture.height > 2 * 192  # a column a caption, and two rows


def test_samples_are_drawn_without_and_with_a_lora(trained: tuple[Path, Ended], tmp_path: Path) -> None:
    lora = trained[0] / "first" / "lora" / "lora.safetensors"
    ended = lorasmith(tmp_path, "sample", "a cat", "[b]", "--model", "demo", "--steps", "1", "--lora", str(lora))
    assert ended == Ended(0, "samples.png\n", "")
    alone = lorasmith(tmp_path, "sample", "a cat", "[b]", "--model", "demo", "--steps", "1", "--output", "[b].png")
    assert alone == Ended(0, "[b].png\n", "")
    with Image.open(tmp_path / "samples.png") as both, Image.open(tmp_path / "[b].png") as one:
        assert both.height > one.height + 192


def test_odd_names_work(tmp_path: Path) -> None:
    made(tmp_path / "[b]ü 猫", "[i]a cat[/i]")
    output = Path("new", "[red]deep", "x")
    ended = lorasmith(tmp_path, "train", "[b]ü 猫", *TINY, "--output", str(output), "--batch_size", "3")
    assert (ended.code, ended.err) == (0, "")
    assert f"LoRA of 2 steps: {output / 'lora.safetensors'}\n" in ended.out
    assert listing(tmp_path / output) == FILES


def test_ctrl_c_ends_after_the_step_in_hand(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(loop, "sample_losses", at_step(2, lambda: signal.raise_signal(signal.SIGINT)))
    ended = lorasmith(home, "train", "cats", *TINY, "--steps", "4")
    assert ended.code == 130
    assert all(line.startswith("stopping: 2/4, ") for line in ended.err.splitlines())  # where the step took seconds
    path = Path("runs", "cats", "lora.safetensors")
    assert ended.out.endswith(f"LoRA of 2 steps: {path}\nstopped after step 2 of 4; continue with --resume\n")
    assert listing(home / "runs" / "cats") == FILES
    assert "2 of 4, 1 sample each" in (home / "runs" / "cats" / "report.html").read_text("utf-8")
    assert lora_file.read(home / path)[1]["lorasmith.steps"] == "2"
    assert signal.getsignal(signal.SIGINT) is usual


def test_a_second_ctrl_c_ends_at_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "sample_losses", at_step(2, twice))
    ended = lorasmith(home, "train", "cats", *TINY)
    assert (ended.code, ended.err) == (130, "lorasmith: stopped\n")
    assert listing(home / "runs" / "cats") == UNFINISHED


def test_ctrl_c_while_samples_are_generated_leaves_a_report(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasmith.runs.run.pictures", lambda *_: signal.raise_signal(signal.SIGINT))
    ended = lorasmith(home, "train", "cats", *TINY[:-2], "--sampling.prompts", "a cat")
    assert (ended.code, ended.err) == (130, "")
    assert ended.out.endswith("stopped after step 2 of 2; continue with --resume\n")
    assert listing(home / "runs" / "cats") == FILES


def test_patterns_that_match_no_layer_are_named(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    patterns = ("--targets.include", "to_q", "--targets.include", "to_w", "--targets.exclude", "mid_blok")
    assert lorasmith(home, "train", "cats", *TINY, *patterns, "--adapter.name", "DoRA").code == 0
    named = "targets.include 'to_w' and targets.exclude 'mid_blok' matches no layer of the model: is it misspelt?"
    assert caplog.messages.count(named) == 1


def test_ctrl_c_before_the_first_step_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasmith.runs.run.toml_of", lambda config: signal.raise_signal(signal.SIGINT))
    ended = lorasmith(home, "train", "cats", "--model", "demo")
    assert ended == Ended(130, "", "lorasmith: stopped\n")
    assert not listing(home / "runs")


def nan() -> torch.Tensor:
    return torch.full((1,), math.nan, requires_grad=True)


def test_losses_that_are_no_numbers_keep_what_was_trained(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "sample_losses", at_step(1, nan, times=3))
        first = lorasmith(home, "train", "cats", *TINY)
    assert first.code == 2 and "learning_rate" not in first.err  # whose steps it has not made yet
    assert not listing(home / "runs")
    monkeypatch.setattr(loop, "sample_losses", at_step(3, nan, times=3))
    ended = lorasmith(home, "train", "cats", *TINY, "--steps", "4")
    assert ended.code == 2
    said = ended.err.splitlines()[-1]
    assert said.startswith("lorasmith: not finite 3 times in a row: ")
    assert said.endswith("; learning_rate is most likely too high, got 0.0005")
    assert f"LoRA of 2 steps: {Path('runs', 'cats', 'lora.safetensors')}\n" in ended.out
    tensors, metadata = lora_file.read(home / "runs" / "cats" / "lora.safetensors")
    assert metadata["lorasmith.steps"] == "2"
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_lack_of_memory_keeps_what_was_trained(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate\n3 bytes.")

    monkeypatch.setattr(loop, "sample_losses", at_step(2, failing))
    ended = lorasmith(home, "train", "cats", *TINY)
    assert ended.code == 2
    assert ended.err.startswith("lorasmith: out of memory: try --memory_ladder, or a smaller batch_size")
    assert ended.err.count("\n") == 1
    assert "LoRA of 1 step: " in ended.out
    assert lora_file.read(home / "runs" / "cats" / "lora.safetensors")[1]["lorasmith.steps"] == "1"


def test_a_full_disk_leaves_no_partial_lora(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).suffix == ".safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    ended = lorasmith(home, "train", "cats", *TINY)
    path = Path("runs", "cats", "checkpoints", "step-0000002.safetensors")
    assert (ended.code, ended.err) == (2, f"lorasmith: cannot write {path}: {os.strerror(errno.ENOSPC)}\n")
    assert listing(home / "runs" / "cats") == UNFINISHED
    assert not list((home / path).parent.iterdir())


Prepare = Callable[[Path], object]


def folder(name: str) -> Prepare:
    return lambda home: (home / name).mkdir()


def written(name: str, content: bytes) -> Prepare:
    return lambda home: (home / name).write_bytes(content)


def truncated_picture(home: Path) -> None:
    path = home / "cats" / "1.png"
    path.write_bytes(path.read_bytes()[:-40])


def truncated_model(home: Path) -> None:
    path = shutil.copytree(BASE, home / "broken") / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickled_model(home: Path) -> None:
    path = shutil.copytree(BASE, home / "pickled") / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))


def nothing(home: Path) -> None:
    pass


BAD: list[tuple[Prepare, str, str]] = [
    (folder("empty"), "empty", r"no pictures \(.*\) in or below empty: found nothing else"),
    (nothing, "dogs", "picture folder dogs does not exist"),
    (truncated_picture, "cats", r"cannot read picture cats.1\.png: .+"),
    (written("cats/1.txt", b"gr\xfcn"), "cats", r"caption cats.1\.txt must be UTF-8, got byte 0xfc at offset 2"),
    (written("cats/1.heic", b"x"), "cats", r"\.heic pictures need the extra 'heif': pip install 'lorasmith\[heif\]'"),
    (nothing, "cats --model none", "model must be set: there is no default"),
    (nothing, "cats --model none/such", r"none.such must be a diffusers folder .*, got no such folder"),
    (nothing, "cats --model SDXL", r"model must be .*, got 'SDXL': for Stable Diffusion XL, --model stabilityai/.*"),
    (nothing, "cats --model cats", r"cats must be a diffusers folder .*, got a folder without it"),
    (
        truncated_model,
        "cats --model broken",
        r"broken.vae.\S+ is cut off: 1,000 of its [\d,]+ bytes are missing",
    ),
    (pickled_model, "cats --model pickled", "pickled.unet must hold safetensors weights: pickles can run code .*"),
    (
        nothing,
        "cats --output cats",
        "output must be a folder that does not exist yet, unless --resume is given, got cats",
    ),
    (written("run.toml", b""), "cats --output run.toml/x", r".*run\.toml.x.*"),
    (nothing, "cats --rank 4", r"--rank is diffusers' name: here it is --adapter\.rank 4"),
    (nothing, "cats --seed -1", "seed must be 0 to 18446744073709551615, got '-1'"),
    (nothing, "cats --device cuda:99", "device must be one that this machine has, got cuda:99: .+"),
    (nothing, "cats --targets.include (", r"targets\.include must be a regular expression .*, got '\('"),
    (nothing, "", "train needs one folder of pictures or one TOML file, got none: lorasmith train .*"),
    (nothing, "cats dogs", "train needs one folder of pictures or one TOML file, got cats dogs"),
    (nothing, "cats --output \udcff", r"arguments must be UTF-8, got '\\udcff'"),
    (written("run.toml", b""), "run.toml --model none", "model must be set: there is no default"),
    (nothing, "run.toml", r"cannot read run\.toml: No such file or directory"),
    (folder("run.toml"), "run.toml", r"cannot read run\.toml: .+"),
    (written("run.toml", b"[data"), "run.toml", r"cannot read run\.toml: .+"),
    (written("run.toml", b"adapter = 3"), "run.toml", r"run\.toml line 1: adapter must be one of LoRA.*, got 3"),
    (written("run.toml", b'data = "x"'), "run.toml", r"run\.toml line 1: data must be a table .*, got 'x'"),
    (written("run.toml", b"[data]\nfoldr = 3"), "run.toml", r".* setting data\.foldr: did you mean data\.folder\?"),
]


@pytest.mark.parametrize(("prepare", "arguments", "message"), BAD)
def test_bad_input_is_refused_in_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, prepare: Prepare, arguments: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    prepare(home)
    before = listing(home)
    ended = lorasmith(home, "train", *TINY, *arguments.split(" "))
    assert re.fullmatch(f"lorasmith: {message}\n", ended.err)
    assert (ended.code, ended.out) == (2, "")
    assert listing(home) == before


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="needs a user who is refused")
def test_a_folder_that_cannot_be_written_is_refused(home: Path) -> None:
    (home / "locked").mkdir(mode=0o500)
    ended = lorasmith(home, "train", "cats", *TINY, "--output", "locked/x")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.endswith("must be where files can be written, got locked/x: locked is write-protected\n")
    assert not listing(home / "locked")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], r"Unknown command \"trian\"\. Did you mean \"train\"\?.*"),
        (["sample"], ".*PROMPTS.*"),
        (["sample", "a cat"], ".*--model.*"),
        (["sample", "a cat", "--model", "demo", "--steps", "0"], r"sampling\.steps must be 1 to 1000, got 0"),
        (["sample", "a cat", "--model", "demo", "--seed", "-1"], r"sampling\.seed must be 0 to \d+, got -1"),
        (["sample", "a cat", "--model", "demo", "--guidance", "nan"], r"sampling\.guidance must be 0 to 100, got nan"),
        (["sample", "a cat", "--model", "demo", "--output", "no/such.png"], "output must be a file in a folder .*"),
        (["sample", "a cat", "--model", "demo", "--output", "."], "output must be a file in a folder .*"),
        (["sample", "a cat", "--model", "demo", "--lora", "x.pt"], r"x\.pt must be a safetensors file: a pickle .*"),
        (["sample", "\udcff", "--model", "demo"], r"arguments must be UTF-8, got '\\udcff'"),
        (["demo", "x"], "demo takes settings only, got x"),
        (["demo", "--concept", "x"], "concept must be one of line_drawing, flat, got 'x'"),
        (["demo", "--rank", "3"], r"--rank is diffusers' name: here it is --adapter\.rank 3"),
    ],
)
def test_other_commands_refuse_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    ended = lorasmith(tmp_path, *arguments)
    assert re.fullmatch(f"lorasmith: {message}\n", ended.err)
    assert (ended.code, ended.out) == (2, "")
    assert not listing(tmp_path)


COMMANDS = "Usage: lorasmith COMMAND\n.* demo .* sample .* train .*"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ([], COMMANDS),
        (["--help"], COMMANDS),
        (["-h"], COMMANDS),
        (["sample", "--help"], "Usage: lorasmith sample .*--lora .*"),
        (["demo", "--help"], "Usage: lorasmith demo .*--concept .*"),
        (["--version"], f"{__version__}\n"),
    ],
)
def test_help(tmp_path: Path, arguments: list[str], shown: str) -> None:
    ended = lorasmith(tmp_path, *arguments)
    assert (ended.code, ended.err) == (0, "")
    assert re.fullmatch(shown, ended.out, re.DOTALL)


@pytest.mark.parametrize("command", [cli.demo, cli.sample, cli.inspect, cli.install_comfyui, *tools.COMMANDS])
def test_help_says_what_each_option_is(tmp_path: Path, command: Callable[..., int]) -> None:
    documented = dict(re.findall(r"^(\w+)\n {4}(.+)$", inspect.getdoc(command) or "", re.MULTILINE))
    names = [name for name, p in inspect.signature(command).parameters.items() if p.kind is not p.VAR_POSITIONAL]
    assert [*documented] == names
    path = ("comfyui", "install") if command is cli.install_comfyui else (command.__name__,)
    shown = lorasmith(tmp_path, *path, "--help").out
    assert all(what in shown for what in documented.values())


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "cats", "--steps", "3", "-h"]])
def test_help_is_quick(tmp_path: Path, arguments: list[str]) -> None:
    program = (
        f"import sys\nfrom lorasmith.cli.main import main\nsys.argv = ['lorasmith', *{arguments}]\n"
        "try:\n    main()\nexcept SystemExit:\n    print(*sys.modules)\n"
    )
    process = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    modules = set(process.stdout.splitlines()[-1].split())
    assert "lorasmith.cli.main" in modules
    assert not modules & {"torch", "diffusers", "transformers", "numpy", "PIL", "pydantic", "matplotlib"}


@pytest.mark.slow
def test_a_process_of_its_own(home: Path) -> None:
    """Logs and errors go to stderr, and paths are printed whatever the terminal's encoding."""
    (home / "cats").rename(home / "kätzchen 猫")
    (home / "kätzchen 猫" / "1.txt").unlink()
    command = [sys.executable, "-m", "lorasmith", "train", "kätzchen 猫", *TINY, "--steps", "1"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert process.returncode == 0
    assert "pictures without a caption in" in process.stderr and "(1.png)" in process.stderr
    assert "Traceback" not in process.stderr
    assert r"k\xe4tzchen \u732b" in process.stdout
    assert listing(home / "runs" / "kätzchen 猫") == FILES
