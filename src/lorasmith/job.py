"""A training job: adapters on a copy of a denoiser, a data set, and what the file says of them."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorasmith import __version__, lorafile
from lorasmith.attach import AdapterSet, attached
from lorasmith.config import Config
from lorasmith.data.cache import Dataset
from lorasmith.devices import DTYPES, compute_dtype
from lorasmith.memory import checkpointed, shared_copy
from lorasmith.training import train
from lorasmith.types import Denoiser, Step


@dataclass
class Job:
    """Adapters about to be trained on a copy of a denoiser; the one that came in is never touched."""

    config: Config  # with steps set
    base: Denoiser  # the one that came in
    denoiser: Denoiser  # the copy, frozen, in the dtype that is computed in
    adapters: AdapterSet
    dataset: Dataset
    done: int  # steps of the LoRA that is continued
    metadata: dict[str, str]  # what other tools read of the base model

    @classmethod
    def of(
        cls, denoiser: Denoiser, dataset: Dataset, config: Config, *, device: torch.device,
        existing: tuple[dict[str, Tensor], int] | None = None, metadata: dict[str, str] | None = None,
    ) -> "Job":  # fmt: skip
        """New adapters, or those of an existing LoRA (its tensors and steps)."""
        assert config.steps is not None
        if existing is None:
            adapters = AdapterSet.new(denoiser, config.adapter, config.targets, config.seed)
        else:
            adapters = lorafile.adapters_from(existing[0], denoiser)
        copy = shared_copy(denoiser, device, compute_dtype(config.training_dtype, device))
        adapters.to(device, compute_dtype(config.lora_dtype, device))
        return cls(config, denoiser, copy, adapters, dataset, existing[1] if existing else 0, metadata or {})

    def steps(self) -> Iterator[Step]:
        """Trains; each step is yielded when it is complete."""
        assert self.config.steps is not None
        with ExitStack() as stack:
            stack.enter_context(attached(self.denoiser, self.adapters))
            if self.config.gradient_checkpointing:
                stack.enter_context(checkpointed(self.denoiser))
            yield from train(
                self.denoiser, self.adapters, self.dataset, self.config, steps=self.config.steps, done=self.done
            )

    def lora(self) -> dict[str, Tensor]:
        """The adapters as a file holds them."""
        return self.adapters.file_state(self.denoiser, DTYPES[self.config.lora_dtype])

    def file_metadata(self, steps: int) -> dict[str, str]:
        """What the file says of itself after so many steps; nothing that differs between equal runs."""
        config = self.config
        own = {
            "lorasmith.version": __version__,
            "lorasmith.steps": str(steps),
            "lorasmith.algorithm": config.adapter.name,
            "lorasmith.base_hash": lorafile.base_hash(self.base),
            "lorasmith.config": _portable(config),
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.implementation": "diffusers",
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(config.adapter.rank),
            "ss_network_alpha": str(config.adapter.alpha or config.adapter.rank),
            "ss_steps": str(steps),
            "ss_max_train_steps": str(config.steps),
            "ss_seed": str(config.seed),
            "ss_learning_rate": str(config.learning_rate),
            "ss_lr_scheduler": config.schedule.name,
            "ss_optimizer": config.optimizer.name,
            "ss_loss_type": config.loss.name,
            "ss_batch_size_per_device": str(config.batch_size),
            "ss_gradient_accumulation_steps": str(config.grad_accumulation_steps),
            "ss_gradient_checkpointing": str(config.gradient_checkpointing),
            "ss_mixed_precision": config.training_dtype,
            "ss_num_train_images": str(len(self.dataset.samples)),
        }
        return {**own, **self.metadata}


def _portable(config: Config) -> str:
    """The config as JSON, with paths cut to their last name: a file tells nothing of the machine it was made on."""
    values = config.model_dump(mode="json", exclude={"output", "device"})
    values["model"] = None if config.model is None else Path(config.model).name
    for key in ("folder", "held_out", "drift"):
        path = values["data"][key]
        values["data"][key] = None if path is None else Path(path).name
    return json.dumps(values, sort_keys=True)
