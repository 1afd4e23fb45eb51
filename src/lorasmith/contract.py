"""train_lora: the sixteen inputs and four outputs of the training node. N samples, C channels, h w latent sides."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from lorasmith import lorafile
from lorasmith.attach import Targets, attach
from lorasmith.config import Config
from lorasmith.data.cache import Dataset, checked
from lorasmith.devices import compute_dtype, device_of
from lorasmith.families import Family, opened
from lorasmith.job import Job
from lorasmith.memory import shared_copy
from lorasmith.settings import explained
from lorasmith.types import Cached, Cond, Denoiser, Result

log = logging.getLogger(__name__)

NO_LORA = "[None]"
NAMES = {
    "adapter.rank": "rank",
    "adapter.alpha": "alpha",
    "adapter": "algorithm",
    "adapter.name": "algorithm",
    "loss": "loss_function",
}
_STEPS_IN_NAME = re.compile(r"_(\d+)_steps")


def train_lora(
    model: Any,
    latents: Tensor | Mapping[str, Any],
    positive: Sequence[Any],
    batch_size: int = 1,
    grad_accumulation_steps: int = 1,
    steps: int = 16,
    learning_rate: float = 0.0005,
    rank: int = 8,
    optimizer: Literal["AdamW", "Adam", "SGD", "RMSprop"] = "AdamW",
    loss_function: Literal["MSE", "L1", "Huber", "SmoothL1"] = "MSE",
    seed: int = 0,
    training_dtype: Literal["bf16", "fp32"] = "bf16",
    lora_dtype: Literal["bf16", "fp32"] = "bf16",
    algorithm: Literal["LoRA"] = "LoRA",
    gradient_checkpointing: bool = True,
    existing_lora: str | Path | None = NO_LORA,
    *,
    alpha: float | None = None,
    targets: Targets | None = None,
) -> Result:
    """Trains a LoRA; the model that comes in stays as it is.

    model: a diffusers folder (path), a diffusers pipeline, or a Denoiser.
    latents: [N,C,h,w] (video: [N,C,f,h,w]) in the model's own scale, as `Codec.encode_images` returns them, or
        {"samples": such a tensor}.
    positive: one conditioning for each latent, or one for all: ComfyUI's [tensor [1,L,D], dict] pairs, tensors [L,D] or
        [1,L,D], dicts of named tensors, or captions, which the model's own encoders encode.
    batch_size: 1 to 10000 samples a micro-batch.
    grad_accumulation_steps: 1 to 1024 micro-batches an optimizer step.
    steps: 1 to 100000 optimizer steps.
    learning_rate: 1e-7 to 1.
    rank: 1 to 128, the inner dimension of the adapters.
    optimizer, loss_function: one of the names in the signature.
    seed: 0 to 2^64 - 1; drives initialisation, sample order, times and noise: the same seed gives the same LoRA.
    training_dtype: what the model computes in; fp32 where the device has no bf16, which is logged.
    lora_dtype: what the adapters compute in (likewise) and are saved in; the optimizer works on fp32 masters.
    gradient_checkpointing: compute activations again in the backward pass, to save memory.
    existing_lora: a LoRA file to go on training, whose rank and alpha hold.
    alpha: the update is scaled by alpha / rank; None: the rank.
    targets: the layers to adapt; None: attention and MLPs.

    Returns model_with_lora (a pipeline for a path or pipeline, else a Denoiser), lora {key: tensor}, loss
    {"loss": [one float an optimizer step]} and steps (those of existing_lora included).

    Raises ValueError that names the input, the rule and the value, and NonFiniteError on a loss or gradient that is not
    finite.
    """
    config = _config(
        batch_size=batch_size, grad_accumulation_steps=grad_accumulation_steps, steps=steps,
        learning_rate=learning_rate, optimizer=optimizer, loss=loss_function, seed=seed,
        training_dtype=training_dtype, lora_dtype=lora_dtype, gradient_checkpointing=gradient_checkpointing,
        adapter={"name": algorithm, "rank": rank, "alpha": alpha}, targets=targets or Targets(),
    )  # fmt: skip
    with torch.inference_mode(False):  # a caller's may be on, and what is made in it cannot be trained
        x0 = _latents(latents)
        existing = _existing(existing_lora)
        family = None if isinstance(model, Denoiser) else opened(model)
        denoiser: Denoiser = model if family is None else family.denoiser
        conds = _one_each(_conds(positive, family), len(x0))
        samples = [checked(Cached(str(i), *pair)) for i, pair in enumerate(zip(x0, conds, strict=True))]
        dataset = Dataset.of(samples, [1] * len(samples), seed=config.seed, group_size=config.group_size)
        metadata = family.metadata() if family else {}
        job = Job.of(denoiser, dataset, config, device=device_of(denoiser), existing=existing, metadata=metadata)
        losses = [step.loss for step in job.steps()]
        lora = job.lora()
        return Result(_with_lora(denoiser, family, lora, config), lora, {"loss": losses}, job.done + len(losses))


def _config(**inputs: Any) -> Config:
    try:
        return Config.model_validate(inputs)
    except ValidationError as error:
        key, _, rest = explained(error).partition(" ")
        raise ValueError(f"{NAMES.get(key, key)} {rest}") from error


def _latents(latents: Any) -> Tensor:
    """[N,C,h,w] or [N,C,f,h,w], float32, on the CPU; ValueError where it is something else."""
    tensor = latents.get("samples") if isinstance(latents, Mapping) else latents
    if not isinstance(tensor, Tensor):
        raise ValueError(f"latents must be a tensor or {{'samples': tensor}}, got {type(latents).__name__}")
    if tensor.ndim not in (4, 5) or 0 in tensor.shape:
        raise ValueError(f"latents must be [N,C,h,w] or [N,C,f,h,w], none of them 0, got {list(tensor.shape)}")
    return tensor.detach().clone().to("cpu", torch.float32)


def _conds(positive: Any, family: Family | None) -> list[Cond]:
    """Each conditioning as {name: [L,D] or [D]}, float32, on the CPU."""
    if isinstance(positive, str | bytes | Mapping | Tensor) or not isinstance(positive, Sequence) or not positive:
        raise ValueError(f"positive must be a list with a conditioning for each latent, got {_described(positive)}")
    if all(isinstance(entry, str) for entry in positive):
        return _encoded(positive, family)
    return [_cond(entry, index) for index, entry in enumerate(positive)]


def _encoded(captions: Sequence[str], family: Family | None) -> list[Cond]:
    if family is None:
        raise ValueError("positive must be tensors where model is a Denoiser, which cannot encode captions, got texts")
    codec = family.codec(device_of(family.denoiser))
    with torch.no_grad():
        batches = [codec.encode_texts([caption]) for caption in captions]
    return [{name: value[0].cpu() for name, value in batch.items()} for batch in batches]


def _cond(entry: Any, index: int) -> Cond:
    """One entry of `positive`; of ComfyUI's dict, the tensors go along under their names."""
    if isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[1], Mapping):
        text, extra = entry
        pooled = extra.get("pooled_output")
        entry = {"text": text} if pooled is None else {"text": text, "pooled": pooled}
    if isinstance(entry, Tensor):
        entry = {"text": entry}
    if not isinstance(entry, Mapping) or not all(isinstance(value, Tensor) for value in entry.values()):
        raise ValueError(
            f"positive[{index}] must be a tensor, a dict of tensors, a caption or [tensor, dict], "
            f"got {_described(entry)}"
        )
    return {name: _one(name, value, index) for name, value in entry.items()}


