"""Settings and values of other programs -> what to type here."""

import difflib
import json
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorasmith.config.other_trainers import COMMON, TOOLS
from lorasmith.config.other_trainers.name import Name, Tool
from lorasmith.config.other_trainers.words import WORDS, Words, side
from lorasmith.config.settings import Setting
from lorasmith.config.spelling import option_of

EXAMPLES = {
    "model": "owner/name", "encoders": "owner/name", "data.folder": "pictures", "data.held_out": "others",
    "data.drift": "others", "data.resolution": "512", "output": "runs/cats", "existing_lora": "old.safetensors",
    "steps": "1000", "adapter.alpha": "8", "adapter.factor": "8", "sampling.prompts": "a cat", "sampling.every": "250",
    "checkpoints.steps": "500", "targets.include": "attn2", "targets.exclude": "attn2", "schedule.warmup": "100",
    "text_encoder.learning_rate": "5e-5", "base_dtype": "int8", "file_layout": "kohya",
}  # fmt: skip
"""Values where the default is none, or shows nothing."""
FILE = "SETTINGS.toml"
OFF = ("false", "no", "0", "off", "none")
DEFAULT = re.compile(r"(^|; )default[: ].*")
LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Value:
    """A value here: `typed` is it, or settings where it takes several."""

    typed: str
    is_nearest: bool = False


@dataclass(frozen=True)
class Answer:
    """What is said of a setting of another program, and the settings {key: value} to give in its place."""

    text: str
    pairs: Pairs = ()
    is_example: bool = False  # whether their values are only examples, or they are not quite the same
    is_exact: bool = False  # whether they mean the same
    is_needless: bool = False


def found(key: str, known: Collection[str], preferred: Tool | None = None) -> tuple[Tool, Name] | None:
    """The entry of a key; of one in a table, the name may be known without the tables around it.

    known: lorasmith's own keys. What is one of them, but for its table or the table's spelling, is no other program's.
    """
    plain = key.lower().replace("-", "_")
    parts = plain.split(".")
    tables, fields = ({k.split(".")[place] for k in known if "." in k} for place in (0, -1))
    near = difflib.get_close_matches(parts[0], tables, 1, 0.8)  # a table that may be misspelt
    is_own = (parts[0] in tables and parts[-1] in fields) or bool(near and ".".join((near[0], *parts[1:])) in known)
    shorter = [] if is_own else [".".join(parts[start:]) for start in range(1, len(parts))]
    tools = TOOLS if preferred is None else (preferred, *TOOLS)
    for candidate in (plain, *shorter):
        for tool in tools if candidate == plain else (tool for tool in tools if tool is not COMMON):
            for name in tool.names:
                if candidate in (theirs.lower() for theirs in name.names):
                    return tool, name
    return None


def similar(key: str) -> str | None:
    """The name of another program that a key is most likely a misspelling of."""
    names = [theirs for tool in TOOLS for name in tool.names for theirs in name.names]
    close = difflib.get_close_matches(key.lower().replace("-", "_"), names, 1, 0.85)
    return close[0] if close else None


def ours_of(setting: Setting, text: str) -> Value | None:
    """Another program's value, as it is here; None where there is nothing of the kind."""
    low, words = text.strip().casefold(), WORDS.get(setting.key, Words())
    for is_nearest, table in ((False, words.same), (True, words.near)):
        if low in table:
            return Value(table[low], is_nearest)
    if setting.options:
        option = option_of(setting.options, text)
        return Value(option) if option else None
    text = side(text) if setting.key == "data.resolution" else text
    return Value(text) if setting.accepts((text,) if setting.kind is tuple else text) else None


def example(setting: Setting, text: str = "") -> str:
    """A value to show: the nearest to a number that is out of range, or one that is often meant."""
    if setting.kind is int and setting.high is not None and text.isdecimal() and int(text) > setting.high:
        return str(setting.high)
    return EXAMPLES.get(setting.key, setting.default)


