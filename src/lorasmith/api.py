"""train_lora: the sixteen inputs and four outputs of the training node. N samples, C channels, h w latent sides."""

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from lorasmith.adapters.algorithms import AlgorithmName
from lorasmith.adapters.hooks import attach
from lorasmith.adapters.targets import Targets
from lorasmith.config.messages import explained
from lorasmith.config.schema import Checkpoints, Config, NonFinite, TextEncoder
from lorasmith.config.settings import settings
from lorasmith.data.dataset import Dataset
from lorasmith.devices import DTYPES, best_device, compute_dtype, device_of
from lorasmith.distributed.process_group import ALONE, World
from lorasmith.formats.dora_magnitude import PAPER
from lorasmith.formats.keys import split
from lorasmith.formats.read import adapters_from
from lorasmith.formats.text_encoder_names import has_text_layers
from lorasmith.models.families.base import PipelineFamily
from lorasmith.models.load import Family, load_model, with_adapted_texts
from lorasmith.optim.optimizers import OptimizerName
from lorasmith.prepare.share import shared_copy
from lorasmith.storage.safetensors_header import Header
from lorasmith.training.in_memory import samples_of
from lorasmith.training.job import Job
from lorasmith.training.plan import Plan
from lorasmith.training.recovery import kept
from lorasmith.types import Denoiser, Result, Step

log = logging.getLogger(__name__)

NO_LORA = "[None]"
MEMBERS = ("nets", "process", "predict", "file_key")  # of a Denoiser
SECONDS = 10  # between lines in the log
NAMES = {
    "adapter.rank": "rank",
    "adapter.alpha": "alpha",
    "adapter.factor": "factor",
    "adapter": "algorithm",
    "adapter.name": "algorithm",
    "loss": "loss_function",
}


