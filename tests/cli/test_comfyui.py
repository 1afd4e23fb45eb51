"""The node pack on its way into a ComfyUI: from the package, over an older one, and not over anything else."""

from pathlib import Path

import pytest
from commands import Ended, lorasmith

from lorasmith.cli import comfyui
from lorasmith.cli.comfyui import pack_path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "ComfyUI" / "custom_nodes" / "other").mkdir(parents=True)
    return tmp_path


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if "__pycache__" not in path.parts}


def test_the_pack_is_copied_and_how_to_undo_it_is_said(home: Path) -> None:
    target = Path("ComfyUI", "custom_nodes", "lorasmith")
    for _ in range(2):
        ended = lorasmith(home, "comfyui", "install", "ComfyUI")
        assert ended.code == 0 and f"to undo it, delete {target}" in ended.out and "pip install lorasmith" in ended.out
        assert names(home / target) == names(pack_path()) >= {"__init__.py", "nodes.py", "requirements.txt"}
        (home / target / "gone.py").touch()
    assert {path.name for path in (home / "ComfyUI" / "custom_nodes").iterdir()} == {"lorasmith", "other"}


@pytest.mark.parametrize("found", ["file", "folder", "link"])
def test_something_else_of_that_name_stays(home: Path, found: str) -> None:
    target = home / "ComfyUI" / "custom_nodes" / "lorasmith"
    if found == "file":
        target.touch()
    elif found == "folder":
        target.mkdir()
    else:
        target.symlink_to(pack_path())
    message = "lorasmith: ComfyUI/custom_nodes/lorasmith must be an earlier lorasmith or nothing, but it is something"
    assert lorasmith(home, "comfyui", "install", "ComfyUI") == Ended(2, "", f"{message} else: move it away\n")
    assert len(list((home / "ComfyUI" / "custom_nodes").iterdir())) == 2


def test_what_is_no_comfyui_is_refused(home: Path) -> None:
    message = "lorasmith: PATH must be a ComfyUI folder, with custom_nodes in it, got other\n"
    assert lorasmith(home, "comfyui", "install", "other") == Ended(2, "", message)


def test_a_disk_that_is_full_leaves_the_older_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lorasmith(home, "comfyui", "install", "ComfyUI").code == 0
    before = names(home / "ComfyUI")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(comfyui.shutil, "copytree", full)
    ended = lorasmith(home, "comfyui", "install", "ComfyUI")
    assert ended.err == "lorasmith: cannot write ComfyUI/custom_nodes/lorasmith: No space left on device\n"
    assert names(home / "ComfyUI") == before
