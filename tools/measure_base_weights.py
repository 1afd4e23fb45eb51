"""Prints what offloaded base weights and int8 gradients do in training, the second table of docs/memory.md.

Weights go to the disk here, as a machine without an accelerator has no other place for them. torchao is measured where
it is installed.
"""

import tempfile
from collections.abc import Callable
from importlib.util import find_spec

import torch
from accelerate import disk_offload
from diffusers.hooks import apply_group_offloading
from measure_checkpointing import ROUNDS, Subject, measured, sd3, seconds, subjects
from torch import Tensor

from lorasmith.base_weights import quantize_backward
from lorasmith.memory import shared_copy
from lorasmith.types import Cond

CPU = torch.device("cpu")
Means = Callable[[Subject, str], object]  # changes the subject's net; may keep files in the folder


def groups(level: str) -> Means:
    """diffusers' offloading of leaves or of whole blocks."""
    num = 1 if level == "block_level" else None
    return lambda subject, folder: apply_group_offloading(
        subject.net, CPU, CPU, level, num_blocks_per_group=num, offload_to_disk_path=folder
    )


MEANS: dict[str, Means] = {
    "none": lambda subject, folder: None,
    "accelerate, leaves": lambda subject, folder: disk_offload(subject.net, folder, CPU),
    "diffusers, leaves": groups("leaf_level"),
    "diffusers, blocks": groups("block_level"),
}
if find_spec("torchao"):
    MEANS["int8 gradients"] = lambda subject, folder: quantize_backward(subject, torch.device("cpu"))


def main() -> None:
    torch.set_num_threads(1)
    print("| net | checkpointing | means | error of the gradients | MiB held at most, weights included | time |")
    print("|---|---|---|---|---|---|")
    narrow = [each for each in subjects() if "SD" not in each[0]]  # the larger UNets are like the demo's, and slow
    for name, subject, inputs in (*narrow, sd3(num_blocks=6, num_heads=4), sd3(num_blocks=2, num_heads=40)):
        for depth in (None, 2):
            row(name, subject, inputs, depth)


def row(name: str, subject: Subject, inputs: tuple[Tensor, Tensor, Cond], depth: int | None) -> None:
    """A line for each means; the error is the norm of the difference over the norm of the right gradients."""
    with tempfile.TemporaryDirectory() as folder:
        changed = {means: shared_copy(subject) for means in MEANS}
        for number, (means, apply) in enumerate(MEANS.items()):
            apply(changed[means], f"{folder}/{number}")
        rows = {means: measured(changed[means], *inputs, depth) for means in MEANS}
        times = {means: [] for means in MEANS}
        for _ in range(ROUNDS):
            for means in MEANS:
                times[means].append(seconds(changed[means], *inputs, depth))
    right = torch.cat([gradient.flatten() for gradient in rows["none"].gradients])
    weights = sum(p.nbytes for p in subject.net.parameters())
    for means, result in rows.items():
        found = torch.cat([gradient.flatten() for gradient in result.gradients])
        error = float((found - right).norm() / right.norm())
        held = result.peak + (weights if means in ("none", "int8 gradients") else 0)
        ratio = min(times[means]) / min(times["none"])
        print(f"| {name} | {depth or 'off'} | {means} | {error:.4f} | {held / 2**20:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
