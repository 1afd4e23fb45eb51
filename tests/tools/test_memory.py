"""The tools hold a few layers at a time, however large the file is."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorasmith.adapters.adapter_set import targeted
from lorasmith.adapters.targets import Targets, adaptable_layers
from lorasmith.models.meta import published_skeleton
from lorasmith.models.reference_configs import PUBLISHED

NUM_LAYERS, SIDES = 160, (512, 1024)
LAYER = 2 * 512 * 1024  # bytes, in bfloat16; some ten float32 copies of a layer may be there at once
PROGRAM = """
import json, os, re, sys, threading
from pathlib import Path
import torch
from lorasmith.tools import convert as conversion
from lorasmith.tools.convert import convert
from lorasmith.tools.extract import extract
from lorasmith.tools.merge import Source
from lorasmith.tools.merge_into_model import merge_into
from lorasmith.tools.metadata import rewrite
from lorasmith.tools.resize import resize
from lorasmith.tools.svd import Cut

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def peak(call):
    done, most, before = threading.Event(), 0, held()
    def watch():
        nonlocal most
        while not done.wait(0.002):
            most = max(most, held())
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    eval(call)
    done.set()
    watcher.join()
    return most - before

torch.set_num_threads(1)
conversion.BATCH = 2**22
convert(Path('small.safetensors'), Path('e.safetensors'), None, 'comfyui')  # imports what is yet to be
for name, call in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        print(name, peak(call), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""
CALLS = {
    "merge_into": "merge_into(Path('base.safetensors'), [Source.parsed('lora.safetensors')], Path('a.safetensors'))",
    "extract": "extract(*map(Path, ('base.safetensors', 'tuned.safetensors', 'b.safetensors')), Cut(rank=1), "
    "dtype=torch.bfloat16)",
    "rewrite": "rewrite(Path('base.safetensors'), Path('c.safetensors'), changes={'a': 'b'}, strip=False)",
    "convert": "convert(Path('large.safetensors'), Path('f.safetensors'), None, 'comfyui')",
    "resize": "resize(Path('wide.safetensors'), Path('d.safetensors'), Cut(rank=8))",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the same with one norm changed, LoRAs for it and for a published one, and large LoRAs."""
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
    denoiser = published_skeleton(PUBLISHED["Stable Diffusion 1.x"][0], with_texts=False)
    chosen = targeted(denoiser, Targets())
    layers = {path: module for path, module in adaptable_layers(denoiser.nets).items() if path in chosen}
    for name, rank in (("small", 1), ("large", 128)):
        state = {}
        for path, module in layers.items():
            assert isinstance(module.weight, torch.Tensor)
            num_out, num_in = module.weight.shape[:2]
            state[f"{path}.lora_A.weight"] = torch.ones(rank, num_in, dtype=torch.bfloat16)
            state[f"{path}.lora_B.weight"] = torch.ones(num_out, rank, dtype=torch.bfloat16)
        save_file(state, folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def peaks(files: Path) -> dict[str, int]:
    """{a tool: the bytes that it holds at most}, each measured in a process of its own that has imported all."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(CALLS)]
    ended = subprocess.run(command, cwd=files, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return {name: int(peak) for name, peak in re.findall(r"^(\w+) (\d+)$", ended.stdout, re.MULTILINE)}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells what a process holds")
@pytest.mark.parametrize("tool", CALLS)
def test_a_few_layers_are_held_at_a_time(peaks: dict[str, int], tool: str) -> None:
    assert 0 < peaks[tool] < NUM_LAYERS // 2 * LAYER
