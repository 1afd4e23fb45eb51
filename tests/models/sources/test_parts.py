"""Parts of folders: whole, or refused by name; each kind of damage to each part of each family."""

import logging
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import lorasmith
from commands import made as pictures_in
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save
from tiers import table
from tiny import TINY, made
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from lorasmith.demo import BASE
from lorasmith.models.load import load_model
from lorasmith.models.sources.components import MODULES, FolderComponents
from lorasmith.models.sources.parts import loaded
from lorasmith.tools.model_files import Model

State = dict[str, Tensor]
CPU = torch.device("cpu")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167540\n"
FAMILIES = sorted(TINY.keys() - {"Wan 2.2", "Wan 2.2 5B"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each is written once."""

    @cache
    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp("folders") / "model"
        made(name).save_pretrained(path)
        return path

    return folder


@contextmanager
def changed(file: Path, change: Callable[[State], State]) -> Iterator[None]:
    """The file with other tensors, as long as this is open."""
    before = file.read_bytes()
    with safe_open(file, framework="pt") as opened_file:
        metadata = opened_file.metadata()
    replace(file, save(change({key: tensor.clone() for key, tensor in load_file(file).items()}), metadata))
    try:
        yield
    finally:
        replace(file, before)


def replace(file: Path, content: bytes) -> None:
    """Another file under its name, as the one before may still be mapped."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def without(key: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if name != key}


def renamed(key: str) -> Callable[[State], State]:
    return lambda state: {f"strange.{name}" if name == key else name: tensor for name, tensor in state.items()}


def widened(key: str) -> Callable[[State], State]:
    return lambda state: {name: tensor[None] if name == key else tensor for name, tensor in state.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_part_is_loaded_whole_or_refused(name: str, folders: Callable[[str], Path]) -> None:
    components = FolderComponents(folders(name))
    for part in [part for part in MODULES if components.has(part)]:
        (file,) = (components.path / part).glob("*.safetensors")
        key = random.Random(f"{name} {part}").choice(sorted(load_file(file)))
        for change, message in (
            (without(key), f"cannot load .*{part}: (1 tensor is|2 tensors are) missing, such as "),
            (renamed(key), f"cannot load .*{part}: (1 tensor is|2 tensors are) missing, such as "),
            (widened(key), rf"cannot load .*{part}: .*shape"),
        ):
            with changed(file, change), pytest.raises(ValueError, match=message) as raised:
                components.part(part, None)
            assert "\n" not in str(raised.value)
        before = file.read_bytes()
        for content, message in (
            (before[:-3], f"{part}/{file.name} is cut off: 3 of its .* bytes are missing"),
            (LFS, f"{part}/{file.name} is a Git LFS pointer, not the file itself: fetch it with git lfs pull"),
        ):
            replace(file, content)
            with pytest.raises(ValueError, match=message):
                components.part(part, None)
        replace(file, before)


def test_the_command_refuses_an_incomplete_text_encoder(tmp_path: Path) -> None:
    model = Path(shutil.copytree(BASE, tmp_path / "model"))
    pictures_in(tmp_path / "pictures", "a cat")
    given = ("train", "pictures", "--model", "model", "--device", "cpu", "--steps", "1", "--sampling.prompts", "[]")
    for part in ("text_encoder", "unet", "vae"):
        (file,) = (model / part).glob("*.safetensors")
        with changed(file, without(sorted(load_file(file))[5])):
            ended = lorasmith(tmp_path, *given)
        assert ended.code == 2 and ended.err.count("\n") == 1 and not (tmp_path / "runs").exists()
        assert f"model/{part}: 1 tensor is missing, such as " in ended.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, "is a Git LFS pointer, not the file itself: fetch it with git lfs pull"),
        (b"", "is empty"),
        (b"<!DOCTYPE html>\n<html><head><title>404</title>", r"is a web page \(HTML\), not the file itself"),
        (b"\n <html lang=en>", r"is a web page \(HTML\), not the file itself"),
        (b"GGUF\3\0\0\0" + bytes(64), "is a GGUF file, which cannot be read"),
        (b"PK\3\4" + bytes(64), "is a zip archive or a pickle of torch.save"),
        (bytes(4096), "begins with zeros: its download was not finished"),
        (b"Access to model x is restricted.", "must be a safetensors file, got text$"),
        ("für x".encode("utf-16"), "must be a safetensors file, got text$"),
        ("ü".encode() * 255 + b"x" + "ü".encode(), "must be a safetensors file, got text$"),
        (b"x", "must be a safetensors file, got text$"),
        (b"\1", "must be a safetensors file, but is too short$"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "must be a safetensors file, but does not begin as one$"),
    ],
)
def test_what_lies_in_the_place_of_weights_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(BASE, tmp_path / "model"))
    single = tmp_path / "model.safetensors"
    single.write_bytes(content)
    (file,) = (model / "text_encoder").glob("*.safetensors")
    replace(file, content)
    for action, path in (
        (lambda: load_model(single), single),
        (lambda: load_model(model).codec(CPU), file),
        (lambda: Model.opened(model), file),
    ):
        with pytest.raises(ValueError, match=f"{path} {message}") as raised:
            action()
        assert "\n" not in str(raised.value)


