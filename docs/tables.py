"""What these pages take from the code: `python docs/tables.py` writes it anew.

    <!-- table: settings optimizer -->  … <!-- end -->   a table from the schema
    <!-- table: files -->               … <!-- end -->   which program reads which LoRA file, as tests prove it
    <!-- table: from kohya -->          … <!-- end -->   another trainer's names, and what they are here
    <!-- table: refused -->             … <!-- end -->   a list of calls that are refused, each with the message
    <!-- run --> and a block of Python                   an example that runs
    <!-- output --> and a block of text                  what the example before it prints

tests/project/test_docs.py fails where a page differs from what would be written.
"""

import contextlib
import inspect
import io
import os
import re
import runpy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from lorasmith.api import NAMES, train_lora
from lorasmith.config.arguments import parsed
from lorasmith.config.other_trainers import TOOLS
from lorasmith.config.other_trainers.name import Name
from lorasmith.config.settings import Setting, leaf, settings
from lorasmith.config.values import configured, merged

DOCS = Path(__file__).parent
MARKED = re.compile(r"(<!-- table: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
REFUSED = re.compile(r"^- `([^`]+)`", re.MULTILINE)
EXAMPLE = re.compile(r"<!-- (run|output) -->\n```(?:python|text)\n(.*?)```", re.DOTALL)
OF_INPUTS = {name: key for key, name in NAMES.items()} | {
    "algorithm": "adapter", "targets": "targets.preset", "latents": "data.folder", "positive": "data.folder",
}  # fmt: skip
"""{input of train_lora: its setting}, where they differ."""
WITHOUT_SETTING = {
    "checkpoint_folder": "none: always `checkpoints` in the run folder",
    "resume_from": "none: the flag `--resume`",
    "world": "none: `torchrun`",
}
"""{input of train_lora: what the command line has in its place}."""
WITHOUT_RANGE = (
    "model", "encoders", "latents", "positive", "existing_lora", "algorithm", "optimizer", "targets",
    "checkpoint_folder", "resume_from", "checkpoints", "non_finite", "text_encoder", "world",
)  # fmt: skip
KINDS = {"adapter": "inputs/algorithm.md", "optimizer": "optimizers.md"}
"""{a setting that chooses one of a kind: the page that lists them}."""
Say = Callable[[str], str]


def pages() -> list[Path]:
    """Every page, translations too."""
    return sorted(DOCS.rglob("*.md"))


# Tables


def with_tables(text: str) -> str:
    """A page's text with the tables from the schema written anew."""

    def table(match: re.Match[str]) -> str:
        opening, what, held, closing = match.groups()
        kind, *names = what.split()
        return match[0] if kind == "refused" else f"{opening}{TABLES[kind](*names)}{closing}"

    return MARKED.sub(table, text)


def setting_of(name: str) -> Setting | None:
    """The setting that an input of train_lora stands for; None for those that only Python has."""
    return settings().get(OF_INPUTS.get(name, name))


def rule_of(name: str) -> str:
    """An input's range, as the signature and the schema have it; "" where it is no number or choice."""
    if name in WITHOUT_RANGE:
        return ""
    annotation = inspect.signature(train_lora).parameters[name].annotation
    if annotation is bool:
        return "true or false"
    options = [choice for option in get_args(annotation) for choice in (get_args(option) or (option,))]
    if choices := [choice for choice in options if isinstance(choice, str)]:
        return ", ".join(choices)
    setting = setting_of(name)
    assert setting is not None, name
    return setting.rule


def default_of(name: str) -> str:
    """An input's default in Python; "" where there is none."""
    default = inspect.signature(train_lora).parameters[name].default
    return "" if default is inspect.Parameter.empty else str(default)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def _head(*names: str) -> str:
    return _row(*names) + f"|{'---|' * len(names)}\n"


def _setting_rows(rows: Sequence[Setting]) -> str:
    if not rows:
        return "It has no settings of its own.\n"
    cells = (
        _row(f"`{row.key}`", row.help.replace("[]", "`[]`").replace("<", "&lt;"), f"`{row.default}`", row.rule)
        for row in rows
    )
    return _head("setting", "meaning", "default", "value") + "".join(cells)


def _settings(part: str) -> str:
    """A part's settings; of the part "top", those that are in no part."""
    known = settings()
    parts = {key.partition(".")[0] for key in known if "." in key}
    held = [
        key for key in known if key.startswith(f"{part}.") or (part == "top" and key not in parts and "." not in key)
    ]
    return _setting_rows([known[key] for key in held])


def _kind(key: str) -> str:
    """The choice among the parts of a kind: its names and its default."""
    chosen = settings()[key]
    return _setting_rows([replace(chosen, rule=f"one of [these]({KINDS[key]})") if key in KINDS else chosen])


def _part(key: str, name: str) -> str:
    """The settings of one part: parts of a kind may share a key with other defaults."""
    part = type(getattr(configured({key: name}), key))
    return _setting_rows([leaf(f"{key}.{field}", info) for field, info in part.model_fields.items() if field != "name"])


def _input(name: str) -> str:
    """An input's range, default and setting."""
    setting = setting_of(name)
    keys = [key for key in settings() if name not in settings() and key.startswith(f"{name}.")]  # those of a part
    keys = keys or ([setting.key] if setting else [])
    rows = [
        ("range", rule_of(name)),
        ("default", f"`{default_of(name)}`" if default_of(name) else "none: it must be given"),
        ("setting", ", ".join(f"`{key}`" for key in keys) or WITHOUT_SETTING.get(name, "only from Python")),
    ]
    return _head("", "") + "".join(_row(*row) for row in rows if row[1])


def _files() -> str:
    """Of tests/helpers/file_table.py."""
    return runpy.run_path(str(DOCS.parent / "tests" / "helpers" / "file_table.py"))["table"]()


def _from(program: str) -> str:
    """Another program's names, and what they are here."""
    (tool,) = (tool for tool in TOOLS if tool.whose.partition("'")[0].lower() == program)
    return _head("there", "here", "") + "".join(_name_row(name, tool.prefix) for name in tool.names)


def _name_row(name: Name, prefix: str) -> str:
    theirs = name.shown or ", ".join(f"`{prefix}{one}`" for one in name.names)
    default = f" (default {name.default})" if name.default else ""
    if name.is_needless:
        return _row(theirs, "", f"not needed: {name.note}")
    if name.is_nearest or not name.ours:
        nearest = f"nearest: `{name.ours}`" if name.ours else ""
        return _row(theirs + default, "none", "; ".join(part for part in (name.note, nearest) if part))
    ours = " ".join(f"`{part.strip()}`" for part in re.split(r" (?=--)", name.ours))
    return _row(theirs + default, ours, name.note)


TABLES: dict[str, Callable[..., str]] = {
    "settings": _settings, "kind": _kind, "part": _part, "input": _input, "files": _files, "from": _from,
}  # fmt: skip


# Refusals


def with_refusals(text: str, say: Say) -> str:
    """A page's text with the message of each call that it lists written anew."""

    def table(match: re.Match[str]) -> str:
        opening, what, held, closing = match.groups()
        if what != "refused":
            return match[0]
        rows = "".join(f"- `{call}` → `{say(call)}`\n" for call in REFUSED.findall(held))
        return f"{opening}\n{rows}\n{closing}"

    return MARKED.sub(table, text)


class Refusals:
    """What is said of bad inputs: of train_lora, or of the command line where a call begins with --."""

    def __init__(self) -> None:
        import torch

        from lorasmith.adapters.targets import Targets
        from lorasmith.config.schema import Checkpoints, NonFinite
        from lorasmith.demo import BASE
        from lorasmith.distributed.process_group import World
        from lorasmith.models.load import load_model

        parts = {part.__name__: part for part in (Targets, Checkpoints, NonFinite, World)}
        self.names = {"torch": torch, "BASE": BASE, **parts}
        self.given: dict[str, Any] = {
            "model": load_model(BASE).denoiser,
            "latents": torch.zeros(2, 4, 16, 16),
            "positive": [torch.zeros(32, 192)] * 2,
            "steps": 1,
        }

    def said(self, call: str) -> str:
        """The message; AssertionError where the call is not refused."""
        if '"old"' in call or '"torn.safetensors"' in call:
            self._write_checkpoints()
        try:
            if call.startswith("--"):
                _, values = parsed(call.split())
                configured(merged({"data": {"folder": "drawings"}, "model": "demo"}, values))
            else:
                train_lora(**{**self.given, **eval(f"dict({call})", dict(self.names))})
        except (ValueError, ArithmeticError) as error:
            return f"lorasmith: {error}" if call.startswith("--") else str(error)
        raise AssertionError(f"{call} is not refused")

    def _write_checkpoints(self) -> None:
        """The folder `old`, with the checkpoint of a training, and `torn.safetensors`, that file without its end."""
        if not Path("old").exists():
            train_lora(**self.given, checkpoint_folder="old")
            (checkpoint,) = Path("old").glob("*.safetensors")
            Path("torn.safetensors").write_bytes(checkpoint.read_bytes()[:-1000])


# Examples


def with_outputs(text: str) -> str:
    """A page's text with what its examples print written anew; runs them, in the folder that is the current one."""
    printed = ""

    def example(match: re.Match[str]) -> str:
        nonlocal printed
        if match[1] == "output":
            return f"<!-- output -->\n```text\n{printed}```"
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(match[2], "example", "exec"), {"__name__": "example"})
        printed = out.getvalue()
        return match[0]

    return EXAMPLE.sub(example, text)


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """Examples write their files into a folder that goes away."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(here)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    say = Refusals().said
    for page in [page.resolve() for page in pages()]:
        text = page.read_text(encoding="utf-8")
        with elsewhere():
            new = with_outputs(with_refusals(with_tables(text), say))
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(page.name)
