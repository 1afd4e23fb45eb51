"""SHA-256 over named tensors."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch


def digest(named: Iterable[tuple[str, Any]]) -> str:
    """Over names, shapes and values (as float32) of tensors, in their order."""
    found = hashlib.sha256()
    for name, tensor in named:
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
    return found.hexdigest()
