"""The help of `lorasmith train`: the basics, every setting, or those that mention a word."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from lorasmith.cli.help_layout import paragraph, section, width_of_output

if TYPE_CHECKING:
    from lorasmith.config.settings import Setting

USAGE = (
    "Usage: lorasmith train PICTURES --model MODEL [--KEY VALUE ...]",
    "lorasmith train SETTINGS.toml [--KEY VALUE ...]",
    "lorasmith train RUN_FOLDER --resume",
)
ABOUT = "Train a LoRA on a folder of pictures, each with its caption in a .txt file of the same name."
EXAMPLES = """Examples:
  lorasmith train cats --model demo --steps 10
  lorasmith train cats --model owner/name --adapter.rank 16 --steps 2000
  lorasmith train cats --model owner/name --sampling.prompts "a cat in snow"
  lorasmith train runs/cats --resume"""
BASICS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "Model and pictures": (
        ("--model MODEL", "diffusers folder, checkpoint file or hub id; demo is the small embedded model"),
        ("--data.resolution PIXELS", "side of a square of the same area; default: the model's own"),
        ("--output FOLDER", "run folder to create; default: runs/NAME of the data folder"),
    ),
    "Training": (
        ("--steps N", "optimizer steps; default: 100 epochs"),
        ("--batch_size N", "images per forward pass; default 1"),
        ("--learning_rate RATE", "default 0.0005"),
        ("--schedule NAME", "learning-rate schedule: constant, linear or cosine; default constant"),
        ("--seed N", "the same seed gives the same file; default 0"),
    ),
    "LoRA": (
        ("--adapter NAME", "LoRA, LoHa, LoKr, OFT, DoRA or GLoRA; default LoRA"),
        ("--adapter.rank N", "1 to 128; default 8"),
        ("--adapter.alpha ALPHA", "the LoRA is scaled by alpha / rank; default: the rank"),
        ("--targets.preset NAME", "layers: attention, attention+mlp or all; default attention+mlp"),
    ),
    "Results": (
        ("--sampling.prompts TEXT", "prompt for images before and after training; repeat the key for more"),
        ("--sampling.every N", "also generate images every N steps"),
        ("--data.held_out FOLDER", "validation pictures, to measure the loss on"),
    ),
    "Interrupted runs": (
        ("--resume", "continue from the newest checkpoint: the same command, or the run folder"),
    ),
    "For scripts": (
        ("--json", "print events as JSON, one object per line"),
    ),
}  # fmt: skip
"""What a first run needs, in a few words; the schema is not read for it, as that takes seconds."""
MORE = (
    ("lorasmith train --help all", "every setting"),
    (
        "lorasmith train --help WORD",
        "settings that mention a word, such as memory, or another trainer's name, such as lr",
    ),
)


FLAGS = (*BASICS["Interrupted runs"], *BASICS["For scripts"])  # which are no settings


def show(word: str | None) -> None:
    """Prints the basics, or with "all" every setting, or those that mention a word; ValueError if none does."""
    width = width_of_output()
    for line in USAGE:
        indent = 0 if line.startswith("Usage") else 7
        print("\n".join(paragraph(line, width, indent, hanging=7)), flush=True)  # before what takes a while
    parts = _basics(width) if word is None else _all(width) if word == "all" else _about(word, width)
    for part in parts:
        print(f"\n{part}")


def _basics(width: int | None) -> Iterator[str]:
    yield "\n".join(paragraph(ABOUT, width))
    yield EXAMPLES
    for heading, rows in {**BASICS, "More": MORE}.items():
        yield section(heading, rows, width)


def _all(width: int | None) -> Iterator[str]:
    from lorasmith.config.settings import settings

    known = settings()
    tables = {key.partition(".")[0] for key in known if "." in key}
    rows: dict[str, list[tuple[str, str]]] = {"General": [*FLAGS]}
    for key, setting in known.items():
        table = key.partition(".")[0]
        rows.setdefault(table if table in tables else "General", []).append(_row(setting))
    for heading, found in rows.items():
        yield section(heading, found, width)


def _about(word: str, width: int | None) -> Iterator[str]:
    """The settings that a word is about, and what it is where it is another trainer's name."""
    from lorasmith.config.settings import settings
    from lorasmith.config.unknown import Unknown, answered, is_of_another

    known = settings()
    low = word.lower().lstrip("-").replace("-", "_")
    found = [
        _row(setting) for setting in known.values() if _speaks_of(low, f"{setting.key} {setting.rule} {setting.help}")
    ]
    found = [*(flag for flag in FLAGS if _speaks_of(low, " ".join(flag))), *found]
    is_foreign = low not in known and is_of_another(low)
    if not found and not is_foreign:
        raise ValueError(f"no setting is about {word}: lorasmith train --help all shows every setting")
    if is_foreign:
        yield "\n".join(paragraph(answered(Unknown(low, ""), known).text, width))
    if found:
        yield section(f"Settings about {word}", found, width)


def _speaks_of(word: str, text: str) -> bool:
    """Whether a word of the text, or of a key in it, begins with the word."""
    return re.search(rf"(?<![a-z]){re.escape(word)}", text.lower()) is not None


def _row(setting: "Setting") -> tuple[str, str]:
    has_default = setting.default not in ("none", "[]") or setting.default in setting.options
    default = f"default {setting.default}" if has_default else "no default"
    return f"--{setting.key}", f"{setting.help} ({setting.rule}; {default})"
