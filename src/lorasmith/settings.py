"""The schema, read: every setting by its dotted key, overrides and TOML files on top of it, and errors in one line."""

import difflib
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tomli_w
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lorasmith.config import Config

NAMES_OF_KINDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path",
    tuple: "a list of texts",
}  # fmt: skip
KINDS = {"int": "a whole number", "float": "a number"}  # of pydantic's types of errors
_TOML_LIST = re.compile(r"""\[\s*["'\]]""")  # other texts in brackets are regular expressions or prompts


@dataclass(frozen=True)
class Setting:
    """One setting of the schema."""

    key: str
    rule: str  # "1 to 128", "one of bf16, fp32", "text"
    default: str
    help: str
    kind: type  # bool, int, float, str, Path or tuple
    options: tuple[str, ...] = ()  # of a str that has no others
    low: float | None = None  # the bounds of a number, which may not belong to it
    high: float | None = None


def settings() -> dict[str, Setting]:
    """{dotted key: setting} of the whole schema, in its order."""
    return {setting.key: setting for setting in _walk(Config, "")}


def _walk(model: type[BaseModel], prefix: str) -> list[Setting]:
    found: dict[str, Setting] = {}
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        members = _members(field.annotation)
        if not members:
            found[key] = _leaf(key, field)
            continue
        if any("name" in member.model_fields for member in members):
            names = [str(member.model_fields["name"].default) for member in members]
            default = _shown(getattr(field.default, "name", None))
            found[key] = Setting(key, _one_of(names), default, field.description or "", str, tuple(names))
        found |= {setting.key: setting for setting in _of_members(members, key)}
    return list(found.values())


def _of_members(members: Sequence[type[BaseModel]], key: str) -> list[Setting]:
    """The settings of the models that a field may hold; help and defaults that differ are said with their models."""
    variants: dict[str, dict[str, Setting]] = {}
    for member in members:
        name = str(member.model_fields["name"].default) if "name" in member.model_fields else ""
        for setting in _walk(member, f"{key}."):
            if setting.key != f"{key}.name":
                variants.setdefault(setting.key, {})[name] = setting
    return [_merged_setting(by_name) for by_name in variants.values()]


def _merged_setting(by_name: Mapping[str, Setting]) -> Setting:
    """The first of {member: setting}, with what the others say differently in its help."""
    first = next(iter(by_name.values()))
    helps = _by_text({name: setting.help for name, setting in by_name.items()})
    defaults = _by_text(
        {name: setting.default for name, setting in by_name.items() if setting.default != first.default}
    )
    said = "; ".join(text if len(helps) == 1 else f"{text} ({', '.join(names)})" for text, names in helps.items())
    return replace(first, help=said + "".join(f"; default {text} for {', '.join(n)}" for text, n in defaults.items()))


def _by_text(texts: Mapping[str, str]) -> dict[str, list[str]]:
    """{name: text} -> {text: names}."""
    names: dict[str, list[str]] = {}
    for name, text in texts.items():
        names.setdefault(text, []).append(name)
    return names


