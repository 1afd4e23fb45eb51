"""metadata: what is set and stripped; the tensors stay byte for byte, whatever their dtype, and are never held."""

import json
import struct
from pathlib import Path

import pytest
import torch
from commands import lorasmith
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorasmith.tools.metadata import changes_of, rewrite


def data_of(path: Path) -> bytes:
    """All behind the head."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 + length :]


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


PRIVATE = {
    "ss_dataset_dirs": '{"10_me": {"n_repeats": 10}}',
    "ss_tag_frequency": '{"10_me": {"a cat": 3}}',
    "prompt": '{"3": {"inputs": {}}}',
    "ss_training_comment": "for my friend",
    "made_of": "/home/someone/pictures",
    "note": 'the file "C:\\Users\\someone\\cats"',
    "listing": '["~/cats"]',
}
PUBLIC = {
    "ss_network_dim": "8", "ss_base_model_version": "sd_v1", "modelspec.prediction_type": "epsilon",
}  # fmt: skip


def test_tensors_stay_byte_for_byte(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5).bfloat16(), "a": torch.randn(2).to(torch.float8_e4m3fn), "c": torch.tensor(3.0),
        "empty": torch.empty(0, 4), "i": torch.arange(5),
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors", PRIVATE | PUBLIC)
    before = (tmp_path / "a.safetensors").read_bytes()
    written = rewrite(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", changes={"modelspec.title": "new = better"}, strip=True
    )
    assert written.left_out == sorted(PRIVATE) and not written.reduced
    assert written.metadata == PUBLIC | {"modelspec.title": "new = better"}
    assert metadata_of(tmp_path / "b.safetensors") == written.metadata
    assert data_of(tmp_path / "b.safetensors") == data_of(tmp_path / "a.safetensors")
    loaded = load_file(tmp_path / "b.safetensors")
    assert all(
        torch.equal(loaded[k].view(-1).view(torch.uint8), tensors[k].view(-1).view(torch.uint8)) for k in tensors
    )
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_dtypes_that_torch_has_not_are_copied_too(tmp_path: Path) -> None:
    head = json.dumps({"x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + b"\1\2\3")
    rewrite(tmp_path / "a.safetensors", tmp_path / "b.safetensors", changes={"k": "v"}, strip=False)
    assert data_of(tmp_path / "b.safetensors") == b"\1\2\3" and metadata_of(tmp_path / "b.safetensors") == {"k": "v"}


@pytest.mark.parametrize("setting", ["x", "=x", " =x", ""])
def test_settings_that_are_none(setting: str) -> None:
    with pytest.raises(ValueError, match=f"^set must be key=value, got '{setting}'$"):
        changes_of([setting])


def test_the_command(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", PRIVATE | PUBLIC)
    shown = lorasmith(tmp_path, "metadata", "a.safetensors")
    assert shown.out == "".join(f"{key}\t{value}\n" for key, value in sorted((PRIVATE | PUBLIC).items())) + "\n"
    ended = lorasmith(
        tmp_path, "metadata", "a.safetensors", "--strip", "--set", "modelspec.author=me", "--set", "x=", "--output",
        "b.safetensors",
    )  # fmt: skip
    assert ended.code == 0 and "for my friend" not in ended.out and "ss_dataset_dirs" in ended.out
    assert metadata_of(tmp_path / "b.safetensors") == PUBLIC | {"modelspec.author": "me", "x": ""}
    missing = (["--strip"], ["--set", "x=1"], ["--strip", "--overwrite"])
    itself = "--output a.safetensors --overwrite changes the file itself"
    for arguments, message in (
        *((arguments, f"--set and --strip need --output: {itself}") for arguments in missing),
        (["--output", "c.safetensors"], "output is written only with --set or --strip"),
        (
            ["--strip", "--output", "a.safetensors"],
            "output must not be there yet without --overwrite, got a.safetensors",
        ),
        (["--strip", "--output", "c.txt"], "output must be a .safetensors file, got c.txt"),
        (["--strip", "--output", "no/c.safetensors"], "output must be in a folder that exists, got no/c.safetensors"),
    ):
        refused = lorasmith(tmp_path, "metadata", "a.safetensors", *arguments)
        assert (refused.code, refused.err) == (2, f"lorasmith: {message}\n")
    ended = lorasmith(tmp_path, "metadata", "a.safetensors", "--strip", "--output", "a.safetensors", "--overwrite")
    assert ended.code == 0 and metadata_of(tmp_path / "a.safetensors") == PUBLIC
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "b.safetensors"}


def test_json(tmp_path: Path) -> None:
    odd = {"ss_network_args": '{"conv_dim": 4, "x": "y"}', "long": "x \t\n\x1b" * 99, "grün": "猫"}
    metadata = PRIVATE | PUBLIC | odd
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", metadata)
    shown = lorasmith(tmp_path, "metadata", "a.safetensors", "--json")
    assert (shown.code, shown.err) == (0, "") and json.loads(shown.out) == {"metadata": metadata}
    ended = lorasmith(tmp_path, "metadata", "a.safetensors", "--strip", "--json", "--output", "b.safetensors")
    assert (ended.code, ended.err) == (0, "") and json.loads(ended.out) == {
        "metadata": PUBLIC | {"ss_network_args": '{"conv_dim": 4}'},
        "left_out": sorted([*PRIVATE, "long", "grün"]),
        "reduced": ["ss_network_args"],
        "output": "b.safetensors",
    }
