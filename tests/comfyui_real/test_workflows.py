"""The example workflows run in ComfyUI as they are, but for the checkpoint, which is tiny, and fewer steps."""

import json
from pathlib import Path
from shutil import copy
from typing import Any

import pytest
from prompts import Prompt, node
from real_comfyui import ROOT, skip_without

Server = Any
WORKFLOWS = ROOT / "comfyui" / "example_workflows"
skip_without()
pytestmark = pytest.mark.timeout(300)
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
SEEDS = ("seed", "noise_seed")
SMALLER = {
    "LorasmithTrainLora": {"steps": 3},
    "LorasmithDataset": {"resolution": 64},
    "EmptyLatentImage": {"width": 64, "height": 64},
    "KSampler": {"steps": 2},
}


def workflow(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / name).read_text(encoding="utf-8"))


def widgets(info: dict[str, Any]) -> dict[str, bool]:
    """The names of a node's widgets in the order of their values, and whether another value follows, for a seed."""
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    names = [*info["input_order"].get("required", []), *info["input_order"].get("optional", [])]
    return {name: _is_controlled(name, *inputs[name]) for name in names if _is_widget(*inputs[name])}


def _is_widget(kind: Any, options: dict[str, Any] | None = None) -> bool:
    return (isinstance(kind, list) or kind in WIDGETS) and not (options or {}).get("forceInput")


def _is_controlled(name: str, kind: Any, options: dict[str, Any] | None = None) -> bool:
    """Whether the front end asks how it is to change after each run."""
    return bool((options or {}).get("control_after_generate", kind == "INT" and name in SEEDS))


def values(names: dict[str, bool], given: list[Any]) -> dict[str, Any]:
    """{widget: value}."""
    rest, found = list(given), {}
    for name, is_controlled in names.items():
        found[name] = rest.pop(0)
        if is_controlled:
            rest.pop(0)
    assert not rest, f"values without a widget: {rest}"
    return found


def as_prompt(server: Server, flow: dict[str, Any]) -> Prompt:
    """What the front end would post; notes are left out."""
    links = {link[0]: [str(link[1]), link[2]] for link in flow["links"]}
    prompt: Prompt = {}
    for part in flow["nodes"]:
        kind = part["type"]
        info = server.client.call(f"/object_info/{kind}").get(kind)
        if info is None:
            assert kind in ("Note", "MarkdownNote"), f"there is no node {kind}"
            continue
        names = widgets(info)
        shown = [slot["name"] for slot in part["inputs"] if slot.get("widget")]
        assert shown == list(names), f"{kind} has other widgets: {set(shown) ^ set(names)}"
        inputs = values(names, part.get("widgets_values") or [])
        inputs |= {slot["name"]: links[slot["link"]] for slot in part["inputs"] if slot.get("link") is not None}
        prompt[str(part["id"])] = node(kind, **{**inputs, **SMALLER.get(kind, {})})
    return prompt


def with_tiny_model(prompt: Prompt) -> Prompt:
    """In the place of the checkpoint, whose outputs are of the same kinds."""
    return {
        name: node("TinyModel") if part["class_type"] == "CheckpointLoaderSimple" else part
        for name, part in prompt.items()
    }


def test_the_example_workflows(server: Server) -> None:
    names = sorted(path.name for path in WORKFLOWS.glob("*.json"))
    assert names == ["continue_a_lora.json", "train_from_a_folder.json"]
    first = server.client.run(with_tiny_model(as_prompt(server, workflow("train_from_a_folder.json"))))
    assert first.event == "execution_success", first.data
    assert any("images" in output for output in first.outputs.values())
    made = server.output / "loras" / "lorasmith_3_steps_00001_.safetensors"
    flow = workflow("continue_a_lora.json")
    (name,) = {
        value
        for part in flow["nodes"] if part["type"] == "LorasmithTrainLora"
        for value in part["widgets_values"] if str(value).endswith(".safetensors")
    }  # fmt: skip
    copy(made, server.base / "models" / "loras" / Path(name).name)
    second = server.client.run(with_tiny_model(as_prompt(server, flow)))
    assert second.event == "execution_success", second.data
    assert list((server.output / "loras").glob("lorasmith_6_steps_*_.safetensors"))


def test_defaults_of_the_workflows_are_the_nodes_own(server: Server) -> None:
    """What a workflow sets differently from a node's default is what it is about, and nothing else."""
    info = server.client.call("/object_info/LorasmithTrainLora")["LorasmithTrainLora"]
    inputs = {**info["input"]["required"], **info["input"]["optional"]}
    for path in WORKFLOWS.glob("*.json"):
        for name, part in as_prompt(server, workflow(path.name)).items():
            if part["class_type"] == "LorasmithTrainLora":
                given = {key: value for key, value in part["inputs"].items() if not isinstance(value, list)}
                changed = {key for key, value in given.items() if value != inputs[key][1].get("default")}
                assert changed <= {"steps", "existing_lora"}, f"{path.name}, node {name}: {changed}"