def _members(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field may hold; none for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [arg for arg in get_args(annotation) if isinstance(arg, type) and issubclass(arg, BaseModel)]


def _leaf(key: str, field: FieldInfo) -> Setting:
    base, metadata = _plain(field.annotation, field.metadata)
    default, description = _shown(field.default), field.description or ""
    if get_origin(base) is Literal:
        options = tuple(map(str, get_args(base)))
        return Setting(key, _one_of(options), default, description, str, options)
    kind = tuple if get_origin(base) is tuple else base
    low = next((m for m in metadata if isinstance(m, Ge | Gt)), None)
    high = next((m for m in metadata if isinstance(m, Le | Lt)), None)
    if low is None or high is None:
        return Setting(key, NAMES_OF_KINDS[kind], default, description, kind)
    above, to = ("above ", ", up to ") if isinstance(low, Gt) else ("", " to ")
    below = "below " if isinstance(high, Lt) else ""
    rule = f"{above}{_number(_bound(low))}{to}{below}{_number(_bound(high))}"
    return Setting(key, rule, default, description, kind, low=_bound(low), high=_bound(high))


def _one_of(options: Sequence[str]) -> str:
    return f"one of {', '.join(options)}"


def _plain(annotation: Any, metadata: Sequence[Any]) -> tuple[Any, list[Any]]:
    """A type without None and without what it is annotated with, and all that it is annotated with."""
    options = [arg for arg in _union_args(annotation) if arg is not type(None)]
    if options:
        return _plain(options[0], metadata)
    if get_origin(annotation) is Annotated:
        base, *inner = get_args(annotation)
        constraints = [part for info in inner for part in (info.metadata if isinstance(info, FieldInfo) else [info])]
        return _plain(base, [*metadata, *constraints])
    return annotation, list(metadata)


def _union_args(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ()


def _bound(bound: Any) -> Any:
    (value,) = (getattr(bound, name) for name in ("ge", "gt", "le", "lt") if name in type(bound).__annotations__)
    return value


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return str(list(default))
    return "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def configured(values: Mapping[str, Any]) -> Config:
    """Nested values -> a config; ValueError with one line that names the key, the rule and the value."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(explained(error)) from error


def explained(error: ValidationError) -> str:
    """The first thing wrong, in one line."""
    known = settings()
    first = error.errors()[0]
    key = _key(first["loc"], known)
    if first["type"] == "extra_forbidden" and key in known:
        part, _, name = key.rpartition(".")
        return f"{part} {first['loc'][-2]} has no setting {name}"
    if first["type"] == "extra_forbidden":
        return f"there is no setting {key}{nearest(key, known)}"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        value = first["input"].get("name") if isinstance(first["input"], dict) else first["input"]
        return f"{key} must be {known[key].rule}, got {value!r}"
    if first["type"] == "value_error":
        return f"{key} {first['msg'].removeprefix('Value error, ')}"
    setting = known.get(key)
    if first["type"] == "string_pattern_mismatch":
        return f"{key} must be {known[key].help}, got {first['input']!r}"
    rule = setting.rule if setting else "a table of settings"
    kind = KINDS.get(first["type"].partition("_")[0])
    if kind and kind != rule and first["type"] not in ("int_parsing", "float_parsing"):
        rule = f"{kind}, {rule}"
    return f"{key} must be {rule}, got {first['input']!r}"


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


def nearest(key: str, known: Mapping[str, Setting]) -> str:
    """What an unknown key most likely meant, as the end of a message."""
    names = {k.rpartition(".")[2]: k for k in reversed(list(known))}
    inside = [k for k in known if k.startswith(f"{key}.")]
    close = inside or difflib.get_close_matches(key, known, 1, 0.6)
    by_name = difflib.get_close_matches(key.rpartition(".")[2], names, 1, 0.6)
    guess = close[0] if close else names[by_name[0]] if by_name else None
    return f": did you mean {guess}?" if guess else ""


def parsed(tokens: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """SOURCE --adapter.rank 16 --schedule cosine … -> what is no setting, and the settings as nested values.

    A list is given by repeating its key or as TOML; a yes-or-no setting alone means true.
    ValueError on an unknown key or a missing value.
    """
    known = settings()
    others: list[str] = []
    values: dict[str, Any] = {}
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
            raise ValueError(f"there is no setting {key}{nearest(key, known)}")
        if not has_value:
            text = _next_value(known[key], rest)
        _set(values, key, _value(known[key], text))
    return others, values


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
    if not _TOML_LIST.match(text):
        return [text]
    try:
        return tomllib.loads(f"list = {text}")["list"]
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{setting.key} must be {setting.rule}, got {text!r} ({error})") from error


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted key: value} -> nested values; a part's name and its fields make one part."""
    values: dict[str, Any] = {}
    for key, value in flat.items():
        _set(values, key, value)
    return values


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *tables, last = key.split(".")
    for name in tables:
        inner = values.setdefault(name, {})
        if not isinstance(inner, dict):
            inner = values[name] = {"name": inner}
        values = inner
    held = values.get(last)
    if isinstance(held, list) and isinstance(value, list):
        value = held + value
    if isinstance(held, dict):
        value = {**held, "name": value}
    values[last] = value


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values, those of `above` on top; a name on one side and fields on the other make one part.

    Another name than the one below starts from its defaults.
    """
    result = dict(below)
    for key, value in above.items():
        held = result.get(key)
        if isinstance(held, str) and isinstance(value, dict):
            held = {"name": held}
        if isinstance(held, dict) and isinstance(value, str):
            value = {"name": value}
        if isinstance(held, dict) and isinstance(value, dict) and not _are_other_parts(held, value):
            value = merged(held, value)
        result[key] = value
    return result


def _are_other_parts(held: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    return "name" in held and "name" in value and held["name"] != value["name"]


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's values; ValueError where it is none."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    _refuse_flags(values, "")
    return values


def _refuse_flags(values: Mapping[str, Any], prefix: str) -> None:
    """ValueError where a number is given as true or false, which would count as 1 or 0."""
    known = settings()
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            _refuse_flags(value, f"{key}.")
        elif isinstance(value, bool) and key in known and known[key].kind is not bool:
            raise ValueError(f"{key} must be {known[key].rule}, got {str(value).lower()}")


def toml_of(config: Config) -> str:
    """The whole config, defaults included; settings that are none are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
