"""Other trainers' names: each entry's answer works when it is pasted, and misspelt keys get a sensible one."""

import re
import shlex
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lorasmith.config.arguments import parsed
from lorasmith.config.other_trainers import TOOLS
from lorasmith.config.other_trainers.name import Name, Tool
from lorasmith.config.other_trainers.words import WORDS, side
from lorasmith.config.settings import settings
from lorasmith.config.translation import Answer, answer, split
from lorasmith.config.unknown import Unknown, answered
from lorasmith.config.values import configured
from lorasmith.formats.model_names import HUB_IDS, SHORT, family_named

KNOWN = settings()
ENTRIES = [
    pytest.param(tool, name, id=f"{tool.whose.split()[0]}-{name.names[0]}") for tool in TOOLS for name in tool.names
]


def said(command: str) -> str:
    """What is said of a command's arguments."""
    with pytest.raises(ValueError) as refusal:
        parsed(shlex.split(command))
    return str(refusal.value)


def works(found: Answer) -> None:
    """Fails where the settings of an answer are refused."""
    tokens = chain.from_iterable((f"--{key}", text) for key, text in found.pairs if key in KNOWN)
    configured(parsed(list(tokens))[1])


@pytest.mark.parametrize(("tool", "name"), ENTRIES)
def test_every_answer_works_when_it_is_pasted(tool: Tool, name: Name) -> None:
    for text in ("", "16", "0.5", "true", "512,512", "algo=lokr factor=8"):
        found = answer(name.names[0], tool, name, text, KNOWN, as_toml=False)
        works(found)
        assert "\n" not in found.text and "`" not in found.text and "](" not in found.text
        written = answer(name.names[0], tool, name, text, KNOWN, as_toml=True)
        lines = re.findall(
            r"(?:here it is|nearest is|and) ([\w.]+ = (?:\"[^\"]*\"|\[[^\]]*\]|[^\s;,(]+))", written.text
        )
        assert all(tomllib.loads(line) for line in lines)
        assert bool(lines) == any(key in KNOWN for key, _ in found.pairs)


@pytest.mark.parametrize("text", ["false", "0"])
def test_what_is_off_is_left_out(text: str) -> None:
    assert answered(Unknown("use_dora", text), KNOWN).pairs == ()
    assert "can be left out: it is off" in answered(Unknown("fp8_base", text), KNOWN).text


def test_examples_are_not_in_the_whole_command() -> None:
    lines = said("pics --epochs 5 --network_dim 256 --save_every_n_epochs 1 --optimizer_type Prodigy --unet_lr 1e-4")
    assert lines.splitlines()[-1] == "  together: lorasmith train pics --learning_rate 1e-4"


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.whose.split()[0])
def test_a_name_stands_once_for_each_program(tool: Tool) -> None:
    names = [theirs.lower() for name in tool.names for theirs in name.names]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("key", WORDS)
def test_words_for_values_are_values_here(key: str) -> None:
    for theirs, ours in {**WORDS[key].same, **WORDS[key].near}.items():
        pairs = split(ours) if ours.startswith("--") else ((key, ours),)
        works(Answer("", pairs))
        assert theirs == theirs.lower() and theirs not in KNOWN[key].options


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("--network_dim 32", "--network_dim is kohya's name: here it is --adapter.rank 32"),
        ("--network-dim=32", "--network_dim is kohya's name: here it is --adapter.rank 32"),
        ("--network_alpha 16", "--network_alpha is kohya's name: here it is --adapter.alpha 16"),
        ("--lr 1e-4", "--lr is another trainer's name: here it is --learning_rate 1e-4"),
        ("--unet_lr 1e-4", "--unet_lr is kohya's name: here it is --learning_rate 1e-4"),
        ("--max_train_steps 2000", "--max_train_steps is kohya's name: here it is --steps 2000"),
        ("--mixed_precision bf16", "--mixed_precision is kohya's name: here it is --training_dtype bf16"),
        ("--mixed_precision no", "--mixed_precision is kohya's name: here it is --training_dtype fp32"),
        (
            "--mixed_precision fp16",
            "--mixed_precision is kohya's name: here it is --training_dtype bf16, the nearest to fp16",
        ),
        (
            "--save_every_n_epochs 1",
            "there is no --save_every_n_epochs here (kohya's name): no LoRA files are written during training, only "
            "checkpoints to resume from; the nearest is --checkpoints.steps 500",
        ),
        (
            "--resolution 512,512",
            "--resolution is kohya's name: here it is --data.resolution 512 (one number, the side of a square)",
        ),
        ("--use_dora", r"--use_dora is diffusers' name: here it is --adapter DoRA \(.*\)"),
        ("--epochs 5", r"--epochs is another trainer's name: here it is --steps 1000 \(steps = epochs × .*\)"),
        ("--train_batch_size 4", "--train_batch_size is kohya's name: here it is --batch_size 4"),
        ("--lr_scheduler cosine", "--lr_scheduler is kohya's name: here it is --schedule cosine"),
        (
            "--lr_scheduler constant_with_warmup",
            "--lr_scheduler is kohya's name: here it is --schedule constant --schedule.warmup 100",
        ),
        (
            "--optimizer_type AdamW8bit",
            "--optimizer_type is kohya's name: here it is --optimizer AdamW, the nearest to AdamW8bit",
        ),
        (
            "--optimizer_type Prodigy",
            "--optimizer_type is kohya's name: here it is --optimizer AdamW; "
            "optimizer must be one of AdamW, .*, got Prodigy",
        ),
        (
            "--network_dim 256",
            "--network_dim is kohya's name: here it is --adapter.rank 128; adapter.rank must be 1 to 128, got 256",
        ),
        (
            "--network_args algo=lokr factor=8",
            r"--network_args is kohya's name: here it is --adapter lokr --adapter.factor 8 \(.*\)",
        ),
        ("--noise_offset 0.03", "there is no --noise_offset here (kohya's name)"),
        ("--cache_latents", r"--cache_latents \(kohya's name\) can be left out: .*"),
        ("--config_file a.toml", r"--config_file is kohya's name: here it is lorasmith train a\.toml \(.*\)"),
        ("--resume_from_checkpoint latest", r"--resume_from_checkpoint is diffusers' name: here it is --resume \(.*\)"),
        (
            "--network_dimm 4",
            "there is no setting network_dimm: did you mean network_dim? "
            "network_dim is kohya's name: here it is --adapter.rank 4",
        ),
    ],
)
def test_another_trainers_name_is_answered_with_the_name_here(given: str, answer: str) -> None:
    assert said(given) == answer or re.fullmatch(answer, said(given))


