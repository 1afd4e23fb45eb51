"""Runs checks of the pack beside a real ComfyUI, in its own interpreter; prints {check: "" or what went wrong}.

`python in_process.py MODULE.FUNCTION[KIND] …`, with COMFYUI_PATH set and lorasmith importable.
"""

import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

PACK = Path(__file__).parents[2] / "comfyui"


def begin(base: str) -> None:
    """ComfyUI without a GPU, whose folders are all in `base`."""
    sys.argv = ["main.py", "--cpu", "--base-directory", base]
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    importlib.import_module("comfy.options").enable_args_parsing()
    import torch

    torch.set_num_threads(1)
    for folder in ("input", "output", "models/loras"):
        Path(base, folder).mkdir(parents=True)


def load_pack() -> None:
    """The folder as the package lorasmith_pack, as ComfyUI loads custom nodes."""
    spec = importlib.util.spec_from_file_location(
        "lorasmith_pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def outcome(name: str) -> str:
    """Runs the check of this name; "" where all is well."""
    function, _, kind = name.removesuffix("]").partition("[")
    module, _, function = function.partition(".")
    began = time.perf_counter()
    try:
        getattr(importlib.import_module(module), function)(*[kind] if kind else [])
    except Exception:
        return traceback.format_exc()
    finally:
        print(f"{time.perf_counter() - began:6.1f} s  {name}", file=sys.stderr)
    return ""


def main() -> None:
    names = sys.argv[1:]
    with tempfile.TemporaryDirectory() as base:
        begin(base)
        load_pack()
        found = {name: outcome(name) for name in names}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
