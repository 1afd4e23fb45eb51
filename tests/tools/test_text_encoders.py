"""Text encoders in merge, extract and convert: as single files of others hold them, under the names of others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, StableDiffusion3Pipeline
from originals import open_clip, original
from safetensors.torch import load_file, save_file
from tiny import made
from tiny_encoders import clip, t5
from torch import Tensor, nn

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import LoRA
from lorasmith.adapters.targets import Targets
from lorasmith.formats import lora_file
from lorasmith.formats.write import in_layout
from lorasmith.models.load import load_model
from lorasmith.tools.convert import convert
from lorasmith.tools.extract import extract
from lorasmith.tools.merge import Source
from lorasmith.tools.merge_into_model import merge_into
from lorasmith.tools.svd import Cut

State = dict[str, Tensor]


def plain(encoder: nn.Module) -> State:
    """CLIP's tensors with the level text_model, whatever this transformers has."""
    names = {key: key if key.startswith(("text_model.", "text_projection")) else f"text_model.{key}"
             for key in encoder.state_dict()}  # fmt: skip
    return {names[key]: tensor.detach().clone() for key, tensor in encoder.state_dict().items()}


def of_open_clip(encoder: nn.Module) -> State:
    state = plain(encoder)
    projection = state.pop("text_projection.weight", None)
    whole = open_clip({key.removeprefix("text_model."): tensor for key, tensor in state.items()})
    extra = {} if projection is None else {"text_projection": projection.T.contiguous()}
    return {**whole, **extra, "logit_scale": torch.tensor(4.0)}


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": tensor.clone() for key, tensor in state.items()}


def encoders(names: str) -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {name: t5(16) if name == "t5" else clip(16, projected=name == "g") for name in names.split()}


def stored(kind: str, nets: Mapping[str, Any]) -> State:
    """The text encoders as such single files hold them, beside a layer of the denoiser."""
    start = "text_encoders."
    parts = {
        "SD 2": lambda: prefixed("cond_stage_model.model.", of_open_clip(nets["l"])),
        "SDXL": lambda: (
            prefixed("conditioner.embedders.0.transformer.", plain(nets["l"]))
            | prefixed("conditioner.embedders.1.model.", of_open_clip(nets["g"]))
        ),
        "SD 3": lambda: (
            prefixed(f"{start}clip_l.transformer.", plain(nets["l"]))
            | prefixed(f"{start}clip_g.transformer.", plain(nets["g"]))
            | prefixed(f"{start}t5xxl.transformer.", nets["t5"].state_dict())
        ),
        "Flux": lambda: (
            prefixed(f"{start}clip_l.transformer.", plain(nets["l"]))
            | prefixed(f"{start}t5xxl.transformer.", nets["t5"].state_dict())
        ),
    }[kind]()
    return {**parts, "model.diffusion_model.x.weight": torch.ones(2, 2)}


KINDS = {  # {kind of file: {the encoder: what kohya's names begin with}}
    "SD 2": {"l": "lora_te_"}, "SDXL": {"l": "lora_te1_", "g": "lora_te2_"},
    "SD 3": {"l": "lora_te1_", "g": "lora_te2_", "t5": "lora_te3_"}, "Flux": {"l": "lora_te1_", "t5": "lora_te3_"},
}  # fmt: skip


def random_lora(kind: str, nets: Mapping[str, Any]) -> tuple[State, dict[str, Any]]:
    """One for every linear layer that is not the projection, and the encoders with it in them."""
    state, changed = {}, {}
    generator = torch.Generator().manual_seed(1)
    for name, start in KINDS[kind].items():
        changed[name] = net = encoders(name)[name]
        net.load_state_dict(nets[name].state_dict())
        for path, module in net.named_modules():
            if isinstance(module, nn.Linear) and path != "text_projection":
                up, down = (
                    torch.randn(shape, generator=generator) * 0.3
                    for shape in ((len(module.weight), 2), (2, module.in_features))
                )
                level = "" if name == "t5" or path.startswith("text_model.") else "text_model."
                layer = f"{start}{level}{path}".replace(".", "_")
                state |= {
                    f"{layer}.lora_up.weight": up,
                    f"{layer}.lora_down.weight": down,
                    f"{layer}.alpha": torch.tensor(1.0),
                }
                module.weight.data += up @ down / 2
    return state, changed


@pytest.mark.parametrize("kind", KINDS)
def test_single_files_of_others(tmp_path: Path, kind: str) -> None:
    """What is merged in is what extract finds, under kohya's names."""
    nets = encoders(" ".join(KINDS[kind]))
    lora, changed = random_lora(kind, nets)
    save_file(stored(kind, nets), tmp_path / "base.safetensors")
    save_file(lora, tmp_path / "lora.safetensors")
    source = Source.parsed(str(tmp_path / "lora.safetensors"))
    count = merge_into(tmp_path / "base.safetensors", [source], tmp_path / "merged.safetensors")
    before, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("base", "merged"))
    expected = stored(kind, changed)
    assert after.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(after[key], tensor, rtol=1e-5, atol=1e-6)
    assert count == sum(not torch.equal(before[key], after[key]) for key in before) > 5
    base, tuned, again = (tmp_path / f"{n}.safetensors" for n in ("base", "merged", "again"))
    extract(base, tuned, again, Cut(rank=2), dtype=torch.float32)
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == lora.keys()
    for key in (key for key in lora if key.endswith("lora_up.weight")):
        other = key.replace("_up", "_down")
        torch.testing.assert_close(again[key] @ again[other], lora[key] @ lora[other] / 2, rtol=1e-3, atol=1e-3)


