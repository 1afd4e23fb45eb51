"""The parts of diffusers folders: loaded whole by their library, or refused by name."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import ModelMixin

from lorasmith.models.checkpoints.load import (
    DTYPES,
    FP8,
    check_complete,
    dtype_in,
    fitted,
    line,
    tensors,
    tensors_that,
    warn_of_others,
)
from lorasmith.models.checkpoints.scaled import weights_only
from lorasmith.models.sources.folder_layout import SHARD_INDEX, WEIGHTS, variant_of, weight_files
from lorasmith.models.sources.reading import was_read
from lorasmith.reporting.pace import counted
from lorasmith.storage.json_files import json_table
from lorasmith.storage.not_safetensors import other_weights
from lorasmith.storage.safetensors_header import Header

log = logging.getLogger(__name__)

UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError)


def loaded(kind: Any, folder: Path, dtype: torch.dtype | None) -> Any:
    """A part of a class of diffusers or transformers, in this dtype (None: as it is stored).

    ValueError where it lacks a tensor or has one of another shape, or a file is missing or broken. What has no place in
    it is named in a warning.
    """
    headers, variant = weights_in(folder)
    base: Any = ModelMixin
    if isinstance(kind, type) and issubclass(kind, base):
        return _of_diffusers(kind, folder, headers, dtype)
    if any(header.scales for header in headers):
        _refuse_scales(headers)
    try:
        part, report = kind.from_pretrained(
            folder, dtype=dtype or _stored_dtype(headers[0]), variant=variant, use_safetensors=True,
            local_files_only=True, output_loading_info=True,
            ignore_mismatched_sizes=True,  # whose error names no tensor
        )  # fmt: skip
    except UNREADABLE as error:
        raise ValueError(f"cannot load {folder}: {line(error)}") from error
    was_read(sum(header.num_bytes_of_all for header in headers))
    check_report(str(folder), report)
    warn_of_others(str(folder), report["unexpected_keys"])
    return part.eval()


def check_report(what: str, report: Mapping[str, Any]) -> None:
    """ValueError where a library's report on loading says that a tensor is missing or has another shape."""
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    for key, stored, own in sorted(report["mismatched_keys"]):
        raise ValueError(f"cannot load {what}: {key} must have the shape {list(own)}, got {list(stored)}")
    if report["error_msgs"]:
        raise ValueError(f"cannot load {what}: {' '.join(str(report['error_msgs'][0]).split())}")
    if len(missing) > 1 and _are_renamed(missing, unexpected):
        raise ValueError(
            f"cannot load {what}: {tensors_that(missing, 'is', 'are')} missing, such as {missing[0]}, and others are "
            f"there, such as {unexpected[0]}: its names may be those of another version of transformers than the "
            f"installed {transformers.__version__}"
        )
    check_complete(what, missing)


def _are_renamed(missing: Iterable[str], unexpected: Iterable[str]) -> bool:
    """Whether all that is missing is there with a level more or less before its name."""
    others = {key.partition(".")[2] for key in unexpected} | set(unexpected)
    return all(key in others or key.partition(".")[2] in others for key in missing)


def weights_in(folder: Path) -> tuple[list[Header], str | None]:
    """The files that are loaded of a part, and their variant; ValueError where one is missing or cannot be used."""
    paths = weight_files(folder)
    if not paths:
        raise ValueError(f"{folder} {other_weights(folder)}")
    variant = variant_of(path.name for path in paths)
    headers = [Header.of(path) for path in paths]
    if not any((match := WEIGHTS.fullmatch(path.name)) and not match["shard"] for path in paths):
        check_index(folder, {header.path.name: header for header in headers}, variant)
    return [weights_only(header) for header in headers], variant


def _of_diffusers(kind: Any, folder: Path, headers: Sequence[Header], dtype: torch.dtype | None) -> Any:
    """Read tensor by tensor: the library's own loader tells nobody how far it is, and knows no scales."""
    first = headers[0]
    scaled = [key for key in first.shapes if key in first.scales or first.dtypes[key] in DTYPES]
    own = dtype or (dtype_in(first, scaled) if first.scales else _stored_dtype(first))
    state = {key: tensor for header in headers for key, tensor in tensors(header, header.shapes, own).items()}
    return fitted(kind, json_table(folder / "config.json"), state, own, path=folder, takes_others=True)


def _refuse_scales(headers: Iterable[Header]) -> None:
    path, (weight, scale) = next((header.path, pair) for header in headers for pair in header.scales.items())
    raise ValueError(
        f"{path} must hold plain weights, as scales of text encoders are not read, got {weight} with {scale}"
    )


def check_shards(folder: Path, headers: Iterable[Header]) -> None:
    """ValueError where a part's files, of whatever variant, are not all that its index names."""
    shards: dict[str | None, dict[str, Header]] = {}
    for header in headers:
        if (match := WEIGHTS.fullmatch(header.path.name)) and match["shard"]:
            shards.setdefault(match["variant"], {})[header.path.name] = header
    for variant, own in shards.items():
        check_index(folder, own, variant)


def check_index(folder: Path, shards: Mapping[str, Header], variant: str | None) -> None:
    """ValueError where a folder's index names a file that is not there, or a tensor that its file lacks."""
    found = [path for path in folder.iterdir() if (m := SHARD_INDEX.fullmatch(path.name)) and m["variant"] == variant]
    if not found and len(shards) > 1:
        name = next(iter(shards)).partition("-0")[0]
        raise ValueError(f"{folder} must hold {name}.safetensors.index.json, which says what its files hold")
    for index in found:
        places = json_table(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise ValueError(f"{index} must say in weight_map which file holds each tensor, but it does not")
        for file in sorted(set(places.values())):
            if file not in shards:
                raise ValueError(f"{folder} must hold {file}, which {index.name} names, but it does not")
            lacking = sorted(key for key, own in places.items() if own == file and key not in shards[file].shapes)
            if lacking:
                what = counted(len(lacking), "tensor")
                raise ValueError(f"{folder / file} lacks {what} that {index.name} names, such as {lacking[0]}")


def _stored_dtype(header: Header) -> torch.dtype:
    """Of the first tensor of floating point, by name; float32 where there is none. fp8 is read into bf16."""
    known = DTYPES | FP8
    kinds = (header.dtypes[key] for key in sorted(header.shapes))
    return next((known[kind] for kind in kinds if kind in known), torch.float32)
