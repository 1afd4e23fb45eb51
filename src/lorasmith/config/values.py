"""Settings as nested values: put together, spelt as the schema has them, and made a config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from lorasmith.config.messages import explained
from lorasmith.config.schema import Config
from lorasmith.config.settings import Setting, settings
from lorasmith.config.spelling import option_of


def configured(values: Mapping[str, Any]) -> Config:
    """Nested values -> a config; ValueError with one line that names the key, the rule and the value.

    Names of options may be written in lower or upper case.
    """
    try:
        return Config.model_validate(_spelt(values, "", settings()))
    except ValidationError as error:
        raise ValueError(explained(error)) from error


def _spelt(values: Mapping[str, Any], prefix: str, known: Mapping[str, Setting]) -> dict[str, Any]:
    """The values with options spelt as the schema has them."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        setting = known.get(key.removesuffix(".name") if name == "name" else key)
        if isinstance(value, Mapping):
            value = _spelt(value, f"{key}.", known)
        elif isinstance(value, str) and setting is not None:
            value = option_of(setting.options, value) or value
        found[name] = value
    return found


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted key: value} -> nested values; a part's name and its fields make one part."""
    values: dict[str, Any] = {}
    for key, value in flat.items():
        put(values, key, value)
    return values


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets the value of a dotted key among nested ones; lists add up."""
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


def toml_of(config: Config, *, is_shared: bool = False) -> str:
    """The whole config, defaults included; settings that are none are left out.

    is_shared: for files that are passed on, of absolute paths the last name alone.
    """
    values = config.model_dump(mode="json", exclude_none=True)
    places = [(values, key) for key in ("model", "encoders", "output", "existing_lora")]
    places += [(values["data"], key) for key in ("folder", "held_out", "drift")]
    for table, key in places if is_shared else ():
        if key in table and Path(table[key]).is_absolute():
            table[key] = Path(table[key]).name
    return tomli_w.dumps(values)
