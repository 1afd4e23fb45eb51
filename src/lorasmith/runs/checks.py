"""What is refused before a model is loaded: settings that contradict each other, paths, and pictures measured wrongly.

Nothing here imports diffusers or transformers, which takes seconds.
"""

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.config.schema import MAX_STEPS, Config
from lorasmith.data.folder import examples, tell_of
from lorasmith.devices import best_device
from lorasmith.distributed.process_group import ALONE, World
from lorasmith.models.sources.kind import refuse_no_lora, refuse_unfit_source
from lorasmith.prepare.compat import Circumstances, check_compatibility
from lorasmith.reporting.tensorboard import refuse_without_tensorboard
from lorasmith.runs.run_dir import chosen_folder
from lorasmith.storage.safetensors_header import Header
from lorasmith.training.checkpoints import SUBFOLDER, CheckpointFolder
from lorasmith.training.plan import refuse_other_run
from lorasmith.types import Example

VIEWS = 100  # of each picture, where steps are not set


@dataclass(frozen=True)
class Request:
    """What a run is asked for, as far as it can be known without a model."""

    config: Config  # with steps set
    device: torch.device
    world: World
    folder: Path | None  # the run folder that it is to have; of the first process alone
    examples: Sequence[Example]
    measured: Mapping[str, Sequence[Example]]  # {"validation": examples, "drift": examples}, where they are given


def checked(config: Config, *, is_resuming: bool = False, folder: Path | None = None, world: World = ALONE) -> Request:
    """The request for a run; ValueError on what cannot be run, whatever the model.

    folder: the run folder to resume in, where it is known.
    """
    if config.model is None or config.data.folder is None:
        raise ValueError(f"{'model' if config.model is None else 'data.folder'} must be set: there is no default")
    device = device_for(config.device, world)
    check_compatibility(config, Circumstances(AdapterSet({}), torch.device("cpu"), device, world))
    if config.tensorboard:
        refuse_without_tensorboard()
    path = folder
    if path is None and world.is_first:
        path = chosen_folder(config, is_resuming=is_resuming)
    if path is not None:
        refuse_unwritable(path)
    refuse_unfit_source(config.model, config.encoders)
    if config.existing_lora is not None:
        with _named("existing_lora"):
            refuse_no_lora(Header.of(config.existing_lora))
    found = examples(config.data.folder, config.data.caption_lines)
    measured: dict[str, Sequence[Example]] = {}
    others = {"validation": ("held_out", config.data.held_out), "drift": ("drift", config.data.drift)}
    for name, (key, own) in others.items():
        if own is not None:
            with _named(f"data.{key}"):
                measured[name] = examples(own, config.data.caption_lines)
            refuse_trained(f"data.{key}", measured[name], found)
    views = VIEWS * sum(example.repeats for example in found)
    steps = config.steps or min(MAX_STEPS, max(1, round(views / (config.group_size * world.size))))
    config = config.model_copy(update={"steps": steps})
    own = path if world.is_first else None
    if own is not None:
        CheckpointFolder.of(own / SUBFOLDER, config).check(partial(refuse_other_run, config=config))
    return Request(config, device, world, own, found, measured)


@contextmanager
def _named(setting: str) -> Iterator[None]:
    """Errors in what a setting names begin with the setting."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error


def checked_sample(
    config: Config, lora: Path | None, output: Path | None, *, overwrite: bool
) -> tuple[Path, torch.device]:
    """Where pictures are to be written and the device to draw them on; ValueError on what cannot be drawn.

    output: None: samples.png, or samples-2.png and so on where that is taken.
    """
    assert config.model is not None
    path = _first_free(Path("samples.png")) if output is None else output
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"output must be a file in a folder that exists, got {path}")
    if path.suffix.lower() != ".png":
        raise ValueError(f"output must be a .png file, got {path}")
    if path.exists() and not overwrite:
        raise ValueError(f"output must not be there yet without --overwrite, got {path}")
    refuse_unwritable(path)
    refuse_unfit_source(config.model, config.encoders)
    if lora is not None:
        Header.of(lora)
    return path, device_for(config.device)


def _first_free(path: Path) -> Path:
    """The path itself, or the first of NAME-2, NAME-3 … that is not there."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(candidate for candidate in itertools.chain([path], numbered) if not candidate.exists())


def device_for(asked: str, world: World = ALONE) -> torch.device:
    """The device asked for; of several processes, each has the GPU of its own number."""
    name = best_device().type if asked == "auto" else asked
    try:
        if world.size > 1 and name in ("cuda", "mps"):
            name = f"{name}:{world.local_rank}"
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # either, where torch was built without the device
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(f"device must be one that this machine has, got {asked}: {reason}") from error


def refuse_unwritable(path: Path) -> None:
    """ValueError where neither the path can be made nor, where it is there, be written into."""
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if there != path and not there.is_dir():
        raise ValueError(f"output must be in a folder, got {path}: {there} is a file")
    if not os.access(there, os.W_OK):
        raise ValueError(f"output must be where files can be written, got {path}: {there} is write-protected")


def refuse_trained(name: str, measured: Sequence[Example], trained: Sequence[Example]) -> None:
    """ValueError where all pictures that are to be measured are the files that are trained on.

    A warning where some are, or hold the same bytes. Links to nowhere are left to whoever reads them.
    """
    files = {example.image_path.resolve() for example in trained if example.image_path.is_file()}
    paths = [example.image_path for example in measured if example.image_path.is_file()]
    if measured and all(example.image_path.resolve() in files for example in measured):
        raise ValueError(f"{name} must hold pictures that are not trained on, but all of them are in data.folder too")
    by_size: dict[int, list[Path]] = {}
    for path in files:
        by_size.setdefault(path.stat().st_size, []).append(path)
    digest = cache(_digest)
    same = [path for path in paths if any(digest(path) == digest(o) for o in by_size.get(path.stat().st_size, ()))]
    what = f"{name}: pictures that are trained on as well, so that their loss says little about new ones"
    tell_of(what, [path.name for path in same])


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
