"""Checks of trained LoRAs: ComfyUI's own loader uses every key, in every layout, and they do what was trained."""

from functools import cache
from typing import Any

import comfy.lora
import comfy.model_management
import torch
from lorasmith_pack.applying import keys_left, with_lora
from lorasmith_pack.layouts import in_layout
from pack_runs import (
    close,
    comfy_denoised,
    denoiser_of,
    entry_numbers,
    equal,
    loras,
    output_of,
    refused,
    state_of,
    trained,
    with_comfy_lora,
)
from tiny_models import Tiny, tiny
from torch import Tensor

from lorasmith.adapters.hooks import attached
from lorasmith.formats import lora_file
from lorasmith.formats.keys import by_layer
from lorasmith.formats.read import adapters_from

ALGORITHMS = ("LoRA", "LoHa", "LoKr", "OFT", "DoRA")
UNETS = ("sd1", "sd2", "sdxl")
LEARNT = {"steps": 3, "learning_rate": 0.05}


@cache
def _model(kind: str) -> Tiny:
    return tiny(kind)


@cache
def _lora(kind: str, preset: str = "all", algorithm: str = "LoRA") -> Any:
    alpha = None if algorithm == "OFT" else 1.0
    return trained(_model(kind), targets={"preset": preset}, algorithm=algorithm, alpha=alpha, **LEARNT).lora


def _weight(model: Tiny, key: str) -> Tensor:
    return model.patcher.model.state_dict()[key]


