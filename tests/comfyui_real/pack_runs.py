"""What the checks beside ComfyUI share: trainings by the pack, denoisers, and what ComfyUI itself computes."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.sd
import folder_paths
import torch
from lorasmith_pack import training
from lorasmith_pack.conditioning import prepared
from lorasmith_pack.denoiser import ComfyDenoiser
from tiny_models import Tiny
from torch import Tensor

from lorasmith.api import config_of
from lorasmith.prepare.share import shared_copy

CPU = torch.device("cpu")
INPUTS: dict[str, Any] = {
    "batch_size": 2, "grad_accumulation_steps": 1, "steps": 2, "learning_rate": 1e-2, "rank": 2, "optimizer": "AdamW",
    "loss_function": "MSE", "seed": 0, "training_dtype": "fp32", "lora_dtype": "fp32", "algorithm": "LoRA",
    "gradient_checkpointing": False, "existing_lora": None, "alpha": None, "factor": None, "targets": {"preset": "all"},
}  # fmt: skip


class Progress:
    """In the place of ComfyUI's progress, which knows no node here."""

    shown: list[tuple[int, int]] = []
    on_step: Callable[[int], None] | None = None

    def __init__(self) -> None:
        self.execution = self

    def set_progress(self, value: int, max_value: int, preview_image: Any = None) -> None:
        self.shown.append((value, max_value))
        on_step = type(self).on_step
        if on_step is not None:
            on_step(value)


training.ComfyAPISync = Progress


def trained(
    tiny: Tiny, latents: Any = None, positive: Any = None, *, are_buckets: bool = False, is_resuming: bool = False,
    **inputs: Any,
) -> Any:  # fmt: skip
    """What the pack trains on lists of LATENT and CONDITIONING; by default on two samples."""
    latents = [tiny.latents(2)] if latents is None else latents
    positive = [tiny.positive(2)] if positive is None else positive
    config = config_of({**INPUTS, **inputs})
    return training.trained(tiny.patcher, latents, positive, config, are_buckets=are_buckets, is_resuming=is_resuming)


def denoiser_of(tiny: Tiny, num: int, positive: Any = None) -> tuple[ComfyDenoiser, Tensor]:
    """The copy that training works on, and `num` samples [num,C,h,w] in the model's scale."""
    samples, entries = prepared(
        tiny.patcher.model, [tiny.latents(num)], [tiny.positive(num) if positive is None else positive],
        are_buckets=False,
    )  # fmt: skip
    denoiser = ComfyDenoiser(tiny.patcher.model, entries, tiny.patcher.model_options)
    return shared_copy(denoiser), torch.stack([sample.latent for sample in samples])


def entry_numbers(*numbers: int) -> dict[str, Tensor]:
    """The conditioning of these samples, as a batch has it."""
    return {"entry": torch.tensor(numbers, dtype=torch.float32)[:, None]}


class Once(comfy.samplers.Sampler):
    """Calls a function with what ComfyUI gives to a sampler, and keeps what it returns."""

    def __init__(self, function: Callable[[Any, dict[str, Any]], Any]) -> None:
        self.function, self.found = function, None

    def sample(
        self, model_wrap: Any, sigmas: Any, extra_args: Any, callback: Any, noise: Any, latent_image: Any = None,
        denoise_mask: Any = None, disable_pbar: bool = False,
    ) -> Any:  # fmt: skip
        self.found = self.function(model_wrap, extra_args)
        return torch.zeros_like(noise)


def comfy_denoised(patcher: Any, pair: Any, x_t: Tensor, sigma: Tensor) -> Tensor:
    """The denoised x_t [1,C,h,w] by ComfyUI's own sampling, from loading the model on."""
    once = Once(lambda model_wrap, extra: model_wrap(x_t, sigma, **extra))
    guider = comfy.samplers.CFGGuider(patcher)
    guider.inner_set_conds({"positive": [pair]})
    with torch.no_grad():
        guider.sample(torch.zeros_like(x_t), torch.zeros_like(x_t), once, sigma, seed=0)
    assert once.found is not None
    return once.found


def output_of(kind: str, denoised: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """The network's output [B,…] that a denoised x_t means for these kinds."""
    s = sigma.double().view(-1, 1, 1, 1)
    if kind == "sd2":
        return (x_t / (s**2 + 1) - denoised) * (s**2 + 1).sqrt() / s
    return (x_t - denoised) / s


def with_comfy_lora(tiny: Tiny, lora: dict[str, Tensor]) -> Any:
    """A clone with the LoRA, by ComfyUI's own loader."""
    return comfy.sd.load_lora_for_models(tiny.patcher, None, lora, 1.0, 0)[0]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """AssertionError where they differ by more than a part of the expected ones' size."""
    assert found.shape == expected.shape, f"{list(found.shape)} for {list(expected.shape)}"
    error = float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-12))
    assert error < tolerance, f"differs by {error:.2e}"


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two LoRAs, or models, are the same bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@contextlib.contextmanager
def refused(*words: str) -> Iterator[None]:
    """AssertionError unless there is a ValueError in one line with all of the words."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 2500, message
        assert all(word in message for word in words), f"{message!r} must name {words}"
        return
    raise AssertionError(f"nothing was refused, which should name {words}")


def state_of(tiny: Tiny) -> dict[str, Tensor]:
    """A copy of the model's weights and buffers."""
    return {key: value.clone() for key, value in tiny.patcher.model.state_dict().items()}


def loras() -> Path:
    """ComfyUI's folder of LoRAs."""
    return Path(folder_paths.get_folder_paths("loras")[0])
