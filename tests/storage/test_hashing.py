"""Hashes of tensors against SHA-256 of the same bytes in one piece."""

import hashlib

import torch

from lorasmith.storage.hashing import PIECE, digest


def test_it_is_of_names_shapes_and_values_as_float32() -> None:
    numbers = torch.arange(2 * PIECE + 6, dtype=torch.float64)
    tensors = {
        "every second": numbers[::2],
        "in bf16": torch.linspace(-1, 1, PIECE + 1).bfloat16(),
        "channels last": numbers[:120].reshape(2, 3, 4, 5).half().contiguous(memory_format=torch.channels_last),
        "a number": torch.tensor(7),
        "nothing": torch.empty(0, 3),
        "trained": torch.ones(2, requires_grad=True),
    }
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().float().contiguous().numpy().tobytes())
    told: list[int] = []
    assert digest(tensors.items(), told.append) == found.hexdigest()
    assert sum(told) == sum(tensor.nbytes for tensor in tensors.values())
