"""The node pack without ComfyUI: small stand-ins for what it uses of it, and a model that they can carry."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import stand_ins
import torch

PACK = Path(__file__).parents[2] / "comfyui"


@pytest.fixture(scope="session", autouse=True)
def modules() -> Iterator[dict[str, ModuleType]]:
    """What the pack imports, in the place of ComfyUI."""
    found = stand_ins.modules()
    with pytest.MonkeyPatch.context() as patch:
        for name, module in found.items():
            patch.setitem(sys.modules, name, module)
        spec = importlib.util.spec_from_file_location(
            "pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
        )
        assert spec is not None and spec.loader is not None
        pack = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "pack", pack)
        spec.loader.exec_module(pack)
        yield found
        for name in [name for name in sys.modules if name.startswith("pack.")]:
            del sys.modules[name]


@pytest.fixture
def folders(tmp_path: Path, modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's folders: input, output, loras."""
    for name in ("input", "output", "loras"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(modules["folder_paths"], "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def patcher() -> Any:
    """A MODEL with random weights, the same in every test."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return stand_ins.Patcher(stand_ins.Model(stand_ins.Noise()))
