"""Keys that are no settings: what each most likely means, and all of them at once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lorasmith.config.messages import unknown_setting
from lorasmith.config.other_trainers.name import Tool
from lorasmith.config.settings import Setting
from lorasmith.config.spelling import near_key
from lorasmith.config.translation import Answer, answer, found, similar


@dataclass(frozen=True)
class Unknown:
    """A key that is no setting, and its value as text, "" for none."""

    key: str
    text: str
    line: int = 0  # of a file, from 1


def answered(
    unknown: Unknown, known: Mapping[str, Setting], *, as_toml: bool = False, preferred: Tool | None = None
) -> Answer:
    """What is said of a key: what another program's name is here, or the nearest setting."""
    shown = unknown.key if as_toml else f"--{unknown.key}"
    entry = found(unknown.key, known, preferred)
    if entry is not None:
        return answer(shown, *entry, unknown.text, known, as_toml)
    near = similar(unknown.key) if near_key(unknown.key, known) is None else None
    entry = found(near, ()) if near else None
    if entry is not None:
        meant = answer(f"{near}", *entry, unknown.text, known, as_toml)
        return replace(meant, text=f"there is no setting {unknown.key}: did you mean {near}? {meant.text}")
    return Answer(unknown_setting(unknown.key, known))


def takes_value(key: str, known: Mapping[str, Setting]) -> bool:
    """Whether an unknown key is followed by a value."""
    entry = found(key, known)
    return entry is None or not entry[1].is_flag


def is_of_another(key: str) -> bool:
    """Whether it is the name of a setting of another program."""
    return found(key, ()) is not None