def test_open_clip_s_own_names_and_projection(tmp_path: Path, caplog: Any) -> None:
    """A LoRA by OpenCLIP's names has q, k and v in one layer; its projection is the transposed of transformers'."""
    nets = encoders("l g")
    save_file(stored("SDXL", nets), tmp_path / "base.safetensors")
    name = "lora_te2_model_transformer_resblocks_0_attn_in_proj"
    up, down = torch.randn(48, 2), torch.randn(2, 16)
    one, other = torch.randn(16, 1), torch.randn(1, 16)
    lora = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    lora |= {"lora_te2_text_projection.lora_up.weight": one, "lora_te2_text_projection.lora_down.weight": other}
    save_file(lora, tmp_path / "lora.safetensors")
    source = Source.parsed(str(tmp_path / "lora.safetensors"))
    assert merge_into(tmp_path / "base.safetensors", [source], tmp_path / "merged.safetensors") == 2
    before, after = (load_file(tmp_path / f"{n}.safetensors") for n in ("base", "merged"))
    start = "conditioner.embedders.1.model."
    changes = {
        f"{start}transformer.resblocks.0.attn.in_proj_weight": up @ down,
        f"{start}text_projection": (one @ other).T,
    }
    for key, change in changes.items():
        torch.testing.assert_close(after[key] - before[key], change, rtol=1e-4, atol=1e-5)
    after[f"{start}logit_scale"] += 1
    save_file(after, tmp_path / "tuned.safetensors")
    base, tuned, again = (tmp_path / f"{n}.safetensors" for n in ("base", "tuned", "again"))
    extract(base, tuned, again, Cut(rank=2), dtype=torch.float32)
    layers = {key.partition(".")[0] for key in load_file(tmp_path / "again.safetensors")}
    assert layers == {f"lora_te2_text_model_encoder_layers_0_self_attn_{q}_proj" for q in "qkv"}
    (line,) = [message for message in caplog.messages if "left out" in message]
    assert line.startswith("left out, as a LoRA cannot hold") and line.endswith(
        f"2 tensors: {start}logit_scale; {start}text_projection"
    )


def test_diffusers_reads_what_is_converted_for_sd_3(tmp_path: Path, caplog: Any) -> None:
    pipe: Any = made("StableDiffusion3Pipeline")
    pipe.save_pretrained(tmp_path / "model")
    layers = {f"lora_te{number}_text_model_encoder_layers_0_self_attn_q_proj": (16, 16) for number in (1, 2)}
    layers["lora_unet_joint_blocks_0_x_block_attn_proj"] = (16, 16)
    layers["lora_te3_encoder_block_0_layer_0_SelfAttention_q"] = (16, 32)
    lora = {
        f"{n}.lora_{w}.weight": torch.randn(s)
        for n, (o, i) in layers.items()
        for w, s in (("up", (o, 2)), ("down", (2, i)))
    }
    save_file(lora, tmp_path / "a.safetensors")
    assert convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "model", "diffusers") == 4
    assert caplog.messages[-1] == (
        "diffusers reads no LoRA of T5, and will leave out: lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    )
    read: Any = StableDiffusion3Pipeline.from_pretrained(tmp_path / "model")
    read.load_lora_weights(tmp_path, weight_name="b.safetensors")
    for number, part in enumerate(("text_encoder", "text_encoder_2"), 1):
        (found,) = [m for path, m in getattr(read, part).named_modules() if path.endswith("layers.0.self_attn.q_proj")]
        name = f"lora_te{number}_text_model_encoder_layers_0_self_attn_q_proj"
        torch.testing.assert_close(
            found.get_delta_weight("default_0"), lora[f"{name}.lora_up.weight"] @ lora[f"{name}.lora_down.weight"]
        )


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_a_single_file_with_encoders_says_as_much_as_the_folder(tmp_path: Path, name: str) -> None:
    """convert finds the layers of all text encoders in it, wherever kohya's names put them."""
    folder = made(name)
    if name == "FluxPipeline":  # whose heads are of the published width in single files
        folder.transformer = FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=1, joint_attention_dim=16,
            pooled_projection_dim=16, guidance_embeds=True,
        )  # fmt: skip
    folder.save_pretrained(tmp_path / "folder")
    parts = {"clip_l": folder.text_encoder, "clip_g": folder.text_encoder_2, "t5xxl": folder.text_encoder_2}
    parts = {**parts, "t5xxl": folder.text_encoder_3} if name != "FluxPipeline" else {**parts, "clip_g": None}
    state = prefixed("model.diffusion_model.", original(folder.transformer))
    for part, net in parts.items():
        if net is not None:
            tensors = net.state_dict() if part == "t5xxl" else plain(net)
            state |= prefixed(f"text_encoders.{part}.transformer.", tensors)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "model.safetensors")
    denoiser = load_model(folder, with_texts=True).denoiser
    adapters = AdapterSet.new(denoiser, LoRA(rank=2), Targets(preset="all"), 0)
    assert adapters.nets == denoiser.nets.keys()
    lora_file.write(tmp_path / "a.safetensors", in_layout(adapters, denoiser, torch.float32, "diffusers"))
    for model in ("folder", "model.safetensors"):
        out = tmp_path / f"{model}.kohya.safetensors"
        assert convert(tmp_path / "a.safetensors", out, tmp_path / model, "kohya") == len(adapters.adapters)
    found, expected = (load_file(tmp_path / f"{n}.kohya.safetensors") for n in ("model.safetensors", "folder"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    numbers = ("1", "2", "3") if name != "FluxPipeline" else ("1", "3")
    assert {key[: len("lora_te1")] for key in found} == {"lora_une", *(f"lora_te{number}" for number in numbers)}
