"""Checks of trainings: seeds, what stays as it is, what is refused, odd conditioning, several sizes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch
from lorasmith_pack import training
from lorasmith_pack.conditioning import prepared
from pack_runs import (
    CPU,
    Progress,
    close,
    comfy_denoised,
    denoiser_of,
    entry_numbers,
    equal,
    output_of,
    refused,
    state_of,
    trained,
)  # fmt: skip
from tiny_models import Tiny, tiny
from torch import Tensor, nn

from lorasmith.training.loop import NonFiniteError

SEED_MAX = 2**64 - 1


def check_the_same_seed_gives_the_same_lora(kind: str) -> None:
    model = tiny(kind)
    before = state_of(model)
    one, again, other = (trained(model, seed=seed).lora for seed in (0, 0, SEED_MAX))
    assert equal(one, again) and one.metadata == again.metadata
    assert not equal(one, other)
    assert equal(before, state_of(model)), "the model was changed"


def check_torch_s_own_seed_changes_nothing() -> None:
    torch.manual_seed(1)
    one = trained(tiny("sd1")).lora
    torch.manual_seed(2)
    assert equal(one, trained(tiny("sd1")).lora)


def check_latents_are_scaled_once(kind: str) -> None:
    model = tiny(kind)
    samples = [model.latents(2), model.latents(2, 8, 16)]
    expected = [model.patcher.model.process_latent_in(x) for batch in samples for x in batch["samples"]]
    for are_buckets in (False, True):
        positive = [model.positive(2), model.positive(2)]
        cached, _ = prepared(model.patcher.model, samples, positive, are_buckets=are_buckets)
        assert all(torch.equal(one.latent, x0) for one, x0 in zip(cached, expected, strict=True)), are_buckets
        assert {one.latent.dtype for one in cached} == {torch.float32}


def check_the_latents_of_the_caller_stay(family: str) -> None:
    model = tiny(family)
    latents, positive = model.latents(2), model.positive(2)
    trained(model, [latents], [positive])
    assert torch.equal(latents["samples"], model.latents(2)["samples"])
    for (text, extra), (same_text, same_extra) in zip(positive, model.positive(2), strict=True):
        assert torch.equal(text, same_text) and extra.keys() == same_extra.keys()
        assert all(torch.equal(torch.as_tensor(extra[key]), torch.as_tensor(same_extra[key])) for key in extra)


def check_nan_is_refused() -> None:
    model = tiny("sd1")
    for odd in (float("nan"), float("inf")):
        latents = model.latents(3)
        latents["samples"][1, 0, 0, 0] = odd
        with refused("sample 1", "latent", "finite"):
            trained(model, [latents], [model.positive(3)])


def check_nan_in_conditioning_is_no_lora() -> None:
    model = tiny("sd1")
    positive = model.positive(2)
    positive[1][0][0, 0, 0] = float("nan")
    before = _checkpoints()
    try:
        outcome = trained(model, positive=[positive], steps=8)
    except (ValueError, NonFiniteError) as error:
        assert "\n" not in str(error), error
    else:
        assert all(tensor.isfinite().all() for tensor in outcome.lora.values())
    assert _checkpoints() == before, "a folder without a checkpoint is left"


def _checkpoints() -> set[Path]:
    return set((Path(folder_paths.get_output_directory()) / training.CHECKPOINTS).glob("*"))


def check_numbers_that_do_not_match_are_refused() -> None:
    model = tiny("sd1")
    with refused("3", "2", "positive"):
        trained(model, [model.latents(2)], [model.positive(3)])
    with refused("3", "2", "positive"):
        trained(model, [model.latents(3)], [model.positive(2)])
    with refused("3", "2"):
        trained(model, [model.latents(2), model.latents(3)], [model.positive(2), model.positive(2)], are_buckets=True)
    with refused("4", "5"):
        trained(model, [model.latents(2), model.latents(3)], [model.positive(2), model.positive(2)])
    with refused("latents"):
        trained(model, [], [model.positive(1)])


def check_one_caption_for_all() -> None:
    model = tiny("sd1")
    one = trained(model, [model.latents(3)], [model.positive(1)])
    several = trained(model, [model.latents(3)], [model.positive(1) * 3])
    assert equal(one.lora, several.lora)
    sizes = [model.latents(2), model.latents(2, 8, 16)]
    one, several = (
        trained(model, sizes, positive, are_buckets=True).lora
        for positive in ([model.positive(1)], [model.positive(1) * 2] * 2)
    )
    assert equal(one, several)


def check_sizes_mixed_in_one_list(family: str) -> None:
    """As MakeTrainingDataset gives them, and as ResolutionBucket does: the same samples are the same training."""
    model = tiny(family)
    captions, sizes = model.positive(3), [(8, 8), (8, 16), (8, 8)]
    singles = [model.latents(1, *size) for size in sizes]
    mixed = trained(model, singles, [[pair] for pair in captions], batch_size=1, steps=3)
    bucket = {"samples": torch.cat([singles[0]["samples"], singles[2]["samples"]])}
    buckets = trained(
        model, [bucket, singles[1]], [[captions[0], captions[2]], [captions[1]]], batch_size=1, steps=3,
        are_buckets=True,
    )  # fmt: skip
    assert len(mixed.losses) == len(buckets.losses) == 3
    assert all(tensor.isfinite().all() for tensor in [*mixed.lora.values(), *buckets.lora.values()])


def check_progress_is_shown() -> None:
    Progress.shown.clear()
    trained(tiny("sd1"), steps=3)
    assert Progress.shown == [(1, 3), (2, 3), (3, 3)]


def check_no_checkpoint_is_left() -> None:
    before = _checkpoints()
    trained(tiny("sd1"), checkpoints={"steps": 1}, steps=3)
    assert _checkpoints() == before


def check_other_settings_reach_the_training() -> None:
    model, plain = tiny("sd1"), trained(tiny("sd1"), steps=3).lora
    settings: tuple[dict[str, Any], ...] = (
        {"loss_space": "x0"}, {"times": {"name": "logit_normal"}}, {"max_grad_norm": 0.01},
        {"schedule": {"name": "cosine"}}, {"optimizer": "SGD"}, {"loss_function": "L1"},
        {"grad_accumulation_steps": 2}, {"batch_size": 1},
    )  # fmt: skip
    for further in settings:
        assert not equal(plain, trained(model, steps=3, **further).lora), further


class Control:
    """What stands in for a ControlNet: two convolutions of its own, which a node made in inference mode."""

    previous_controlnet = extra_hooks = cond_hint_original = None

    def __init__(self, channels: int, width: int, needs_grad: bool) -> None:
        self.multigpu_clones: dict[Any, Any] = {}
        self.net = nn.Sequential(nn.Conv2d(channels, width, 1), nn.Conv2d(width, width, 1)).requires_grad_(needs_grad)
        self.wrapped = comfy.model_patcher.ModelPatcher(self.net, CPU, CPU)
        self.batches: list[int] = []
        self.was_loaded, self.was_cleaned = True, False

    def pre_run(self, model: Any, percent_to_timestep_function: Callable[..., float]) -> None:
        self.is_ready = True

    def get_models(self) -> list[Any]:
        return [self.wrapped]

    def get_extra_hooks(self) -> list[Any]:
        return []

    def inference_memory_requirements(self, dtype: torch.dtype) -> int:
        return 0

    def get_control(self, x_noisy: Tensor, t: Tensor, cond: Any, batched_number: int, options: Any) -> Any:
        self.batches.append(len(x_noisy))
        self.was_loaded &= any(held.model is self.wrapped for held in comfy.model_management.current_loaded_models)
        return {"middle": [], "input": [], "output": [self.net(x_noisy) * 0]}

    def cleanup(self) -> None:
        self.was_cleaned = True


def _with_control(model: Tiny, num: int, *, needs_grad: bool = False) -> tuple[list[Any], Control]:
    with torch.inference_mode():
        control = Control(model.channels, 64, needs_grad)  # the width of the UNet's deepest stage
    return [[text, {**extra, "control": control}] for text, extra in model.positive(num)], control


def check_a_control_net_runs_per_sample() -> None:
    model = tiny("sd1")
    positive, control = _with_control(model, 2)
    found = trained(model, positive=[positive], gradient_checkpointing=True).losses
    assert control.is_ready and set(control.batches) == {1}
    close(torch.tensor(found), torch.tensor(trained(model).losses), 1e-3)


def check_a_control_net_whose_weights_ask_for_gradients() -> None:
    """As ComfyUI leaves the weights of the models that it loads, in inference mode."""
    model = tiny("sd1")
    positive, _ = _with_control(model, 2, needs_grad=True)
    trained(model, positive=[positive])


def check_a_control_net_is_loaded_and_cleaned_up() -> None:
    """As ComfyUI's own sampling does: it is moved to the device that it runs on, and forgets its hints afterwards."""
    model = tiny("sd1")
    comfy.model_management.unload_all_models()
    positive, control = _with_control(model, 2)
    trained(model, positive=[positive])
    assert control.was_loaded, "its model was not loaded"
    assert control.was_cleaned, "its hints are still held"


