"""A training job: adapters on a copy of a denoiser, a data set, and what the file says of them."""

import json
import logging
import math
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorasmith import __version__, lorafile
from lorasmith.adapters import Algorithm, LoKr
from lorasmith.adapters.oft import OFTAdapter
from lorasmith.attach import AdapterSet, attached, targeted
from lorasmith.base_weights import offload, quantize_backward, refuse_useless_offloading
from lorasmith.checkpoints import Checkpoint
from lorasmith.config import Config, LayoutName
from lorasmith.data.cache import Dataset
from lorasmith.devices import DTYPES, compute_dtype, device_of, model_dtype
from lorasmith.experts import Expert, experts
from lorasmith.file_layouts import in_layout, metadata_of, refuse_impossible
from lorasmith.loading import adapters_from
from lorasmith.low_bit import low_bit_copy, refuse_needs_of_whole_weights
from lorasmith.memory import shared_copy
from lorasmith.packing import pack
from lorasmith.resuming import (
    WITHOUT_EFFECT,
    dtypes_of,
    facts_of,
    group_to_go_on_with,
    refuse_differences,
    tell_changes,
)
from lorasmith.sharding import refuse_useless_sharding, shard
from lorasmith.state import State
from lorasmith.targets import TEXT_NETS, Targets
from lorasmith.training import has_native_kernels, train
from lorasmith.types import Denoiser, Step
from lorasmith.world import ALONE, World

log = logging.getLogger(__name__)

LYCORIS_NAMES = {"LoRA": "locon", "LoHa": "loha", "LoKr": "lokr", "OFT": "diag-oft", "DoRA": "locon"}
LYCORIS_DORA = {"dora_wd": "True", "wd_on_output": "True"}  # as its users write them


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
    _hashing: Future[str] | None = None

    @classmethod
    def of(
        cls, denoiser: Denoiser, dataset: Dataset, config: Config, *, device: torch.device,
        metadata: dict[str, str] | None = None, world: World = ALONE,
    ) -> "Job":  # fmt: skip
        """New adapters, or those of an existing LoRA."""
        assert config.steps is not None
        if config.non_finite.returns and config.checkpoints.steps is None:  # by the clock it could be another step
            raise ValueError("checkpoints.steps must be set where non_finite.returns is, got none")
        if config.text_encoder.learning_rate is not None and not config.text_encoder.train:
            raise ValueError("text_encoder.train must be true where text_encoder.learning_rate is set, got false")
        path = config.existing_lora
        if path is None:
            adapters, done, first = AdapterSet.new(denoiser, config.adapter, config.targets, config.seed), 0, 0
        else:
            adapters, done, first = _continued(path, denoiser, dataset.order.group_size, config)
            _warn_of_differences(config, adapters, denoiser)
        shares = [(share, expert.denoiser) for expert, share in _shares(adapters, denoiser)]
        for share, own in shares or [(adapters, denoiser)]:
            refuse_impossible(share, own, config.file_layout)
        if config.base_dtype != "none":
            refuse_needs_of_whole_weights(config, adapters)
        if config.offloading:
            refuse_useless_offloading(denoiser, adapters, device, config.gradient_checkpointing)
        if config.sharded:
            refuse_useless_sharding(config, adapters, world)
        home = device_of(denoiser) if config.offloading or config.sharded else device
        dtype = model_dtype(config.training_dtype, device)
        if config.base_dtype == "none":
            copy = shared_copy(denoiser, home, dtype)
        else:
            copy = low_bit_copy(denoiser, config.base_dtype, home, dtype)
        if config.quantized_backward:
            quantize_backward(copy, device)
        if config.offloading:  # after quantize_backward, which changes the forward passes that this wraps
            offload(copy, device)
        is_fp16 = any(p.dtype == torch.float16 for net in copy.nets.values() for p in net.parameters())
        if config.sharded:
            shard(copy, device)
        effective = {
            "dtypes": dtypes_of(copy),
            "packed layers": str(pack(copy, config.pack, adapters.offsets)),
            "kernels in C": "yes" if has_native_kernels(config, device) else "no",
        }
        adapters.to(device, compute_dtype(config.lora_dtype, device))
        network = _network(adapters, config.adapter if path is None else None)
        facts = facts_of(denoiser, adapters, dataset, device, world) | effective
        state = State(adapters, config, is_fp16=is_fp16, group=first)
        job = cls(config, denoiser, copy, adapters, dataset, state, done, facts, {**network, **(metadata or {})}, world)
        if world.size > 1:
            refuse_differences(world, config, job.facts)
        return job

    @property
    def facts(self) -> dict[str, str]:
        """What decides the result besides the config; waits for the base model's hash."""
        return {"base model": self._base_hash().result(), **self.other_facts}

    def _base_hash(self) -> Future[str]:
        """Of the base model, from a thread that the first call begins: it takes seconds, and files alone need it."""
        if self._hashing is None:
            self._hashing = ThreadPoolExecutor(1).submit(lorafile.base_hash, self.base)
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
        assert self.config.steps is not None
        if checkpoint.step > self.config.steps:
            raise ValueError(f"steps must be at least the {checkpoint.step} of the checkpoint, got {self.config.steps}")
        self.load(checkpoint)
        tell_changes(checkpoint, self.config, self.facts)

    def load(self, checkpoint: Checkpoint) -> None:
        """Becomes as it was then, but for what the config has otherwise now; ValueError where it does not fit."""
        try:
            self.state.load(checkpoint.tensors, checkpoint.numbers)
        except ValueError as error:
            raise ValueError(f"cannot resume from the checkpoint of step {checkpoint.step}: {error}") from error
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
        return [expert for expert, _ in _shares(self.adapters, self.base)]

    def loras_of_experts(self) -> Iterator[tuple[Expert, dict[str, Tensor], dict[str, str]]]:
        """Each trained expert with the tensors and the metadata of its file."""
        dtype, layout = DTYPES[self.config.lora_dtype], self.config.file_layout
        for expert, share in _shares(self.adapters, self.base):
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


