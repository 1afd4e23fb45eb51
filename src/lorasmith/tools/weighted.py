"""LoRAs as they are given to be merged: a file, or a file and its weight."""

import math
from collections.abc import Sequence
from pathlib import Path


def weighted(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:WEIGHT`; ValueError where the weight is not a finite number other than 0."""
    name, colon, tail = text.rpartition(":")
    is_path = any(sign in tail for sign in "/\\") or tail.lower().endswith(".safetensors")  # C:\x: a drive
    if not colon or not name or is_path or Path(text).exists():
        return Path(text), 1.0
    try:
        weight = float(tail)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or not weight:
        raise ValueError(f"the weight of {name} must be a finite number other than 0, got {tail or 'none'}")
    return Path(name), weight


def refuse_too_few(loras: Sequence[object]) -> None:
    """ValueError where there is nothing to add up."""
    if len(loras) < 2:
        raise ValueError(f"merge needs two LoRAs or more, or a model to merge one into, got {len(loras)}")
