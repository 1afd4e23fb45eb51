"""What a job is to train: adapters that fit a model, and all that is refused before a sample is encoded for it."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.adapters.adapter_set import AdapterSet, targeted
from lorasmith.adapters.parts import OFFSETS
from lorasmith.adapters.registry import IN_FLOAT32
from lorasmith.adapters.targets import TEXT_NETS, Targets, adaptable_layers
from lorasmith.config.schema import Config
from lorasmith.devices import DTYPES
from lorasmith.distributed.process_group import ALONE, World
from lorasmith.formats import lora_file
from lorasmith.formats.experts import Expert, experts
from lorasmith.formats.keys import split
from lorasmith.formats.read import adapters_from
from lorasmith.formats.write import refuse_impossible
from lorasmith.prepare.compat import Circumstances, check_compatibility
from lorasmith.reporting.pace import counted
from lorasmith.training.checkpoints import Checkpoint
from lorasmith.training.state import refuse_misfit
from lorasmith.types import Denoiser

log = logging.getLogger(__name__)

KEPT = IN_FLOAT32 | OFFSETS.keys()
"""The parts of a LoRA file that lora_dtype does not round."""


@dataclass(frozen=True)
class Plan:
    """Adapters for a denoiser, which need nothing of it but its layers: a skeleton serves as well.

    Those of algorithms that need its weights start from these.
    """

    config: Config  # with steps set
    device: torch.device
    world: World
    adapters: AdapterSet
    done: int = 0  # steps of the LoRA that is continued
    first_group: int = 0  # the first group of samples whose draws are new

    @classmethod
    def of(
        cls, denoiser: Denoiser, config: Config, *, home: torch.device, device: torch.device, world: World = ALONE
    ) -> "Plan":
        """New adapters, or those of an existing LoRA; home: where the model's weights are.

        ValueError where the settings contradict each other, or where the adapters do not fit the model or the file's
        layout.
        """
        assert config.steps is not None
        if config.existing_lora is None:
            adapters = AdapterSet.new(denoiser, config.adapter, config.targets, config.seed)
            plan = cls(config, device, world, adapters)
        else:
            plan = cls._continued(config.existing_lora, denoiser, config, device=device, world=world)
        for share, own in [(s, e.denoiser) for e, s in shares(plan.adapters, denoiser)] or [(plan.adapters, denoiser)]:
            refuse_impossible(share, own, config.file_layout)
        check_compatibility(config, Circumstances(plan.adapters, home, device, world))
        return plan

    @classmethod
    def _continued(
        cls, path: Path, denoiser: Denoiser, config: Config, *, device: torch.device, world: World
    ) -> "Plan":
        """The adapters that a LoRA file holds for this denoiser; ValueError that names the input."""
        try:
            state, metadata = lora_file.read(path)
            adapters = adapters_from(state, denoiser, metadata, ignore_unknown=config.ignore_unknown)
            if not adapters.adapters:
                raise ValueError(f"{path} must hold an adapter to be trained, got differences of weights alone")
            steps = lora_file.steps_of(path, metadata)
        except ValueError as error:
            raise ValueError(f"existing_lora: {error}") from error
        stated = lora_file.stated_settings(metadata)
        for adapter in adapters.adapters.values():
            adapter.restore(stated)
        _warn_of_differences(config, adapters, denoiser)
        _warn_of_rounding(state, DTYPES[config.lora_dtype])
        drawn = lora_file.stated_number(metadata, "lorasmith.samples")
        first = steps if drawn is None else math.ceil(drawn / (config.group_size * world.size))
        return cls(config, device, world, adapters, steps, first)

    @property
    def needs_weights(self) -> bool:
        """Whether the adapters depend on the weights of the model that they were made for."""
        return bool(self.adapters.needing_weights)

    def refuse_misfit(self, checkpoint: Checkpoint) -> None:
        """ValueError where the run of this checkpoint cannot become this one."""
        shapes = {
            f"{path}/{name}": parameter.shape
            for path, adapter in self.adapters.adapters.items()
            for name, parameter in adapter.named_parameters()
        }
        with misfit_named(checkpoint):
            refuse_misfit(checkpoint.tensors, shapes)


def refuse_other_run(checkpoint: Checkpoint, config: Config) -> None:
    """ValueError where settings alone show that the run of this checkpoint cannot become this one."""
    assert config.steps is not None
    if checkpoint.step > config.steps:
        raise ValueError(f"steps must be at least the {checkpoint.step} of the checkpoint, got {config.steps}")
    own = {"optimizer.name": config.optimizer.name}
    if config.existing_lora is None:  # else the LoRA's own hold
        own |= {"adapter.name": config.adapter.name, "adapter.rank": config.adapter.rank}
    for key, value in own.items():
        part, _, name = key.partition(".")
        before = checkpoint.config[part][name]
        if before != value:
            raise ValueError(f"{key} must be {before}, as in the run that is resumed, got {value}")


@contextmanager
def misfit_named(checkpoint: Checkpoint) -> Iterator[None]:
    """A ValueError in here says which checkpoint does not fit."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"cannot resume from the checkpoint of step {checkpoint.step}: {error}") from error


