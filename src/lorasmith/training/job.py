"""A training job: adapters on a copy of a denoiser, a data set, and what the file says of them."""

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorasmith import __version__
from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import Algorithm
from lorasmith.adapters.hooks import attached
from lorasmith.adapters.targets import TEXT_NETS
from lorasmith.config.schema import Config
from lorasmith.data.dataset import Dataset
from lorasmith.devices import DTYPES, compute_dtype, device_of
from lorasmith.distributed.process_group import ALONE, World
from lorasmith.formats.experts import Expert, experts
from lorasmith.formats.write import in_layout, metadata_of
from lorasmith.prepare.base_model import prepare
from lorasmith.reporting.progress import SILENT, Progress
from lorasmith.training.base_hash import BaseHash
from lorasmith.training.checkpoints import Checkpoint
from lorasmith.training.fingerprint import (
    WITHOUT_EFFECT,
    dtypes_of,
    facts_of,
    group_to_go_on_with,
    refuse_differences,
    tell_changes,
)
from lorasmith.training.loop import has_native_kernels, train
from lorasmith.training.plan import Plan, misfit_named, refuse_other_run, shares, warn_of_idle_targets
from lorasmith.training.state import State
from lorasmith.types import Denoiser, LayoutName, Step

log = logging.getLogger(__name__)


