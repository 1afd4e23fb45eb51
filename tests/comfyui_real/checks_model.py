"""Checks of a model of ComfyUI as lorasmith sees it: predictions, noise, targets, losses, gradients."""

from contextlib import nullcontext
from typing import Any

import comfy_extras.nodes_train as builtin
import torch
from pack_runs import (
    INPUTS,
    Once,
    close,
    comfy_denoised,
    denoiser_of,
    entry_numbers,
    equal,
    output_of,
    trained,
)  # fmt: skip
from tiny_models import tiny
from torch import Tensor, nn

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import LoRA
from lorasmith.adapters.hooks import attached
from lorasmith.adapters.targets import Targets
from lorasmith.api import config_of
from lorasmith.prepare.activation_checkpointing import checkpointed
from lorasmith.rng import Purpose, normal, uniform
from lorasmith.training.objective import sample_losses
from lorasmith.types import Batch

FRACTIONS = torch.tensor([0.0, 0.02, 0.5, 0.97])
LOSSES = ("MSE", "L1", "Huber", "SmoothL1")
FLOWS = ("sd3", "flux")


def check_layers_are_torch_s_own(kind: str) -> None:
    own = (nn.Linear, nn.Conv2d)
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(kind, dtype)
        layers = [m for m in denoiser_of(model, 1)[0].model.diffusion_model.modules() if isinstance(m, own)]
        assert layers and {type(layer) for layer in layers} <= set(own)
        assert not any(type(layer) in own for layer in model.patcher.model.diffusion_model.modules())


def check_a_batch_of_captions_is_its_samples(kind: str) -> None:
    denoiser, x0 = denoiser_of(tiny(kind), 3)
    t = denoiser.process.time(torch.tensor([0.1, 0.5, 0.9]))
    x_t = denoiser.process.noise(x0, torch.randn(x0.shape), t)
    with torch.no_grad():
        together = denoiser.predict(x_t, t, entry_numbers(0, 1, 2))
        single = [denoiser.predict(x_t[[i]], t[[i]], entry_numbers(i)) for i in range(3)]
        others = denoiser.predict(x_t, t, entry_numbers(1, 2, 0))
    close(together, torch.cat(single))
    assert (together - others).abs().max() > 1e-4, "the captions make no difference"


def check_the_prediction_is_comfyui_s(kind: str) -> None:
    model = tiny(kind)
    denoiser, x0 = denoiser_of(model, 3)
    t = denoiser.process.time(torch.tensor([0.1, 0.5, 0.9]))
    x_t = denoiser.process.noise(x0, torch.randn(x0.shape), t)
    with torch.no_grad():
        found = denoiser.predict(x_t, t, entry_numbers(0, 1, 2))
    pairs = model.positive(3)
    denoised = torch.cat([comfy_denoised(model.patcher, pairs[i], x_t[[i]], t[[i]]) for i in range(3)])
    close(found, output_of(kind, denoised, x_t, t), 1e-3)


def check_captions_of_several_lengths(kind: str) -> None:
    model = tiny(kind)
    positive = [*model.positive(1, tokens=6), *model.positive(1, tokens=9)]
    denoiser, x0 = denoiser_of(model, 2, positive)
    t = denoiser.process.time(torch.tensor([0.3, 0.6]))
    with torch.no_grad():
        found = denoiser.predict(x0, t, entry_numbers(0, 1))
    denoised = torch.cat([comfy_denoised(model.patcher, positive[i], x0[[i]], t[[i]]) for i in range(2)])
    close(found, output_of(kind, denoised, x0, t), 1e-3)


def _drawn(kind: str) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A process, x0 and eps [4,4,8,8] and sigma [4]."""
    denoiser, _ = denoiser_of(tiny(kind), 1)
    generator = torch.Generator().manual_seed(3)
    x0, eps = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    return denoiser.process, x0, eps, denoiser.process.time(FRACTIONS)


def check_targets(kind: str) -> None:
    process, x0, eps, sigma = _drawn(kind)
    s = sigma.view(-1, 1, 1, 1)
    expected = eps
    if kind == "sd2":
        expected = (eps - s * x0) / (1 + s**2).sqrt()
    if kind in FLOWS:
        expected = eps - x0
    close(process.target(x0, eps, sigma), expected, 1e-5)


def check_noise_and_back(kind: str) -> None:
    process, x0, eps, sigma = _drawn(kind)
    x_t, target = process.noise(x0, eps, sigma), process.target(x0, eps, sigma)
    s = sigma.view(-1, 1, 1, 1)
    close(x_t, (1 - s) * x0 + s * eps if kind in FLOWS else x0 + s * eps, 1e-6)
    close(process.x0(x_t, target, sigma), x0, 1e-4)
    levels = slice(1, 3) if kind in FLOWS else slice(1, 4)  # where both parts are more than rounding
    close(process.eps(x_t, target, sigma)[levels], eps[levels], 1e-3)


def check_signal_to_noise(kind: str) -> None:
    process, _, _, sigma = _drawn(kind)
    assert sigma.diff().gt(0).all() and sigma.isfinite().all() and sigma.gt(0).all()
    s = sigma.double()
    expected = ((1 - s) / s).square() if kind in FLOWS else s**-2
    found = process.snr(sigma).double()
    assert torch.allclose(found, expected, rtol=1e-4), f"{found} for {expected}"


class OneLoss(builtin.TrainSampler):
    """The built-in node's loss of one sample at a given noise level, by its own code."""

    def __init__(self, loss: str, sigma: Tensor) -> None:
        super().__init__(builtin._create_loss_function(loss), None, training_dtype=torch.float32)
        self.sigma, self.found = sigma, 0.0

    def sample(
        self, model_wrap: Any, sigmas: Any, extra_args: Any, callback: Any, noise: Any, latent_image: Any = None,
        denoise_mask: Any = None, disable_pbar: bool = False,
    ) -> Any:  # fmt: skip
        conds = builtin.process_cond_list(model_wrap.conds)["positive"]
        arguments = model_wrap, self.sigma, noise, latent_image, conds, [0], extra_args, 1
        self.found = float(self.fwd_bwd(*arguments, bwd=False))
        return torch.zeros_like(latent_image)


