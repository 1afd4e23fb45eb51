"""A run: what it derives from its data, what its file tells, what it measures, and when its folder goes."""

import json
import re
import socket
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import made

from lorasmith.config.values import configured, merged
from lorasmith.demo import BASE
from lorasmith.formats import lora_file
from lorasmith.formats.read import adapters_from
from lorasmith.models.families.sd import StableDiffusion
from lorasmith.runs import run
from lorasmith.runs.checks import checked
from lorasmith.runs.run import Run, opened_run
from lorasmith.runs.run_dir import numbered_folder
from lorasmith.training.job import _network

Opened = Callable[..., AbstractContextManager[Run]]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: StableDiffusion) -> Opened:
    """Opens runs of the embedded model, which is loaded once, on two captioned pictures."""
    monkeypatch.setattr(run, "load_model", lambda model, encoders, with_texts: family)
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "cats", "a cat", "a black cat")
    base = {"model": str(BASE), "device": "cpu", "data": {"folder": "cats"}, "sampling": {"steps": 1}}
    return lambda **values: opened_run(checked(configured(merged(base, values))))


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "expected"), [(1, 1, 700), (5, 1, 140), (2, 4, 88), (700, 1, 1), (10_000, 4, 1)]
)
def test_the_default_is_100_views_of_each_picture(
    opened: Opened, tmp_path: Path, batch_size: int, accumulation: int, expected: int
) -> None:
    made(tmp_path / "dogs" / "5_dog", "a dog")
    made(tmp_path / "dogs" / "plain", "a dog", "another")
    with opened(data={"folder": "dogs"}, batch_size=batch_size, grad_accumulation_steps=accumulation) as found:
        assert found.num_steps == expected
        assert found.job.config.data.resolution == 64  # the model's own, now that it is known


def test_steps_that_are_set_stay(opened: Opened) -> None:
    with opened(steps=7, batch_size=50) as found:
        assert found.num_steps == 7


