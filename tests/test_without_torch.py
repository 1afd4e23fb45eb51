"""What is answered without torch, whose import takes seconds: help, wrong settings, other programs' files, metadata."""

import json
import subprocess
import sys
from pathlib import Path

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
}
PROGRAM = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
sys.modules["torch"] = None  # importing it is an error
from lorasmith.cli import main
for call in sys.argv[1:]:
    sys.argv, out = ["lorasmith", *call.split()], io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(out):
            main()
    except SystemExit as end:
        print(json.dumps([end.code or 0, out.getvalue()]))
"""


def test_help_and_refusals_need_no_torch(tmp_path: Path) -> None:
    (tmp_path / "kohya.toml").write_text('model = "demo"\nnetwork_dim = 4\n')
    (tmp_path / "toolkit.yaml").write_text("config:\n  process:\n    - train:\n        steps: 10\n")
    save_file({"a": torch.ones(2)}, tmp_path / "lora.safetensors", {"ss_note": "a caption"})
    command = [sys.executable, "-c", PROGRAM, *CALLS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for (call, (code, words)), (own_code, text) in zip(CALLS.items(), answers, strict=True):
        assert own_code == code and words in text, f"{call}: {own_code}, {text}"
