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
from lorasmith.models.sources.folder_layout import MODEL_INDEX, MODULES, TOKENIZER
from lorasmith.models.sources.parts import UNREADABLE, loaded
from lorasmith.storage.json_files import json_table

WORDS = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
"""What a tokenizer's words are in, of one kind or another."""
CHECKER, EXTRACTOR, NEEDS_CHECKER = "safety_checker", "feature_extractor", "requires_safety_checker"


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
        given: dict[str, Any] = {name: None for name, entry in self.index.items() if entry == [None, None]}
        given |= {name: self.part(name, dtype) for name in MODULES if name not in nets and self.has(name)}
        given |= {name: self._tokenizer(name) for name in self.index if TOKENIZER.fullmatch(name) and name not in nets}
        given |= self._safety_checker(dtype) | dict(nets)
        try:
            kind = getattr(importlib.import_module("diffusers"), self.index["_class_name"])
            return kind.from_pretrained(self.path, **given, local_files_only=True)
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
        return loaded(self._class(name), folder, dtype)

    def _class(self, name: str) -> Any:
        """Of a part, by the pipeline's index: of a library, or of diffusers' own modules of pipelines."""
        library, kind = self.index[name]
        try:
            is_library = library in ("diffusers", "transformers")
            return getattr(importlib.import_module(library if is_library else f"diffusers.pipelines.{library}"), kind)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"cannot load {self.path / name}: {line(error)}") from error

    def _tokenizer(self, name: str) -> Any:
        """None where there is none; ValueError where its words are missing, as the library would take it for empty."""
        folder = self.path / name
        if not self.has(name):
            return None
        if not any((folder / words).is_file() for words in WORDS):
            raise ValueError(f"{folder} must hold {' or '.join(WORDS)}, but it does not")
        try:
            return self._class(name).from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the library raises nothing more exact
            raise ValueError(f"cannot load {folder}: {line(error)}") from error

    def _safety_checker(self, dtype: torch.dtype | None) -> dict[str, Any]:
        """What pictures are checked with, or that they are not, as where a model is fetched from the hub."""
        if CHECKER not in self.index:
            return {}
        here = [name for name in (CHECKER, EXTRACTOR) if self.has(name) and (self.path / name).is_dir()]
        if here == [CHECKER, EXTRACTOR]:  # the one needs the other
            return {CHECKER: self.part(CHECKER, dtype)}
        return {CHECKER: None, NEEDS_CHECKER: False, **({} if EXTRACTOR in here else {EXTRACTOR: None})}


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