def check_the_loss_of_clean_latents_is_the_built_in_node_s(kind: str) -> None:
    model = tiny(kind)
    denoiser, x0 = denoiser_of(model, 1)
    sigma = denoiser.process.time(uniform(0, Purpose.TIME, 0, (1,)))
    eps = normal(0, Purpose.NOISE, 0, tuple(x0.shape[1:]))[None]
    batch = Batch(x0, entry_numbers(0), (0,), ("0",))
    for loss in LOSSES:
        own = sample_losses(denoiser, batch, config_of({**INPUTS, "loss_function": loss, "loss_space": "x0"}))
        theirs = OneLoss(loss, sigma.clone())
        guider = builtin.TrainGuider(model.patcher.clone())
        guider.set_conds(model.positive(1))
        guider.sample(eps, model.latents(1)["samples"], theirs, torch.zeros(1), seed=0)
        assert abs(float(own) - theirs.found) < 1e-4 * theirs.found, f"{loss}: {float(own)} for {theirs.found}"


def check_the_sampler_above_sees_what_comfyui_sees() -> None:
    """That `Once` is called at all: else the checks with it compare nothing."""
    once = Once(lambda model_wrap, extra: "called")
    guider = builtin.TrainGuider(tiny("sd1").patcher)
    guider.set_conds(tiny("sd1").positive(1))
    guider.sample(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), once, torch.ones(1), seed=0)
    assert once.found == "called"


def _first_step(kind: str, dtype: torch.dtype, **inputs: Any) -> dict[str, Tensor]:
    """The LoRA after one step, of a model and data made in inference mode, as ComfyUI makes them."""
    with torch.inference_mode():
        model = tiny(kind, dtype)
        latents, positive = [model.latents(2)], [model.positive(2)]
        return trained(model, latents, positive, steps=1, **inputs).lora


def check_gradients_reach_every_adapter(kind: str) -> None:
    plain = _first_step(kind, torch.float32)
    still = [key for key, tensor in plain.items() if key.endswith("lora_up.weight") and not tensor.any()]
    assert not still and len(plain) > 30, still
    for depth in (1, 2, 5):
        again = _first_step(kind, torch.float32, gradient_checkpointing=True, checkpoint_depth=depth)
        assert equal(plain, again), f"checkpointing at depth {depth} changes the result"


def check_gradients_in_bf16(family: str) -> None:
    dtypes = {"training_dtype": "bf16", "lora_dtype": "bf16"}
    plain = _first_step(family, torch.bfloat16, **dtypes)
    still = [key for key, tensor in plain.items() if key.endswith("lora_up.weight") and not tensor.any()]
    assert not still and all(tensor.isfinite().all() for tensor in plain.values()), still
    assert {tensor.dtype for key, tensor in plain.items() if ".lora_" in key} == {torch.bfloat16}
    assert equal(plain, _first_step(family, torch.bfloat16, gradient_checkpointing=True, **dtypes))


def check_gradients_of_a_model_in_another_dtype(family: str) -> None:
    """fp32 weights computed in bf16, and bf16 weights computed in fp32."""
    for dtype, name in ((torch.float32, "bf16"), (torch.bfloat16, "fp32")):
        lora = _first_step(family, dtype, training_dtype=name)
        still = [key for key, tensor in lora.items() if key.endswith("lora_up.weight") and not tensor.any()]
        assert not still, still


def check_the_model_s_own_dtype(family: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        lora = _first_step(family, dtype, training_dtype="none")
        assert all(tensor.any() for key, tensor in lora.items() if key.endswith("lora_up.weight"))


def _kept(kind: str, depth: int | None) -> int:
    """Bytes that a forward pass keeps for the backward one, weights left out."""
    denoiser, x0 = denoiser_of(tiny(kind), 2)
    adapters = AdapterSet.new(denoiser, LoRA(rank=2), Targets(preset="all"), 0)
    weights = {p.untyped_storage().data_ptr() for p in denoiser.model.parameters()}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with attached(denoiser, adapters), checkpointed(denoiser, depth) if depth else nullcontext():
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            denoiser.predict(x0, torch.full((2,), 0.5), entry_numbers(0, 1))
    return sum(size for place, size in seen.items() if place not in weights)


def check_checkpointing_keeps_less(kind: str) -> None:
    whole = _kept(kind, None)
    for depth in range(1, 6):
        assert _kept(kind, depth) < whole / 3, f"depth {depth}"
