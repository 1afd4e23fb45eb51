"""Where a real ComfyUI is: a checkout in COMFYUI_PATH, and an interpreter with its packages in COMFYUI_PYTHON."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
VARIABLES = ("COMFYUI_PATH", "COMFYUI_PYTHON")
MISSING = [name for name in VARIABLES if not os.environ.get(name)]


def skip_without() -> None:
    """Skips a module of tests that run ComfyUI itself; the whole of them takes minutes."""
    if MISSING:
        what = "a checkout of ComfyUI, and a Python with what it and lorasmith need"
        pytest.skip(f"{' and '.join(MISSING)} not set: {what}", allow_module_level=True)


def comfyui_path() -> Path:
    return Path(os.environ["COMFYUI_PATH"])


def interpreter() -> str:
    return os.environ["COMFYUI_PYTHON"]


def environment() -> dict[str, str]:
    """With lorasmith's sources, one thread, and no network for models."""
    own = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **own}
