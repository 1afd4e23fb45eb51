"""Versions that pyproject.toml does not allow are named, with the one that is wanted."""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import lorasmith
from lorasmith import errors
from lorasmith.__main__ import main

PROJECT: dict[str, Any] = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]


def install(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """What pyproject.toml says, with these versions installed and no other package."""
    extras = PROJECT["optional-dependencies"]
    lines = [
        *PROJECT["dependencies"],
        *(f"{line}; extra == '{name}'" for name in ("quantized",) for line in extras[name]),
    ]

    def version(name: str) -> str:
        if name in versions:
            return versions[name]
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    monkeypatch.setattr(metadata, "version", version)


def line_about(torch: str, diffusers: str) -> str:
    wanted = {(need := Requirement(line)).name: need.specifier for line in PROJECT["dependencies"]}
    return (
        f"torch must be {wanted['torch']}, got {torch}; diffusers must be {wanted['diffusers']}, got {diffusers}: "
        "install lorasmith again with pip, or upgrade what is named"
    )


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_old_packages_are_refused_by_the_command_line(
    rank: str, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, diffusers="0.39.0", torch="2.9.1+cpu", transformers="5.99.0", torchao="0.15.0")
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit) as ending:
        main()
    line = f"lorasmith: {line_about('2.9.1+cpu', '0.39.0')}\n"
    assert ending.value.code == 2 and capsys.readouterr().err == line * lines


def test_nothing_of_an_old_package_is_imported_before_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, cyclopts="3.0.0")
    monkeypatch.delitem(sys.modules, "lorasmith.cli", raising=False)
    monkeypatch.setitem(sys.modules, "cyclopts", None)
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "lorasmith: cyclopts must be >=5, got 3.0.0" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train_lora", "read", "write"])
def test_old_packages_are_refused_by_the_python_interface(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, diffusers="0.36.0", torch="2.9.1")
    with pytest.raises(ValueError, match=re.escape(line_about("2.9.1", "0.36.0"))):
        getattr(lorasmith, name)


def test_the_command_is_the_one_that_refuses() -> None:
    assert PROJECT["scripts"] == {"lorasmith": f"{main.__module__}:{main.__name__}"}


def test_an_old_package_of_an_extra_is_named_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, torchao="0.15.0")
    errors.refuse_old()
    said = "base_dtype int8 needs the extra 'quantized': pip install 'lorasmith[quantized]'"
    assert str(errors.needs_extra("base_dtype int8", "quantized")) == f"{said} (torchao must be >=0.18, got 0.15.0)"
    install(monkeypatch)
    assert str(errors.needs_extra("base_dtype int8", "quantized")) == said


def test_what_is_installed_here_is_new_enough() -> None:
    assert errors.too_old() == []


def test_nothing_is_said_where_lorasmith_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert errors.too_old("quantized") == []