def _one(name: str, value: Tensor, index: int) -> Tensor:
    """A tensor with or without a batch axis of 1 -> [L,D] or [D]."""
    axes = 1 if name == "pooled" else 2
    if value.ndim == axes + 1 and len(value) == 1:
        value = value[0]
    if value.ndim != axes:
        rule = "[D] or [1,D]" if axes == 1 else "[L,D] or [1,L,D]"
        raise ValueError(f"positive[{index}] {name} must be {rule}, got {list(value.shape)}")
    return value.detach().clone().to("cpu", torch.float32)


def _described(value: Any) -> str:
    return f"{type(value).__name__} of length {len(value)}" if isinstance(value, list | tuple) else type(value).__name__


def _one_each(conds: list[Cond], num_latents: int) -> list[Cond]:
    if len(conds) == 1:
        return conds * num_latents
    if len(conds) != num_latents:
        raise ValueError(
            f"positive must have one conditioning for each latent or one for all, "
            f"got {len(conds)} conditionings for {num_latents} latents"
        )
    return conds


def _existing(existing_lora: str | Path | None) -> tuple[dict[str, Tensor], int] | None:
    """The tensors and steps of the LoRA to continue; its name gives the steps where its metadata does not."""
    if existing_lora is None or existing_lora == NO_LORA:
        return None
    path = Path(existing_lora)
    state, metadata = lorafile.read(path)
    in_name = _STEPS_IN_NAME.search(path.stem)
    done = metadata.get("lorasmith.steps") or (in_name[1] if in_name else None)
    if done is None:
        log.warning("%s does not say how many steps it was trained: counting from 0", path.name)
    return state, int(done or 0)


def _with_lora(denoiser: Denoiser, family: Family | None, lora: dict[str, Tensor], config: Config) -> Any:
    """The model with exactly what the file holds."""
    copy, device = shared_copy(denoiser), device_of(denoiser)
    attach(copy, lorafile.adapters_from(lora, copy).to(device, compute_dtype(config.lora_dtype, device)))
    return copy if family is None else family.pipeline(copy)