def train_lora(
    model: Any,
    latents: Tensor | Mapping[str, Any] | Sequence[Tensor | Mapping[str, Any]],
    positive: Sequence[Any],
    batch_size: int = 1,
    grad_accumulation_steps: int = 1,
    steps: int = 16,
    learning_rate: float = 0.0005,
    rank: int = 8,
    optimizer: OptimizerName = "AdamW",
    loss_function: Literal["MSE", "L1", "Huber", "SmoothL1"] = "MSE",
    seed: int = 0,
    training_dtype: Literal["bf16", "fp32", "none"] | torch.dtype = "bf16",
    lora_dtype: Literal["bf16", "fp32"] | torch.dtype = "bf16",
    algorithm: AlgorithmName = "LoRA",
    gradient_checkpointing: bool = True,
    existing_lora: str | Path | None = NO_LORA,
    *,
    encoders: str | Path | None = None,
    alpha: float | None = None,
    factor: int | None = None,
    targets: Targets | Sequence[str] | None = None,
    checkpoint_depth: int = 2,
    offloading: bool = False,
    quantized_backward: bool = False,
    base_dtype: Literal["none", "int8", "fp8", "nf4"] = "none",
    bucket_mode: bool = False,
    checkpoint_folder: str | Path | None = None,
    resume_from: str | Path | None = None,
    checkpoints: Checkpoints | None = None,
    non_finite: NonFinite | None = None,
    memory_ladder: bool = False,
    pack: Literal["none", "conv", "all"] = "all",
    native_kernels: bool = True,
    text_encoder: TextEncoder | None = None,
    world: World = ALONE,
) -> Result:
    """Trains a LoRA. The model that is passed in is left unchanged.

    model: a diffusers folder or single-file checkpoint (path), a hub id, a diffusers pipeline, or a Denoiser.
    latents: [N,C,h,w] (video: [N,C,f,h,w]) scaled as `Codec.encode_images` returns them, or
        {"samples": such a tensor}, or a list of these; NumPy arrays also work. Encode images first.
    positive: one conditioning for each latent, or one for all: ComfyUI's [tensor [1,L,D], dict] pairs, tensors [L,D] or
        [1,L,D], dicts of named tensors, or captions, which the model's text encoders encode. With a list of latents, a
        list of such lists also works.
    batch_size: 1 to 10000 images per forward pass.
    grad_accumulation_steps: 1 to 1024 forward passes per optimizer step.
    steps: 1 to 100000 optimizer steps.
    learning_rate: 1e-7 to 1.
    rank: 1 to 128, the inner dimension of the adapters; for OFT, the size of a block (see `lorasmith.adapters`).
    optimizer: a name from docs/optimizers.md. loss_function: one of the names in the signature.
    seed: 0 to 2^64 - 1; of initialisation, sample order, timesteps and noise: the same seed gives the same LoRA.
    training_dtype: dtype the model computes in, a name or torch.bfloat16 or torch.float32; fp32 if the device has no
        bf16, which is logged; none: its own dtype, with loss scaling if that is fp16.
    lora_dtype: dtype of the adapters, in compute and in the file; the optimizer works on fp32 master weights.
    gradient_checkpointing: recompute activations in the backward pass, to save memory.
    existing_lora: a LoRA file to continue training; its algorithm, rank and alpha are kept.
    encoders: for a single-file model, a diffusers folder or hub id with the components it lacks; None: it lacks none.
    alpha: the update is scaled by alpha / rank; None: the rank. For OFT: the limit of the rotation; None: no limit.
    factor: LoKr only: rows and columns of the smaller Kronecker factor; None: near square.
    targets: the layers to adapt: `lorasmith.adapters.targets.Targets`, or a list of the last parts of their paths, as
        ["to_q", "to_v"]; None: attention and MLPs.
    checkpoint_depth: 1 to 5: gradient_checkpointing recomputes the outermost blocks at 1, the innermost at 5.
    offloading: not possible here, as the model is trained on the device it is on.
    quantized_backward: compute gradients through linear layers in int8, with a few percent error (torchao).
    base_dtype: keep the frozen weights of linear layers in 8 bits (int8, fp8: torchao) or 4 (nf4: bitsandbytes) to
        save memory while training; model_with_lora has the unquantised weights.
    bucket_mode: latents may be a list of several sizes; every step trains on samples of one size.
    checkpoint_folder: where to write checkpoints, also after an error or Ctrl-C; None: nowhere.
    resume_from: a checkpoint, or a folder of checkpoints, of which the newest valid one is used; None: none. The result
        is bit for bit that of an uninterrupted training; changes since the checkpoint are logged.
    checkpoints: when to write one and how many to keep; None: every 5 minutes, and the newest 2.
    non_finite: how to handle a NaN or infinite loss or gradient; None: the batch is skipped, and the third in a row
        is an error.
    memory_ladder: when memory runs out, turn on gradient_checkpointing, then halve batch_size, instead of stopping.
    pack: which frozen layers are prepacked for the CPU while training: faster, but uses more memory.
    native_kernels: use C kernels if the CPU supports them and a compiler is installed.
    text_encoder: whether to train the text encoders too, and at which learning rate; None: do not. `positive` must
        then be captions, and the model Stable Diffusion or Flux.1.
    world: the processes that train this LoRA together (`lorasmith.distributed.process_group.joined`); each is
        given all inputs and returns all outputs.

    Returns model_with_lora (a pipeline for a path or pipeline, else a Denoiser), lora {key: tensor}, loss
    {"loss": [one float per optimizer step]} and steps (including those of existing_lora).

    On a terminal, a bar shows progress; it is also logged every ten seconds, at level INFO.

    A model loaded from a path or hub id trains on the best device, any other where it is. Gradients are clipped to
    norm 1, the default of max_grad_norm on the command line.

    Raises ValueError, which names the input, the rule and the value, and NonFiniteError after non_finite.limit NaN or
    infinite losses or gradients in a row, or if weights become NaN or infinite.
    """
    config = config_of(
        {
            "batch_size": batch_size, "grad_accumulation_steps": grad_accumulation_steps, "steps": steps,
            "learning_rate": learning_rate, "rank": rank, "optimizer": optimizer, "loss_function": loss_function,
            "seed": seed, "training_dtype": _named(training_dtype), "lora_dtype": _named(lora_dtype),
            "algorithm": algorithm,
            "gradient_checkpointing": gradient_checkpointing, "existing_lora": existing_lora, "alpha": alpha,
            "factor": factor, "targets": _targets(targets),
            "checkpoint_depth": checkpoint_depth, "offloading": offloading, "quantized_backward": quantized_backward,
            "base_dtype": base_dtype, "checkpoints": Checkpoints() if checkpoints is None else checkpoints,
            "non_finite": NonFinite() if non_finite is None else non_finite, "memory_ladder": memory_ladder,
            "pack": pack, "native_kernels": native_kernels,
            "text_encoder": TextEncoder() if text_encoder is None else text_encoder,
        }
    )  # fmt: skip
    if not isinstance(world, World):
        raise ValueError(f"world must be what lorasmith.distributed.process_group.joined gives, got {world!r}")
    if config.non_finite.returns and checkpoint_folder is None:
        raise ValueError("non_finite.returns must be 0 without checkpoint_folder, where there is nothing to go back to")
    with torch.inference_mode(False):  # a caller's may be on, and what is made in it cannot be trained
        family = _family(model, encoders, with_texts=config.text_encoder.train)
        if isinstance(family, PipelineFamily) and family.TEXTS is not None and config.existing_lora is not None:
            _refuse_texts(config.existing_lora)
        denoiser: Denoiser = model if family is None else family.denoiser
        device = best_device() if isinstance(model, str | Path) else device_of(denoiser)
        plan = Plan.of(denoiser, config, home=device_of(denoiser), device=device, world=world)
        if family is not None:
            family = with_adapted_texts(family, plan.adapters.nets)
            denoiser = family.denoiser
        samples = samples_of(latents, positive, family, several_sizes=bucket_mode)
        dataset = Dataset.of(samples, [1] * len(samples), seed=config.seed, group_size=config.group_size * world.size)
        metadata = family.metadata() if family else {}
        job = Job.planned(plan, denoiser, dataset, metadata)
        folders = _path(checkpoint_folder, "checkpoint_folder"), _path(resume_from, "resume_from")
        with kept(job, *folders) as keeper:
            for _ in _shown(keeper.steps(), job, world):
                pass
        lora = job.lora()
        return Result(_with_lora(denoiser, family, lora, config), lora, {"loss": job.state.losses}, job.steps_in_all)


