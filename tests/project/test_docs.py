"""The documentation: its tables, messages, commands and examples are what the program says; its site builds."""

import importlib.util
import inspect
import itertools
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
from commands import without_work
from tiers import table

from lorasmith.api import train_lora
from lorasmith.cli.main import main
from lorasmith.config.arguments import parsed
from lorasmith.config.schema import Config
from lorasmith.config.settings import settings
from lorasmith.config.values import configured

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
INPUTS = list(inspect.signature(train_lora).parameters)
KINDS = {
    "adapter": "algorithms",
    "optimizer": "optimizers.md",
    "loss": "losses.md",
    "schedule": "schedules.md",
    "times": "times.md",
}
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
EXTERNAL = re.compile(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?https?://[^>]*>")


def _tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_tables", DOCS / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = _tables()
PAGES = [pytest.param(page, id=page.relative_to(DOCS).as_posix()) for page in tables.pages()]
WITH_EXAMPLES = [page for page in tables.pages() if tables.EXAMPLE.search(page.read_text(encoding="utf-8"))]
QUICK = [DOCS / name for name in ("algorithms/lora.md", "inputs/alpha.md", "inputs/model.md", "models.md")]
STALE = "stale: python docs/tables.py writes it anew"


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_what_the_schema_says(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.with_tables(text) == text, STALE


@pytest.mark.slow
def test_refusals_are_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = tables.Refusals().said
    for page in tables.pages():
        text = page.read_text(encoding="utf-8")
        assert tables.with_refusals(text, said) == text, STALE


@table("page", WITH_EXAMPLES, quick=QUICK, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_examples_run_and_print_what_is_shown(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert tables.with_outputs(text) == text, STALE


@pytest.mark.parametrize("page", ["contract.md", "contract.es.md"])
def test_the_contract_lists_every_input_with_its_range_and_default(page: str) -> None:
    rows = {}
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"\| \[`(\w+)`\]\(inputs/(\w+)\.md\) \| .+ \| (.*?) ?\| (.*?) ?\|", line):
            assert match[1] == match[2]
            rows[match[1]] = (match[3], match[4].strip("`"))
    assert list(rows)[:16] == INPUTS[:16] and set(rows) == set(INPUTS)
    for name, (rule, default) in rows.items():
        english = (
            rule.replace("más de ", "above ")
            .replace(" hasta ", " up to ")
            .replace(" a ", " to ")
            .replace(" o ", " or ")
        )
        assert (english, default) == (tables.rule_of(name), tables.default_of(name)), name


@pytest.mark.parametrize("name", INPUTS)
def test_every_input_has_its_page(name: str) -> None:
    text = (DOCS / "inputs" / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n") and f"<!-- table: input {name} -->" in text
    assert f"inputs/{name}.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for heading in ("## Example", "## What is refused", "## Pitfalls", "## Related"):
        assert heading in text, heading


def test_every_setting_is_on_the_page_of_the_settings_or_of_its_kind() -> None:
    pages = ("settings.md", *tables.KINDS.values())
    text = "".join((DOCS / page).read_text(encoding="utf-8") for page in pages)
    assert [key for key in settings() if f"| `{key}` |" not in text] == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_a_kind_has_its_place(kind: str) -> None:
    for name in settings()[kind].rule.removeprefix("one of ").split(", "):
        page = DOCS / KINDS[kind] / f"{name.lower()}.md" if kind == "adapter" else DOCS / KINDS[kind]
        assert f"<!-- table: part {kind} {name} -->" in page.read_text(encoding="utf-8"), name
    assert get_args(Config.model_fields[kind].annotation)


def _commands(text: str) -> list[tuple[str, str]]:
    """Each `lorasmith` command of a page, and what it is shown to print."""
    blocks = [(match[1], match[2]) for match in BLOCK.finditer(text)]
    found = []
    for (kind, block), (after, shown) in itertools.pairwise([*blocks, ("", "")]):
        for line in block.replace("\\\n", "").splitlines() if kind == "sh" else ():
            if line.startswith("lorasmith "):
                found.append((line, shown if after == "text" else ""))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command, shown in _commands(page.read_text(encoding="utf-8")):
        words = shlex.split(command, comments=True)
        if shown.startswith("lorasmith: "):
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit, match="2"):
                main()
            logging.getLogger("lorasmith").setLevel(logging.NOTSET)
            assert without_work(capsys.readouterr().err) == shown
        elif words[1] == "train":
            others, values = parsed([word for word in words[2:] if word != "--json"])
            configured(values)
            assert len(others) == 1, command


def test_pages_name_no_place_on_the_machine_that_made_them() -> None:
    for page in tables.pages():
        assert not re.search(r"(?<![\w.])/(work|root|home|tmp|usr)/", page.read_text(encoding="utf-8")), page


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_no_other_server(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs the extra 'docs': make docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (built.returncode, built.stdout + built.stderr) == (0, "")
    for page in tmp_path.rglob("*.html"):
        assert not EXTERNAL.search(page.read_text(encoding="utf-8")), page
    for file in ("search/search_index.js", "assets/iframe-worker.js"):  # which the search needs without a server
        assert (tmp_path / file).is_file()
    assert "assets/iframe-worker.js" in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "Entradas" in (tmp_path / "es" / "contract.html").read_text(encoding="utf-8")
