"""Single files of every family: the original layout, ComfyUI's and diffusers' names, beside diffusers' own nets."""

import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxTransformer2DModel
from originals import original
from PIL import Image
from safetensors.torch import load_file, save_file
from tiers import table
from tiny import FOLDERS_ALONE, PROMPTS, TINY, made
from torch import Tensor

from lorasmith.cli.main import main
from lorasmith.formats.architectures.registry import ARCHITECTURES
from lorasmith.formats.detect import model_family
from lorasmith.models.checkpoints.load import _Empty
from lorasmith.models.checkpoints.transformers import OriginalTransformer
from lorasmith.models.load import load_model, original_of
from lorasmith.models.meta import skeleton
from lorasmith.models.sources.single_file import FileComponents
from lorasmith.storage.safetensors_header import Header
from lorasmith.tools.merge import Source
from lorasmith.tools.merge_into_model import merge_into

State = dict[str, Tensor]
CPU = torch.device("cpu")
DENOISER = "model.diffusion_model."
ORIGINALS = {architecture.name: original_of(architecture) for architecture in ARCHITECTURES if architecture.model_signs}
TRANSFORMERS = {family: layout for family, layout in ORIGINALS.items() if isinstance(layout, OriginalTransformer)}
SMALL: dict[str, list[dict[str, Any]]] = {  # heads, and what they are turned by, are as published
    "Stable Diffusion 3": [
        {
            "num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 128,
            "pooled_projection_dim": 24, "pos_embed_max_size": 12, "in_channels": 4, "out_channels": 4, **extra,
        }
        for extra in ({}, {"qk_norm": "rms_norm", "dual_attention_layers": (0,)})
    ],
    "Flux": [
        {
            "num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 16,
            "pooled_projection_dim": 24, "in_channels": 16, "guidance_embeds": is_told,
        }
        for is_told in (True, False)
    ],
    "Chroma": [
        {
            "num_layers": 1, "num_single_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 16,
            "in_channels": 16, "approximator_num_channels": 8, "approximator_hidden_dim": 32, "approximator_layers": 2,
        }
    ],
    "Flux.2": [
        {
            "num_layers": 1, "num_single_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 24,
            "in_channels": 16, "timestep_guidance_channels": 32, "guidance_embeds": is_told, "mlp_ratio": ratio,
        }
        for is_told, ratio in ((True, 3.0), (False, 2.0))
    ],
    "Qwen-Image": [{"num_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 16, "in_channels": 16}],
    "Z-Image": [{"n_layers": 2, "n_refiner_layers": 1, "n_heads": 1, "n_kv_heads": 1, "dim": 128, "cap_feat_dim": 16}],
    "Lumina 2": [
        {
            "num_layers": 2, "num_refiner_layers": 2, "hidden_size": 192, "num_attention_heads": 2, "num_kv_heads": 1,
            "cap_feat_dim": 16, "in_channels": 4,
        }
    ],
    "Wan": [
        {
            "num_layers": 2, "num_attention_heads": 1, "text_dim": 16, "freq_dim": 32, "ffn_dim": 48, "in_channels": 8,
            "out_channels": 8,
        }
    ],
}  # fmt: skip
EVERY = [pytest.param(family, config, id=f"{family} {n}") for family in SMALL for n, config in enumerate(SMALL[family])]


def kind_of(family: str) -> Any:
    layout = ORIGINALS[family]
    assert isinstance(layout, OriginalTransformer)
    return getattr(diffusers, layout.kind)


@cache
def net_of(family: str, number: int = 0) -> Any:
    """Random, also where a new net is zero, the same in every test."""
    with torch.random.fork_rng():
        torch.manual_seed(number)
        net = kind_of(family)(**SMALL[family][number]).eval()
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return net


def written(path: Path, state: State, prefix: str = "", dtype: torch.dtype = torch.float32) -> Path:
    save_file({f"{prefix}{key}": value.to(dtype).contiguous().clone() for key, value in state.items()}, path)
    return path


def loaded(path: Path, family: str, base: dict[str, Any] | None = None) -> Any:
    header = Header.of(path)
    assert model_family(header.shapes) == family
    prefix = DENOISER if header.holds(DENOISER) else ""
    return ORIGINALS[family].net(header, {key.removeprefix(prefix): key for key in header.shapes}, base or {})


def check_same(ours: Any, theirs: Any) -> None:
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)
    buffers = dict(ours.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in theirs.named_buffers())
    assert not any(tensor.is_meta for tensor in (*state.values(), *buffers.values()))
    hidden = {"_use_default_values"}
    assert {k: v for k, v in ours.config.items() if k not in hidden} == {
        k: v for k, v in theirs.config.items() if k not in hidden
    }


def test_every_layout_is_tested() -> None:
    assert SMALL.keys() == TRANSFORMERS.keys()


@pytest.mark.parametrize("family", sorted(TRANSFORMERS))
def test_sizes_of_the_published_models_are_read_off_their_shapes(family: str) -> None:
    """diffusers' defaults are a published model's config each; the weights take no memory."""
    with _Empty():
        net = kind_of(family)()
    layout = ORIGINALS[family]
    assert isinstance(layout, OriginalTransformer)
    found = layout.sizes({key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}, {})
    assert found == {key: net.config[key] for key in found}


@pytest.mark.parametrize(("family", "config"), EVERY)
def test_every_layout_gives_the_net(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    net = net_of(family, SMALL[family].index(config))
    unread = {"norm_final.weight": torch.ones(4)} if family in ("Z-Image", "Lumina 2") else {}
    state = original(net)
    assert state.keys() != net.state_dict().keys() or family == "Qwen-Image"
    for number, (layout, prefix) in enumerate(
        ((state | unread, DENOISER), (state, ""), (net.state_dict(), ""), (net.state_dict(), DENOISER))
    ):
        path = written(tmp_path / f"{number}.safetensors", layout, prefix)
        check_same(loaded(path, family), net)
        (shaped,) = skeleton(path, with_texts=True)[0].nets.values()
        assert {key: tensor.shape for key, tensor in shaped.state_dict().items()} == {
            key: tensor.shape for key, tensor in net.state_dict().items()
        }
        assert type(shaped) is type(net) and all(parameter.is_meta for parameter in shaped.parameters())


@pytest.mark.parametrize("prefix", [DENOISER, ""])
@pytest.mark.parametrize("family", sorted(SMALL))
def test_a_lora_by_diffusers_names_is_merged_into_a_file(family: str, prefix: str, tmp_path: Path) -> None:
    net = net_of(family)
    written(tmp_path / "net.safetensors", original(net), prefix)
    generator, lora = torch.Generator().manual_seed(0), {}
    for path, module in net.named_modules():
        if isinstance(module, torch.nn.Linear):
            down = torch.randn(2, module.in_features, generator=generator)
            up = torch.randn(module.out_features, 2, generator=generator)
            lora |= {f"transformer.{path}.lora_A.weight": down, f"transformer.{path}.lora_B.weight": up}
            module.weight.data += 0.5 * up @ down
    save_file(lora, tmp_path / "lora.safetensors")
    source = Source.parsed(f"{tmp_path / 'lora.safetensors'}:0.5")
    assert merge_into(tmp_path / "net.safetensors", [source], tmp_path / "merged.safetensors")
    expected, found = original(net), load_file(tmp_path / "merged.safetensors")
    assert found.keys() == {f"{prefix}{key}" for key in expected} and len(list(tmp_path.iterdir())) == 3
    for key, tensor in expected.items():
        torch.testing.assert_close(found[f"{prefix}{key}"], tensor, rtol=1e-5, atol=1e-5)


def test_a_lora_that_cannot_be_converted_to_a_file_s_names_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "net.safetensors", original(net_of("Flux")))
    name = "transformer.transformer_blocks.0.attn.to_q"
    for state, reason in (
        ({"lora_A.weight": torch.full((1, 256), torch.nan), "lora_B.weight": torch.ones(256, 1)}, "must be finite"),
        ({"lora_A.weight": torch.ones(1, 8), "lora_B.weight": torch.ones(256, 1)}, r"must have the shape \[1, 256\]"),
        ({"lokr_w1": torch.ones(16, 16), "lokr_w2": torch.ones(16, 16)}, "Kronecker"),
    ):
        save_file({f"{name}.{part}": tensor for part, tensor in state.items()}, tmp_path / "lora.safetensors")
        with pytest.raises(ValueError, match=f"1 of its 1 layer has a name that .* cannot be converted: .*{reason}"):
            source = Source.parsed(str(tmp_path / "lora.safetensors"))
            merge_into(tmp_path / "net.safetensors", [source], tmp_path / "merged.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"net.safetensors", "lora.safetensors"}


@pytest.mark.parametrize("family", sorted(SMALL))
def test_weights_keep_their_dtype(family: str, tmp_path: Path) -> None:
    """But for fp8, which is read into bf16, and what diffusers keeps in float32 for every dtype."""
    net, kept = net_of(family), set(kind_of(family)._keep_in_fp32_modules or ())
    for stored, expected in (
        (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float8_e4m3fn, torch.bfloat16),
    ):  # fmt: skip
        found = loaded(written(tmp_path / "net.safetensors", original(net), dtype=stored), family).state_dict()
        for key, tensor in net.state_dict().items():
            dtype = torch.float32 if kept & set(key.split(".")) else expected
            assert found[key].dtype == dtype and torch.equal(found[key].float(), tensor.to(stored).float()), key


def test_the_dtype_is_that_of_most_numbers(tmp_path: Path) -> None:
    state = {k: t.bfloat16() if t.ndim > 1 else t for k, t in original(net_of("Flux")).items()}
    save_file(state, tmp_path / "net.safetensors")
    assert {p.dtype for p in loaded(tmp_path / "net.safetensors", "Flux").parameters()} == {torch.bfloat16}


@table("family", sorted(SMALL), quick=["Stable Diffusion 3", "Z-Image"])
def test_no_tensor_is_dropped_or_made_up(family: str, tmp_path: Path) -> None:
    """Each tensor that is missing, each that is one too many, under either kind of names."""
    net, path = net_of(family), tmp_path / "net.safetensors"
    kind = type(net).__name__
    for state in (original(net), net.state_dict()):
        for key in [key for key in state if "1." in key or key.count(".") < 2]:
            written(path, {name: tensor for name, tensor in state.items() if name != key})
            with pytest.raises(ValueError, match=f"cannot load the {kind} of .*: (.* missing|no )") as raised:
                ORIGINALS[family].net(Header.of(path), {name: name for name in state if name != key}, {})
            assert "\n" not in str(raised.value)
        written(path, state | {"strange.weight": torch.ones(2)})
        with pytest.raises(ValueError, match=f"the {kind} of .*: 1 tensor has no place in it, such as strange.weight"):
            loaded(path, family)
        wide = next(key for key in state if key.endswith("norm_q.weight") or "proj_out" in key or "final_layer" in key)
        written(path, state | {wide: torch.ones(3, 5)})
        with pytest.raises(ValueError, match=f"cannot load the {kind} of |add up to the width of a head"):
            loaded(path, family)


def test_weights_in_integers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file(original(net_of("Flux")) | {"img_in.weight": torch.ones(2, 2, dtype=torch.uint8)}, path)
    with pytest.raises(ValueError, match="must hold plain weights, .* got img_in.weight in U8 without a scale"):
        load_model(path)


def test_heads_of_another_width_need_the_folder(tmp_path: Path) -> None:
    config = {**SMALL["Flux"][0], "attention_head_dim": 16, "axes_dims_rope": (4, 4, 8)}
    path = written(tmp_path / "net.safetensors", original(FluxTransformer2DModel(**config)))
    with pytest.raises(
        ValueError, match=r"axes_dims_rope .* width of a head, 16, got \[16, 56, 56\]: encoders must be"
    ):
        loaded(path, "Flux")
    assert loaded(path, "Flux", {"axes_dims_rope": [4, 4, 8]}).config["num_attention_heads"] == 2


@table("name", sorted(TINY.keys() - FOLDERS_ALONE), quick=["StableDiffusionXLPipeline", "FluxPipeline", "Wan 2.1"])
def test_a_file_beside_a_folder_is_the_pipeline(name: str, tmp_path: Path) -> None:
    """The denoiser in the original layout and under diffusers' names; all else is the folder's."""
    pipe, family = made(name), load_model(made(name))
    pipe.save_pretrained(tmp_path / "folder")
    reference = family.codec(CPU)
    cond = reference.encode_texts(PROMPTS[:2])
    latents = torch.randn(2, *TINY[name].latent, generator=torch.Generator().manual_seed(0))
    t = family.denoiser.process.time(torch.tensor([0.3, 0.9]))
    (part, net), *others = family.denoiser.nets.items()
    if others:
        with pytest.raises(ValueError, match="holds one denoiser, but the pipeline of encoders has"):
            load_model(written(tmp_path / "net.safetensors", original(net)), tmp_path / "folder")
        return
    wide = part == "unet"  # whose tiny heads are not as wide as those of files
    for number, state in enumerate([net.state_dict()] if wide else [net.state_dict(), original(net)]):
        path = written(tmp_path / f"{number}.safetensors", state)
        for weights in (tmp_path / "folder" / part).glob("*.safetensors"):
            weights.unlink()  # which are not needed
        found = load_model(path, tmp_path / "folder")
        with torch.no_grad():
            ours, theirs = (f.denoiser.predict(latents, t, cond) for f in (found, family))
            assert torch.equal(ours, theirs) and ours.std() > 0
            torch.testing.assert_close(found.codec(CPU).encode_texts(PROMPTS[:2]), cond, rtol=0, atol=1e-4)
        assert type(found.pipeline(found.denoiser)) is type(pipe)
        for values in (found.denoiser.process, family.denoiser.process):
            assert values.time(torch.tensor([0.5])) == family.denoiser.process.time(torch.tensor([0.5]))


def test_a_file_of_flux_alone(tmp_path: Path) -> None:
    """Trains from tensors with the published scheduler; captions need the folder, which the message says."""
    for number, shift in ((0, True), (1, False)):
        path = written(tmp_path / "net.safetensors", original(net_of("Flux", number)), DENOISER)
        family = load_model(path)
        assert (family.denoiser.process.by_size is not None) == shift  # type: ignore[union-attr]
        assert family.pipeline(family.denoiser).vae is None
        with pytest.raises(
            ValueError, match="must hold vae and text_encoder and text_encoder_2 to encode captions, or"
        ):
            family.codec(CPU)


@pytest.mark.parametrize(
    ("encoders", "message"),
    [
        ("sdxl", "encoders must be a folder of FluxPipeline for a file of Flux, got StableDiffusionXLPipeline"),
        ("nowhere", "nowhere must be a diffusers folder with a model_index.json, got no such folder"),
    ],
)
def test_encoders_of_another_kind_are_refused(encoders: str, message: str, tmp_path: Path) -> None:
    made("StableDiffusionXLPipeline").save_pretrained(tmp_path / "sdxl")
    path = written(tmp_path / "net.safetensors", original(net_of("Flux")))
    with pytest.raises(ValueError, match=message):
        load_model(path, tmp_path / encoders)
    with pytest.raises(ValueError, match="encoders must be none where model is no single file, got x"):
        load_model(tmp_path / "sdxl", "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {"single_blocks.0.linear1.lora_down.weight": torch.ones(2, 2)}, "must be a model, got a LoRA"),
        (lambda s: s | {f"{DENOISER}x": torch.ones(1)}, "FluxTransformer2DModel of .*: no x_embedder.weight"),
        (lambda _: {"txt_in.individual_token_refiner.x": torch.ones(1)}, "a family among .*, got HunyuanVideo"),
        (lambda _: {"encoder.conv_in.weight": torch.ones(1)}, "got tensors such as encoder.conv_in.weight"),
        (lambda s: {k: t for k, t in s.items() if "single" not in k}, "a kind of blocks is missing"),
    ],
)  # fmt: skip
def test_files_that_are_no_such_model(change: Callable[[State], State], message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "net.safetensors", change(original(net_of("Flux"))))
    with pytest.raises(ValueError, match=message) as raised:
        load_model(path)
    assert "\n" not in str(raised.value) and re.search(re.escape(str(path)), str(raised.value))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="is cut off: 3 of its .* bytes are missing"):
        load_model(path)


