"""The help of `train`: its basics are what the schema says, it fits the terminal, and words find their settings."""

import inspect
import re
import sys
from pathlib import Path

import pytest
from commands import lorasmith

from lorasmith.cli import help_layout, train_help
from lorasmith.cli import main as cli
from lorasmith.config.arguments import parsed
from lorasmith.config.settings import settings

WIDTHS = [40, 60, 80, 200]


def shown(tmp_path: Path, *words: str) -> str:
    ended = lorasmith(tmp_path, "train", "--help", *words)
    assert (ended.code, ended.err) == (0, "")
    return ended.out


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """Help is printed as on a terminal of this width."""
    for module in (help_layout, train_help):
        monkeypatch.setattr(module, "width_of_output", lambda: request.param)
    return request.param


def test_the_basics_are_what_the_schema_says(tmp_path: Path) -> None:
    for heading, rows in train_help.BASICS.items():
        for name, meaning in rows:
            key = name.split()[0].removeprefix("--")
            if key in inspect.signature(cli.train).parameters:  # a flag
                continue
            assert key in settings(), heading
            if match := re.search(r"default (\S+)$", meaning):
                assert settings()[key].default == match[1]
            elif "default:" in meaning:
                assert settings()[key].default == "none"
            if "such as" in meaning:  # examples from a list that grows
                continue
            for option in settings()[key].options:
                assert option == "none" or re.search(rf"\b{re.escape(option)}(?![\w+])", meaning), option


def test_the_examples_are_understood(tmp_path: Path) -> None:
    for line in train_help.EXAMPLES.splitlines()[1:]:
        words = re.findall(r'"[^"]*"|\S+', line)
        assert words[:2] == ["lorasmith", "train"]
        others, _ = parsed([word.strip('"') for word in words[2:] if word != "--resume"])
        assert len(others) == 1


def test_basics_are_few_and_everything_is_everything(tmp_path: Path) -> None:
    basics, everything = shown(tmp_path), shown(tmp_path, "all")
    options = re.compile(r"^  --([\w.]+)", re.MULTILINE)
    assert 10 < len(options.findall(basics)) < 20
    assert sorted(options.findall(everything)) == sorted([*settings(), "resume", "json"])
    assert basics.count("\n") < 50
    assert everything.count("\n") < len(settings()) + 40  # nothing is wrapped in a pipe


@pytest.mark.parametrize(
    ("word", "keys"),
    [
        ("rank", {"adapter.rank", "adapter.alpha"}),
        ("memory", {"memory_ladder", "base_dtype", "gradient_checkpointing"}),
        ("Resume", {"resume"}),
        ("targets.include", {"targets.include"}),
        ("momentum", {"optimizer.momentum"}),
    ],
)
def test_a_word_finds_its_settings(tmp_path: Path, word: str, keys: set[str]) -> None:
    found = set(re.findall(r"^  --([\w.]+)", shown(tmp_path, word), re.MULTILINE))
    assert keys <= found and len(found) < 12


def test_a_word_may_be_another_trainers_name(tmp_path: Path) -> None:
    assert "--network_dim is kohya's name: here it is --adapter.rank 8" in shown(tmp_path, "network_dim")
    assert "--epochs is another trainer's name: here it is --steps 1000" in shown(tmp_path, "epochs")


def test_a_word_that_nothing_is_about(tmp_path: Path) -> None:
    ended = lorasmith(tmp_path, "train", "--help", "xyzzy")
    assert ended.code == 2 and ended.err.startswith("lorasmith: no setting is about xyzzy: ")


@pytest.mark.parametrize("terminal", WIDTHS, indirect=True)
@pytest.mark.parametrize(
    "arguments", [["train", "--help"], ["train", "--help", "all"], ["--help"], ["merge", "--help"]]
)
def test_help_fits_the_terminal(tmp_path: Path, terminal: int, arguments: list[str]) -> None:
    ended = lorasmith(tmp_path, *arguments)
    lines = [line for line in ended.out.splitlines() if "lorasmith " not in line and len(line.split()) > 1]
    assert ended.code == 0 and len(lines) > 5
    assert all(len(line) <= min(terminal, help_layout.WIDEST) for line in lines)


def test_sections() -> None:
    rows = [("--a", "one two three four"), ("--long", "")]
    assert help_layout.section("H", rows, None) == "H:\n  --a     one two three four\n  --long"
    assert help_layout.section("H", rows, 30) == "H:\n  --a\n      one two three four\n  --long"
    assert help_layout.section("H", [("-a", "word " * 15)], 60).splitlines()[2].startswith("      word")


def test_help_without_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs may be started with stdout closed, which Python has as None."""
    monkeypatch.setattr(sys, "stdout", None)
    assert help_layout.width_of_output() is None
    train_help.show(None)
