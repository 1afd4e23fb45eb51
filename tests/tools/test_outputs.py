"""Where the tools may write: what is refused before anything is made."""

import os
from pathlib import Path

import pytest

from lorasmith.demo import BASE
from lorasmith.tools.outputs import refuse_output, refuse_output_like


def test_a_folder_that_is_not_writable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_output(tmp_path / "a.safetensors", overwrite=False)
    refuse_output_like(BASE, tmp_path / "m", overwrite=False)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path or not mode & os.W_OK)  # root may all
    with pytest.raises(ValueError, match="^output must be in a folder that can be written to, got .*a.safetensors$"):
        refuse_output(tmp_path / "a.safetensors", overwrite=True)
    with pytest.raises(ValueError, match="^output must be in a folder that can be written to, got .*m$"):
        refuse_output_like(BASE, tmp_path / "m", overwrite=False)
