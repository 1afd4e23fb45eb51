"""What `import lorasmith` offers: quickly, listed, and typed."""

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import lorasmith
from lorasmith import api
from lorasmith.adapters import algorithms
from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.hooks import attach
from lorasmith.adapters.targets import Targets
from lorasmith.config.schema import Config
from lorasmith.formats import lora_file
from lorasmith.formats.read import adapters_from
from lorasmith.models.load import load_model
from lorasmith.prepare.share import shared_copy
from lorasmith.training.loop import train
from lorasmith.training.state import State

OFFERED = {
    "AdapterSet": AdapterSet, "Config": Config, "DoRA": algorithms.DoRA, "LoHa": algorithms.LoHa,
    "LoKr": algorithms.LoKr, "LoRA": algorithms.LoRA, "OFT": algorithms.OFT, "State": State, "Targets": Targets,
    "adapters_from": adapters_from, "attach": attach, "load_model": load_model, "read_lora": lora_file.read,
    "shared_copy": shared_copy, "train": train, "train_lora": api.train_lora, "write_lora": lora_file.write,
}  # fmt: skip


def test_what_is_offered_is_listed_and_is_the_modules_own() -> None:
    assert OFFERED.keys() <= set(dir(lorasmith))
    for name, own in OFFERED.items():
        assert getattr(lorasmith, name) is own
    assert lorasmith.read is lora_file.read and lorasmith.write is lora_file.write  # the names of before
    with pytest.raises(AttributeError, match="module 'lorasmith' has no attribute 'trane'"):
        lorasmith.trane  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, lorasmith; dir(lorasmith); lorasmith.__version__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_it_is_typed(tmp_path: Path) -> None:
    """Type checkers know everything that is offered."""
    assert (files("lorasmith") / "py.typed").is_file()
    script = tmp_path / "script.py"
    script.write_text(
        f"from lorasmith import {', '.join(OFFERED)}\nimport lorasmith\nreveal_type(lorasmith.load_model)\n"
    )
    checked = subprocess.run([sys.executable, "-m", "pyright", script], capture_output=True, text=True)
    assert checked.returncode == 0 and "(model: Any" in checked.stdout, checked.stdout


def test_a_lora_is_written_and_read_by_the_name_of_a_file(tmp_path: Path) -> None:
    lora = {"x.lora_down.weight": torch.ones(2, 3), "x.lora_up.weight": torch.ones(3, 2), "x.alpha": torch.tensor(2.0)}
    lorasmith.write_lora(str(tmp_path / "x.safetensors"), lora)
    found, metadata = lorasmith.read_lora(str(tmp_path / "x.safetensors"))
    assert found.keys() == lora.keys() and metadata == {}
    assert all(torch.equal(found[key], tensor) for key, tensor in lora.items())
