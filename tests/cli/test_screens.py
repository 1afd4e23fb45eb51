"""Every command that draws, on a real terminal: what its screen shows, windows that change, Ctrl-C, and its end."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest

if sys.platform == "win32":
    pytest.skip("there are no pseudo-terminals", allow_module_level=True)

import pyte
from commands import TINY, made
from ptyprocess import PtyProcess

from lorasmith.formats import lora_file
from lorasmith.training.checkpoints import newest_in

PATIENCE = 100.0  # seconds, on a busy machine
ROWS = 30
CTRL_C = b"\x03"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "xterm-256color"}


class Window:
    """A terminal window in which commands run."""

    def __init__(self, command: list[str], columns: int = 80) -> None:
        self.screen = pyte.Screen(columns, ROWS)
        self._stream = pyte.ByteStream(self.screen)
        environment = {**os.environ, **ENVIRONMENT}
        self.process = PtyProcess.spawn(command, dimensions=(ROWS, columns), env=environment)
        os.set_blocking(self.process.fd, False)

    def text(self) -> str:
        """What it shows by now."""
        try:
            while content := os.read(self.process.fd, 65536):
                self._stream.feed(content)
        except OSError:  # nothing more yet, or the process has ended
            pass
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def until(self, is_there: Callable[[str], object]) -> str:
        """What it shows once that is so."""
        end = time.monotonic() + PATIENCE
        while not is_there(text := self.text()):
            assert time.monotonic() < end, f"waited too long, with this on the screen:\n{text}"
            time.sleep(0.02)
        return text

    def resize(self, columns: int) -> None:
        self.process.setwinsize(ROWS, columns)
        self.screen.resize(ROWS, columns)

    def clear(self) -> None:
        self.text()
        self.screen.reset()


class Commands(Window):
    """A window with a process that forks off one command after the other."""

    def __init__(self, folder: Path) -> None:
        paths = folder / "requests", folder / "answers"
        for path in paths:
            os.mkfifo(path)
        server = str(Path(__file__).parents[1] / "helpers" / "terminal_server.py")
        super().__init__([sys.executable, server, *map(str, paths)])
        self.folder = folder
        self._answers: TextIO = paths[1].open()
        self._requests: TextIO = paths[0].open("w", buffering=1)
        os.set_blocking(self._answers.fileno(), False)
        self._answer()

    def start(self, *arguments: str, columns: int = 80) -> None:
        self.resize(columns)
        self.clear()
        print(json.dumps([str(self.folder), arguments]), file=self._requests)
        self.child = int(self._answer())

    def end(self) -> int:
        """The exit code of the command that was started; the cursor is there, in a line of its own."""
        code = int(self._answer())
        self.text()
        assert not self.screen.cursor.hidden and self.screen.cursor.x == 0
        return code

    def close(self) -> None:
        self._requests.close()
        self.process.close(force=True)
        self._answers.close()

    def _answer(self) -> str:
        answers: list[str] = []

        def has_come(_: str) -> bool:
            answers.append(self._answers.readline())
            return bool(answers[-1])

        self.until(has_come)
        return answers[-1].strip()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    folder = tmp_path_factory.mktemp("terminal")
    made(folder / "cats", "a cat", "a black cat")
    window = Commands(folder)
    yield window
    window.close()


def bars(text: str, what: str) -> int:
    return len(re.findall(rf"^{what}\b.*\d/\d+", text, flags=re.M))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_training_in_a_window_that_changes(commands: Commands) -> None:
    steps = ("--steps", "12", "--sampling.every", "6", "--sampling.steps", "2", "--sampling.prompts", "a cat")
    commands.start("train", "cats", *TINY, *steps, "--output", "run")
    first = commands.until(lambda text: bars(text, "training"))
    assert first.startswith("lorasmith ")
    for columns in (40, 200, 60):
        commands.resize(columns)
        done = len((commands.folder / "run" / "steps.jsonl").read_text().splitlines())
        commands.until(lambda text, done=done: (match := re.search(r"(\d+)/12", text)) and int(match[1]) > done)
        assert bars(commands.text(), "training") == 1
    assert commands.end() == 0
    text = commands.text()
    assert re.search(r"^training .*12/12  epoch 6/6 .* in 0:\d\d$", text, flags=re.M), text
    assert text.count("sample: run/samples/step-") == 2 and "LoRA of 12 steps: run/lora.safetensors" in text
    assert not re.search("^(loading|encoding|generating).*/", text, flags=re.M)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("stop", ["Ctrl-C", signal.SIGTERM, signal.SIGHUP])
def test_a_training_that_is_stopped(commands: Commands, stop: str | signal.Signals) -> None:
    output = f"stopped-{stop}"
    commands.start("train", "cats", *TINY, "--steps", "400", "--output", output, columns=40)
    commands.until(lambda text: re.search(r" [1-9]\d*/400", text))
    if isinstance(stop, signal.Signals):
        os.kill(commands.child, stop)
    else:
        commands.process.write(CTRL_C)
    assert commands.end() == 130
    assert re.search(r"^stopped .*/400 .*in \d+:\d\d$", commands.text(), flags=re.M)
    (steps,) = {int(step) for step in re.findall(r"after step (\d+) of", commands.text().replace("\n", " "))}
    assert lora_file.read(commands.folder / output / "lora.safetensors")[1]["lorasmith.steps"] == str(steps)
    checkpoint = newest_in(commands.folder / output)
    assert checkpoint is not None and checkpoint.step == steps


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_commands_for_files_and_samples(commands: Commands) -> None:
    commands.start("train", "cats", *TINY, "--output", "lora", "--adapter.rank", "2")
    assert commands.end() == 0
    lora = "lora/lora.safetensors"
    calls = {
        "sample": ("a cat", "--model", "demo", "--lora", lora, "--steps", "2", "--output", "samples.png"),
        "resize": (lora, "--rank", "1", "--output", "small.safetensors"),
        "merge": (lora, f"{lora}:0.5", "--rank", "2", "--output", "sum.safetensors"),
        "merge ": (lora, "--model", "demo", "--output", "merged"),
        "extract": ("demo", "merged", "--rank", "2", "--output", "found.safetensors"),
        "convert": (lora, "--to", "diffusers", "--model", "demo", "--output", "named.safetensors"),
    }
    for name, arguments in calls.items():
        commands.start(name.strip(), *arguments, columns=50)
        assert commands.end() == 0, commands.text()
        output = arguments[-1]
        assert (commands.folder / output).exists() and output in commands.text().splitlines()[-1]
        assert not bars(commands.text(), r"(loading|merging|resizing|extracting|generating)")
    commands.start("sample", "a cat", "--model", "demo", "--steps", "1000", "--output", "none.png")
    commands.until(lambda text: bars(text, "generating"))
    commands.process.write(CTRL_C)
    assert commands.end() == 130 and commands.text().endswith("lorasmith: stopped")
    assert not (commands.folder / "none.png").exists()


@pytest.mark.timeout(400)
def test_a_command_that_is_stopped_while_it_imports(tmp_path: Path) -> None:
    window = Window([sys.executable, "-m", "lorasmith", "demo"], 40)
    window.until(lambda text: "loading" in text)
    window.process.write(CTRL_C)
    window.until(lambda text: text.endswith("lorasmith: stopped"))
    assert window.process.wait() == 130