def shares(adapters: AdapterSet, denoiser: Denoiser) -> list[tuple[Expert, AdapterSet]]:
    """The experts that have some of the adapters, each with its own."""
    found = ((expert, adapters.moved(expert.alone)) for expert in experts(denoiser))
    return [(expert, share) for expert, share in found if share.adapters or share.offsets]


def warn_of_idle_targets(denoiser: Denoiser, config: Config) -> None:
    """Names patterns that match no layer, where new adapters are made."""
    idle = config.targets.idle(adaptable_layers(denoiser.nets)) if config.existing_lora is None else []
    if idle:
        log.warning("%s matches no layer of the model: is it misspelt?", " and ".join(idle))


def _warn_of_differences(config: Config, adapters: AdapterSet, denoiser: Denoiser) -> None:
    """Names the inputs that a continued LoRA overrules, and what becomes of its weights."""
    asked_paths = targeted(denoiser, config.targets)
    if config.targets != Targets() and asked_paths != adapters.adapters.keys():
        log.warning(
            "targets: the LoRA holds %s, which are trained, not the %d asked for",
            counted(len(adapters.adapters), "layer"), len(asked_paths),
        )  # fmt: skip
    if config.text_encoder.train and not any(path.startswith(TEXT_NETS) for path in adapters.adapters):
        log.warning("text_encoder.train: the LoRA's own layers hold, none of which is one of a text encoder")
    others = config.adapter.model_dump(exclude={"name", "rank", "alpha"}, exclude_defaults=True)
    for name, value in others.items():
        log.warning("%s: the LoRA's own holds, not %s", name, value)
    asked = {"algorithm": config.adapter.name, "rank": config.adapter.rank, "alpha": config.adapter.alpha}
    held = {"algorithm": adapters.algorithms, "rank": adapters.ranks, "alpha": adapters.alphas}
    for name, value in asked.items():
        # Small layers get smaller blocks and ranks than asked for, so it is the greatest that counts.
        if value is not None and held[name] and held[name][-1] != value:
            log.warning("%s: the LoRA's own (%s) holds, not %s", name, ", ".join(map(str, held[name])), value)


def _warn_of_rounding(state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Names the dtypes of a continued LoRA's weights that this dtype does not hold exactly."""
    weights = (tensor for key, tensor in state.items() if split(key)[1] not in KEPT)
    rounded = {str(w.dtype).removeprefix("torch.") for w in weights if (w.to(dtype).to(w.dtype) != w).any()}
    if rounded:
        log.warning(
            "existing_lora: its weights are %s and are rounded to %s; lora_dtype fp32 keeps them as they are",
            " and ".join(sorted(rounded)), str(dtype).removeprefix("torch."),
        )  # fmt: skip