def everything(net: Any) -> State:
    """Parameters, buffers, and what modules keep as plain tensors."""
    plain = {
        f"{path}.{name}": value
        for path, module in net.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }
    return {**dict(net.named_parameters()), **dict(net.named_buffers()), **plain}


@pytest.mark.parametrize("name", sorted(TINY))
@table("dtype", [None, torch.bfloat16, torch.float32], quick=[torch.bfloat16])
def test_parts_of_diffusers_are_loaded_as_its_own_loader_does(
    name: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    made(name).to(torch.bfloat16).save_pretrained(tmp_path)
    components = FolderComponents(tmp_path)
    for part in [part for part in MODULES if components.has(part) and components.index[part][0] == "diffusers"]:
        found = components.part(part, dtype)
        expected = type(found).from_pretrained(tmp_path / part, dtype=dtype or torch.bfloat16)
        ours, theirs = everything(found), everything(expected)
        assert ours.keys() == theirs.keys() and not found.training
        for key, tensor in theirs.items():
            assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key


def test_older_names_of_a_vae_s_attention(tmp_path: Path) -> None:
    vae = tmp_path / "vae"
    AutoencoderKL(norm_num_groups=4, block_out_channels=(8,)).save_pretrained(vae)
    (file,) = vae.glob("*.safetensors")
    state, old = load_file(file), {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for present, former in old.items():
        state = {key.replace(f".{present}.", f".{former}."): tensor for key, tensor in state.items()}
    assert len(state.keys() - load_file(file).keys()) == 16
    replace(file, save(state, {"format": "pt"}))
    ours, theirs = loaded(AutoencoderKL, vae, None), AutoencoderKL.from_pretrained(vae)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in ours.state_dict().items())


def test_tensors_without_a_place_are_named_in_a_line(
    folders: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    components = FolderComponents(folders("FluxPipeline"))
    extra = {"adapter.down.weight": torch.ones(2), "adapter.up.weight": torch.ones(2), "position_ids": torch.ones(1)}
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        (file,) = (components.path / part).glob("*.safetensors")
        caplog.clear()
        with changed(file, lambda state: state | extra), caplog.at_level(logging.WARNING, "lorasmith"):
            components.part(part, None)
        own = [record.message for record in caplog.records if record.name.startswith("lorasmith")]
        assert own == [
            f"{components.path / part}: 2 tensors have no place in the model and are not used, "
            "such as adapter.down.weight"
        ]


def test_names_of_another_version_are_called_that(folders: Callable[[str], Path]) -> None:
    components = FolderComponents(folders("FluxPipeline"))
    (file,) = (components.path / "text_encoder").glob("*.safetensors")
    with changed(file, lambda state: {f"strange.{key}": tensor for key, tensor in state.items()}):
        with pytest.raises(ValueError, match="tensors are missing, .* may be those of another version of transformers"):
            components.part("text_encoder", None)


def test_tied_weights_are_there_under_either_name(tmp_path: Path) -> None:
    config = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    (file,) = (tmp_path / "t5").glob("*.safetensors")
    table = load_file(file)["shared.weight"]
    twin, other = "encoder.embed_tokens.weight", without("shared.weight")
    for change in (lambda s: s, lambda s: s | {twin: table.clone()}, lambda s: other(s | {twin: table})):
        with changed(file, change):
            found = loaded(T5EncoderModel, tmp_path / "t5", None)
        assert torch.equal(found.shared.weight, table) and torch.equal(found.encoder.embed_tokens.weight, table)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A text encoder in several files."""
    made("FluxPipeline").text_encoder_2.save_pretrained(tmp_path / "text_encoder_2", max_shard_size="4KB")
    assert len(list((tmp_path / "text_encoder_2").glob("*.safetensors"))) > 2
    return tmp_path / "text_encoder_2"


def test_shards_are_complete(shards: Path) -> None:
    loaded(T5EncoderModel, shards, None)
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    lost = sorted(load_file(second))[0]
    with changed(second, without(lost)):
        with pytest.raises(ValueError, match=f"{second} lacks 1 tensor that model.* names, such as {lost}"):
            loaded(T5EncoderModel, shards, None)
    content = first.read_bytes()
    replace(first, LFS)
    with pytest.raises(ValueError, match=f"{first} is a Git LFS pointer"):
        loaded(T5EncoderModel, shards, None)
    first.unlink()
    (shards.parent / "model_index.json").write_text("{}")
    for action in (lambda: loaded(T5EncoderModel, shards, None), lambda: Model.opened(shards.parent)):
        with pytest.raises(ValueError, match=f"{shards} must hold {first.name}, which model.* names, but it does not"):
            action()
    replace(first, content)
    (shards / "model.safetensors.index.json").write_bytes(LFS)
    with pytest.raises(ValueError, match="index.json is a Git LFS pointer"):
        loaded(T5EncoderModel, shards, None)
    (shards / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="index.json must say in weight_map which file holds each tensor"):
        loaded(T5EncoderModel, shards, None)
    (shards / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="must hold model.safetensors.index.json, which says"):
        loaded(T5EncoderModel, shards, None)


def test_quantised_parts_of_folders_are_refused(folders: Callable[[str], Path]) -> None:
    components = FolderComponents(folders("FluxPipeline"))
    config = components.path / "text_encoder_2" / "config.json"
    before = config.read_text()
    config.write_text(before.replace("{", '{"quantization_config": {"quant_method": "bitsandbytes"},', 1))
    with pytest.raises(ValueError, match="got bitsandbytes as quantization_config in .*text_encoder_2/config.json"):
        components.part("text_encoder_2", None)
    config.write_text(before)
    (file,) = (components.path / "text_encoder_2").glob("*.safetensors")
    key = next(key for key in sorted(load_file(file)) if key.endswith("q.weight"))
    scale = {key.replace("weight", "scale_weight"): torch.tensor(2.0)}
    with changed(file, lambda state: state | scale):
        with pytest.raises(
            ValueError, match="as scales of text encoders are not read, got .*q.weight with .*scale_weight"
        ):
            components.part("text_encoder_2", None)


def test_an_open_pipeline_without_weights_is_refused() -> None:
    pipe: Any = made("FluxPipeline")
    pipe.text_encoder_2.to("meta")
    with pytest.raises(ValueError, match="must hold its weights, but .* tensors are missing of its text_encoder_2"):
        load_model(pipe)
