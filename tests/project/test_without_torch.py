"""What is answered without libraries whose import takes seconds: help, refusals, other programs' files, metadata."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

CALLS = {
    "train --help all": (0, "--adapter.rank"),
    "train --help lr": (0, "--learning_rate"),
    "train cats --model demo --network_dim 4": (2, "--adapter.rank 4"),
    "train cats --model demo --adapter.rank 4000": (2, "1 to 128"),
    "demo --optimizer.name Lion": (2, "one of AdamW"),
    "train kohya.toml": (2, "line 2"),
    "train toolkit.yaml": (2, "steps = 10"),
    "metadata lora.safetensors": (0, "a caption"),
    "metadata lora.safetensors --strip --output bare.safetensors": (0, "bare.safetensors"),
    "merge lora.safetensors lora.safetensors --output a.txt": (2, "output must be a .safetensors file"),
    "merge lora.safetensors --output a.safetensors": (2, "needs two LoRAs or more"),
    "merge lora.safetensors:x lora.safetensors --output a.safetensors": (2, "weight of lora.safetensors"),
    "merge lora.safetensors nowhere.safetensors --output a.safetensors": (2, "nowhere.safetensors must be"),
    "extract demo demo --rank 1 --output lora.safetensors": (2, "without --overwrite"),
    "convert lora.safetensors --to kohya --output no/a.safetensors": (2, "in a folder that exists"),
    "convert kohya.toml --to kohya --output a.safetensors": (2, "kohya.toml"),
    "convert lora.safetensors --to kohya --output a.safetensors --model SDXL": (
        2,
        "hub id, got 'SDXL': for Stable Diffusion XL, --model stabilityai/stable-diffusion-xl-base-1.0",
    ),
}
WITHOUT_MODEL_CLASSES = {
    "merge lora.safetensors lora.safetensors --output a.safetensors": (2, "loading model classes"),
    "merge lora.safetensors lora.safetensors --output a.safetensors --rank 0": (2, "rank must be 1 or more"),
    "merge lora.safetensors --model nowhere --output a": (
        2,
        "nowhere must be a diffusers folder or a safetensors file",
    ),
    "merge lora.safetensors --model demo --output a.safetensors": (2, "output must be a folder, as the model is"),
    "merge nowhere.safetensors --model demo --output a": (2, "nowhere.safetensors must be"),
    "extract demo nowhere --rank 1 --output a.safetensors": (2, "nowhere must be a diffusers folder"),
    "extract demo demo --output a.safetensors": (2, "either rank or keep must be given"),
    "convert lora.safetensors --to kohya --output a.safetensors --model nowhere": (2, "nowhere must be a diffusers"),
}
PROGRAM = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
sys.modules[sys.argv[1]] = None  # importing it is an error
from lorasmith.cli.main import main
for call in sys.argv[2:]:
    sys.argv, out = ["lorasmith", *call.split()], io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(out):
            main()
    except SystemExit as end:
        print(json.dumps([end.code or 0, out.getvalue()]))
"""


@pytest.mark.parametrize(("library", "calls"), [("torch", CALLS), ("diffusers", WITHOUT_MODEL_CLASSES)])
def test_answers_without_a_library(tmp_path: Path, library: str, calls: dict[str, tuple[int, str]]) -> None:
    (tmp_path / "kohya.toml").write_text('model = "demo"\nnetwork_dim = 4\n')
    (tmp_path / "toolkit.yaml").write_text("config:\n  process:\n    - train:\n        steps: 10\n")
    save_file({"a": torch.ones(2)}, tmp_path / "lora.safetensors", {"ss_note": "a caption"})
    command = [sys.executable, "-c", PROGRAM, library, *calls]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for (call, (code, words)), (own_code, text) in zip(calls.items(), answers, strict=True):
        assert own_code == code and words in text, f"{call}: {own_code}, {text}"
