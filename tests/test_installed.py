"""Versions that pyproject.toml does not allow are named, with the one that is wanted."""

import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from lorasmith import cli, installed

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


def test_old_packages_are_refused_by_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, diffusers="0.39.0", torch="2.9.1+cpu", transformers="5.99.0", torchao="0.15.0")
    monkeypatch.setattr("sys.argv", ["lorasmith", "--version"])
    with pytest.raises(SystemExit) as ending:
        cli.main()
    wanted = {(need := Requirement(line)).name: need.specifier for line in PROJECT["dependencies"]}
    assert ending.value.code == 2 and capsys.readouterr().err == (
        f"lorasmith: torch must be {wanted['torch']}, got 2.9.1+cpu; "
        f"diffusers must be {wanted['diffusers']}, got 0.39.0: "
        "install lorasmith again with pip, or upgrade what is named\n"
    )


def test_an_old_package_of_an_extra_is_named_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, torchao="0.15.0")
    installed.refuse_old()
    said = "base_dtype int8 needs the extra 'quantized': pip install 'lorasmith[quantized]'"
    assert str(installed.needs_extra("base_dtype int8", "quantized")) == f"{said} (torchao must be >=0.18, got 0.15.0)"
    install(monkeypatch)
    assert str(installed.needs_extra("base_dtype int8", "quantized")) == said


def test_what_is_installed_here_is_new_enough() -> None:
    assert installed.too_old() == []


def test_nothing_is_said_where_lorasmith_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert installed.too_old("quantized") == []
