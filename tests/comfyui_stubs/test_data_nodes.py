"""Data sets: folders, sizes, files that hold what they were given and never a pickle."""

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from stand_ins import entry, latents
from torch import Tensor


class Encoders:
    """A VAE and a CLIP that keep what they see."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []

    def encode(self, image: Tensor) -> Tensor:
        self.images.append(image)
        return image.movedim(-1, 1)[..., ::8, ::8]

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list[Any]:
        return [[torch.zeros(1, 2, 5), {"text": text}]]


def test_a_folder_becomes_latents_and_conditioning(folders: Path) -> None:
    from pack.data_nodes import LorasmithDataset

    for name, size in (("a.png", (64, 64)), ("2_cats/b.png", (128, 64))):
        path = folders / "input" / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (255, 0, 0)).save(path)
        path.with_suffix(".txt").write_text(f"caption of {path.name}")
    both = Encoders()
    some, positive, images, captions = LorasmithDataset.execute("pictures", both, both, 128).args
    found = [
        (caption, tuple(latent["samples"].shape), cond[0][1]["text"], tuple(image.shape))
        for caption, latent, cond, image in zip(captions, some, positive, images, strict=True)
    ]
    assert sorted(found) == sorted(
        [("caption of a.png", (1, 3, 16, 16), "caption of a.png", (1, 128, 128, 3))]
        + [("caption of b.png", (1, 3, 8, 24), "caption of b.png", (1, 64, 192, 3))] * 2
    )
    assert len(both.images) == 2 and torch.equal(both.images[0][0, 0, 0], torch.tensor([1.0, 0.0, 0.0]))
    (listed,) = [w for w in LorasmithDataset.define_schema().inputs if w.id == "folder"]
    assert listed.declared["options"] == ["pictures", "pictures/2_cats"]
    with pytest.raises(ValueError, match="^a name must stay inside input, got"):
        LorasmithDataset.execute("../output", both, both, 128)


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_a_change_behind_a_link_is_seen(folders: Path) -> None:
    from pack.data_nodes import LorasmithDataset

    elsewhere = folders / "elsewhere"
    (folders / "input" / "pictures").mkdir(parents=True)
    elsewhere.mkdir()
    (folders / "input" / "pictures" / "link").symlink_to(elsewhere)
    Image.new("RGB", (64, 64)).save(elsewhere / "a.png")
    seen = [LorasmithDataset.fingerprint_inputs("pictures")]
    for text in ("a cat", "a dog!"):
        (elsewhere / "a.txt").write_text(text)
        seen.append(LorasmithDataset.fingerprint_inputs("pictures"))
    (elsewhere / "metadata.jsonl").touch()
    seen.append(LorasmithDataset.fingerprint_inputs("pictures"))
    assert len(set(seen)) == 4 and LorasmithDataset.fingerprint_inputs("gone") == "[]"


def test_buckets_keep_pairs_together() -> None:
    from pack.data_nodes import LorasmithBuckets

    some = [latents(1), latents(2, 4, 6), latents(1)]
    positive = [[entry(0)], [entry(1), entry(2)], [entry(3)]]
    batches, conds = LorasmithBuckets.execute(some, positive).args
    assert [tuple(batch["samples"].shape) for batch in batches] == [(2, 4, 4, 4), (2, 4, 4, 6)]
    expected = [[entry(0), entry(3)], [entry(1), entry(2)]]
    for found, wanted in zip(conds, expected, strict=True):
        assert all(torch.equal(one[0], other[0]) for one, other in zip(found, wanted, strict=True))


def test_a_data_set_comes_back_from_its_file(folders: Path) -> None:
    from pack.data_nodes import LorasmithLoadDataset, LorasmithSaveDataset

    extra = {
        "pooled_output": torch.randn(1, 4), "attention_mask": torch.tensor([[1, 1, 0]]), "guidance": 3.5, "width": 64,
        "nothing": None, "list": [torch.ones(2).bfloat16(), "text", {"inner": True}],
    }  # fmt: skip
    LorasmithSaveDataset.execute(
        [latents(2), latents(1, 4, 6)], [[entry(0, **extra), entry(1)], [entry(2)]], ["a/cats"]
    )
    (listed,) = LorasmithLoadDataset.define_schema().inputs
    assert listed.declared["options"] == ["a/cats"]
    some, positive = LorasmithLoadDataset.execute("a/cats").args
    shapes = [tuple(latent["samples"].shape) for latent in some]
    assert shapes == [(1, 4, 4, 4), (1, 4, 4, 4), (1, 4, 4, 6)] and len(positive) == 3
    ((text, found),) = positive[0]
    assert torch.equal(text, entry(0)[0]) and found.keys() == extra.keys()
    for key in ("pooled_output", "attention_mask"):
        assert torch.equal(found[key], extra[key]) and found[key].dtype == extra[key].dtype
    assert {key: found[key] for key in ("guidance", "width", "nothing")} == {
        "guidance": 3.5,
        "width": 64,
        "nothing": None,
    }
    assert found["list"][0].dtype == torch.bfloat16 and found["list"][1:] == ["text", {"inner": True}]


def test_what_no_file_can_hold_is_named(folders: Path) -> None:
    from pack.data_nodes import LorasmithSaveDataset

    with pytest.raises(ValueError, match=r"^positive\[1\].control must be made of tensors, numbers and texts"):
        LorasmithSaveDataset.execute([latents(1)], [[entry(0, control=SimpleNamespace())]], ["cats"])
    assert not list((folders / "output").rglob("*.safetensors"))


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      ", pickle.dumps({"a": 1}), b"\xff" * 64])
def test_other_files_are_refused(folders: Path, content: bytes) -> None:
    from pack.data_nodes import LorasmithLoadDataset

    path = folders / "output" / "lorasmith" / "datasets" / "cats.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="^cats.safetensors must be a"):
        LorasmithLoadDataset.execute("cats")
    with pytest.raises(ValueError, match="^a name must stay inside datasets, got"):
        LorasmithLoadDataset.execute("../../secret")
