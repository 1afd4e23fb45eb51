"""merge --model: against diffusers' fuse_lora, our own hooks and LyCORIS; folders, single files, shards, refusals."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import lorasmith
from diffusers import StableDiffusionPipeline
from originals import original
from safetensors.torch import load_file, save_file
from tiers import table
from tiny import PROMPTS, TINY, made
from torch import Tensor

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import OFT, DoRA, LoHa, LoKr, LoRA
from lorasmith.adapters.hooks import attached
from lorasmith.adapters.targets import Targets, adaptable_layers
from lorasmith.demo import BASE
from lorasmith.formats import dora_magnitude, lora_file
from lorasmith.formats.unet_names import ldm_names
from lorasmith.formats.write import in_layout
from lorasmith.models.families.sd import StableDiffusion
from lorasmith.models.load import load_model
from lorasmith.tools.merge import Source
from lorasmith.tools.merge_into_model import merge_into
from lorasmith.tools.model_files import Model, Place
from lorasmith.types import Cond, Denoiser, LayoutName

UNET = "unet/diffusion_pytorch_model.safetensors"
PLAIN = LoRA(rank=4, alpha=2)
ALGORITHMS = [PLAIN, LoHa(rank=3), LoKr(rank=2), LoKr(rank=64), OFT(rank=4), DoRA(rank=4)]


def trained(family: Any, algorithm: Any = PLAIN, preset: Any = "all", std: float = 0.1) -> AdapterSet:
    adapters = AdapterSet.new(family.denoiser, algorithm, Targets(preset=preset), 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapters.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return adapters


def written(path: Path, family: Any, adapters: AdapterSet, metadata: Any = None) -> Source:
    lora_file.write(path, adapters.file_state(family.denoiser, torch.float32), metadata or {})
    return Source.parsed(str(path))


def weights_of(folder: Path, part: str = "unet") -> dict[str, Tensor]:
    return {
        key: value for file in sorted((folder / part).glob("*.safetensors")) for key, value in load_file(file).items()
    }


def test_the_model_is_the_one_that_diffusers_fuses(tmp_path: Path, family: StableDiffusion) -> None:
    source = written(tmp_path / "a.safetensors", family, trained(family))
    assert merge_into(BASE, [Source(source.lora, 0.7)], tmp_path / "out") == len(adaptable_layers(family.denoiser.nets))
    pipe: Any = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None, requires_safety_checker=False)
    pipe.unet.float()
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors")
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    ours, base = weights_of(tmp_path / "out"), weights_of(BASE)
    assert ours.keys() == base.keys()
    for key, theirs in pipe.unet.state_dict().items():
        assert ours[key].dtype == base[key].dtype
        torch.testing.assert_close(ours[key].float(), theirs.to(base[key].dtype).float(), rtol=1e-2, atol=1e-4)
    changed = [key for key in base if not torch.equal(base[key], ours[key])]
    assert len(changed) > 70 and all(key.endswith(".weight") for key in changed)
    files = {path.relative_to(BASE) for path in BASE.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()} == files
    assert all((tmp_path / "out" / f).read_bytes() == (BASE / f).read_bytes() for f in files if f != Path(UNET))
    assert type(load_model(tmp_path / "out").denoiser).__name__ == "StableDiffusionDenoiser"


@dataclass(frozen=True)
class Base:
    """A tiny pipeline in a folder, load_model, and its encoding of a prompt."""

    folder: Path
    family: Any
    cond: Cond

    def prediction(self, name: str, denoiser: Denoiser) -> Tensor:
        """On noise."""
        latents = torch.randn(1, *TINY[name].latent, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return denoiser.predict(latents, denoiser.process.time(torch.tensor([0.5])), self.cond)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """Each is made once."""

    @cache
    def base(name: str) -> Base:
        folder = tmp_path_factory.mktemp("bases") / "base"
        made(name).save_pretrained(folder)
        family = load_model(folder)
        with torch.no_grad():
            return Base(folder, family, family.codec(torch.device("cpu")).encode_texts([PROMPTS[0]]))

    return base


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: f"{a.name}-{a.rank}")
@table("name", ["StableDiffusionXLPipeline", "FluxPipeline"], quick=["FluxPipeline"])
def test_every_algorithm_predicts_as_with_hooks(tmp_path: Path, bases: Any, name: str, algorithm: Any) -> None:
    base = bases(name)
    adapters = trained(base.family, algorithm, "attention+mlp", 0.3)
    source = written(tmp_path / "a.safetensors", base.family, adapters)
    merge_into(base.folder, [source], tmp_path / "out")
    before = base.prediction(name, base.family.denoiser)
    with attached(base.family.denoiser, adapters):
        expected = base.prediction(name, base.family.denoiser)
    found = base.prediction(name, load_model(tmp_path / "out").denoiser)
    assert (expected - before).abs().max() > 1e-3
    assert (found - expected).abs().max() < 1e-2 * (expected - before).abs().max()


def layouts(name: str) -> list[LayoutName | None]:
    """What training writes and diffusers' own; of one transformer those of the original code's layers, too."""
    found: list[LayoutName | None] = [None, "diffusers", "comfyui"]
    return found[:2] if name in ("StableDiffusionXLPipeline", "Wan 2.2") else found


NAMED = [(name, layout) for name in sorted(TINY) for layout in layouts(name)]


@table(("name", "layout"), NAMED, quick=NAMED[::4])
def test_every_family_s_layers_are_found_by_their_names(tmp_path: Path, bases: Any, name: str, layout: Any) -> None:
    """Nothing else changes."""
    base = bases(name)
    denoiser = base.family.denoiser
    adapters = trained(base.family, preset="attention+mlp")
    lora_file.write(tmp_path / "a.safetensors", in_layout(adapters, denoiser, torch.float32, layout), {})
    merge_into(base.folder, [Source.parsed(str(tmp_path / "a.safetensors"))], tmp_path / "out")
    for part, net in denoiser.nets.items():
        after = weights_of(tmp_path / "out", part)
        assert after.keys() == net.state_dict().keys()
        for key, before in net.state_dict().items():
            path = f"{part}.{key.removesuffix('.weight')}"
            if path in adapters.adapters and key.endswith(".weight"):
                with torch.no_grad():
                    before = adapters.adapters[path].merged(before)
            torch.testing.assert_close(after[key], before, rtol=1e-4, atol=1e-5)


def test_dora_with_comfyui_s_lengths_is_the_same_model(tmp_path: Path, family: StableDiffusion) -> None:
    adapters = trained(family, DoRA(rank=4), "attention")
    paper = adapters.file_state(family.denoiser, torch.float32)
    lora_file.write(tmp_path / "a.safetensors", paper, dora_magnitude.PAPER)
    comfyui = dora_magnitude.for_comfyui(paper, family.denoiser)
    lora_file.write(tmp_path / "b.safetensors", comfyui, dora_magnitude.COMFYUI)
    for name in "ab":
        merge_into(BASE, [Source.parsed(str(tmp_path / f"{name}.safetensors"))], tmp_path / name)
    one, other = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    for key in one:
        torch.testing.assert_close(one[key].float(), other[key].float(), rtol=1e-2, atol=1e-3)


def test_several_add_up_with_their_weights_and_shards_stay_shards(tmp_path: Path) -> None:
    made("FluxPipeline").save_pretrained(tmp_path / "base", max_shard_size="40KB")
    files = sorted(path.name for path in (tmp_path / "base" / "transformer").iterdir())
    assert len(files) > 3
    family = load_model(tmp_path / "base")
    a = written(tmp_path / "a.safetensors", family, trained(family))
    merge_into(tmp_path / "base", [Source(a.lora, 0.75), Source(a.lora, -0.25)], tmp_path / "twice")
    merge_into(tmp_path / "base", [Source(a.lora, 0.5)], tmp_path / "once")
    assert sorted(path.name for path in (tmp_path / "once" / "transformer").iterdir()) == files
    one, other = (weights_of(tmp_path / name, "transformer") for name in ("twice", "once"))
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)
    load_model(tmp_path / "once")


def test_a_single_file_keeps_its_names(tmp_path: Path, family: StableDiffusion) -> None:
    names = ldm_names(family.denoiser.unet.config)
    unet = {}
    for key, value in family.denoiser.unet.state_dict().items():
        stem, _, leaf = key.rpartition(".")
        unet[f"model.diffusion_model.{names[stem]}.{leaf}"] = value.half()
    text = {"cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": torch.randn(6, 4)}
    save_file(unet | text, tmp_path / "base.safetensors", {"modelspec.title": "mine"})
    adapters = trained(family)
    state = adapters.file_state(family.denoiser, torch.float32)
    layer = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    factors = {f"{layer}.lora_up.weight": torch.randn(6, 2), f"{layer}.lora_down.weight": torch.randn(2, 4)}
    save_file(state | factors, tmp_path / "a.safetensors")
    merge_into(
        tmp_path / "base.safetensors", [Source.parsed(str(tmp_path / "a.safetensors"))], tmp_path / "b.safetensors"
    )
    merged = load_file(tmp_path / "b.safetensors")
    (key,) = text
    torch.testing.assert_close(
        merged[key], text[key] + factors[f"{layer}.lora_up.weight"] @ factors[f"{layer}.lora_down.weight"]
    )
    for path, adapter in adapters.adapters.items():
        module = family.denoiser.unet.get_submodule(path.removeprefix("unet."))
        found = merged[f"model.diffusion_model.{names[path.removeprefix('unet.')]}.weight"]
        assert found.dtype == torch.float16 and isinstance(module.weight, Tensor)
        with torch.no_grad():
            expected = adapter.merged(module.weight.half().float())
        torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-3)


def test_differences_of_norms_and_biases(tmp_path: Path) -> None:
    base = weights_of(BASE)
    state = {"lora_unet_conv_norm_out.diff": torch.ones_like(base["conv_norm_out.weight"]).float()}
    state["lora_unet_conv_out.diff_b"] = torch.ones_like(base["conv_out.bias"]).float()
    state["lora_unet_conv_out.alpha"] = torch.tensor(1.0)
    save_file(state, tmp_path / "a.safetensors")
    source = Source.parsed(f"{tmp_path / 'a.safetensors'}:0.5")
    assert merge_into(BASE, [source], tmp_path / "out") == 2
    after = weights_of(tmp_path / "out")
    for key in ("conv_norm_out.weight", "conv_out.bias"):
        torch.testing.assert_close(after[key].float(), (base[key].float() + 0.5).to(base[key].dtype).float())


def factors(name: str, n_out: int = 3, n_in: int = 4) -> dict[str, Tensor]:
    return {f"{name}.lora_up.weight": torch.ones(n_out, 1), f"{name}.lora_down.weight": torch.ones(1, n_in)}


REFUSED = [
    (
        factors("lora_unet_single_blocks_0_linear1"),
        r"does not fit .*: 1 of its 1 layer does not, and it looks like one for Flux",
    ),
    (factors("lora_unet_conv_norm_out"), "cannot be merged into a weight of 1 axes"),
    (factors("lora_unet_time_embedding_linear_1"), "lora_down.weight must have the shape"),
    ({"lora_unet_conv_out.diff": torch.ones(2)}, r"diff must have the shape \[4, \d+, 3, 3\], got \[2\]"),
    (
        factors("lora_unet_time_embedding_linear_1") | factors("unet.time_embedding.linear_1"),
        "2 of its 2 layers|another name",
    ),
]


@pytest.mark.parametrize(("state", "message"), REFUSED)
def test_refusals(tmp_path: Path, state: dict[str, Tensor], message: str) -> None:
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        merge_into(BASE, [Source.parsed(str(tmp_path / "a.safetensors"))], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_becomes_infinite_leaves_nothing(tmp_path: Path, family: StableDiffusion) -> None:
    source = written(tmp_path / "a.safetensors", family, trained(family))
    shutil.copytree(BASE, tmp_path / "base")
    half = {key: value.half() for key, value in load_file(BASE / UNET).items()}
    save_file(half, tmp_path / "base" / UNET)
    with pytest.raises(ValueError, match="must be finite to be saved"):
        merge_into(tmp_path / "base", [Source(source.lora, 1e9)], tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "base"}


def test_pickles_are_left_out_with_a_warning(tmp_path: Path, family: StableDiffusion, caplog: Any) -> None:
    source = written(tmp_path / "a.safetensors", family, trained(family))
    shutil.copytree(BASE, tmp_path / "base")
    (tmp_path / "base" / "unet" / "old.bin").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        merge_into(tmp_path / "base", [source], tmp_path / "out")
    assert "old.bin is left out: a pickle" in caplog.text and not (tmp_path / "out" / "unet" / "old.bin").exists()


def test_only_what_changes_is_counted(tmp_path: Path, caplog: Any) -> None:
    """Too little for the dtype is no change."""
    name = "lora_unet_time_embedding_linear_1"
    n_out, n_in = weights_of(BASE)["time_embedding.linear_1.weight"].shape
    for alpha, count in ((1e-9, 0), (1.0, 1)):
        save_file(factors(name, n_out, n_in) | {f"{name}.alpha": torch.tensor(alpha)}, tmp_path / "a.safetensors")
        ended = lorasmith(tmp_path, "merge", "a.safetensors", "--model", "demo", "--output", f"out{count}")
        assert ended.out.startswith(f"{count} weight{'' if count == 1 else 's'} changed\n")
        assert ("no weight has changed" in caplog.text) == (not count)
        caplog.clear()


@pytest.mark.parametrize("kind", ["folder", "single file"])
def test_unknown_layers_are_left_out_where_that_is_asked_for(
    tmp_path: Path, family: StableDiffusion, kind: str, caplog: Any
) -> None:
    base, output = BASE, tmp_path / "out"
    if kind == "single file":
        base, output = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
        unet = original(family.denoiser.unet)
        save_file({f"model.diffusion_model.{key}": tensor for key, tensor in unet.items()}, base)
    n_out, n_in = weights_of(BASE)["time_embedding.linear_1.weight"].shape
    state = factors("unet.time_embedding.linear_1", n_out, n_in)
    save_file(state | factors("lora_te3_encoder_block_0") | factors("x.y"), tmp_path / "a.safetensors")
    source = Source.parsed(str(tmp_path / "a.safetensors"))
    with pytest.raises(
        ValueError, match=r"a.safetensors does not fit .*2 of its 3 layers do|of its 3 layers have names"
    ):
        merge_into(base, [source], output)
    assert merge_into(base, [source], output, ignore_unknown=True) == 1
    assert "2 layers that the model does not have are left out: lora_te3_encoder_block_0; x.y" in caplog.messages
    save_file(factors("x.y"), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="1 of its 1 layer does not"):
        merge_into(base, [Source.parsed(str(tmp_path / "b.safetensors"))], output, ignore_unknown=True, overwrite=True)


def test_the_command(tmp_path: Path, family: StableDiffusion) -> None:
    written(tmp_path / "a.safetensors", family, trained(family, preset="attention"))
    arguments = ("merge", "a.safetensors:0.5", "--model", "demo", "--output")
    ended = lorasmith(tmp_path, *arguments, "out")
    assert ended.code == 0 and "weights changed" in ended.out and "out" in ended.out
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    again = lorasmith(tmp_path, *arguments, "out")
    assert (again.code, again.err) == (2, "lorasmith: output must not be there yet without --overwrite, got out\n")
    assert lorasmith(tmp_path, *arguments, "out", "--overwrite").code == 0
    for output, message in (
        ("b.safetensors", "output must be a folder, as the model is, got b.safetensors"),
        ("no/out", "output must be in a folder that exists, got no/out"),
    ):
        refused = lorasmith(tmp_path, *arguments, output)
        assert (refused.code, refused.err) == (2, f"lorasmith: {message}\n")
    (tmp_path / "mine").mkdir()
    refused = lorasmith(tmp_path, *arguments, "mine", "--overwrite")
    assert (refused.code, refused.err) == (
        2,
        "lorasmith: output must be a diffusers folder to be written over, got mine\n",
    )
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "out", "mine"}


def test_a_name_that_means_two_modules_means_none() -> None:
    model = Model.opened(BASE)
    assert model.place("lora_unet_conv_in") == Place("unet", "conv_in")
    assert model.place("diffusion_model.input_blocks.0.0") == Place("unet", "conv_in")
    assert model.place("lora_te_text_model_encoder_layers_0_mlp_fc1") is not None
    assert model.place("conv_in_nowhere") is None
