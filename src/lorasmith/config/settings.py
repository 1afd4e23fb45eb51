"""The schema, read: every setting by its dotted key, with its rule, its default and its help."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from lorasmith.config.schema import Config

NAMES_OF_KINDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path",
    tuple: "a list of texts",
}  # fmt: skip


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
    type: Any = None  # as pydantic takes it; None for the choice of a part

    def accepts(self, value: Any) -> bool:
        """Whether a value, or a text for one, is allowed."""
        try:
            TypeAdapter(self.type).validate_python(value)
        except ValidationError:
            return False
        return True


@cache  # it is walked for every key that is looked up
def settings() -> Mapping[str, Setting]:
    """{dotted key: setting} of the whole schema, in its order."""
    return MappingProxyType({setting.key: setting for setting in _walk(Config, "")})


def _walk(model: type[BaseModel], prefix: str) -> list[Setting]:
    found: dict[str, Setting] = {}
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        members = _members(field.annotation)
        if not members:
            found[key] = leaf(key, field)
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


def leaf(key: str, field: FieldInfo) -> Setting:
    """The setting that a field with a plain value makes."""
    base, metadata = _plain(field.annotation, field.metadata)
    default, description = _shown(field.default), field.description or ""
    whole = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    if get_origin(base) is Literal:
        options = tuple(map(str, get_args(base)))
        return Setting(key, _one_of(options), default, description, str, options, type=whole)
    kind = tuple if get_origin(base) is tuple else base
    low = next((m for m in metadata if isinstance(m, Ge | Gt)), None)
    high = next((m for m in metadata if isinstance(m, Le | Lt)), None)
    if low is None or high is None:
        return Setting(key, NAMES_OF_KINDS[kind], default, description, kind, type=whole)
    above, to = ("above ", ", up to ") if isinstance(low, Gt) else ("", " to ")
    below = "below " if isinstance(high, Lt) else ""
    rule = f"{above}{_number(_bound(low))}{to}{below}{_number(_bound(high))}"
    return Setting(key, rule, default, description, kind, low=_bound(low), high=_bound(high), type=whole)


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
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()


def _bound(bound: Any) -> Any:
    (value,) = (getattr(bound, name) for name in ("ge", "gt", "le", "lt") if name in type(bound).__annotations__)
    return value


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return str(list(default))
    return "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
