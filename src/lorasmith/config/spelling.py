"""Keys and options as people spell them."""

import difflib
import re
from collections.abc import Collection, Mapping

from lorasmith.config.settings import Setting


def option_of(options: Collection[str], text: str) -> str | None:
    """The option that a text means, in whatever case."""
    return {_plain(option): option for option in options}.get(_plain(text))


def near_option(options: Collection[str], text: str) -> str | None:
    """The option that a text is most likely a misspelling of."""
    plain = {_plain(option): option for option in options}
    close = difflib.get_close_matches(_plain(text), plain, 1, 0.7)
    return plain[close[0]] if close else None


def near_key(key: str, known: Mapping[str, Setting]) -> str | None:
    """The setting that an unknown key most likely means; None where none is alike."""
    inside = [k for k in known if k.startswith(f"{key}.")]
    if inside:
        return inside[0]
    fields = {k.rpartition(".")[2]: k for k in reversed(list(known))}
    field = key.rpartition(".")[2]
    close = difflib.get_close_matches(key, known, 1, 0.75)
    by_field = difflib.get_close_matches(field, fields, 1, 0.75)
    if close or by_field:
        return close[0] if close else fields[by_field[0]]
    return _sharing_words(field, fields)


def _sharing_words(field: str, fields: Mapping[str, str]) -> str | None:
    """The setting whose words are all in the field's name, or the other way round."""
    words = _words(field)
    alike = [name for name in fields if _words(name) <= words or (words and words <= _words(name))]
    return fields[max(alike, key=lambda name: (len(_words(name) & words), -len(name)))] if alike else None


def _plain(text: str) -> str:
    return text.casefold().replace("-", "_")


def _words(name: str) -> set[str]:
    return {word for word in re.split(r"[._]", name.lower()) if word}
