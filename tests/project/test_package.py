"""What `import lorasmith` offers: quickly, listed, and typed."""

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import lorasmith
from lorasmith import api
from lorasmith.formats import lora_file

OFFERED = {"train_lora": api.train_lora, "read": lora_file.read, "write": lora_file.write}


def test_what_is_offered_is_listed_and_is_the_modules_own() -> None:
    assert OFFERED.keys() <= set(dir(lorasmith))
    for name, own in OFFERED.items():
        assert getattr(lorasmith, name) is own
    with pytest.raises(AttributeError, match="module 'lorasmith' has no attribute 'train'"):
        lorasmith.train  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, lorasmith; dir(lorasmith); lorasmith.__version__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_it_is_typed() -> None:
    """Type checkers read where what is offered comes from."""
    folder = files("lorasmith")
    assert (folder / "py.typed").is_file()
    module = (folder / "__init__.py").read_text()
    assert all(f"import {name} as {name}\n" in module for name in OFFERED)


def test_a_lora_is_written_and_read_by_the_name_of_a_file(tmp_path: Path) -> None:
    lora = {"x.lora_down.weight": torch.ones(2, 3), "x.lora_up.weight": torch.ones(3, 2), "x.alpha": torch.tensor(2.0)}
    lorasmith.write(str(tmp_path / "x.safetensors"), lora)
    found, metadata = lorasmith.read(str(tmp_path / "x.safetensors"))
    assert found.keys() == lora.keys() and metadata == {}
    assert all(torch.equal(found[key], tensor) for key, tensor in lora.items())
