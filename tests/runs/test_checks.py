"""What is refused before a model is loaded or a picture encoded, and that finding out imports little."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import made
from safetensors.torch import save_file
from tiny import made as pipeline

from lorasmith.config.values import configured, merged
from lorasmith.demo import BASE
from lorasmith.formats import lora_file
from lorasmith.runs import run
from lorasmith.runs.checks import checked, checked_sample
from lorasmith.runs.run import opened_run

Prepare = Callable[[Path], object]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with the folder `cats` of two pictures."""
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "cats", "a cat", "a black cat")
    return tmp_path


def config(**values: Any) -> Any:
    base = {"model": str(BASE), "device": "cpu", "data": {"folder": "cats"}, "steps": 1, "sampling": {"prompts": []}}
    return configured(merged(base, values))


def nothing(home: Path) -> None:
    pass


def linked(home: Path) -> None:
    (home / "link").symlink_to("cats", target_is_directory=True)


def a_file(home: Path) -> None:
    (home / "file").write_text("x")


def empty(home: Path) -> None:
    (home / "empty").mkdir()


def sub_folder(home: Path) -> None:
    made(home / "cats" / "more", "a tabby")


def no_lora(home: Path) -> None:
    save_file({"x.weight": torch.ones(2, 2)}, home / "weights.safetensors")


def lora(home: Path, key: str = "lora_te2_text_model_encoder_layers_0_mlp_fc1", size: int = 16) -> None:
    state = {f"{key}.lora_down.weight": torch.ones(4, size), f"{key}.lora_up.weight": torch.ones(size, 4)}
    lora_file.write(home / "lora.safetensors", state, {})


IN_TRAINING = r"must hold pictures that are not trained on, but all of them are in data\.folder too"
AT_ONCE: list[tuple[Prepare, dict[str, Any], str]] = [
    (
        nothing,
        {"existing_lora": "x.safetensors"},
        r"existing_lora: x\.safetensors must be a safetensors file: file not found",
    ),
    (a_file, {"existing_lora": "file"}, "existing_lora: file must be a safetensors file, got text"),
    (
        no_lora,
        {"existing_lora": "weights.safetensors"},
        "existing_lora: .* must be a LoRA, got tensors such as x.weight",
    ),
    (nothing, {"targets": {"preset": "none"}}, "targets must match a layer, got preset 'none' and no include"),
    (a_file, {"output": "file/x"}, "output must be in a folder, got file.x: file is a file"),
    (a_file, {"output": "file"}, "output must be a folder that does not exist yet"),
    (nothing, {"model": "none/such/model"}, r"none.such.model must be a diffusers folder .*, got no such folder"),
    (nothing, {"model": "x.safetensors"}, r"x\.safetensors must be a safetensors file: file not found"),
    (lora, {"model": "lora.safetensors"}, r"lora\.safetensors must be a model, got a LoRA"),
    (nothing, {"encoders": str(BASE)}, "encoders must be none where model is no single file"),
    (nothing, {"data": {"held_out": "dogs"}}, r"data\.held_out: picture folder dogs does not exist"),
    (empty, {"data": {"drift": "empty"}}, r"data\.drift: no pictures .* in or below empty"),
    (nothing, {"data": {"held_out": "cats"}}, rf"data\.held_out {IN_TRAINING}"),
    (linked, {"data": {"drift": "link"}}, rf"data\.drift {IN_TRAINING}"),
    (sub_folder, {"data": {"held_out": "cats/more"}}, rf"data\.held_out {IN_TRAINING}"),
    (nothing, {"text_encoder": {"learning_rate": 1e-4}}, r"text_encoder\.train must be true where"),
    (nothing, {"non_finite": {"returns": 1}}, r"checkpoints\.steps must be set where non_finite\.returns is"),
    (nothing, {"sharded": True}, "sharded must be False in a single process"),
    (nothing, {"offloading": True}, "offloading must be False on cpu"),
    (nothing, {"base_dtype": "int8", "offloading": True}, "base_dtype must be none with offloading"),
    (nothing, {"base_dtype": "int8"}, "base_dtype int8 needs the extra 'quantized'"),
    (nothing, {"quantized_backward": True}, "quantized_backward needs the extra 'quantized'"),
    (nothing, {"tensorboard": True}, "tensorboard needs the extra 'tensorboard'"),
    (nothing, {"device": "cuda:99"}, "device must be one that this machine has, got cuda:99"),
]


