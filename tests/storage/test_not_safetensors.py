"""Git LFS pointers in the place of texts and pictures: each tool that needs the file names it, and no other does."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lorasmith.data.folder import examples
from lorasmith.data.images import picture
from lorasmith.demo import BASE
from lorasmith.models.load import load_model
from lorasmith.models.meta import skeleton
from lorasmith.models.sources.kind import refuse_unfit_source
from lorasmith.tools.inspect import inspected
from lorasmith.tools.lora_layers import LoRAFile
from lorasmith.tools.model_files import Model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:9f\nsize 1234\n"
SAID = "is a Git LFS pointer, not the file itself: fetch it with git lfs pull"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The embedded model, with links in the place of its files."""
    shutil.copytree(BASE, tmp_path / "model", copy_function=lambda one, other: Path(other).symlink_to(one))
    return tmp_path / "model"


TRAINING: dict[str, Callable[[Path], Any]] = {
    "checks": lambda p: refuse_unfit_source(str(p), None),
    "load": load_model,
}
NAMES: dict[str, Callable[[Path], Any]] = {"merge, extract": Model.opened}
SHAPES: dict[str, Callable[[Path], Any]] = {"convert": lambda p: skeleton(p, with_texts=True)}
INSPECT: dict[str, Callable[[Path], Any]] = {"inspect": inspected}
NEEDED_BY = {
    "model_index.json": TRAINING | NAMES | SHAPES | INSPECT,
    "unet/config.json": TRAINING | NAMES | SHAPES,
    "scheduler/scheduler_config.json": TRAINING,
    "tokenizer/vocab.json": TRAINING,
    "tokenizer/merges.txt": TRAINING,
    "tokenizer/spiece.model": TRAINING,
    "text_encoder/model.safetensors.index.json": TRAINING,
}
EVERY = TRAINING | NAMES | SHAPES | INSPECT


@pytest.mark.parametrize("name", NEEDED_BY)
def test_a_pointer_in_a_folder_is_named_where_the_file_is_needed(name: str, model: Path) -> None:
    (model / name).unlink(missing_ok=True)
    (model / name).write_bytes(POINTER)
    for tool, read in EVERY.items():
        if tool in NEEDED_BY[name]:
            with pytest.raises(ValueError, match=f"^{model / name} {SAID}$"):
                read(model)
        else:
            read(model)


def test_pointers_beside_a_file_of_another_program(tmp_path: Path) -> None:
    save_file({"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.ones(2, 1)}, tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(POINTER)
    for read in (LoRAFile.opened, inspected):
        with pytest.raises(ValueError, match=f"{tmp_path / 'adapter_config.json'} {SAID}$"):
            read(tmp_path / "a.safetensors")


def test_pointers_among_pictures_and_captions(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(POINTER)
    with pytest.raises(ValueError, match=f"{tmp_path / 'a.txt'} {SAID}$"):
        examples(tmp_path)
    (tmp_path / "b.png").write_bytes(POINTER)
    with pytest.raises(ValueError, match=f"cannot read picture {tmp_path / 'b.png'}: it {SAID}$"):
        picture(tmp_path / "b.png")


def test_gguf_files_in_a_folder_are_called_that(model: Path) -> None:
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    (model / "unet" / "flux-Q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="unet holds flux-Q4.gguf, which is a GGUF file, which cannot be read: use"):
        load_model(model)
