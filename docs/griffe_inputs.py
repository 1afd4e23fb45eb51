"""Docstrings as the code writes them -> as mkdocstrings reads them.

A docstring here names a parameter at the start of a line, `rank: 1 to 128`, and goes on in indented lines; types stand
in the signature alone. These lines become a section "Args:". And docstrings are plain text: <net> is no HTML.
"""

import re
from typing import Any

from griffe import Docstring, Extension, Function, Object

NAMES = re.compile(r"((?:\w+, )*\w+): (.+)")


class Inputs(Extension):
    """Gives functions a section of their parameters, and takes the HTML out of all docstrings."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("<", "&lt;")

    def on_function(self, *, func: Function, **_: Any) -> None:
        if func.docstring is not None:
            func.docstring.value = sectioned(func.docstring, {parameter.name for parameter in func.parameters})


def sectioned(docstring: Docstring, parameters: set[str]) -> str:
    """The text with the lines that name parameters in a section."""
    lines = docstring.value.splitlines()
    out: list[str] = []
    inside = False
    for line in lines:
        match = NAMES.fullmatch(line)
        names = match[1].split(", ") if match else []
        if match and set(names) <= parameters:
            if not inside:
                out += ["", "Args:"]
            inside = True
            out += [f"    {name}: {match[2]}" for name in names]
        elif inside and line.startswith(" "):
            out.append(f"    {line}")
        else:
            if inside and line:
                out.append("")
            inside = inside and not line
            out.append(line)
    return "\n".join(out)