@pytest.mark.parametrize(("prepare", "values", "message"), AT_ONCE)
def test_what_needs_no_model_is_refused_without_one(
    home: Path, monkeypatch: pytest.MonkeyPatch, prepare: Prepare, values: dict[str, Any], message: str
) -> None:
    for package in ("torchao", "tensorboard"):
        for module in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
            monkeypatch.setitem(sys.modules, module, None)
    prepare(home)
    with pytest.raises(ValueError, match=f"^{message}"):
        checked(config(**values))


@pytest.mark.slow
def test_finding_out_imports_no_library_of_models() -> None:
    heavy = {"diffusers", "transformers", "matplotlib", "torchao", "accelerate"}
    code = (
        f"import sys, lorasmith.cli.main, lorasmith.config, lorasmith.runs.checks; print({heavy} & sys.modules.keys())"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("set()\n", "")


def other_layers(home: Path) -> None:
    lora(home, "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", size=8)


def chroma(home: Path) -> None:
    pipeline("ChromaPipeline").save_pretrained(home / "chroma")


BY_LAYERS: list[tuple[Prepare, dict[str, Any], str]] = [
    (
        lora,
        {"existing_lora": "lora.safetensors"},
        "existing_lora: the LoRA does not fit .* the model has no such layer",
    ),
    (other_layers, {"existing_lora": "lora.safetensors"}, "existing_lora: the LoRA does not fit .* must have"),
    (nothing, {"targets": {"include": ["x"]}, "adapter": "DoRA"}, "targets must match a layer, got preset 'none'"),
    (nothing, {"adapter": "LoHa", "file_layout": "diffusers"}, "file_layout diffusers: diffusers reads LoRA"),
    (chroma, {"model": "chroma", "text_encoder": {"train": True}}, r"text_encoder\.train must be false for this model"),
]


@pytest.mark.parametrize(("prepare", "values", "message"), BY_LAYERS)
def test_what_the_layers_decide_is_refused_before_weights_are_loaded(
    home: Path, monkeypatch: pytest.MonkeyPatch, prepare: Prepare, values: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(run, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    prepare(home)
    with pytest.raises(ValueError, match=f"^{message}"), opened_run(checked(config(**values))):
        pass
    assert not (home / "runs").exists()


def test_pictures_of_the_same_bytes_are_named(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    made(home / "dogs", "a dog", "a dog", "a dog")
    request = checked(config(data={"held_out": "dogs"}))
    assert len(request.measured["validation"]) == 3
    assert "data.held_out: pictures that are trained on as well" in caplog.text and "2 (0.png, 1.png)" in caplog.text


def test_samples_are_numbered_or_refused_where_their_file_is_there(home: Path) -> None:
    asked = config(data={"folder": None})
    assert checked_sample(asked, None, None, overwrite=False)[0] == Path("samples.png")
    for name in ("samples.png", "samples-2.png"):
        (home / name).touch()
    assert checked_sample(asked, None, None, overwrite=False)[0] == Path("samples-3.png")
    with pytest.raises(ValueError, match=r"^output must not be there yet without --overwrite, got samples\.png$"):
        checked_sample(asked, None, Path("samples.png"), overwrite=False)
    assert checked_sample(asked, None, Path("samples.png"), overwrite=True)[0] == Path("samples.png")
    with pytest.raises(ValueError, match=r"^x\.safetensors must be a safetensors file: file not found"):
        checked_sample(asked, Path("x.safetensors"), None, overwrite=False)