def check_areas_and_masks(family: str) -> None:
    model = tiny(family)
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    parts = (
        {"area": (4, 8, 4, 0), "strength": 1.0},
        {"area": ("percentage", 0.5, 1.0, 0.5, 0.0), "strength": 1.0},
        {"mask": mask, "mask_strength": 1.0, "set_area_to_bounds": False},
    )
    for part in parts:
        positive = [[text, {**extra, **part}] for text, extra in model.positive(2)]
        denoiser, x0 = denoiser_of(model, 2, positive)
        t = denoiser.process.time(torch.tensor([0.4, 0.8]))
        with torch.no_grad():
            found = denoiser.predict(x0, t, entry_numbers(0, 1))
        denoised = torch.cat([comfy_denoised(model.patcher, positive[i], x0[[i]], t[[i]]) for i in range(2)])
        seen = denoised != 0  # elsewhere ComfyUI computes nothing
        assert 0 < seen.float().mean() < 1, f"{part} covers all or nothing"
        close(found * seen, output_of(family, denoised, x0, t) * seen, 2e-3)
        assert trained(model, positive=[positive]).lora


def check_a_range_of_times() -> None:
    """As ConditioningSetTimestepRange sets it: it trains at every time, or is refused in one line."""
    model = tiny("sd1")
    positive = [[text, {**extra, "start_percent": 0.0, "end_percent": 0.5}] for text, extra in model.positive(2)]
    try:
        lora = trained(model, positive=[positive], batch_size=1, steps=6).lora
    except ValueError as error:
        assert "\n" not in str(error), error
    else:
        assert all(tensor.any() for key, tensor in lora.items() if key.endswith("lora_up.weight"))


