"""Where the parts of a diffusers pipeline come from: a folder, an open pipeline, or a single file beside a folder."""

import copy
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lorasmith.models.checkpoints.load import line
from lorasmith.models.sources.folder_layout import MODEL_INDEX, MODULES
from lorasmith.models.sources.parts import UNREADABLE, loaded
from lorasmith.storage.json_files import json_table


class Components(Protocol):
    """The parts of one pipeline."""

    def net(self, name: str) -> Any:
        """A net that adapters train on; ValueError where there is none."""
        ...

    @property
    def scheduler(self) -> Mapping[str, Any]:
        """The scheduler's config."""
        ...

    def config(self, name: str) -> Any:
        """A value of the pipeline's own config; None where it has none."""
        ...

    def pipeline(self, nets: Mapping[str, nn.Module], dtype: torch.dtype | None = None) -> Any:
        """A pipeline around these nets; its other parts in this dtype (None: as they are stored)."""
        ...

    def lacking(self, names: Sequence[str]) -> str:
        """What is said where these parts, which captions are encoded with, are not there."""
        ...


@dataclass(frozen=True)
class FolderComponents:
    """A diffusers folder: one subfolder a part."""

    path: Path

    @cached_property
    def index(self) -> dict[str, Any]:
        return json_table(self.path / MODEL_INDEX)

    @property
    def scheduler(self) -> Mapping[str, Any]:
        return json_table(self.path / "scheduler" / "scheduler_config.json")

    def config(self, name: str) -> Any:
        return self.index.get(name)

    def net(self, name: str) -> Any:
        return self.part(name, None)

    def pipeline(self, nets: Mapping[str, nn.Module], dtype: torch.dtype | None = None) -> Any:
        parts = {name: self.part(name, dtype) for name in MODULES if name not in nets and self.has(name)}
        absent = {name: None for name, entry in self.index.items() if entry == [None, None]}  # which must be said
        try:
            kind = getattr(importlib.import_module("diffusers"), self.index["_class_name"])
            return kind.from_pretrained(self.path, **absent, **nets, **parts, local_files_only=True)
        except UNREADABLE as error:  # some processors of captions need packages of their own
            raise ValueError(f"cannot load {self.path}: {line(error)}") from error

    def lacking(self, names: Sequence[str]) -> str:
        return f"model must hold {' and '.join(names)} to encode captions, but it does not"

    def has(self, name: str) -> bool:
        """Whether the pipeline has such a part."""
        entry = self.index.get(name)
        return isinstance(entry, list) and None not in entry

    def part(self, name: str, dtype: torch.dtype | None) -> Any:
        """A part with weights; ValueError where it is missing or broken."""
        folder = self.path / name
        if not self.has(name) or not folder.is_dir():
            raise ValueError(f"{self.path} must hold {name}/, but it does not")
        library, kind = self.index[name]
        try:
            found = getattr(importlib.import_module(library), kind)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"cannot load {folder}: {line(error)}") from error
        return loaded(found, folder, dtype)


@dataclass(frozen=True)
class OpenComponents:
    """A diffusers pipeline that a caller hands over: its parts are used as they are."""

    pipe: Any

    @property
    def scheduler(self) -> Mapping[str, Any]:
        return self.pipe.scheduler.config

    def config(self, name: str) -> Any:
        return self.pipe.config.get(name)

    def net(self, name: str) -> Any:
        net = getattr(self.pipe, name, None)
        if net is None:
            raise ValueError(f"model must hold a {name}, but the pipeline's is None")
        return net

    def pipeline(self, nets: Mapping[str, nn.Module], dtype: torch.dtype | None = None) -> Any:
        twin = copy.copy(self.pipe)
        for name, net in nets.items():
            setattr(twin, name, net)
        return twin

    def lacking(self, names: Sequence[str]) -> str:
        return f"model must hold {' and '.join(names)} to encode captions, but it does not"