def answer(shown: str, tool: Tool, name: Name, text: str, known: Mapping[str, Setting], as_toml: bool) -> Answer:
    """What is said of a setting that is shown so and has this value, "" for none."""
    note = _note(name, text)
    if name.is_flag and text.lower() in OFF:
        return Answer(f"{shown} ({tool.whose}) can be left out: it is off", is_needless=True)
    if name.is_needless:
        return Answer(f"{shown} ({tool.whose}) can be left out: {note}", is_needless=True)
    pairs, value = _pairs(name, text, known)
    if not pairs:
        return Answer(f"there is no {shown} here ({tool.whose}){f': {note}' if note else ''}")
    ours = typed(pairs, known, as_toml)
    if name.is_nearest:
        reason = f": {note}" if note else ""
        return Answer(f"there is no {shown} here ({tool.whose}){reason}; the nearest is {ours}", pairs, is_example=True)
    said = f"{shown} is {tool.whose}: here it is {ours}"
    setting = known.get(pairs[-1][0])
    if value is not None and value.is_nearest:
        said += f", the nearest to {text}"
    elif value is None and setting is not None and text and _carries(name):
        return Answer(f"{said}; {setting.key} must be {setting.rule}, got {text}", pairs, is_example=True)
    is_example = name.is_other_value or (value is None and _carries(name))
    is_exact = not is_example and (value is None or not value.is_nearest)
    return Answer(said + (f" ({note})" if note else ""), pairs, is_example, is_exact)


def _note(name: Name, text: str) -> str:
    """The entry's note as plain text; without defaults where there is a value."""
    note = LINK.sub(r"\1", name.note).replace("`", "")
    return DEFAULT.sub("", note) if text and _carries(name) else note


def _carries(name: Name) -> bool:
    """Whether the value is to be taken over."""
    return not (name.is_other_value or name.is_flag or name.to)


def _pairs(name: Name, text: str, known: Mapping[str, Setting]) -> tuple[Pairs, Value | None]:
    """The settings to give, and what became of the value."""
    template = (name.to(text) or name.ours) if name.to else name.ours
    pairs = split(template)
    if pairs == ((FILE, ""),) and text.endswith(".toml"):
        return ((text, ""),), None
    if not pairs or pairs[-1][1] or pairs[-1][0] not in known:
        return pairs, None
    setting = known[pairs[-1][0]]
    value = ours_of(setting, text) if text and _carries(name) else None
    chosen = example(setting, text) if value is None else value.typed
    inner = split(chosen) if chosen.startswith("--") else ((setting.key, chosen),)
    return (*pairs[:-1], *inner), value


def split(template: str) -> Pairs:
    """--adapter LoRA --adapter.rank … -> ((adapter, LoRA), (adapter.rank, "")); words without a key have it alone."""
    pairs: list[tuple[str, str]] = []
    for token in shlex.split(template):
        if token.startswith("--"):
            pairs.append((token.removeprefix("--"), ""))
        elif pairs:
            pairs[-1] = (pairs[-1][0], token)
        else:
            pairs.append((token, ""))
    return tuple(pairs)


def typed(pairs: Pairs, known: Mapping[str, Setting], as_toml: bool) -> str:
    """The settings as they are typed, on the command line or in a file."""
    shown = []
    for key, text in pairs:
        if key not in known:  # a flag, or a file
            shown.append(f"--{key}" if key == "resume" else f"lorasmith train {key}")
        elif as_toml:
            shown.append(f"{key} = {json.dumps(in_toml(known[key], text), ensure_ascii=False)}")
        else:
            shown.append(f"--{key} {shlex.quote(text)}")
    return (" and " if as_toml else " ").join(shown)


def in_toml(setting: Setting, text: str) -> Any:
    """A value as a file has it."""
    if setting.kind is tuple:
        return json.loads(text) if text.startswith('["') else [text]
    if setting.kind is bool:
        return text.lower() == "true"
    return setting.kind(text) if setting.kind in (int, float) else text


def listed(texts: Sequence[str]) -> str:
    """Several values as the text of a list."""
    return f"[{', '.join(text if text.isdecimal() else json.dumps(text, ensure_ascii=False) for text in texts)}]"
