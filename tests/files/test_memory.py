"""The tools hold a few layers at a time, however large the file is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

NUM_LAYERS, SIDES = 40, (1024, 2048)
LAYER = 2 * 1024 * 2048  # bytes, in bfloat16
PROGRAM = """
import re, sys, threading
from pathlib import Path
import torch
from lorasmith.files.{module} import *
from lorasmith.files.merging import Source
from lorasmith.files.truncation import Cut

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

done, most = threading.Event(), [0]
def watch():
    while not done.wait(0.002):
        most[0] = max(most[0], held())
torch.set_num_threads(1)
before = held()
watcher = threading.Thread(target=watch)
watcher.start()
{call}
done.set()
watcher.join()
print("peak", most[0] - before)
"""
CALLS = {
    "merging_into": "merge_into(Path('base.safetensors'), [Source.parsed('lora.safetensors')], "
    "Path('out.safetensors'))",
    "extraction": "extract(*map(Path, ('base.safetensors', 'tuned.safetensors', 'out.safetensors')), Cut(rank=1), "
    "dtype=torch.bfloat16)",
    "metadata": "rewrite(Path('base.safetensors'), Path('out.safetensors'), changes={'a': 'b'}, strip=False)",
    "resizing": "resize(Path('wide.safetensors'), Path('out.safetensors'), Cut(rank=8))",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the same with one norm changed, a LoRA for it, and a LoRA as large as the model."""
    folder = tmp_path_factory.mktemp("files")
    stems = [f"model.diffusion_model.x.{number}" for number in range(NUM_LAYERS)]
    norm = {"model.diffusion_model.norm.weight": torch.zeros(8)}
    base = {f"{stem}.weight": torch.ones(SIDES, dtype=torch.bfloat16) for stem in stems}
    save_file(base | norm, folder / "base.safetensors")
    save_file(base | {key: value + 1 for key, value in norm.items()}, folder / "tuned.safetensors")
    for name, rank in (("lora", 4), ("wide", 512)):
        state = {}
        for stem in stems:
            layer = stem.replace("model.diffusion_model", "lora_unet").replace(".", "_")
            state[f"{layer}.lora_up.weight"] = torch.ones(SIDES[0], rank, dtype=torch.bfloat16)
            state[f"{layer}.lora_down.weight"] = torch.ones(rank, SIDES[1], dtype=torch.bfloat16)
        save_file(state if name == "lora" else dict(list(state.items())[:4]), folder / f"{name}.safetensors")
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells what a process holds")
@pytest.mark.parametrize("module", CALLS)
def test_a_few_layers_are_held_at_a_time(files: Path, module: str) -> None:
    code = PROGRAM.format(module=module, call=CALLS[module])
    ended = subprocess.run([sys.executable, "-c", code], cwd=files, capture_output=True, text=True)
    peak = re.search(r"peak (\d+)", ended.stdout)
    assert peak is not None, ended.stderr
    (files / "out.safetensors").unlink()
    print(peak[1])
    assert int(peak[1]) < 20 * LAYER
