"""Settings on the command line: --adapter.rank 16 --schedule cosine …"""

import os
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from lorasmith.config.settings import Setting, settings
from lorasmith.config.translation import typed
from lorasmith.config.unknown import Unknown, answered, takes_value
from lorasmith.config.values import put
from lorasmith.errors import Faults

TOML_LIST = re.compile(r"""\[\s*["'\]]""")  # other texts in brackets are regular expressions or prompts


def parsed(tokens: Sequence[str], command: str = "train") -> tuple[list[str], dict[str, Any]]:
    """SOURCE --adapter.rank 16 --schedule cosine … -> what is no setting, and the settings as nested values.

    A list is given by repeating its key or as TOML; a yes-or-no setting alone means true.
    ValueError on unknown keys, all of them at once, or a missing value.
    """
    known = settings()
    others: list[str] = []
    values: dict[str, Any] = {}
    given: list[tuple[str, str]] = []
    unknown: list[Unknown] = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            others.append(token)
            continue
        key, has_value, text = token[2:].partition("=")
        key = key.replace("-", "_")
        if key.endswith(".name"):  # as a TOML file has it
            key = key.removesuffix(".name")
        if key not in known:
            unknown.append(Unknown(key, text if has_value else _unknown_value(key, rest, known)))
            continue
        if not has_value:
            text = _next_value(known[key], rest)
        given.append((key, text))
        put(values, key, _value(known[key], text))
    if unknown:
        raise _unknown_keys(command, others, given, unknown, known)
    return others, values


def stray_words(tokens: Sequence[str]) -> str:
    """Where a value of several words was given without quotes, what to type, as the end of a message."""
    known = settings()
    for start, token in enumerate(tokens):
        key = token.removeprefix("--").replace("-", "_")
        if not token.startswith("--") or key not in known:
            continue
        words = list(takewhile(lambda word: not (word.startswith("--") or os.path.exists(word)), tokens[start + 1 :]))
        words = [word for word in words if word]
        setting = known[key]
        if len(words) < 2 or setting.kind in (int, float, bool) or setting.options:
            continue
        quoted = f"--{key} {shlex.quote(' '.join(words))}"
        repeated = " ".join(f"--{key} {shlex.quote(word)}" for word in words)
        several = f"; several values need the key each time: {repeated}" if setting.kind is tuple else ""
        return f": a value of several words needs quotes: {quoted}{several}"
    return ""


def _unknown_keys(
    command: str, others: Sequence[str], given: Sequence[tuple[str, str]], unknown: Sequence[Unknown],
    known: Mapping[str, Setting],
) -> ValueError:  # fmt: skip
    """What is said of keys that are no settings and, where several are another program's, the whole command."""
    answers = [answered(one, known) for one in unknown]
    if len(answers) == 1:
        return ValueError(answers[0].text)
    lines = [f"  {answer.text}" for answer in answers]
    sure = [answer for answer in answers if not answer.is_example]
    pairs = [pair for answer in sure for pair in answer.pairs if pair[0] in known or pair[0] == "resume"]
    if pairs:
        lines.append(f"  together: lorasmith {command} {_translated(others, given, pairs, known)}")
    return Faults(f"{len(answers)} of the settings are not lorasmith's:", *lines)


def _translated(
    others: Sequence[str], given: Sequence[tuple[str, str]], pairs: Sequence[tuple[str, str]],
    known: Mapping[str, Setting],
) -> str:  # fmt: skip
    """The arguments with what was given and what stands for the rest; of what is given twice, the last."""
    more = {key: text for key, text in pairs if key not in dict(given)}
    pictures = more.pop("data.folder", "")
    words = [shlex.quote(word) for word in others or [pictures] if word]
    return " ".join([*words, typed((*given, *more.items()), known, False)])


def _unknown_value(key: str, rest: list[str], known: Mapping[str, Setting]) -> str:
    """Takes the values that follow an unknown key; a flag has none, unless it is true or false."""
    is_flag = not takes_value(key, known)
    taken = []
    while rest and not rest[0].startswith("--") and (not is_flag or rest[0].lower() in ("true", "false")):
        taken.append(rest.pop(0))
        if "=" not in taken[-1]:  # lists of settings go on
            break
    return " ".join(taken)


def _next_value(setting: Setting, rest: list[str]) -> str:
    """Takes the value that follows a key; a yes-or-no setting needs none."""
    if setting.kind is bool:
        return rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
    if not rest or rest[0].startswith("--"):
        raise ValueError(f"--{setting.key} needs a value: {setting.rule}")
    return rest.pop(0)


def _value(setting: Setting, text: str) -> Any:
    if text == "none" == setting.default and "none" not in setting.options:
        return None
    if setting.kind is not tuple:
        return text
    if not TOML_LIST.match(text):
        return [text]
    try:
        return tomllib.loads(f"list = {text}")["list"]
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{setting.key} must be {setting.rule}, got {text!r} ({error})") from error