@pytest.mark.parametrize(
    ("command", "together"),
    [
        (
            "pics --network_dim 32 --steps 10 --lr_scheduler cosine --cache_latents --xyzzy",
            "pics --steps 10 --adapter.rank 32 --schedule cosine",
        ),
        (
            "--train_data_dir 'my pics' --model demo --unet_lr 1e-4 --sampling.prompts a --sampling.prompts b",
            "'my pics' --model demo --sampling.prompts a --sampling.prompts b --learning_rate 1e-4",
        ),
        ("pics --network_module lycoris.kohya --network_args algo=lokr conv_dim=4", "pics --adapter lokr "
         "--targets.preset all"),
    ],
)  # fmt: skip
def test_of_several_names_the_whole_command_is_given(command: str, together: str) -> None:
    lines = said(command).splitlines()
    assert re.fullmatch(r"\d of the settings are not lorasmith's:", lines[0])
    assert lines[-1] == f"  together: lorasmith train {together}"
    others, values = parsed(shlex.split(lines[-1].partition(" train ")[2]))
    assert len(others) == 1
    configured(values)


@pytest.mark.parametrize("name", ["alpha", "momentum", "guidance", "preset", "factor", "held_out", "limit", "beta1"])
def test_a_field_without_its_table_is_found(name: str) -> None:
    assert re.fullmatch(rf".*did you mean \w+\.{name}\?", answered(Unknown(name, ""), KNOWN).text)


@pytest.mark.parametrize("key", ["xyzzy", "epo", "q", "foo.bar", "frobnicate", "lrr", "_"])
def test_no_silly_setting_is_named(key: str) -> None:
    assert answered(Unknown(key, "5"), KNOWN).text == f"there is no setting {key}"


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(KNOWN)), st.data())
def test_one_slip_of_the_finger_is_understood(key: str, data: st.DataObject) -> None:
    start = key.rfind(".") + 1
    if len(key) - start < 6:
        return
    place = data.draw(st.integers(start + 1, len(key) - 2))
    slip = data.draw(st.sampled_from([key[:place] + key[place + 1 :], f"{key[:place]}x{key[place:]}"]))
    if slip not in KNOWN:
        assert answered(Unknown(slip, ""), KNOWN).text.startswith((f"there is no setting {slip}: did you mean ", "--"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512,512", "512"),
        ("512x512", "512"),
        ("[768, 512]", "627"),
        ("(1024,1024)", "1024"),
        ("512", "512"),
        ("a", "a"),
    ],
)
def test_a_width_and_height_become_the_side_of_a_square(text: str, expected: str) -> None:
    assert side(text) == expected


@pytest.mark.parametrize(
    "text", ["SDXL", "sdxl", "SD-1.5", "sd15", "SD 1.5", "flux", "FLUX.1-dev", "Z-Image", "wan2.2"]
)
def test_short_names_of_models(text: str) -> None:
    assert family_named(text) in HUB_IDS


def test_short_names_of_models_are_told_apart() -> None:
    names = [name for names in SHORT.values() for name in names.split()]
    assert len(names) == len(set(names)) and set(SHORT) == set(HUB_IDS)
    assert family_named("my-model") is None and family_named("") is None
    assert all(re.fullmatch(r"[\w-]+/[\w.-]+", hub_id) for hub_id in HUB_IDS.values())


def test_the_pages_show_every_program() -> None:
    pages = {path.stem for path in (Path(__file__).parents[2] / "docs" / "from").glob("*.md")}
    assert {tool.page for tool in TOOLS if tool.page} == pages
