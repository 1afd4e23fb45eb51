"""A training in ComfyUI: progress, cancelling and resuming around lorasmith's job."""

import gc
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import folder_paths
import torch
from comfy_api.latest import ComfyAPISync
from torch import Tensor

from lorasmith.adapters.parts import SCALE
from lorasmith.config.schema import Config
from lorasmith.data.dataset import Dataset
from lorasmith.errors import is_out_of_memory
from lorasmith.formats.architectures.registry import ARCHITECTURES
from lorasmith.formats.dora_magnitude import COMFYUI, PAPER, for_comfyui
from lorasmith.storage.folder_lock import FolderLock
from lorasmith.training.checkpoints import CheckpointFolder
from lorasmith.training.fingerprint import WITHOUT_EFFECT
from lorasmith.training.job import Job
from lorasmith.training.loop import NonFiniteError
from lorasmith.training.recovery import Keeper, kept

from .conditioning import is_pair, prepared
from .denoiser import ComfyDenoiser
from .pictures import loss_picture

log = logging.getLogger(__name__)

CHECKPOINTS = Path("lorasmith", "checkpoints")  # in the output folder
OF_THE_TRAINING = ("base model", "structure", "process", "data", "first weights", "dtypes")
"""The facts by which a training is known again; others are of the machine."""
MAY_CHANGE = ("gradient_checkpointing", "checkpoint_depth", "pack", "native_kernels")
"""Inputs that trade memory for time: the LoRA is the same but for rounding."""
SECONDS_A_PREVIEW = 2.0
ADVICE = "turn on memory_ladder or gradient_checkpointing and queue again to continue from the last step, or reduce"
BASES = {kind: names for architecture in ARCHITECTURES for kind, names in architecture.comfyui.items()}
"""{ComfyUI's class of a model: what modelspec and kohya's tools call it}."""


