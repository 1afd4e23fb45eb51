"""convert: every layout holds the same LoRA, there and back bit for bit; diffusers reads what is made for it."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from commands import lorasmith
from diffusers import StableDiffusionPipeline
from originals import original
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiers import table

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import DoRA, LoRA
from lorasmith.adapters.targets import Targets
from lorasmith.demo import BASE
from lorasmith.formats import lora_file
from lorasmith.formats.read import adapters_from
from lorasmith.formats.write import in_layout
from lorasmith.models.families.sd import StableDiffusion
from lorasmith.models.load import load_model
from lorasmith.tools.convert import convert
from lorasmith.types import LayoutName

STARTS = {"kohya": "lora_unet_", "diffusers": "unet.", "comfyui": "diffusion_model.", "lycoris": "lycoris_"}


def written(path: Path, family: StableDiffusion, algorithm: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    adapters = AdapterSet.new(family.denoiser, algorithm, Targets(), 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    lora_file.write(path, adapters.file_state(family.denoiser, dtype), {"ss_steps": "7"})
    return load_file(path)


@pytest.mark.parametrize("layout", get_args(LayoutName))
@table("dtype", [torch.float32, torch.bfloat16], quick=[torch.float32])
def test_there_and_back(tmp_path: Path, family: StableDiffusion, layout: LayoutName, dtype: torch.dtype) -> None:
    state = written(tmp_path / "a.safetensors", family, LoRA(rank=4, alpha=4), dtype)
    num_layers = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", BASE, layout)
    there = load_file(tmp_path / "b.safetensors")
    assert num_layers == len(state) // 3 and all(key.startswith(STARTS[layout]) for key in there)
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", BASE, "kohya")
    back = load_file(tmp_path / "c.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    with safe_open(tmp_path / "b.safetensors", framework="pt") as file:
        assert file.metadata()["ss_steps"] == "7" and f"convert to {layout}" in file.metadata()["lorasmith.history"]


def test_dora_s_lengths_survive_comfyui_s(tmp_path: Path, family: StableDiffusion) -> None:
    state = written(tmp_path / "a.safetensors", family, DoRA(rank=4, alpha=4), torch.float32)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", BASE, "comfyui")
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", BASE, "kohya")
    back = load_file(tmp_path / "c.safetensors")
    assert back.keys() == state.keys()
    for key in state:
        torch.testing.assert_close(back[key], state[key], rtol=1e-4, atol=1e-5)


def test_dora_needs_the_model_s_weights_for_comfyui_alone(tmp_path: Path, family: StableDiffusion) -> None:
    model = shutil.copytree(BASE, tmp_path / "model")
    state = written(tmp_path / "a.safetensors", family, DoRA(rank=4, alpha=4), torch.float32)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", model, "comfyui")
    expected = in_layout(adapters_from(state, family.denoiser), family.denoiser, torch.float32, "comfyui")
    found = load_file(tmp_path / "b.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-6)
    without_weights(model)
    convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors", model, "diffusers")
    convert(tmp_path / "c.safetensors", tmp_path / "d.safetensors", model, "kohya")
    back = load_file(tmp_path / "d.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    damaged: tuple[tuple[str, LayoutName], ...] = (("a", "comfyui"), ("b", "kohya"))
    for name, layout in damaged:
        with pytest.raises(ValueError, match="model.safetensors is cut off: it ends inside its header"):
            convert(tmp_path / f"{name}.safetensors", tmp_path / "e.safetensors", model, layout)
    assert not (tmp_path / "e.safetensors").exists()


def without_weights(model: Path) -> None:
    for file in model.glob("*/*.safetensors"):
        file.chmod(0o644)
        file.write_bytes(file.read_bytes()[:100])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "single file"])
def test_no_weights_are_read(tmp_path: Path, family: StableDiffusion, kind: str) -> None:
    """LoRA of both nets, for a folder whose files are cut off, and for a file whose numbers are not there."""
    model = shutil.copytree(BASE, tmp_path / "model")
    denoiser = load_model(BASE, with_texts=True).denoiser
    adapters = AdapterSet.new(denoiser, LoRA(rank=2), Targets(), 0)
    lora_file.write(tmp_path / "a.safetensors", adapters.file_state(denoiser, torch.float32), {})
    if kind == "folder":
        without_weights(model)
    else:
        model = tmp_path / "model.safetensors"
        encoder: Any = denoiser.nets["text_encoder"]
        texts = {f"cond_stage_model.transformer.text_model.{k}": t for k, t in encoder.state_dict().items()}
        unet = {f"model.diffusion_model.{k}": t for k, t in original(family.denoiser.unet).items()}
        save_file({key: torch.full_like(tensor, torch.nan) for key, tensor in (unet | texts).items()}, model)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", model, "diffusers")
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", model, "kohya")
    state, back = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "c.safetensors")
    assert any(key.startswith("lora_te_") for key in state)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


def test_what_peft_s_configuration_scales_is_converted_scaled(tmp_path: Path, family: StableDiffusion) -> None:
    """LoKr's whole factors, which every other reader uses as they are."""
    name = "base_model.model.time_embedding.linear_1"
    module = family.denoiser.unet.get_submodule("time_embedding.linear_1")
    assert isinstance(module.weight, torch.Tensor)
    n_out, n_in = module.weight.shape
    w1, w2 = torch.randn(4, 4), torch.randn(n_out // 4, n_in // 4)
    save_file({f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "r": 4, "alpha": 8}))
    convert(tmp_path / "adapter_model.safetensors", tmp_path / "b.safetensors", BASE, "kohya")
    adapters = adapters_from(lora_file.read(tmp_path / "b.safetensors")[0], family.denoiser)
    found = adapters.adapters["unet.time_embedding.linear_1"].merged(torch.zeros(n_out, n_in))
    torch.testing.assert_close(found, 2 * torch.kron(w1, w2))