def _differences(model: Tiny, lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """What ComfyUI adds to the weights for a LoRA."""
    patched = with_comfy_lora(model, lora)
    return {
        key: comfy.lora.calculate_weight(patches, _weight(model, key).clone(), key) - _weight(model, key)
        for key, patches in patched.patches.items()
    }


def _the_same(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert found.keys() == expected.keys(), f"{what}: {sorted(found.keys() ^ expected.keys())[:3]}"
    for key, difference in expected.items():
        close(found[key], difference, 1e-3)


def _both_predictions(kind: str, lora: Any, patcher: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The output [1,C,h,w] of lorasmith's hooks, of ComfyUI's patcher, and without the LoRA."""
    model = _model(kind)
    denoiser, x0 = denoiser_of(model, 1)
    t = denoiser.process.time(torch.tensor([0.5]))
    x_t = denoiser.process.noise(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(5)), t)
    floats = {key: tensor.float() for key, tensor in lora.items()}
    with torch.no_grad():
        before = denoiser.predict(x_t, t, entry_numbers(0))
        with attached(denoiser, adapters_from(floats, denoiser, lora.metadata).freeze()):
            own = denoiser.predict(x_t, t, entry_numbers(0))
    denoised = comfy_denoised(patcher, model.positive(1)[0], x_t, t)
    comfy.model_management.unload_all_models()
    return own, output_of(kind, denoised, x_t, t), before


def check_comfyui_loads_all_algorithms(kind: str) -> None:
    model, before = _model(kind), state_of(_model(kind))
    for algorithm in ALGORITHMS:
        lora = _lora(kind, algorithm=algorithm)
        assert keys_left(model.patcher, lora) == [], algorithm
        own, theirs, plain = _both_predictions(kind, lora, with_comfy_lora(model, lora))
        assert (own - plain).abs().max() > 1e-2, f"{algorithm} changes too little to compare"
        close(theirs, own, 1e-3)
    assert equal(before, state_of(model)), "the weights did not come back"


def check_beside_the_weights(kind: str) -> None:
    """The node's `bypass`: it computes the same, or is refused in one line."""
    model = _model(kind)
    for algorithm in ALGORITHMS:
        lora = _lora(kind, algorithm=algorithm)
        try:
            patcher = with_lora(model.patcher, lora, 1.0, beside=True)
        except ValueError as error:
            assert "bypass" in str(error) and algorithm in str(error), error
            continue
        own, theirs, _ = _both_predictions(kind, lora, patcher)
        close(theirs, own, 1e-3)


def check_bf16_files() -> None:
    model = _model("sd1")
    for algorithm in ALGORITHMS:
        lora = trained(model, algorithm=algorithm, lora_dtype="bf16", **LEARNT).lora
        assert keys_left(model.patcher, lora) == [], algorithm
        own, theirs, _ = _both_predictions("sd1", lora, with_comfy_lora(model, lora))
        close(theirs, own, 1e-3)


def _readable(lora: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Diffusers' names of UNets in kohya's spelling, which alone ComfyUI knows in full."""
    if kind not in UNETS:
        return lora
    parts = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    found = {}
    for key, tensor in lora.items():
        layer, _, part = key.removeprefix("unet.").partition(".lora_")
        found[f"lora_unet_{layer.replace('.', '_')}.{parts[f'lora_{part}']}"] = tensor
    return found


def check_layouts(family: str) -> None:
    model = _model(family)
    for preset in ("attention", "attention+mlp"):
        lora = _lora(family, preset)
        expected = _differences(model, lora)
        assert len(expected) == len({key.partition(".lora_")[0] for key in lora if ".lora_" in key})
        for layout in ("kohya", "diffusers"):
            other = in_layout(lora, layout, model.patcher.model)
            assert not other.keys() & lora.keys(), f"{layout} has the same names"
            other = _readable(other, family) if layout == "diffusers" else other
            assert keys_left(model.patcher, other) == [], f"{layout} of {preset}"
            _the_same(_differences(model, other), expected, f"{layout} of {preset}")


def check_kohya_names_of_other_algorithms(family: str) -> None:
    model = _model(family)
    for algorithm in ALGORITHMS[1:]:
        lora = _lora(family, "attention", algorithm)
        other = in_layout(lora, "kohya", model.patcher.model)
        assert keys_left(model.patcher, other) == [], algorithm
        _the_same(_differences(model, other), _differences(model, lora), algorithm)


def check_every_layer_in_kohya_s_names(family: str) -> None:
    model, lora = _model(family), _lora(family)
    other = in_layout(lora, "kohya", model.patcher.model)
    assert keys_left(model.patcher, other) == []
    _the_same(_differences(model, other), _differences(model, lora), family)


def check_every_layout_has_its_lengths_of_dora(family: str) -> None:
    """ComfyUI's file makes the weights in ComfyUI that the others' m makes by the paper's equation 5."""
    model, lora = _model(family), _lora(family, "all", "DoRA")
    in_comfyui, (papers, _) = _differences(model, lora), lora.file("kohya")
    layers = by_layer(papers)
    assert {f"{layer}.weight" for layer in layers} == in_comfyui.keys()
    for layer, parts in layers.items():
        weight, up, down = _weight(model, f"{layer}.weight"), parts["lora_up.weight"], parts["lora_down.weight"]
        whole = weight + float(parts["alpha"]) / len(down) * (up.flatten(1) @ down.flatten(1)).view_as(weight)
        lengths = whole.flatten(1).norm(dim=1).view_as(parts["dora_scale"])
        close(in_comfyui[f"{layer}.weight"], parts["dora_scale"] / lengths * whole - weight, 1e-3)
    lora = _lora(family, "attention", "DoRA")
    papers, metadata = lora.file("diffusers")
    assert metadata["lorasmith.dora_scale"] == "paper" and lora.metadata["lorasmith.dora_scale"] == "ComfyUI"
    state = in_layout(papers, "diffusers", model.patcher.model)
    vectors = [tensor for key, tensor in state.items() if key.endswith(".lora_magnitude_vector")]
    assert len(vectors) == len(state) / 3
    scales = torch.cat([tensor.flatten() for key, tensor in papers.items() if key.endswith(".dora_scale")])
    assert torch.equal(torch.cat([vector.flatten() for vector in vectors]), scales)


def check_layouts_that_are_not_possible_are_refused() -> None:
    with refused("model", "kohya"):
        in_layout(_lora("sd1", "attention"), "kohya", None)
    with refused("diffusers", "LoRA and DoRA"):
        in_layout(_lora("sd1", "attention", "LoHa"), "diffusers", _model("sd1").patcher.model)


def check_a_lora_of_another_model_is_refused() -> None:
    with refused("fit", "keys"):
        with_lora(_model("flux").patcher, _lora("sd1", "attention"), 1.0)


def check_existing_loras_of_all_layouts(family: str) -> None:
    model, lora = _model(family), _lora(family, "attention")
    for layout in ("ComfyUI", "kohya", "diffusers"):
        path = loras() / f"{family}_{layout}_7_steps_00001_.safetensors"
        lora_file.write(path, in_layout(lora, layout, model.patcher.model), {})
        if layout == "diffusers" and family not in UNETS:  # where several of its layers are one here
            with refused("existing_lora", "fit"):
                trained(model, existing_lora=path)
            continue
        outcome = trained(model, existing_lora=path, learning_rate=1e-7, rank=1)
        assert outcome.steps == 9, f"{layout}: {outcome.steps}"
        _the_same(_differences(model, outcome.lora), _differences(model, lora), layout)


def check_an_existing_lora_whose_name_says_nothing() -> None:
    lora = _lora("sd1", "attention")
    path = loras() / "mine.safetensors"
    lora_file.write(path, lora, {})
    assert trained(_model("sd1"), existing_lora=path).steps == 2
    lora_file.write(path, lora, lora.metadata)
    assert trained(_model("sd1"), existing_lora=path).steps == 3 + 2


def check_going_on_with_every_algorithm(family: str) -> None:
    """Alpha stays, and what was trained is where it goes on."""
    model = _model(family)
    for algorithm in ALGORITHMS:
        first = _lora(family, "attention", algorithm)
        path = loras() / f"{family}_{algorithm}.safetensors"
        lora_file.write(path, first, first.metadata)
        again = trained(model, existing_lora=path, steps=1, learning_rate=1e-7).lora
        assert again.keys() == first.keys(), algorithm
        for key, tensor in first.items():
            if key.endswith(".alpha"):
                assert torch.equal(again[key], tensor), key
            elif tensor.any():
                close(again[key], tensor, 1e-3)


def check_alpha_is_constant() -> None:
    for algorithm in ("LoRA", "LoHa", "LoKr"):
        lora = trained(_model("sd1"), algorithm=algorithm, alpha=3.0, steps=5, learning_rate=0.1).lora
        alphas = {float(tensor) for key, tensor in lora.items() if key.endswith(".alpha")}
        assert alphas == {3.0}, f"{algorithm}: {alphas}"


def check_a_constrained_oft_is_read_alike(family: str) -> None:
    model = _model(family)
    lora = trained(model, algorithm="OFT", alpha=1e-3, targets={"preset": "attention"}, **LEARNT).lora
    own, theirs, _ = _both_predictions(family, lora, with_comfy_lora(model, lora))
    close(theirs, own, 1e-3)


def check_differences_of_a_built_in_file_are_kept() -> None:
    """`.diff` and `.diff_b`, which the built-in node writes beside LoRA."""
    lora = dict(_lora("sd1", "attention"))
    norm, bias = "diffusion_model.out.0.diff", "diffusion_model.out.0.diff_b"
    lora |= {norm: torch.full((32,), 0.25), bias: torch.full((32,), -0.5)}
    path = loras() / "builtin_3_steps_00001_.safetensors"
    lora_file.write(path, lora, {})
    again = trained(_model("sd1"), existing_lora=path)
    assert again.steps == 5
    assert torch.equal(again.lora[norm], lora[norm]) and torch.equal(again.lora[bias], lora[bias])
    assert keys_left(_model("sd1").patcher, again.lora) == []