class Trained(dict[str, Tensor]):
    """A LORA_MODEL as ComfyUI reads it, which knows what its file is to say, and DoRA's lengths as others read them."""

    def __init__(self, lora: Mapping[str, Tensor], metadata: Mapping[str, str], denoiser: ComfyDenoiser) -> None:
        """lora: with the paper's lengths; metadata: of a file with these; denoiser: the model it was trained on."""
        super().__init__(for_comfyui(lora, denoiser))
        self._lengths = {key: tensor for key, tensor in lora.items() if key.endswith(f".{SCALE}")}
        self.metadata = {**metadata, **(COMFYUI if self._lengths else {})}

    def file(self, layout: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The weights as the program of a layout reads them, under ComfyUI's names, and the metadata."""
        if layout == "ComfyUI" or not self._lengths:
            return dict(self), self.metadata
        return {**self, **self._lengths}, {**self.metadata, **PAPER}


@dataclass(frozen=True)
class Outcome:
    """What a training gives."""

    lora: Trained
    losses: list[float]
    steps: int


def trained(
    patcher: Any, latents: Sequence[Any], positive: Sequence[Any], config: Config, *,
    are_buckets: bool, is_resuming: bool,
) -> Outcome:  # fmt: skip
    """Trains a LoRA on a MODEL of ComfyUI, which stays as it is.

    latents, positive: lists of LATENT and CONDITIONING; are_buckets: each LATENT is a batch with a CONDITIONING of its
    own. ValueError on bad input; RuntimeError, with what to change, where memory runs out. Cancelling raises ComfyUI's
    exception, once a checkpoint is written.
    """
    extras = [pair[1] for part in positive for pair in part if is_pair(pair)]
    failure = None
    try:
        with torch.inference_mode(False), _training_mode():
            return _outcome(
                _loaded(patcher, extras), latents, positive, config, are_buckets=are_buckets, is_resuming=is_resuming
            )
    except NonFiniteError as error:
        failure = NonFiniteError(f"{error}; lower learning_rate, or turn resume off to begin anew")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failure = RuntimeError(f"out of memory: {ADVICE} batch_size or the size of latents: {error}")
    finally:
        controls = comfy.sampler_helpers.get_models_from_cond(extras, "control")
        comfy.sampler_helpers.cleanup_additional_models(list(dict.fromkeys(controls)))
        gc.collect()  # the copy of the model hangs in cycles
        comfy.model_management.soft_empty_cache()
    raise failure


def _outcome(
    patcher: Any, latents: Sequence[Any], positive: Sequence[Any], config: Config, *,
    are_buckets: bool, is_resuming: bool,
) -> Outcome:  # fmt: skip
    """As `trained`, of a patcher that is loaded; nothing of the model's copy is held once this returns or raises."""
    samples, entries = prepared(patcher.model, latents, positive, are_buckets=are_buckets)
    denoiser = ComfyDenoiser(patcher.model, entries, patcher.model_options)
    dataset = Dataset.of(samples, [1] * len(samples), seed=config.seed, group_size=config.group_size)
    job = Job.of(denoiser, dataset, config, device=patcher.load_device, metadata=_metadata(patcher.model))
    _run(job, is_resuming)
    return Outcome(Trained(job.lora(), job.file_metadata(), denoiser), job.state.losses, job.steps_in_all)


def _run(job: Job, is_resuming: bool) -> None:
    """Trains to the end, from the checkpoint of the same training on where it was cancelled."""
    folder = Path(folder_paths.get_output_directory()) / CHECKPOINTS / _identity(job)
    if not is_resuming:
        _forget(folder)
    is_ended = False
    try:
        with kept(job, folder, folder) as keeper:
            if job.state.counters.step:
                log.info("continuing after step %d of %s, from %s", job.state.counters.step, job.config.steps, folder)
            _follow(job, keeper)
        is_ended = True
    finally:
        if is_ended or not CheckpointFolder.of(folder, job.config).steps():
            shutil.rmtree(folder, ignore_errors=True)


def _follow(job: Job, keeper: Keeper) -> None:
    """Shows each step; where the prompt is cancelled, ends after the step in hand, with a checkpoint."""
    api, shown = ComfyAPISync(), 0.0
    assert job.config.steps is not None
    with closing(keeper.steps()) as steps:
        for _ in steps:
            if comfy.model_management.processing_interrupted():
                keeper.keep()
                log.info("cancelled after step %d: queue again to continue", job.state.counters.step)
                break
            preview = None
            if time.monotonic() - shown >= SECONDS_A_PREVIEW:
                preview, shown = loss_picture(job.state.losses), time.monotonic()
            api.execution.set_progress(job.state.counters.step, job.config.steps, preview_image=preview)
    comfy.model_management.throw_exception_if_processing_interrupted()


def _identity(job: Job) -> str:
    """Equal for trainings that end in the same LoRA."""
    config = job.config.model_dump(mode="json", exclude={*WITHOUT_EFFECT, *MAY_CHANGE})
    facts = [job.facts[name] for name in OF_THE_TRAINING]
    return hashlib.sha256(json.dumps([config, facts], sort_keys=True).encode()).hexdigest()[:16]


def _forget(folder: Path) -> None:
    """Removes a training's checkpoints; ValueError where another ComfyUI is writing them."""
    if folder.is_dir():
        lock = FolderLock(folder)
        lock.acquire()
        lock.release()
        shutil.rmtree(folder)


def _loaded(patcher: Any, extras: Sequence[Mapping[str, Any]]) -> Any:
    """The patcher, its patches in its weights, on its device, with the networks that its conditioning needs."""
    if hasattr(patcher, "is_dynamic") and patcher.is_dynamic():  # of newer versions
        patcher = patcher.clone(disable_dynamic=True)
    others, _ = comfy.sampler_helpers.get_additional_models({"positive": extras}, patcher.model_dtype())
    comfy.model_management.load_models_gpu([patcher, *others], force_full_load=True)
    return patcher


@contextmanager
def _training_mode() -> Iterator[None]:
    """Networks leave out, as long as this is open, what has no gradient; older versions have no such switch."""
    switches = vars(comfy.model_management)
    before = switches.get("in_training")
    if before is None:
        yield
        return
    switches["in_training"] = True
    try:
        yield
    finally:
        switches["in_training"] = before


def _metadata(model: Any) -> dict[str, str]:
    """What other tools read of the base model, where its kind is known."""
    names = BASES.get(type(model.model_config).__name__)
    return {} if names is None else {"modelspec.architecture": f"{names[0]}/lora", "ss_base_model_version": names[1]}
