"""Prints what offloaded and low-bit base weights and int8 gradients do in training, two tables of docs/memory.md.

Weights go to the disk here, as a machine without an accelerator has no other place for them. torchao and bitsandbytes
are measured where they are installed. Words as arguments choose the means whose names they are in, and "none".
"""

import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec

import torch
from accelerate import disk_offload
from diffusers.hooks import apply_group_offloading
from measure_checkpointing import ROUNDS, Subject, measured, sd3, seconds, subjects
from torch import Tensor

from lorasmith.prepare.int8_backward import quantize_backward
from lorasmith.prepare.quantize import LowBitLinear, low_bit_copy
from lorasmith.prepare.share import shared_copy
from lorasmith.types import Cond

CPU = torch.device("cpu")
Means = Callable[[Subject, str], Subject]  # the subject with its weights elsewhere or otherwise; may keep files


def changed_by(change: Callable[[Subject, str], object]) -> Means:
    """The means that changes a copy."""

    def means(subject: Subject, folder: str) -> Subject:
        twin = shared_copy(subject)
        change(twin, folder)
        return twin

    return means


def groups(level: str) -> Means:
    """diffusers' offloading of leaves or of whole blocks."""
    num = 1 if level == "block_level" else None
    return changed_by(
        lambda subject, folder: apply_group_offloading(
            subject.net, CPU, CPU, level, num_blocks_per_group=num, offload_to_disk_path=folder
        )
    )


def low_bits(kind: str) -> Means:
    return lambda subject, folder: low_bit_copy(subject, kind, CPU, None)


MEANS: dict[str, Means] = {
    "none": changed_by(lambda subject, folder: None),
    "accelerate, leaves": changed_by(lambda subject, folder: disk_offload(subject.net, folder, CPU)),
    "diffusers, leaves": groups("leaf_level"),
    "diffusers, blocks": groups("block_level"),
}
OFFLOADED = tuple(MEANS)[1:]
if find_spec("torchao"):
    MEANS["int8 gradients"] = changed_by(lambda subject, folder: quantize_backward(subject, CPU))
    MEANS |= {f"base_dtype {kind}": low_bits(kind) for kind in ("int8", "fp8")}
if find_spec("bitsandbytes"):
    MEANS["base_dtype nf4"] = low_bits("nf4")


def bytes_of_weights(subject: Subject) -> int:
    """Those of the net's parameters, and of what low-bit layers keep."""
    packed = sum(layer.packed.nbytes for layer in subject.net.modules() if isinstance(layer, LowBitLinear))
    return packed + sum(p.nbytes for p in subject.net.parameters())


def main() -> None:
    torch.set_num_threads(1)
    print("| net | checkpointing | means | error of the gradients | MiB held at most, weights included | time |")
    print("|---|---|---|---|---|---|")
    for name in [name for name in MEANS if name != "none" and not any(word in name for word in sys.argv[1:] or [""])]:
        del MEANS[name]
    narrow = [each for each in subjects() if "SD" not in each[0]]  # the larger UNets are like the demo's, and slow
    for name, subject, inputs in (*narrow, sd3(num_blocks=6, num_heads=4), sd3(num_blocks=2, num_heads=40)):
        for depth in (None, 2):
            row(name, subject, inputs, depth)


def row(name: str, subject: Subject, inputs: tuple[Tensor, Tensor, Cond], depth: int | None) -> None:
    """A line for each means; the error is the norm of the difference over the norm of the right gradients."""
    with tempfile.TemporaryDirectory() as folder:
        changed = {means: apply(subject, f"{folder}/{number}") for number, (means, apply) in enumerate(MEANS.items())}
        rows = {means: measured(changed[means], *inputs, depth) for means in MEANS}
        times = {means: [] for means in MEANS}
        for _ in range(ROUNDS):
            for means in MEANS:
                times[means].append(seconds(changed[means], *inputs, depth))
    right = torch.cat([gradient.flatten() for gradient in rows["none"].gradients])
    for means, result in rows.items():
        found = torch.cat([gradient.flatten() for gradient in result.gradients])
        error = float((found - right).norm() / right.norm())
        held = result.peak + (0 if means in OFFLOADED else bytes_of_weights(changed[means]))
        ratio = min(times[means]) / min(times["none"])
        print(f"| {name} | {depth or 'off'} | {means} | {error:.4f} | {held / 2**20:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
