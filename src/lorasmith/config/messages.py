"""What is wrong with values, in one line: the key, the rule, the value and, where it is known, what was meant."""

from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from lorasmith.config.settings import Setting, settings
from lorasmith.config.spelling import near_key, near_option
from lorasmith.config.translation import ours_of

KINDS = {"int": "a whole number", "float": "a number"}  # of pydantic's types of errors


def explained(error: ValidationError) -> str:
    """The first thing wrong, in one line."""
    known = settings()
    first = error.errors()[0]
    key, value = _key(first["loc"], known), first["input"]
    if first["type"] == "extra_forbidden" and key in known:
        part, _, name = key.rpartition(".")
        return f"{part} {first['loc'][-2]} has no setting {name}"
    if first["type"] == "extra_forbidden":
        return unknown_setting(key, known)
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        value = value.get("name") if isinstance(value, dict) else value
        return f"{key} must be {known[key].rule}, got {value!r}{_meant(known[key], value)}"
    if first["type"] == "value_error":
        return f"{key} {first['msg'].removeprefix('Value error, ')}"
    setting = known.get(key)
    if first["type"] == "string_pattern_mismatch":
        return f"{key} must be {known[key].help}, got {value!r}"
    rule = setting.rule if setting else "a table of settings"
    kind = KINDS.get(first["type"].partition("_")[0])
    if kind and kind != rule and first["type"] not in ("int_parsing", "float_parsing"):
        rule = f"{kind}, {rule}"
    return f"{key} must be {rule}, got {value!r}{_meant(setting, value) if setting else ''}"


def unknown_setting(key: str, known: Mapping[str, Setting]) -> str:
    """That there is no such setting, and the nearest one."""
    near = near_key(key, known)
    return f"there is no setting {key}{f': did you mean {near}?' if near else ''}"


def _meant(setting: Setting, value: object) -> str:
    """What another program's value, or a misspelt one, is here, as the end of a message."""
    if not isinstance(value, str):
        return ""
    ours = ours_of(setting, value)
    if ours is not None and ours.typed != value:
        return f": the nearest is {ours.typed}" if ours.is_nearest else f": did you mean {ours.typed}?"
    near = near_option(setting.options, value)
    return f": did you mean {near}?" if near else ""


def _key(loc: Sequence[int | str], known: Mapping[str, Setting]) -> str:
    """pydantic's location -> dotted key, without list positions, the names of a union's members and their `name`."""
    key = ""
    for index, part in enumerate(loc):
        is_last = index == len(loc) - 1
        longer = f"{key}.{part}".lstrip(".")
        prefix_known = any(k == longer or k.startswith(f"{longer}.") for k in known)
        is_name = part == "name" and key in known
        if isinstance(part, str) and (prefix_known or is_last) and not is_name:
            key = longer
    return key
