"""Checks of models that other nodes have changed before: other noise schedules, weights of few bits, failures."""

from functools import partial
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy_extras.nodes_model_advanced as advanced
import torch
from lorasmith_pack import training
from pack_runs import CPU, close, equal, refused, state_of, trained, with_comfy_lora
from tiny_models import Tiny, tiny

FP8 = torch.float8_e4m3fn


def _with(model: Tiny, patcher: Any) -> Tiny:
    return Tiny(patcher, model.channels, model.width, model.pooled, model.guidance)


def check_a_patched_noise_schedule_is_trained_on() -> None:
    """By ModelSamplingSD3, ModelSamplingFlux and ModelSamplingDiscrete; the model has its own again afterwards."""
    patches = {
        "sd3": partial(advanced.ModelSamplingSD3().patch, shift=1.0),
        "flux": partial(advanced.ModelSamplingFlux().patch, max_shift=2.0, base_shift=0.1, width=512, height=512),
        "sd1": partial(advanced.ModelSamplingDiscrete().patch, sampling="v_prediction", zsnr=True),
    }
    for kind, patch in patches.items():
        model = tiny(kind)
        plain, own = trained(model).losses, model.patcher.model.model_sampling
        patched = _with(model, patch(model=model.patcher)[0])
        assert trained(patched).losses != plain, kind
        comfy.model_management.unload_all_models()
        assert model.patcher.model.model_sampling is own and trained(model).losses == plain, kind


def check_other_kinds_of_output() -> None:
    """A network that is said to predict something else has another target, and still a finite loss."""
    model, found = tiny("sd1"), []
    for sampling in ("eps", "v_prediction", "x0", "lcm"):
        patched = advanced.ModelSamplingDiscrete().patch(model.patcher, sampling, zsnr=False)[0]
        found.append(trained(_with(model, patched)).losses)
    assert torch.tensor(found).isfinite().all() and len({tuple(losses) for losses in found}) == 4


def check_a_lora_from_before_is_part_of_the_model() -> None:
    model = tiny("sd1")
    first = trained(model, learning_rate=0.1, steps=4)
    before, plain = state_of(model), trained(model, seed=1).losses
    assert trained(_with(model, with_comfy_lora(model, first.lora)), seed=1).losses != plain
    comfy.model_management.unload_all_models()
    assert equal(before, state_of(model)), "the patches stayed in the model"


def _in_eight_bits(family: str) -> Tiny:
    """As ComfyUI loads checkpoints in fp8: weights are cast when they are used."""
    model = tiny(family)
    net = model.patcher.model.diffusion_model.to(FP8)
    net.dtype, model.patcher.model.manual_cast_dtype = FP8, torch.float32
    for module in net.modules():
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True
    return model


def _bytes(model: Tiny) -> dict[str, torch.Tensor]:
    return {key: value.view(torch.uint8) for key, value in state_of(model).items() if value.dtype == FP8}


def check_weights_of_eight_bits(family: str) -> None:
    with torch.inference_mode():
        model = _in_eight_bits(family)
        before = _bytes(model)
        for dtype in ("none", "fp32"):
            outcome = trained(model, training_dtype=dtype)
            assert all(tensor.any() for key, tensor in outcome.lora.items() if key.endswith("lora_up.weight"))
            assert torch.tensor(outcome.losses).isfinite().all()
        assert before and equal(before, _bytes(model))


class Dynamic(comfy.model_patcher.ModelPatcher):
    """A stand-in for the patcher whose weights come from the disk as they are used, which the CPU has not."""

    def is_dynamic(self) -> bool:
        return True


def check_a_dynamic_patcher_is_made_plain() -> None:
    model = tiny("sd1")
    dynamic = Dynamic(model.patcher.model, CPU, CPU)
    dynamic.cached_patcher_init = (lambda disable_dynamic: tiny("sd1").patcher, ())
    assert equal(trained(_with(model, dynamic)).lora, trained(model).lora)


def check_a_failure_leaves_comfyui_as_it_was() -> None:
    model = tiny("sd1")
    with refused("hooks"):
        trained(model, positive=[[[text, {"hooks": comfy.hooks.HookGroup()}] for text, _ in model.positive(2)]])
    assert not comfy.model_management.in_training
    assert all(not parameter.grad_fn for parameter in model.patcher.model.parameters())


def check_running_out_of_memory_says_what_to_do() -> None:
    model = tiny("sd1")
    failing = model.patcher.model.diffusion_model.middle_block[0]
    forward = failing.forward

    def short(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    failing.forward = short
    try:
        trained(model)
    except RuntimeError as error:
        assert "gradient_checkpointing" in str(error) and "batch_size" in str(error), error
        assert "\n" not in str(error), error
    else:
        raise AssertionError("nothing was raised")
    finally:
        failing.forward = forward
    assert not comfy.model_management.in_training


def check_cancelling_keeps_what_was_done() -> None:
    """A cancelled training goes on where it was, and ends in the same LoRA."""
    model = tiny("sd1")
    inputs: dict[str, Any] = {"steps": 5, "seed": 9}
    whole = trained(model, **inputs)
    shown: list[int] = []

    def interrupt(value: int) -> None:
        shown.append(value)
        comfy.model_management.interrupt_current_processing(value == 2)

    training.ComfyAPISync.on_step = interrupt
    try:
        trained(model, **inputs)
    except comfy.model_management.InterruptProcessingException:
        pass
    else:
        raise AssertionError("it was not cancelled")
    finally:
        training.ComfyAPISync.on_step = None
    assert shown == [1, 2]
    resumed = trained(model, is_resuming=True, **inputs)
    assert equal(whole.lora, resumed.lora) and whole.lora.metadata == resumed.lora.metadata
    close(torch.tensor(resumed.losses), torch.tensor(whole.losses), 1e-12)
