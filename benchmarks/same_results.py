"""Whether two checkouts of lorasmith train the same LoRAs, bit for bit.

python benchmarks/same_results.py CHECKOUT OTHER_CHECKOUT [RUN ...]

Each run trains for a few steps in both and compares the SHA-256 of the tensors in the LoRA files. A refactoring must
change none. The hashes depend on the processor, so they are only ever compared on one machine, and none is stored.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

THREADS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SHORT = (
    "--model demo --device cpu --steps 4 --batch_size 2 --adapter.rank 4 --learning_rate 0.01 --sampling.prompts []"
).split()
RUNS: dict[str, Sequence[str]] = {
    "LoRA": (),
    "LoHa": ("--adapter", "LoHa"),
    "LoKr": ("--adapter", "LoKr", "--adapter.factor", "4"),
    "OFT": ("--adapter", "OFT"),
    "DoRA": ("--adapter", "DoRA", "--targets.preset", "all"),
    "Adam": ("--optimizer", "Adam"),
    "SGD": ("--optimizer", "SGD", "--optimizer.momentum", "0.9"),
    "RMSprop": ("--optimizer", "RMSprop", "--schedule", "cosine", "--schedule.warmup", "2"),
    "fp32": ("--training_dtype", "fp32", "--lora_dtype", "fp32"),
    "own dtype": ("--training_dtype", "none", "--pack", "none"),
    "int8 base": ("--base_dtype", "int8", "--gradient_checkpointing", "false"),
    "plain kernels": ("--native_kernels", "false", "--pack", "none"),
    "Huber, accumulated": ("--loss", "Huber", "--grad_accumulation_steps", "3"),
    "x0, logit-normal": ("--loss_space", "x0", "--times", "logit_normal", "--checkpoint_depth", "4"),
    "kohya's names": ("--file_layout", "kohya", "--targets.preset", "all"),
    "diffusers' names": ("--file_layout", "diffusers"),
    "text encoders": ("--text_encoder.train", "true", "--text_encoder.learning_rate", "0.001"),
}
"""Settings of runs on pictures of one size; the rest need more than settings."""
EXTRA = ("buckets", "resumed", "continued", "two processes", "node")
TESTS_OF_NODES = ("tests/comfyui_stubs", "tests/pack")
NODE = """
import importlib.util, os, sys
from pathlib import Path
import torch
checkout, stubs = Path(sys.argv[1]), Path(sys.argv[2])
sys.path[:0] = [str(stubs), str(stubs.parent), str(stubs.parent / "helpers")]
import stand_ins
modules = stand_ins.modules()
sys.modules.update(modules)
modules["folder_paths"].ROOT = Path.cwd()
for name in ("input", "output", "loras"):
    Path(name).mkdir()
pack = checkout / "comfyui"
spec = importlib.util.spec_from_file_location("pack", pack / "__init__.py", submodule_search_locations=[str(pack)])
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])
from pack.nodes import LorasmithTrainLora
from safetensors.torch import save_file
torch.manual_seed(0)
patcher = stand_ins.Patcher(stand_ins.Model(stand_ins.Noise()))
values = {"batch_size": 2, "grad_accumulation_steps": 1, "steps": 4, "learning_rate": 0.01, "rank": 2,
          "optimizer": "AdamW", "loss_function": "MSE", "seed": 3, "training_dtype": "fp32", "lora_dtype": "fp32",
          "algorithm": "LoRA", "gradient_checkpointing": False, "existing_lora": "[None]"}
inputs = {name: [value] for name, value in values.items()}
conds = [[stand_ins.entry(number) for number in range(4)]]
outputs = LorasmithTrainLora.execute([patcher], [stand_ins.latents(4)], conds, **inputs).args
save_file({key: value.contiguous() for key, value in dict(outputs[1]).items()}, "lora.safetensors")
"""


def digest_of(path: Path) -> str:
    """SHA-256 over a file's tensors, in the order of their names: name, dtype, shape, bytes."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    entries.pop("__metadata__", None)
    found = hashlib.sha256()
    for key in sorted(entries):
        begin, end = (8 + length + offset for offset in entries[key]["data_offsets"])
        found.update(f"{key} {entries[key]['dtype']} {entries[key]['shape']}\n".encode() + content[begin:end])
    return found.hexdigest()


def make_pictures(folder: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    """A folder of pictures in these sizes, with captions; every checkout trains on the same."""
    folder.mkdir()
    for number, size in enumerate(sizes):
        image = Image.linear_gradient("L").resize(size).rotate(36 * number)
        Image.merge("RGB", (image, image.rotate(90), image.rotate(180))).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a gradient, turned {number} times", encoding="utf-8")
    return folder


def call(checkout: Path, folder: Path, command: Sequence[str]) -> None:
    """Runs a command with this checkout's package; RuntimeError with what it printed where it fails."""
    environment = {**os.environ, **THREADS, "PYTHONPATH": str(checkout / "src")}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} in {checkout}: {ended.stderr[-2000:]}")


def train(
    checkout: Path, folder: Path, pictures: Path, *settings: str, start: Sequence[str] = ("-m",), output: str = "run"
) -> Path:
    """The LoRA file of a run with these settings."""
    arguments = ("train", str(pictures), *SHORT, "--output", output, *settings)
    call(checkout, folder, (sys.executable, *start, "lorasmith", *arguments))
    return folder / output / "lora.safetensors"


def trained(name: str, checkout: Path, folder: Path, pictures: Path, mixed: Path) -> Path:
    """The LoRA file of one of the runs."""
    if name == "buckets":
        return train(checkout, folder, mixed, "--batch_size", "1", "--steps", "6")
    if name == "resumed":
        train(checkout, folder, pictures, "--checkpoints.steps", "2")
        return train(checkout, folder, pictures, "--checkpoints.steps", "2", "--steps", "7", "--resume")
    if name == "continued":
        first = train(checkout, folder, pictures, "--adapter", "DoRA")
        return train(checkout, folder, pictures, "--existing_lora", str(first), output="second")
    if name == "two processes":
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
        return train(checkout, folder, pictures, start=torchrun)
    if name == "node":
        stubs = next(checkout / tests for tests in TESTS_OF_NODES if (checkout / tests).is_dir())
        call(checkout, folder, (sys.executable, "-c", NODE, str(checkout), str(stubs)))
        return folder / "lora.safetensors"
    return train(checkout, folder, pictures, *RUNS[name])


def main() -> None:
    checkouts = [Path(argument).resolve() for argument in sys.argv[1:3]]
    names = sys.argv[3:] or [*RUNS, *EXTRA]
    differing = []
    for name in names:
        with tempfile.TemporaryDirectory() as place:
            root = Path(place)
            pictures = make_pictures(root / "pictures", [(64, 64)] * 4)
            mixed = make_pictures(root / "mixed", [(64, 64), (96, 48), (48, 96), (64, 64), (96, 48)])
            digests = []
            for number, checkout in enumerate(checkouts):
                folder = root / str(number)
                folder.mkdir()
                digests.append(digest_of(trained(name, checkout, folder, pictures, mixed)))
        same = digests[0] == digests[1]
        differing += [] if same else [name]
        print(f"{name:20} {'same' if same else 'DIFFERENT'}  {digests[0][:16]} {digests[1][:16]}", flush=True)
    print(f"{len(names) - len(differing)} of {len(names)} are the same")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