def test_a_file_holds_one_denoiser(tmp_path: Path) -> None:
    header = Header.of(written(tmp_path / "net.safetensors", original(net_of("Wan"))))
    with pytest.raises(ValueError, match="holds one denoiser, but the pipeline of encoders has transformer_2 too"):
        FileComponents(header, ORIGINALS["Wan"], "WanPipeline").net("transformer_2")
    with pytest.raises(ValueError, match="does not hold its scheduler's config: encoders must be a folder that does"):
        _ = FileComponents(header, ORIGINALS["Wan"], "WanPipeline").scheduler


@pytest.mark.slow
def test_commands_take_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = made("FluxPipeline")
    pipe.save_pretrained(tmp_path / "folder")
    path = written(tmp_path / "net.safetensors", original(pipe.transformer))
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("a cat")
    monkeypatch.chdir(tmp_path)
    given = ["--model", str(path), "--encoders", str(tmp_path / "folder")]
    quick = ["--steps", "1", "--data.resolution", "32", "--sampling.prompts", "[]", "--output", "run"]
    for command in (["train", "pictures", *given, *quick], ["sample", "a cat", *given, "--steps", "1"]):
        monkeypatch.setattr(sys, "argv", ["lorasmith", *command])
        with pytest.raises(SystemExit) as raised:
            main()
        assert raised.value.code == 0
    assert list((tmp_path / "run").glob("*.safetensors")) and (tmp_path / "samples.png").is_file()
