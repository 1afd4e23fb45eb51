"""What a checkpoint costs: seconds to write and to read it, and their share of the time between two at the default.

`python benchmarks/checkpoints.py --millions 1 10 100`: so many million numbers are trained. A checkpoint holds each of
them three times in float32 (master and AdamW's two means). Files go to --folder, whose disk is what is measured.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from lorasmith.config.schema import Checkpoints
from lorasmith.training.checkpoints import Checkpoint, CheckpointFolder, read

LAYERS = 100


def measured(folder: Path, millions: float, repeats: int) -> tuple[float, list[float], list[float]]:
    """Size in MB, and the seconds of each writing and each reading."""
    size = int(millions * 1e6) // LAYERS
    parts = ("master", "optimizer/exp_avg", "optimizer/exp_avg_sq")
    tensors = {f"{part}/{layer:03d}": torch.randn(size) for part in parts for layer in range(LAYERS)}
    checkpoints = CheckpointFolder(folder, Checkpoints(keep=1))
    writing, reading = [], []
    for step in range(1, repeats + 1):
        began = time.perf_counter()
        checkpoints.write(Checkpoint(step, tensors, {}, {}, {}))
        writing.append(time.perf_counter() - began)
        began = time.perf_counter()
        read(checkpoints.file_path(step))
        reading.append(time.perf_counter() - began)
    return checkpoints.file_path(repeats).stat().st_size / 1e6, writing, reading


def main() -> None:
    parser = argparse.ArgumentParser(description="What checkpoints cost.")
    parser.add_argument("--millions", type=float, nargs="+", default=[0.25, 10, 50])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; none: the system's folder for temporary files")
    asked = parser.parse_args()
    interval = 60 * Checkpoints().minutes
    print(f"{'numbers':>12} {'file':>10} {'write':>8} {'read':>8}   share of {interval:.0f} s")
    for millions in asked.millions:
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            size, writing, reading = measured(Path(folder), millions, asked.repeats)
        write, load = statistics.median(writing), statistics.median(reading)
        print(f"{millions:>10} M {size:>7.0f} MB {write:>6.2f} s {load:>6.2f} s   {write / interval:.2%}")


if __name__ == "__main__":
    main()