def check_hooks_are_refused() -> None:
    model = tiny("sd1")
    positive = [[text, {**extra, "hooks": comfy.hooks.HookGroup()}] for text, extra in model.positive(2)]
    with refused("positive[0]", "hooks"):
        trained(model, positive=[positive])


def check_what_is_no_conditioning_is_refused() -> None:
    model = tiny("sd1")
    for odd in (["a caption"], [torch.zeros(1, 6, 20)], [[torch.zeros(1, 6, 20)]]):
        with refused("positive"):
            trained(model, positive=[odd * 2])


def check_a_network_s_wrapper_is_called() -> None:
    """`model_function_wrapper`, by which other packs change how a model is called."""
    model, calls = tiny("sd1"), []

    def wrapper(apply_model: Any, arguments: dict[str, Any]) -> Tensor:
        calls.append(len(arguments["input"]))
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    plain = trained(model).lora
    model.patcher.set_model_unet_function_wrapper(wrapper)
    wrapped = trained(model).lora
    assert calls and all(tensor.isfinite().all() for tensor in wrapped.values()) and wrapped.keys() == plain.keys()


def check_every_contract_input_is_in_the_metadata() -> None:
    lora = trained(tiny("sdxl"), seed=7, rank=3).lora
    expected = {
        "ss_steps": "2", "ss_network_dim": "3", "ss_seed": "7", "ss_base_model_version": "sdxl_base_v1-0",
        "lorasmith.steps": "2",
    }  # fmt: skip
    assert {key: lora.metadata.get(key) for key in expected} == expected