def test_folders_are_numbered_where_their_name_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for is_there in (False, True):
        assert numbered_folder("cats", is_there=is_there) == Path("runs/cats")
    for name in ("cats", "cats-2", "cats-4", "dogs-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert numbered_folder("cats", is_there=False) == Path("runs/cats-3")
    assert numbered_folder("cats", is_there=True) == Path("runs/cats-2")
    assert numbered_folder("dogs", is_there=False) == Path("runs/dogs")
    (tmp_path / "runs" / "dogs").write_text("a file")
    assert numbered_folder("dogs", is_there=False) == Path("runs/dogs-3")


def test_the_folder_is_named_after_the_pictures(opened: Opened, tmp_path: Path) -> None:
    for values, path in (
        ({}, "runs/cats"),
        ({"data": {"folder": "cats/../cats"}}, "runs/cats-2"),
        ({"output": "x/y"}, "x/y"),
    ):
        with opened(**values) as found:
            assert found.folder is not None and found.folder.path == Path(path)


def test_the_first_captions_are_the_prompts(opened: Opened, tmp_path: Path) -> None:
    made(tmp_path / "many", "c", "b", "c", "a", "", "d")
    for values, prompts in (
        ({"data": {"folder": "many"}}, ("c", "b", "a", "")),
        ({"sampling": {"prompts": []}}, ()),
        ({"sampling": {"prompts": ["x", "x"]}}, ("x", "x")),
    ):
        with opened(**values) as found:
            assert found.prompts == prompts


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": None}, "model must be set: there is no default"),
        ({"data": {"folder": None}}, r"data\.folder must be set: there is no default"),
        ({"output": "cats"}, "output must be a folder that does not exist yet, unless --resume is given, got cats"),
        (
            {"output": "cats/0.png"},
            r"output must be a folder that does not exist yet, unless --resume is given, got cats/0\.png",
        ),
        (
            {"output": "cats/runs/1"},
            "output must be outside the picture folder, lest its plots be trained on, got cats/runs/1",
        ),
        ({"data": {"folder": "."}}, "output must be outside the picture folder, .*, got runs/.*"),
        ({"device": "cuda:99"}, "device must be one that this machine has, got cuda:99: .+"),
        ({"device": "cuda:99999999999"}, "device must be one that this machine has, got cuda:99999999999: .+"),
        ({"targets": {"preset": "none"}}, "targets must match a layer, got preset 'none'.*"),
    ],
)
def test_what_cannot_be_run_is_refused(opened: Opened, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"), opened(**values):
        pass
    assert not Path("runs").exists()


@pytest.mark.slow
def test_samples_of_the_last_step_are_generated_once(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    generated, calls = run.pictures, []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return generated(*arguments)

    monkeypatch.setattr(run, "pictures", counted)
    for output, every in (("plain", None), ("often", 1)):
        with opened(steps=2, output=output, sampling={"every": every}) as found:
            assert len(list(found.steps())) == 2
            found.finish()
    assert len(calls) == 2 + 3  # before and after; and after the first step
    plain, often = (Path(output, "before_after.png").read_bytes() for output in ("plain", "often"))
    assert plain == often and len(list(Path("often", "samples").iterdir())) == 2


@pytest.mark.slow
def test_held_out_and_drift_pictures_are_measured_before_and_after(opened: Opened, tmp_path: Path) -> None:
    made(tmp_path / "held out", "a white cat", "a grey cat")
    made(tmp_path / "others", "a house", "a tree", "a car")
    values = {"data": {"held_out": "held out", "drift": "others"}, "steps": 2, "sampling": {"prompts": []}}
    with opened(**values) as measured:
        assert len(list(measured.steps())) == 2
        summary = dict(measured.finish())
    number = r"[+-]?\d+\.\d+"
    for name in ("validation", "drift"):
        line = rf"({number}) ± {number} before, ({number}) ± {number} after: {number} ± {number}"
        found = re.fullmatch(line, summary[f"{name} loss"])
        assert found and f"{name} loss" in Path("runs/cats/report.html").read_text("utf-8")
    assert summary["steps"] == "2 of 2, 1 sample each" and summary["pictures"] == "2"
    assert re.fullmatch(r"\d+ s", summary["measuring time"]) and "sampling time" not in summary


def test_what_a_run_leaves_to_pass_on_holds_no_absolute_path(opened: Opened, tmp_path: Path) -> None:
    made(tmp_path / "held out", "a white cat")
    data = {"folder": str(tmp_path / "cats"), "held_out": str(tmp_path / "held out")}
    with opened(data=data, output=str(tmp_path / "out" / "mine"), steps=1, sampling={"prompts": ["a cat"]}) as trained:
        list(trained.steps())
        trained.save()
        trained.finish()
    needed_here = {"run.toml", "checkpoints"}  # to resume
    files = [p for p in (tmp_path / "out" / "mine").rglob("*") if p.is_file() and needed_here.isdisjoint(p.parts)]
    places = [str(place).encode() for place in (tmp_path, BASE.parent)]
    assert {"lora.safetensors", "report.html", "before_after.png", "steps.jsonl"} <= {path.name for path in files}
    assert [path.name for path in files if any(place in path.read_bytes() for place in places)] == []
    assert "folder = &quot;cats&quot;" in (tmp_path / "out" / "mine" / "report.html").read_text("utf-8")


def saved(run: AbstractContextManager[Run]) -> Path:
    """Trains to the end; returns the path of the LoRA."""
    with run as trained:
        list(trained.steps())
        (path,) = trained.save()
    return path


def header(path: Path) -> dict[str, str]:
    """A safetensors file's metadata."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])["__metadata__"]


def test_the_file_tells_nothing_of_the_machine_or_the_hour(opened: Opened, tmp_path: Path) -> None:
    made(tmp_path / "held out", "a white cat", "a grey cat")
    folders = {"folder": str(tmp_path / "cats"), "held_out": str(tmp_path / "held out")}
    path = saved(opened(data=folders, output=str(tmp_path / "x" / "my LoRA"), steps=1, sampling={"prompts": []}))
    content = path.read_bytes()
    for told in (tmp_path, BASE, BASE.parent, Path.home()):
        assert str(told).encode() not in content or len(str(told)) < 4
    metadata = header(path)
    text = "\n".join(f"{key}={value}" for key, value in metadata.items())
    assert socket.gethostname() not in text.split()
    assert not re.search(r"\d\d\d\d-\d\d-\d\d|\d\d:\d\d", text)
    assert not re.search(r'["=]([A-Za-z]:)?[/\\]', text)  # a path from the root
    assert metadata["modelspec.title"] == "my LoRA"
    config = json.loads(metadata["lorasmith.config"])
    assert config["data"] == {"folder": "cats", "resolution": 64, "caption_lines": "join"}
    assert config["model"] == metadata["ss_sd_model_name"] == BASE.name


def test_equal_runs_make_equal_files_whatever_their_number(opened: Opened) -> None:
    files = [saved(opened(steps=1, sampling={"prompts": []})) for _ in range(2)]
    assert files == [Path("runs/cats/lora.safetensors"), Path("runs/cats-2/lora.safetensors")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert header(files[1])["modelspec.title"] == "cats"


def test_the_folder_goes_where_nothing_was_trained(opened: Opened) -> None:
    with pytest.raises(KeyboardInterrupt), opened(output="x/y", steps=2, sampling={"prompts": []}):
        assert Path("x/y/run.toml").exists()
        raise KeyboardInterrupt
    assert not Path("x/y").exists()
    with pytest.raises(KeyboardInterrupt), opened(output="x/y", steps=2, sampling={"prompts": []}) as run:
        next(run.steps())
        raise KeyboardInterrupt
    assert len(Path("x/y/steps.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_folder_that_another_run_made_meanwhile_is_left_alone(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs" / "cats" / "lora.safetensors"
    encode = run.encoded

    def late(*args: Any) -> Any:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("of the other run")
        return encode(*args)

    monkeypatch.setattr(run, "encoded", late)
    with pytest.raises(ValueError, match="^output must be a folder that does not exist yet"), opened(steps=1):
        pass
    assert path.read_text() == "of the other run"


@pytest.mark.slow
def test_a_run_continues_a_lora(opened: Opened, tmp_path: Path, caplog: Any) -> None:
    """Its algorithm, rank and steps are the file's; the file's name alone goes into the next one."""
    path = saved(opened(steps=2, adapter={"name": "LoHa", "rank": 2}, sampling={"prompts": []}))
    with opened(steps=3, existing_lora=path, sampling={"prompts": []}) as second:
        assert second.job.adapters.algorithms == ["LoHa"] and "rank: the LoRA's own (2) holds, not 8" in caplog.text
        assert [step.step for step in second.steps()] == [3, 4, 5]
        metadata = second.job.file_metadata()
    assert json.loads(metadata["lorasmith.config"])["existing_lora"] == "lora.safetensors"
    assert metadata["ss_network_args"] == '{"algo": "loha"}' and metadata["lorasmith.steps"] == "5"


@pytest.mark.parametrize(
    ("dtype", "values", "says"),
    [("fp32", 1 / 3, False), ("bf16", 0.25, False), ("bf16", 1 / 3, True)],
)
def test_a_lora_whose_weights_are_rounded_is_told_of(
    opened: Opened, tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str, values: float, says: bool
) -> None:
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    state = {f"{layer}.lora_down.weight": torch.full((4, 160), values), f"{layer}.lora_up.weight": torch.ones(160, 4)}
    lora_file.write(tmp_path / "lora.safetensors", {**state, f"{layer}.alpha": torch.tensor(1 / 3)}, {})
    with opened(steps=1, existing_lora="lora.safetensors", lora_dtype=dtype):
        pass
    said = "existing_lora: its weights are float32 and are rounded to bfloat16; lora_dtype fp32 keeps them as they are"
    assert (said in caplog.text) == says


def test_the_metadata_of_dora_are_lycoriss_and_say_whose_lengths_it_holds(opened: Opened) -> None:
    with opened(steps=1, adapter={"name": "DoRA", "rank": 2}, sampling={"prompts": []}) as job_run:
        metadata = job_run.job.file_metadata()
    assert metadata["ss_network_module"] == "lycoris.kohya" and metadata["lorasmith.dora_scale"] == "paper"
    assert metadata["ss_network_args"] == '{"algo": "locon", "dora_wd": "True", "wd_on_output": "True"}'


def test_the_metadata_say_which_way_dora_s_lengths_are(family: StableDiffusion) -> None:
    """As LyCORIS has it: True of outputs, False of inputs; a file with both says neither."""
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to"

    def said(**shapes: tuple[int, int]) -> dict[str, str]:
        state = {}
        for name, shape in shapes.items():
            state |= {
                f"{layer}_{name}.lora_down.weight": torch.ones(1, 160),
                f"{layer}_{name}.dora_scale": torch.ones(shape),
            }
            state |= {f"{layer}_{name}.lora_up.weight": torch.ones(160, 1)}
        return json.loads(_network(adapters_from(state, family.denoiser), None)["ss_network_args"])

    assert said(q=(160, 1)) == {"algo": "locon", "dora_wd": "True", "wd_on_output": "True"}
    assert said(q=(1, 160)) == {"algo": "locon", "dora_wd": "True", "wd_on_output": "False"}
    assert said(q=(1, 160), k=(160, 1)) == {"algo": "locon", "dora_wd": "True"}