@pytest.mark.slow
def test_without_a_model(tmp_path: Path) -> None:
    def lora(name: str, layers: dict[str, tuple[int, int]], **extra: torch.Tensor) -> Path:
        state = {f"{layer}.lora_up.weight": torch.ones(n_out, 1) for layer, (n_out, _) in layers.items()}
        state |= {f"{layer}.lora_down.weight": torch.ones(1, n_in) for layer, (_, n_in) in layers.items()}
        save_file(state | extra, tmp_path / name)
        return tmp_path / name

    output = tmp_path / "out.safetensors"
    fits_none = "but fits no published model"
    for layer, sizes, message in (
        (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", (8, 768),
            rf"looks like a LoRA for Stable Diffusion 1.x, {fits_none}, not even Stable Diffusion 1.5 \(.*must have",
        ),
        ("lora_unet_something", (8, 8), f"looks like a LoRA for an unknown model, {fits_none}: --model must say which"),
        ("transformer.transformer_blocks.0.attn.to_q", (3072, 3072), "fits FLUX.1 and Qwen-Image, whose names differ"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message) as raised:
            convert(lora("a.safetensors", {layer: sizes}), output, None, "kohya")
        assert "\n" not in str(raised.value) and not output.exists()
    name = "lora_unet_double_blocks_0_img_mlp_0"
    dora = lora("b.safetensors", {name: (12288, 3072)}, **{f"{name}.dora_scale": torch.ones(12288, 1)})
    with pytest.raises(ValueError, match="holds DoRA, whose lengths depend on the model's weights .*: --model must"):
        convert(dora, output, None, "comfyui")
    convert(dora, output, None, "diffusers")
    key = "transformer.transformer_blocks.0.ff.net.0.proj.lora_magnitude_vector"
    assert torch.equal(load_file(output)[key], torch.ones(12288))


def test_unknown_layers_are_left_out_where_that_is_asked_for(tmp_path: Path, caplog: Any) -> None:
    known = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    layers = {known: (640, 2048), "lora_te3_x": (2, 2)}
    state = {f"{layer}.lora_{w}.weight": torch.ones(shape) for layer, (n_out, n_in) in layers.items()
             for w, shape in (("up", (n_out, 1)), ("down", (1, n_in)))}  # fmt: skip
    save_file(state, tmp_path / "a.safetensors")
    save_file({key: state[key] for key in state if "te3" in key}, tmp_path / "c.safetensors")
    arguments = tmp_path / "b.safetensors", None, "diffusers"
    with pytest.raises(ValueError, match="lora_te3_x .*: the model has no such layer"):
        convert(tmp_path / "a.safetensors", *arguments)
    assert convert(tmp_path / "a.safetensors", *arguments, ignore_unknown=True) == 1
    assert caplog.messages[-1] == "1 layer that the model does not have is left out: lora_te3_x"
    with pytest.raises(ValueError, match="must hold a layer that the model has, got lora_te3_x"):
        convert(tmp_path / "c.safetensors", tmp_path / "d.safetensors", BASE, "kohya", ignore_unknown=True)


def test_the_command_and_diffusers(tmp_path: Path, family: StableDiffusion) -> None:
    written(tmp_path / "a.safetensors", family, LoRA(rank=4, alpha=2), torch.float32)
    arguments = ("convert", "a.safetensors", "--model", "demo", "--to", "diffusers", "--output", "b.safetensors")
    ended = lorasmith(tmp_path, *arguments)
    assert (ended.code, ended.err) == (0, "") and "b.safetensors" in ended.out
    deltas = []
    for name in ("a", "b"):
        pipe: Any = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None, requires_safety_checker=False)
        pipe.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors")
        layers = [module for module in pipe.unet.modules() if "default_0" in getattr(module, "lora_A", {})]
        deltas.append([layer.get_delta_weight("default_0") for layer in layers])
    assert len(deltas[0]) > 50
    torch.testing.assert_close(*deltas, rtol=1e-3, atol=1e-4)
    ended = lorasmith(tmp_path, "convert", "a.safetensors", "--to", "diffusers", "--output", "c.safetensors")
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert ended.err.endswith("--model must say which it is for\n")
    state = {"lora_unet_single_blocks_37_linear2": (3072, 15360)}
    save_file(
        {f"{layer}.{part}": torch.ones(shape) for layer, (rows, columns) in state.items() for part, shape in
         (("lora_up.weight", (rows, 1)), ("lora_down.weight", (1, columns)), ("alpha", ()))},
        tmp_path / "flux.safetensors",
    )  # fmt: skip
    ended = lorasmith(tmp_path, "convert", "flux.safetensors", "--to", "diffusers", "--output", "d.safetensors")
    assert (ended.code, ended.err) == (0, "") and ended.out.startswith("1 layer\n")
    refused = lorasmith(tmp_path, *arguments)
    assert (refused.code, refused.err) == (
        2, "lorasmith: output must not be there yet without --overwrite, got b.safetensors\n"
    )  # fmt: skip
    refused = lorasmith(tmp_path, *arguments[:5], "x", "--output", "c.safetensors")
    assert refused.code == 2 and 'Choose from: "kohya", "diffusers"' in refused.err
