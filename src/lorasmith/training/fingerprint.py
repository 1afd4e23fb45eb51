"""What has changed between a checkpoint and the run that resumes from it, and whether the result can still be exact."""

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin

from lorasmith import __version__
from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.config.schema import Config
from lorasmith.data.dataset import Dataset
from lorasmith.distributed.process_group import World
from lorasmith.storage.hashing import digest
from lorasmith.training.checkpoints import Checkpoint
from lorasmith.types import Denoiser

log = logging.getLogger(__name__)

GROUP_SIZE = "samples a step"
OF_MODEL = ("base model", "structure", "process", "data")
PLACES: Mapping[str, Sequence[str]] = {
    "output": (), "data": ("data",), "model": OF_MODEL, "encoders": OF_MODEL, "existing_lora": ("first weights",),
    "device": ("processor", "threads", "dtypes", "packed layers", "kernels in C"),
    "threads": ("threads",),
}  # fmt: skip
"""{setting that may differ between machines: the facts that say whether what is found there does}."""
SHARED_FACTS = ("base model", "structure", "process", "data", "first weights", GROUP_SIZE, "lorasmith")
WITHOUT_EFFECT = (
    "checkpoints", "tensorboard", "memory_ladder", "non_finite", "offloading", "ignore_unknown", "file_layout",
)  # fmt: skip
"""Settings that the weights do not depend on, unless something goes wrong in the run."""
HARMLESS = (
    "checkpoints", "tensorboard", "offloading", "ignore_unknown", "file_layout", "sampling", "gradient_checkpointing",
    "checkpoint_depth",
)  # fmt: skip
"""Settings that leave the weights as they are."""
MEASURED = ("data.held_out", "data.drift")
ASKED_FOR = {"pack": "packed layers", "native_kernels": "kernels in C"}
"""{setting: fact that says what came of it}."""


def facts_of(
    denoiser: Denoiser, adapters: AdapterSet, dataset: Dataset, device: torch.device, world: World
) -> dict[str, str]:
    """What decides a run's result besides its config and the base model's values.

    The adapters are new, or those of an existing LoRA.
    """
    is_cpu = device.type == "cpu"
    return {
        "structure": _structure(denoiser),
        "process": _process(denoiser),
        "data": dataset.digest(),
        "first weights": digest(adapters.file_state(denoiser, torch.float32).items()),
        GROUP_SIZE: str(dataset.order.group_size),
        "processes": str(world.size),
        "processor": torch.backends.cpu.get_cpu_capability() if is_cpu else torch.cuda.get_device_name(device)
        if device.type == "cuda" else device.type,
        "threads": str(torch.get_num_threads()) if is_cpu else "any",
        "torch": torch.__version__,
        "lorasmith": __version__,
    }  # fmt: skip


def dtypes_of(denoiser: Denoiser) -> str:
    """What a denoiser computes in."""
    return ", ".join(sorted({str(p.dtype) for net in denoiser.nets.values() for p in net.parameters()}))


def _structure(denoiser: Denoiser) -> str:
    """A hash of what the nets are but for their weights: modules with their sizes, and diffusers' configs."""
    found = [
        (name, repr(net), sorted(_stated(net.config)) if isinstance(net, ConfigMixin) else ())
        for name, net in sorted(denoiser.nets.items())
    ]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _stated(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a diffusers config says of the net, not of where it came from."""
    yield from ((key, repr(value)) for key, value in config.items() if not key.startswith("_"))


def _process(denoiser: Denoiser) -> str:
    """A hash of what the process does to plain numbers at some times."""
    t = denoiser.process.time(torch.arange(64) / 64)
    x0, eps = torch.ones(64, 1), torch.full((64, 1), 2.0)
    found = {"time": t, "noise": denoiser.process.noise(x0, eps, t), "target": denoiser.process.target(x0, eps, t)}
    return digest(found.items())


def refuse_differences(world: World, config: Config, facts: Mapping[str, str]) -> None:
    """ValueError where the processes would not train the same LoRA."""
    settings = {key: str(v) for key, v in _flat(config.model_dump(mode="json")) if key.partition(".")[0] not in PLACES}
    first, *others = world.of_all(settings | {name: facts[name] for name in SHARED_FACTS})
    for rank, other in enumerate(others, 1):
        for key in {**first, **other}:
            if first.get(key) != other.get(key):
                raise ValueError(
                    f"{key} must be the same in all processes, got {first.get(key)} in process 0 and "
                    f"{other.get(key)} in process {rank}"
                )


def tell_changes(checkpoint: Checkpoint, config: Config, facts: Mapping[str, str]) -> None:
    """Logs what is not as it was when the checkpoint was written."""
    was = {**Config().model_dump(mode="json"), **checkpoint.config}  # an older program had fewer settings
    old, new = dict(_flat(was)), dict(_flat(config.model_dump(mode="json")))
    keys = [key for key in {**old, **new} if _shown(old.get(key)) != _shown(new.get(key))]
    harmless = [key for key in keys if _is_harmless(key, checkpoint, config, facts)]
    changes = [f"{key} {_shown(old.get(key))} -> {_shown(new.get(key))}" for key in keys if key not in harmless]
    changes += [
        f"{name} {checkpoint.facts.get(name, 'unknown'):.12} -> {fact:.12}"
        for name, fact in facts.items()
        if checkpoint.facts.get(name) != fact
    ]
    if harmless:
        told = ", ".join(f"{key} {_shown(old.get(key))} -> {_shown(new.get(key))}" for key in harmless)
        log.info("changed since the checkpoint, without effect on the weights: %s", told)
    if changes:
        log.warning(
            "changed since the checkpoint, so that the result is not that of a run which was never interrupted: %s",
            ", ".join(changes),
        )


def group_to_go_on_with(checkpoint: Checkpoint, group_size: int) -> int:
    """The number of the first group whose samples' draws are new."""
    drawn = checkpoint.numbers["counters"]["group"] * int(checkpoint.facts[GROUP_SIZE])
    return math.ceil(drawn / group_size)


def _is_harmless(key: str, checkpoint: Checkpoint, config: Config, facts: Mapping[str, str]) -> bool:
    """Whether the weights are the same in spite of it.

    More steps change nothing before them where the rate does not depend on their number; when checkpoints are written
    and which are kept matters to a run that goes back to them.
    """
    if key == "steps":
        return config.schedule.name == "constant" == checkpoint.config["schedule"]["name"]
    if key in ASKED_FOR:
        return checkpoint.facts.get(ASKED_FOR[key]) == facts[ASKED_FOR[key]]
    if key in MEASURED:
        return True
    place = key.partition(".")[0]
    if place in PLACES:
        return all(checkpoint.facts.get(name) == facts[name] for name in PLACES[place])
    goes_back = config.non_finite.returns or checkpoint.config["non_finite"]["returns"]
    return place in HARMLESS and not (goes_back and key in ("checkpoints.steps", "checkpoints.keep"))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values -> (dotted key, value)."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
