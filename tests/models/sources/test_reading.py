"""Loading that shows how much is left: of folders part by part, of single files tensor by tensor."""

from pathlib import Path

import pytest
import torch
from hearing import Heard
from originals import original
from safetensors.torch import save_file
from tiny import made

from lorasmith.models.load import bytes_to_load, load_model
from lorasmith.models.sources.reading import loading_shown
from lorasmith.reporting import progress
from lorasmith.storage.safetensors_header import Header

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "MEGABYTE", 1)


def size(*paths: Path) -> int:
    return sum(Header.of(path).num_bytes_of_all for path in paths)


def heard_of(model: Path, encoders: Path | None = None) -> Heard:
    heard = Heard()
    with loading_shown(bytes_to_load(model, encoders), heard):
        load_model(model, encoders).codec(CPU)
    return heard


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "Wan 2.2"])
def test_a_folder_is_loaded_tensor_by_tensor_but_for_text_encoders(tmp_path: Path, name: str) -> None:
    made(name).save_pretrained(tmp_path)
    paths = list(tmp_path.glob("*/*.safetensors"))
    (what, total, unit), *counts, end = heard_of(tmp_path).reports
    assert (what, total, unit, end) == ("loading the model", size(*paths), "MB", "done")
    texts = [path for path in paths if path.parent.name.startswith("text_encoder")]
    others = [Header.of(path) for path in {*paths} - {*texts}]
    own = [header.num_bytes(key) for header in others for key in header.shapes]
    assert sorted(counts) == sorted([*own, *map(size, texts)])


def test_only_files_that_are_loaded_are_counted(tmp_path: Path) -> None:
    made("StableDiffusionXLPipeline").save_pretrained(tmp_path)
    whole = size(*tmp_path.glob("*/*.safetensors"))
    made("StableDiffusionXLPipeline").save_pretrained(tmp_path, variant="fp16")
    made("StableDiffusionXLPipeline").unet.save_pretrained(tmp_path / "unet", variant="fp32", max_shard_size="100KB")
    assert bytes_to_load(tmp_path, None) == whole == sum(heard_of(tmp_path).reports[1:-1])


def test_a_single_file_is_loaded_tensor_by_tensor(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "transformer.safetensors"
    pipe = made("StableDiffusion3Pipeline")
    pipe.save_pretrained(folder)
    save_file(original(pipe.transformer), file)
    beside = [path for path in folder.glob("*/*.safetensors") if path.parent.name != "transformer"]
    (_, total, _), *counts, _ = heard_of(file, folder).reports
    assert total == size(file, *beside) == sum(counts)