def config_of(inputs: Mapping[str, Any]) -> Config:
    """The contract's inputs but model and data, and further settings by their own names, as a config.

    Text is no number here and 1 is no flag, which a command line cannot tell apart. ValueError in one line.
    """
    values = dict(inputs)
    adapter = {"name": values.pop("algorithm"), "rank": values.pop("rank"), "alpha": values.pop("alpha")}
    factor, existing_lora = values.pop("factor"), values.pop("existing_lora")
    values["adapter"] = adapter if factor is None else {**adapter, "factor": factor}
    values["loss"] = values.pop("loss_function")
    values["existing_lora"] = None if existing_lora == NO_LORA else _text_as_path(existing_lora)
    try:
        config = Config.model_validate(values, strict=True)
    except ValidationError as error:
        key, _, rest = shorten(explained(error), 300, placeholder=" …").partition(" ")
        raise ValueError(f"{NAMES.get(key, key)} {rest}") from error
    if config.steps is None:  # which a run from the command line may leave open
        raise ValueError(f"steps must be a whole number, {settings()['steps'].rule}, got None")
    return config


def _family(model: Any, encoders: Any, *, with_texts: bool) -> Family | None:
    """None for a Denoiser, which is no model of a family."""
    if encoders is not None and not isinstance(encoders, str | Path):
        raise ValueError(f"encoders must be a folder, a hub id or None, got {encoders!r:.100}")
    if isinstance(model, Denoiser):
        if encoders is not None:
            raise ValueError(f"encoders must be none where model is no single file, got {encoders}")
        if with_texts:
            raise ValueError("text_encoder.train must be false where model is a Denoiser, which holds what it trains")
        return None
    _refuse_no_model(model)
    return load_model(model, encoders, with_texts=with_texts)


def _refuse_texts(lora: Path) -> None:
    """ValueError where a LoRA to continue has layers of text encoders, which are not to be trained."""
    try:
        keys = Header.of(lora).shapes
    except ValueError as error:
        raise ValueError(f"existing_lora: {error}") from error
    if has_text_layers(split(key)[0] for key in keys):
        raise ValueError(
            f"text_encoder must be TextEncoder(train=True), with captions as positive, to continue {lora}, which "
            f"holds layers of text encoders"
        )


def _refuse_no_model(model: Any) -> None:
    """ValueError for a net alone, and for a Denoiser that lacks a member."""
    if isinstance(model, nn.Module):
        raise ValueError(
            f"model must be a pipeline, a path, a hub id or a Denoiser, got a net alone ({type(model).__name__}): give "
            "the pipeline that it is a part of"
        )
    missing = [name for name in MEMBERS if name not in dir(model)]
    if 0 < len(missing) < len(MEMBERS):
        raise ValueError(
            f"model must have {', '.join(MEMBERS)} to be a Denoiser, but {type(model).__name__} lacks "
            f"{' and '.join(missing)}"
        )


def _named(dtype: Any) -> Any:
    """The name of a torch dtype; the schema refuses what is neither."""
    return next((name for name, own in DTYPES.items() if own == dtype), dtype)


def _targets(targets: Any) -> Any:
    """A list of the last words of paths as targets; the schema refuses what is neither."""
    if isinstance(targets, list | tuple) and targets and all(isinstance(word, str) for word in targets):
        return Targets(preset="none", include=tuple(rf"(^|\.){re.escape(word)}$" for word in targets))
    return Targets() if targets is None else targets


def _shown(steps: Iterator[Step], job: Job, world: World) -> Iterator[Step]:
    """The steps, with a bar on a terminal and lines in the log."""
    console, num_steps, logged = Console(stderr=True), job.config.steps or 0, time.monotonic()
    is_shown = console.is_terminal and world.is_first
    for step in track(steps, "training", total=num_steps, console=console, disable=not is_shown):
        if time.monotonic() - logged > SECONDS:
            logged = time.monotonic()
            log.info("step %d of %d, loss %.4g", step.step - job.done, num_steps, step.loss)
        yield step


def _text_as_path(value: Any) -> Any:
    """The schema, which is strict, refuses what is neither."""
    return Path(value) if isinstance(value, str) else value


def _path(value: Any, name: str) -> Path | None:
    if value is not None and not isinstance(value, str | Path):
        raise ValueError(f"{name} must be a path or None, got {value!r}")
    return None if value is None else Path(value).expanduser()


def _with_lora(denoiser: Denoiser, family: Family | None, lora: dict[str, Tensor], config: Config) -> Any:
    """The model with exactly what the file holds."""
    copy, device = shared_copy(denoiser), device_of(denoiser)
    attach(copy, adapters_from(lora, copy, PAPER).freeze().to(device, compute_dtype(config.lora_dtype, device)))
    return copy if family is None else family.pipeline(copy)
