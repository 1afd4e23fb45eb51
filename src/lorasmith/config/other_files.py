"""Settings files of other programs, in YAML or JSON: what they say, as a file that lorasmith reads."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import tomli_w
import yaml

from lorasmith.config.files import read_text
from lorasmith.config.other_trainers import TOOLS
from lorasmith.config.other_trainers.name import Tool
from lorasmith.config.settings import Setting, settings
from lorasmith.config.translation import Answer, found, in_toml, listed, ours_of, split, typed
from lorasmith.config.unknown import Unknown, answered
from lorasmith.config.values import nested
from lorasmith.errors import Faults

SUFFIXES = (".yaml", ".yml", ".json")
EMPTY = ("", "false", "False", "0", "0.0", "null", "none", "None", "[]", "~")
"""Values of what another program does not use."""


def refusal(path: Path) -> Faults:
    """What is said of such a file: the TOML file with the same settings. ValueError where it cannot be read."""
    known = settings()
    unknown = [Unknown(key, text, line) for key, text, line in entries(path)]
    tool = _tool_of(unknown, known)
    whose = "" if tool is None else f" (its keys are {tool.whose}s)"
    answers = {
        one: _answer(one, known, tool) for one in unknown if one.text not in EMPTY or _is_switch(one, known, tool)
    }
    sure = [answer for answer in answers.values() if not answer.is_example]
    pairs = [pair for answer in sure for pair in answer.pairs if pair[0] in known]
    values = {key: in_toml(known[key], text) for key, text in reversed(pairs)}
    lines = tomli_w.dumps(nested({key: values[key] for key in known if key in values})).splitlines()
    heading = f"settings are read from TOML, and {path} is none{whose}. As {path.with_suffix('.toml').name}:"
    return Faults(heading, *lines, *_comments(answers))


def _answer(one: Unknown, known: Mapping[str, Setting], tool: Tool | None) -> Answer:
    """As of any unknown key; but some names are lorasmith's own, too."""
    if one.key not in known:
        return answered(one, known, as_toml=True, preferred=tool)
    setting, value = known[one.key], ours_of(known[one.key], one.text)
    if value is None:
        return Answer(f"{one.key} must be {setting.rule}, got {one.text}")
    pairs = split(value.typed) if value.typed.startswith("--") else ((one.key, value.typed),)
    return Answer(f"{typed(pairs, known, True)} is the nearest to {one.text}" if value.is_nearest else "", pairs)


def _is_switch(one: Unknown, known: Mapping[str, Setting], tool: Tool | None) -> bool:
    """Whether a setting may be on here where it is off there."""
    entry = found(one.key, known, tool)
    key = one.key if entry is None else entry[1].ours.removeprefix("--")
    return one.text.lower() == "false" and key in known and known[key].kind is bool


def _comments(answers: Mapping[Unknown, Answer]) -> Iterator[str]:
    """What is said of each setting that is not the same here, as comments; those that nothing is known of, together."""
    left = []
    for one, answer in answers.items():
        if answer.is_needless or answer.is_exact:
            continue
        if answer.text.startswith("there is no setting"):
            left.append(f"{one.key} (line {one.line})")
        elif answer.text:
            yield f"# line {one.line}: {answer.text}"
    if left:
        yield f"# without a counterpart: {', '.join(left)}"


def _tool_of(unknown: Sequence[Unknown], known: Mapping[str, Setting]) -> Tool | None:
    """The program that has most of the names that are not lorasmith's; None where none has any of them."""
    strange = [one.key for one in unknown if one.key not in known]
    parts = {part for key in strange for part in key.split(".")}
    marked = [tool for tool in TOOLS if parts.intersection(tool.sections)]
    if marked:
        return marked[0]
    entries = [found(key, known) for key in strange]
    tools = [entry[0] for entry in entries if entry is not None]
    return max(tools, key=tools.count) if tools else None


def entries(path: Path) -> Iterator[tuple[str, str, int]]:
    """(dotted key, value as text, line) of each setting of a YAML or JSON file; ValueError where it is neither."""
    text = read_text(path).expandtabs(1)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} must be a file of settings, and has none")
    return _entries(root, "")


def _entries(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, str, int]]:
    for name, value in node.value:
        key, line = f"{prefix}{name.value}", name.start_mark.line + 1
        members = value.value if isinstance(value, yaml.SequenceNode) else [value]
        tables = [member for member in members if isinstance(member, yaml.MappingNode)]
        for table in tables:
            yield from _entries(table, f"{key}.")
        if not tables:
            yield key, value.value if members == [value] else listed([member.value for member in members]), line
