"""Files of settings: what is wrong in a TOML file, with its line; files of other programs become TOML."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lorasmith.config import other_files
from lorasmith.config.files import lines_of, located, read_toml
from lorasmith.config.values import configured
from lorasmith.errors import Faults

KOHYA = """\
pretrained_model_name_or_path = "sd15.safetensors"
# comment = 1
train_data_dir = 'pics'

[network]
network_dim = 32
"network_alpha" = 16

[optimizer]
optimizer_type = "AdamW8bit"
learning_rat = 1e-4
[[datasets]]
  [[datasets.subsets]]
  image_dir = "x"
"""
AI_TOOLKIT = """\
job: extension
config:
  name: "my_lora"
  process:
    - type: 'sd_trainer'
      trigger_word: "sks"
      network:
        type: "lora"
        linear: 32
        linear_alpha: 16
      save:
        dtype: float16
        save_every: 250
      datasets:
        - folder_path: "/pics"
          caption_ext: "txt"
          resolution: [512, 512]
      train:
        batch_size: 2
        steps: 2000
        lr: 1e-4
        optimizer: "adamw8bit"
        dtype: bf16
        unheard_of: 3
      model:
        name_or_path: "owner/name"
      sample:
        prompts: ["a", "b c"]
        sample_every: 250
"""
ONETRAINER = {
    "training_method": "LORA", "base_model_name": "owner/name", "epochs": 10, "learning_rate": 0.0003,
    "lora_rank": 16, "lora_alpha": 1.0, "optimizer": {"optimizer": "ADAMW", "weight_decay": 0.02},
    "masked_training": False, "resolution": "512", "train_dtype": "BFLOAT_16", "text_encoder": {"train": True},
    "learning_rate_scheduler": "COSINE", "something": None,
}  # fmt: skip


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_toml_is_read_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("\ufeffsteps = 3\r\n[sampling]\r\nprompts = ['grün']\r\n", encoding="utf-8")
    assert read_toml(path) == {"steps": 3, "sampling": {"prompts": ["grün"]}}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot read FILE: No such file or directory"),
        (b"steps = ", "cannot read FILE: Invalid value .*"),
        (b"gr\xfcn", "FILE must be UTF-8 text, got byte 0xfc at offset 2"),
        ("steps = 3".encode("utf-16"), "FILE must be UTF-8 text, got UTF-16"),
        (b"a = " + b"[" * 10_000, "cannot read FILE: .*"),
    ],
)
def test_unreadable_toml_is_refused(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "a.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{reason.replace('FILE', re.escape(str(path)))}$"):
        read_toml(path)


def test_all_unknown_keys_of_a_file_are_named_with_their_lines(tmp_path: Path) -> None:
    with pytest.raises(Faults) as refusal:
        read_toml(written(tmp_path, "kohya.toml", KOHYA))
    heading, *lines = str(refusal.value).splitlines()
    assert heading == f"{tmp_path / 'kohya.toml'} has 7 settings that are not lorasmith's:"
    assert [line.partition(": ")[0] for line in lines] == [f"  line {n}" for n in (1, 3, 6, 7, 10, 11, 14)]
    assert lines[2] == "  line 6: network.network_dim is kohya's name: here it is adapter.rank = 32"
    assert lines[4] == (
        '  line 10: optimizer.optimizer_type is kohya\'s name: here it is optimizer = "AdamW", the nearest to AdamW8bit'
    )
    assert lines[5] == "  line 11: there is no setting optimizer.learning_rat: did you mean learning_rate?"


def test_one_unknown_key_takes_one_line(tmp_path: Path) -> None:
    path = written(tmp_path, "a.toml", "steps = 3\n[data]\nfoldr = 3\n")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} line 3: there is no setting data\.foldr: did you"):
        read_toml(path)


def test_a_value_that_is_refused_is_named_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "a.toml", "steps = 3\n[adapter]\nrank = 200\n")
    message = "adapter.rank must be 1 to 128, got 200"
    assert located(message, path, {}) == f"{path} line 3: {message}"
    assert located(message, path, {"steps": 3}) == f"{path} line 3: {message}"
    assert located(message, path, {"adapter": {"rank": "200"}}) == message
    assert located("batch_size must be 1", path, {}) == "batch_size must be 1"


names = st.sampled_from(["a", "b-c", "d_e", '"f g"', "'h'"])
values = st.sampled_from(["1", '"x = 2"', "[1, 2]", "'''\n\n'''", "{ k = 1 }"])


@hypothesis_settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.lists(names, min_size=1, max_size=2), names, values), max_size=5))
def test_lines_are_those_of_the_keys(entries: list[tuple[list[str], str, str]]) -> None:
    """Against what tomllib reads of the file: each key that it finds has a line, and that line begins with it."""
    text, seen = "", set()
    for number, (table, name, value) in enumerate(entries):
        header = ".".join([*table, f"t{number}"])
        text += f"# x\n[ {header} ]\n{name} = {value}\n"
        seen.add((header, name))
    tomllib.loads(text)
    lines = text.splitlines()
    for header, name in seen:
        bare = ".".join(part.strip("\"'") for part in header.split("."))
        line = lines_of(text)[f"{bare}.{name.strip(chr(34) + chr(39))}"]
        assert lines[line - 1].startswith(name) and lines[line - 2] == f"[ {header} ]"


def as_toml(path: Path) -> tuple[str, dict[str, Any], str]:
    """The heading, the values and the comments of the TOML file that is offered in a file's place."""
    heading, *lines = str(other_files.refusal(path)).splitlines()
    return heading, tomllib.loads("\n".join(lines)), "\n".join(line for line in lines if line.startswith("#"))


