"""LoRA files: bytes, other readers, refusals."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import LoRA
from lorasmith.adapters.hooks import attached
from lorasmith.adapters.targets import Targets
from lorasmith.formats import lora_file
from lorasmith.formats.read import adapters_from
from lorasmith.models.families.sd import StableDiffusion
from lorasmith.prepare.share import shared_copy
from lorasmith.storage.atomic import remove_partial

METADATA = {f"key{i}": str(i) for i in range(20)}


def trained(family: StableDiffusion, preset: Any = "all", rank: int = 4) -> AdapterSet:
    adapters = AdapterSet.new(family.denoiser, LoRA(rank=rank, alpha=2.0), Targets(preset=preset), 0)
    for parameter in adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    return adapters


@pytest.mark.slow
def test_equal_content_makes_equal_bytes_in_every_process(tmp_path: Path) -> None:
    """The library alone orders metadata by a hash that changes between processes."""
    code = (
        "import torch, sys; from lorasmith.formats.lora_file import file_pieces;"
        "m = {f'key{i}': str(i) for i in range(20)};"
        "sys.stdout.buffer.write(b''.join(file_pieces({'b': torch.ones(2), 'a': torch.zeros(3, 1)}, m)))"
    )
    outputs = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    state = {"a": torch.zeros(3, 1), "b": torch.ones(2)}
    assert outputs == {b"".join(lora_file.file_pieces(state, dict(reversed(METADATA.items()))))}


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    state = {"x.alpha": torch.tensor(3.0), "x.lora_up.weight": torch.randn(3, 2).bfloat16()}
    lora_file.write(tmp_path / "lora.safetensors", state, {"clé": 'ü "quoted" \n'})
    loaded = load_file(tmp_path / "lora.safetensors")
    assert all(torch.equal(loaded[key], state[key]) for key in state) and len(loaded) == 2
    assert lora_file.read(tmp_path / "lora.safetensors")[1] == {"clé": 'ü "quoted" \n'}
    (length,) = struct.unpack("<Q", (tmp_path / "lora.safetensors").read_bytes()[:8])
    assert length % 8 == 0


def test_it_is_what_the_library_writes_but_for_the_metadata() -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    state = {f"{i}{dtype}": torch.randn(2, i, 3).to(dtype) for i in range(3) for dtype in dtypes}
    state |= {"number": torch.tensor(2.0), "turned": torch.randn(3, 4).t(), "part": torch.randn(4, 4)[1:3]}
    head, *rest = lora_file.file_pieces(state, {})
    theirs = save({key: tensor.contiguous() for key, tensor in state.items()})
    (length,) = struct.unpack("<Q", theirs[:8])
    assert b"".join(rest) == theirs[8 + length :]
    assert json.loads(bytes(head)[8:]) == {"__metadata__": {}, **json.loads(theirs[8 : 8 + length])}


def test_a_round_trip_is_bit_for_bit(family: StableDiffusion, tmp_path: Path) -> None:
    state = trained(family).file_state(family.denoiser, torch.float32)
    lora_file.write(tmp_path / "a.safetensors", state, {})
    back = adapters_from(lora_file.read(tmp_path / "a.safetensors")[0], family.denoiser)
    again = back.file_state(family.denoiser, torch.float32)
    assert list(again) == list(state) and all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize("preset", ["attention", "all"])
def test_diffusers_draws_the_same_picture_from_the_file(
    family: StableDiffusion, tmp_path: Path, preset: str, latents: Tensor
) -> None:
    """Every key is used, and 5 denoising steps agree with our hooks."""
    adapters = trained(family, preset)
    state = adapters.file_state(family.denoiser, torch.float32)
    lora_file.write(tmp_path / "lora.safetensors", state, {})
    denoiser = shared_copy(family.denoiser, torch.device("cpu"), torch.float32)
    pipe = family.pipeline(denoiser)
    pipe.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def picture() -> Tensor:
        return pipe("red apple", latents=latents[:1], num_inference_steps=5, output_type="pt", height=64, width=64)[0]

    without = picture()
    with attached(denoiser, adapters):
        ours = picture()
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    loaded = {name for name, _ in pipe.unet.named_parameters() if "lora_" in name}
    assert len(loaded) == 2 * len(adapters.adapters)
    torch.testing.assert_close(picture(), ours, atol=1e-4, rtol=0)
    assert float((ours - without).abs().max()) > 0.05


def test_nothing_is_left_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        lora_file.write(tmp_path / "lora.safetensors", {"a": torch.ones(1)}, {})
    assert not list(tmp_path.iterdir())


def test_an_existing_file_survives_a_write_that_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    lora_file.write(path, {"a": torch.ones(1)}, {})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="^b must be finite to be saved, got NaN or infinity$"):
        lora_file.write(path, {"b": torch.tensor([float("nan")])}, {})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=r"lora\.pt must be a safetensors file: a pickle \(\.pt\) can run code"):
        lora_file.read(tmp_path / "lora.pt")
    save_file({"a": torch.ones(100)}, tmp_path / "cut.safetensors")
    content = (tmp_path / "cut.safetensors").read_bytes()
    for length in (0, 4, 20, len(content) - 1):
        (tmp_path / "cut.safetensors").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.safetensors (is empty|is cut off|must be a safetensors file)"):
            lora_file.read(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="file not found"):
        lora_file.read(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match="got a folder"):
        lora_file.read(tmp_path)


def test_base_hash_is_of_the_values(family: StableDiffusion) -> None:
    twin = shared_copy(family.denoiser, torch.device("cpu"), torch.float64)
    assert lora_file.base_hash(twin) == lora_file.base_hash(family.denoiser)
    next(iter(twin.unet.parameters())).data.view(-1)[0] += 1
    assert lora_file.base_hash(twin) != lora_file.base_hash(family.denoiser)


def test_the_header_is_sorted() -> None:
    content = b"".join(lora_file.file_pieces({"b": torch.ones(1), "a": torch.ones(1)}, METADATA))
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert list(header["__metadata__"]) == sorted(METADATA)


def test_what_killed_writers_left_is_removed_files_and_folders_alike(tmp_path: Path) -> None:
    (tmp_path / ".a.safetensors.1.partial").touch()
    (tmp_path / ".b.safetensors.x.partial" / "0").mkdir(parents=True)
    (tmp_path / "c.safetensors").touch()
    remove_partial([tmp_path])
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]
