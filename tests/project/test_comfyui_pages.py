"""The node pack's help pages, translations and example workflows: complete in both languages, and consistent."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

PACK = Path(__file__).parents[2] / "comfyui"
HEADINGS = {"en": ("## Inputs", "## Outputs"), "es": ("## Entradas", "## Salidas")}
LANGUAGES = list(HEADINGS)
ROW = re.compile(r"\| `(\w+)` \| ([A-Z_]+) \|")
MAX_LINE = 130
SYNTAX = re.compile(r"[@{}|]")
"""Characters that mean something else than themselves in the front end's messages."""


def node_defs(language: str) -> dict[str, Any]:
    return json.loads((PACK / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


NODES = list(node_defs("en"))
WORKFLOWS = [pytest.param(path, id=path.stem) for path in sorted((PACK / "example_workflows").glob("*.json"))]


def names_in(value: Any) -> Any:
    """The keys at all depths, in order, and nothing else."""
    return [(key, names_in(inner)) for key, inner in value.items()] if isinstance(value, dict) else None


def texts_in(value: Any) -> list[str]:
    return [text for inner in value.values() for text in texts_in(inner)] if isinstance(value, dict) else [value]


def ids_below(heading: str, page: str) -> list[str]:
    """The first column of the table between this heading and the next one."""
    section = page.split(f"\n{heading}\n")[1].split("\n## ")[0]
    return [match[1] for match in ROW.finditer(section)]


def test_every_node_of_the_pack_is_there() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in PACK.glob("*.py"))
    assert sorted(NODES) == sorted(re.findall(r'node_id="(\w+)"', source))
    assert {path.name for path in (PACK / "web" / "docs").iterdir()} == set(NODES)


def test_both_languages_translate_the_same() -> None:
    english, spanish = (node_defs(language) for language in LANGUAGES)
    assert names_in(english) == names_in(spanish)
    for node in NODES:
        for kind in ("inputs", "outputs"):
            for key, slot in english[node][kind].items():
                assert slot["name"] == spanish[node][kind][key]["name"], (node, key)


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_read_as_they_are_written(language: str) -> None:
    texts = texts_in(node_defs(language))
    assert [text for text in texts if not text.strip() or SYNTAX.search(text)] == []


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node", NODES)
def test_a_page_names_every_input_and_output_in_order(node: str, language: str) -> None:
    page = (PACK / "web" / "docs" / node / f"{language}.md").read_text(encoding="utf-8")
    told = node_defs(language)[node]
    inputs, outputs = HEADINGS[language]
    assert page.startswith(f"# {told['display_name']}\n")
    assert ids_below(inputs, page) == list(told["inputs"])
    assert ids_below(outputs, page) == [slot["name"] for slot in told["outputs"].values()]
    assert [line for line in page.splitlines() if len(line) > MAX_LINE] == []


@pytest.mark.parametrize("path", WORKFLOWS)
def test_the_links_of_a_workflow_have_both_ends(path: Path) -> None:
    graph = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {link[0]: link for link in graph["links"]}
    assert graph["version"] == 0.4
    assert len(nodes) == len(graph["nodes"]) and max(nodes) == graph["last_node_id"]
    assert len(links) == len(graph["links"]) and max(links) == graph["last_link_id"]
    for number, source, output, target, place, kind in links.values():
        taken, given = nodes[target]["inputs"][place], nodes[source]["outputs"][output]
        assert taken["link"] == number and number in given["links"]
        assert taken["type"] == given["type"] == kind
    ends = [slot["link"] for node in nodes.values() for slot in node["inputs"] if slot["link"] is not None]
    starts = [number for node in nodes.values() for slot in node["outputs"] for number in slot["links"] or []]
    assert sorted(ends) == sorted(starts) == sorted(links)


@pytest.mark.parametrize("path", WORKFLOWS)
def test_the_widgets_of_a_workflow_are_the_nodes_own(path: Path) -> None:
    told, own = node_defs("en"), 0
    for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
        widgets = [slot["name"] for slot in node["inputs"] if "widget" in slot]
        if node["type"] in told:
            own += 1
            known = told[node["type"]]["inputs"]
            assert {slot["name"] for slot in node["inputs"]} == set(known)
            assert widgets == [name for name in known if name in widgets]
        if "seed" in widgets and node["type"] not in told:
            widgets.insert(widgets.index("seed") + 1, "control_after_generate")
        if node["type"] != "Note":  # whose text is no input
            assert len(node.get("widgets_values", [])) == len(widgets), node["type"]
    assert own >= 4
