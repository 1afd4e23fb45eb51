"""Loading that shows how much is left: of folders part by part, of single files tensor by tensor."""

from pathlib import Path

import pytest
import torch
from hearing import Heard
from originals import original
from safetensors.torch import save_file
from tiny import made

from lorasmith.models.load import bytes_to_load, opened
from lorasmith.models.sources.reading import loading_shown
from lorasmith.reporting import progress
from lorasmith.storage.safetensors_header import Header

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "MEGABYTE", 1)


def heard_of(model: Path, encoders: Path | None = None) -> Heard:
    heard = Heard()
    with loading_shown(bytes_to_load(model, encoders), heard):
        opened(model, encoders).codec(CPU)
    return heard


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "Wan 2.2"])
def test_a_folder_is_loaded_part_by_part(tmp_path: Path, name: str) -> None:
    pipe = made(name)
    pipe.save_pretrained(tmp_path)
    sizes = [path.stat().st_size for path in tmp_path.glob("*/*.safetensors")]
    (what, total, unit), *counts, end = heard_of(tmp_path).reports
    assert (what, total, unit, end) == ("loading the model", sum(sizes), "MB", "done")
    assert sorted(counts) == sorted(sizes)


def test_only_files_that_are_loaded_are_counted(tmp_path: Path) -> None:
    made("StableDiffusionXLPipeline").save_pretrained(tmp_path)
    whole = sum(path.stat().st_size for path in tmp_path.glob("*/*.safetensors"))
    made("StableDiffusionXLPipeline").save_pretrained(tmp_path, variant="fp16")
    made("StableDiffusionXLPipeline").unet.save_pretrained(tmp_path / "unet", variant="fp32", max_shard_size="100KB")
    assert bytes_to_load(tmp_path) == whole == sum(heard_of(tmp_path).reports[1:-1])


def test_a_single_file_is_loaded_tensor_by_tensor(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "transformer.safetensors"
    pipe = made("StableDiffusion3Pipeline")
    pipe.save_pretrained(folder)
    save_file(original(pipe.transformer), file)
    header = Header.of(file)
    beside = [path.stat().st_size for path in folder.glob("*/*.safetensors") if path.parent.name != "transformer"]
    (_, total, _), *counts, _ = heard_of(file, folder).reports
    assert total == sum(map(header.num_bytes, header.shapes)) + sum(beside) == sum(counts)
    assert len(counts) == len(header.shapes) + len(beside)


def test_what_may_have_to_be_fetched_is_loaded_without_a_count() -> None:
    assert bytes_to_load("someone/model") is None
    heard = Heard()
    with loading_shown(None, heard):
        pass
    assert heard.reports == [("loading the model", None, ""), "done"]