def _shares(adapters: AdapterSet, denoiser: Denoiser) -> list[tuple[Expert, AdapterSet]]:
    """The experts that have some of the adapters, each with its own."""
    found = ((expert, adapters.moved(expert.alone)) for expert in experts(denoiser))
    return [(expert, share) for expert, share in found if share.adapters or share.offsets]


def _continued(path: Path, denoiser: Denoiser, group_size: int, config: Config) -> tuple[AdapterSet, int, int]:
    """The adapters that a LoRA file holds for this denoiser, its steps, and the first group whose draws are new.

    ValueError that names the input.
    """
    try:
        state, metadata = lorafile.read(path)
        adapters = adapters_from(state, denoiser, metadata, ignore_unknown=config.ignore_unknown)
        steps = lorafile.steps_of(path, metadata)
    except ValueError as error:
        raise ValueError(f"existing_lora: {error}") from error
    constraint = lorafile.stated_constraint(metadata)
    for adapter in adapters.adapters.values():
        if isinstance(adapter, OFTAdapter) and constraint is not None:
            adapter.constraint = constraint
    drawn = lorafile.stated_number(metadata, "lorasmith.samples")
    return adapters, steps, steps if drawn is None else math.ceil(drawn / group_size)


def _warn_of_differences(config: Config, adapters: AdapterSet, denoiser: Denoiser) -> None:
    """Names the inputs that a continued LoRA overrules."""
    asked_paths = targeted(denoiser, config.targets)
    if config.targets != Targets() and asked_paths != adapters.adapters.keys():
        log.warning(
            "targets: the LoRA's own %d layers hold, not the %d asked for", len(adapters.adapters), len(asked_paths)
        )
    if config.text_encoder.train and not any(path.startswith(TEXT_NETS) for path in adapters.adapters):
        log.warning("text_encoder.train: the LoRA's own layers hold, none of which is one of a text encoder")
    if isinstance(config.adapter, LoKr) and config.adapter.factor is not None:
        log.warning("factor: the LoRA's own holds, not %d", config.adapter.factor)
    asked = {"algorithm": config.adapter.name, "rank": config.adapter.rank, "alpha": config.adapter.alpha}
    held = {"algorithm": adapters.algorithms, "rank": adapters.ranks, "alpha": adapters.alphas}
    for name, value in asked.items():
        # Small layers get smaller blocks and ranks than asked for, so it is the greatest that counts.
        if value is not None and held[name] and held[name][-1] != value:
            log.warning("%s: the LoRA's own (%s) holds, not %s", name, ", ".join(map(str, held[name])), value)


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
    if adapters.algorithms == ["LoRA"]:
        return {"ss_network_module": "networks.lora", **own}
    algorithm = "+".join(dict.fromkeys(LYCORIS_NAMES[name] for name in adapters.algorithms))
    args = {"algo": algorithm, **(LYCORIS_DORA if "DoRA" in adapters.algorithms else {})}
    return {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(args), **own}


def _portable(config: Config) -> str:
    """What decides the result, as JSON; paths are cut to their last name: a file tells nothing of its machine."""
    without = {"output": True, "device": True, "sampling": True, "data": {"held_out", "drift"}}
    values = config.model_dump(mode="json", exclude={**without, **dict.fromkeys(WITHOUT_EFFECT, True)})
    for table, key in ((values, "model"), (values, "encoders"), (values, "existing_lora"), (values["data"], "folder")):
        table[key] = None if table[key] is None else Path(table[key]).name
    return json.dumps(values, sort_keys=True)