@dataclass
class Job:
    """Adapters about to be trained on a copy of a denoiser; the one that came in is never touched."""

    config: Config  # with steps set
    base: Denoiser  # the one that came in
    denoiser: Denoiser  # the copy, frozen, in the dtype that is computed in
    adapters: AdapterSet
    dataset: Dataset
    state: State
    done: int  # steps of the LoRA that is continued
    other_facts: dict[str, str]  # what decides the result besides the config and the base model's values
    metadata: dict[str, str]  # what other tools read of the base model
    world: World
    progress: Progress = SILENT
    _hashing: BaseHash | None = None

    @classmethod
    def of(
        cls, denoiser: Denoiser, dataset: Dataset, config: Config, *, device: torch.device,
        metadata: dict[str, str] | None = None, world: World = ALONE,
    ) -> "Job":  # fmt: skip
        """What a plan for this denoiser makes."""
        plan = Plan.of(denoiser, config, home=device_of(denoiser), device=device, world=world)
        warn_of_idle_targets(denoiser, config)
        return cls.planned(plan, denoiser, dataset, metadata)

    @classmethod
    def planned(
        cls, plan: Plan, denoiser: Denoiser, dataset: Dataset, metadata: dict[str, str] | None = None, *,
        progress: Progress = SILENT,
    ) -> "Job":  # fmt: skip
        """The plan's adapters on a copy of the denoiser; ValueError where the copy cannot be made as asked."""
        config, device, adapters = plan.config, plan.device, plan.adapters
        model = prepare(denoiser, config, device, offsets=adapters.offsets, progress=progress)
        effective = {
            "dtypes": dtypes_of(model.denoiser),
            "packed layers": str(model.num_prepacked),
            "kernels in C": "yes" if has_native_kernels(config, device) else "no",
        }
        adapters.to(device, compute_dtype(config.lora_dtype, device))
        network = _network(adapters, config.adapter if config.existing_lora is None else None)
        facts = facts_of(denoiser, adapters, dataset, device, plan.world) | effective
        state = State(adapters, config, is_fp16=model.is_fp16, group=plan.first_group)
        job = cls(
            config, denoiser, model.denoiser, adapters, dataset, state, plan.done, facts,
            {**network, **(metadata or {})}, plan.world, progress,
        )  # fmt: skip
        if plan.world.size > 1:
            refuse_differences(plan.world, config, job.facts)
        return job

    @property
    def facts(self) -> dict[str, str]:
        """What decides the result besides the config; waits for the base model's hash."""
        return {"base model": self._base_hash().result(self.progress), **self.other_facts}

    def _base_hash(self) -> BaseHash:
        """Begun by the first call: it takes seconds, and files alone need it."""
        if self._hashing is None:
            self._hashing = BaseHash(self.base)
        return self._hashing

    def steps(self, stop: threading.Event | None = None) -> Iterator[Step]:
        """Trains on from where the state is, until `stop` is set; each step is yielded when it is complete."""
        steps = train(
            self.denoiser, self.adapters, self.dataset, self.config, state=self.state, done=self.done,
            world=self.world, stop=stop,
        )  # fmt: skip
        with attached(self.denoiser, self.adapters), closing(steps):
            for step in steps:
                self._base_hash()  # the first step would have to wait for it where there are few cores
                yield step

    @property
    def steps_in_all(self) -> int:
        """Steps completed, those of the LoRA that is continued included."""
        return self.done + self.state.counters.step

    def checkpoint(self) -> Checkpoint:
        """What a run resumes from."""
        config = self.config.model_dump(mode="json")
        return Checkpoint(self.state.counters.step, self.state.tensors(), self.state.numbers(), config, self.facts)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint and tells what has changed since; ValueError where it does not fit."""
        refuse_other_run(checkpoint, self.config)
        self.load(checkpoint)
        tell_changes(checkpoint, self.config, self.facts)

    def load(self, checkpoint: Checkpoint) -> None:
        """Becomes as it was then, but for what the config has otherwise now; ValueError where it does not fit."""
        with misfit_named(checkpoint):
            self.state.load(checkpoint.tensors, checkpoint.numbers)
        counters = self.state.counters
        counters.group = group_to_go_on_with(checkpoint, self.dataset.order.group_size)
        if checkpoint.config["batch_size"] != self.config.batch_size:  # not only lower than asked for, by the ladder
            counters.batch_size = self.config.batch_size
        if checkpoint.config["gradient_checkpointing"] != self.config.gradient_checkpointing:
            counters.checkpointing = self.config.gradient_checkpointing

    def lora(self) -> dict[str, Tensor]:
        """The adapters as a file holds them."""
        return in_layout(self.adapters, self.base, DTYPES[self.config.lora_dtype], self._layout)

    @property
    def _layout(self) -> LayoutName | None:
        """Of the whole LoRA; other programs read those of experts, if there are some."""
        return None if experts(self.base) else self.config.file_layout

    @property
    def trained_experts(self) -> list[Expert]:
        """Those that have a file of their own."""
        return [expert for expert, _ in shares(self.adapters, self.base)]

    def loras_of_experts(self) -> Iterator[tuple[Expert, dict[str, Tensor], dict[str, str]]]:
        """Each trained expert with the tensors and the metadata of its file."""
        dtype, layout = DTYPES[self.config.lora_dtype], self.config.file_layout
        for expert, share in shares(self.adapters, self.base):
            metadata = {
                **self.file_metadata(),
                **metadata_of(share, expert.denoiser, layout),
                **expert.metadata,
                "lorasmith.algorithm": "+".join(share.algorithms),
            }
            yield expert, in_layout(share, expert.denoiser, dtype, layout), metadata

    def file_metadata(self) -> dict[str, str]:
        """What the file says of itself; nothing that differs between equal runs."""
        config, steps = self.config, self.steps_in_all
        own = {
            "lorasmith.version": __version__,
            "lorasmith.steps": str(steps),
            "lorasmith.samples": str(self.state.counters.group * self.dataset.order.group_size),
            "lorasmith.algorithm": "+".join(self.adapters.algorithms),
            "lorasmith.base_hash": self.facts["base model"],
            "lorasmith.config": _portable(config),
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.implementation": "diffusers",
            "ss_steps": str(steps),
            "ss_max_train_steps": str(config.steps),
            "ss_seed": str(config.seed),
            "ss_learning_rate": str(config.learning_rate),
            **({"ss_text_encoder_lr": str(config.rate_of(TEXT_NETS))} if config.text_encoder.train else {}),
            "ss_lr_scheduler": config.schedule.name,
            "ss_optimizer": config.optimizer.name,
            "ss_loss_type": config.loss.name,
            "ss_batch_size_per_device": str(config.batch_size),
            "ss_gradient_accumulation_steps": str(config.grad_accumulation_steps),
            "ss_gradient_checkpointing": str(config.gradient_checkpointing),
            "ss_mixed_precision": config.training_dtype,
            "ss_num_train_images": str(len(self.dataset.samples)),
        }
        return {**own, **metadata_of(self.adapters, self.base, self._layout), **self.metadata}


def _network(adapters: AdapterSet, asked: Algorithm | None) -> dict[str, str]:
    """What kohya's tools read of the adapters, new ones as asked for or those of a file.

    "Dynamic" is their word for ranks or alphas that differ by layer.
    """
    ranks, alphas = adapters.ranks, adapters.alphas
    if asked is not None:
        ranks, alphas = [asked.rank], [asked.alpha or asked.rank]
    own = {
        f"ss_network_{name}": str(values[0]) if len(values) == 1 else "Dynamic" if values else "None"
        for name, values in (("dim", ranks), ("alpha", alphas))
    }
    modules = {kind.KOHYA_MODULE for kind in adapters.kinds}
    if len(modules) == 1 and (module := modules.pop()):
        return {"ss_network_module": module, **own}
    args = json.dumps(_lycoris_args(adapters))
    return {"ss_network_module": "lycoris.kohya", "ss_network_args": args, **own}


def _lycoris_args(adapters: AdapterSet) -> dict[str, str]:
    """The arguments that LyCORIS's users give for these algorithms, but for those that would differ."""
    found: dict[str, dict[str, None]] = {}
    for kind in adapters.kinds:
        for name, value in kind.LYCORIS_ARGS.items():
            found.setdefault(name, {})[value] = None
    return {name: "+".join(values) for name, values in found.items() if name == "algo" or len(values) == 1}


def _portable(config: Config) -> str:
    """What decides the result, as JSON; paths are cut to their last name: a file tells nothing of its machine."""
    without = {"output": True, "device": True, "threads": True, "sampling": True, "data": {"held_out", "drift"}}
    values = config.model_dump(mode="json", exclude={**without, **dict.fromkeys(WITHOUT_EFFECT, True)})
    for table, key in ((values, "model"), (values, "encoders"), (values, "existing_lora"), (values["data"], "folder")):
        table[key] = None if table[key] is None else Path(table[key]).name
    return json.dumps(values, sort_keys=True)