def test_a_file_of_ai_toolkit_becomes_toml(tmp_path: Path) -> None:
    heading, values, comments = as_toml(written(tmp_path, "aitk.yaml", AI_TOOLKIT))
    assert heading.endswith("aitk.yaml is none (its keys are ai-toolkit's names). As aitk.toml:")
    config = configured(values)
    assert (config.model, config.steps, config.batch_size, config.learning_rate) == ("owner/name", 2000, 2, 1e-4)
    assert (config.adapter.rank, config.adapter.alpha) == (32, 16)
    assert (config.data.folder, config.data.resolution) == (Path("/pics"), 512)
    assert config.sampling.every == 250 and config.optimizer.name == "AdamW" and config.output == Path("my_lora")
    assert config.sampling.prompts == ("a", "b c")
    assert re.search(r"# line 6: there is no config\.process\.trigger_word here \(ai-toolkit's name\)", comments)
    assert "# without a counterpart: job (line 1), config.process.type (line 5), " in comments
    assert "config.process.train.unheard_of (line 24)" in comments


def test_a_file_of_onetrainer_becomes_toml(tmp_path: Path) -> None:
    text = json.dumps(ONETRAINER, indent="\t")
    heading, values, comments = as_toml(written(tmp_path, "config.json", text))
    assert heading.endswith("config.json is none (its keys are OneTrainer's names). As config.toml:")
    config = configured(values)
    assert config.learning_rate == 0.0003 and config.schedule.name == "cosine" and config.data.resolution == 512
    assert (config.adapter.rank, config.adapter.alpha) == (16, 1.0)
    assert config.optimizer.model_dump()["weight_decay"] == 0.02 and config.text_encoder.train
    assert "masked_training" not in comments and "something" not in comments
    assert re.search(r"# line 4: epochs is OneTrainer's name: here it is steps = 1000 \(steps = epochs × ", comments)


def test_a_file_of_the_kohya_gui_becomes_toml(tmp_path: Path) -> None:
    gui = {"LoRA_type": "Standard", "network_dim": 8, "max_resolution": "512,512", "optimizer": "AdamW8bit",
           "learning_rate": 1e-4, "lr_scheduler": "cosine", "xformers": "xformers", "noise_offset": 0,
           "network_weights": "", "unet_lr": 0.0, "epoch": 10, "fp8_base": False, "gradient_checkpointing": False,
           "use_8bit_adam": None, "save_every_n_epochs": 1}  # fmt: skip
    heading, values, comments = as_toml(written(tmp_path, "gui.json", json.dumps(gui, indent=2)))
    assert "kohya's names" in heading and "noise_offset" not in comments
    assert values == {"adapter": {"name": "LoRA", "rank": 8}, "data": {"resolution": 512}, "optimizer": "AdamW",
                      "learning_rate": 1e-4, "schedule": "cosine", "gradient_checkpointing": False}  # fmt: skip
    assert [line.partition(": ")[0] for line in comments.splitlines()] == [f"# line {line}" for line in (5, 12, 16)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t8.yaml", "model: demo\nsteps: 2\nadapter:\n  rank: 4\n"),
        ("t8.json", '{"model": "demo", "steps": 2, "adapter": {"rank": 4}}'),
    ],
)
def test_a_file_of_lorasmith_s_own_names_is_nobody_else_s(tmp_path: Path, name: str, text: str) -> None:
    heading, values, comments = as_toml(written(tmp_path, name, text))
    assert heading.endswith(f"{name} is none. As t8.toml:") and not comments
    assert values == {"model": "demo", "steps": 2, "adapter": {"rank": 4}}


def test_a_misspelt_table_is_no_other_program_s(tmp_path: Path) -> None:
    message = r"line 2: there is no setting adaptor\.rank: did you mean adapter\.rank\?$"
    with pytest.raises(ValueError, match=message):
        read_toml(written(tmp_path, "a.toml", "[adaptor]\nrank = 4\n"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1, 2", "cannot read .*"),
        ("", ".* must be a file of settings, .*"),
        ("- 1\n", ".* must be a file of settings, .*"),
    ],
)
def test_files_that_hold_no_settings(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)^{reason}$"):
        other_files.refusal(written(tmp_path, "a.yaml", text))
    (tmp_path / "c.yaml").write_text("steps: 3", encoding="utf-16")
    with pytest.raises(ValueError, match=r"c\.yaml must be UTF-8 text, got UTF-16$"):
        other_files.refusal(tmp_path / "c.yaml")
    with pytest.raises(ValueError, match=r"^cannot read .*b\.yaml: No such file or directory$"):
        other_files.refusal(tmp_path / "b.yaml")
