"""The pack in a running ComfyUI: whole runs, cancelling and resuming, errors, and wires to the built-in companions."""

from pathlib import Path
from shutil import copy
from typing import Any

import pytest
from comfy_client import Ended
from prompts import CONTRACT, Prompt, from_a_folder, node, ours_among_theirs, theirs_among_ours
from real_comfyui import skip_without
from safetensors import safe_open

Server = Any
skip_without()
pytestmark = pytest.mark.timeout(300)
NODES = ("TrainLora", "SaveLora", "LoadLora", "LossGraph", "Dataset", "Buckets", "SaveDataset", "LoadDataset")


def succeeded(server: Server, prompt: Prompt, **arguments: Any) -> Ended:
    ended = server.client.run(prompt, **arguments)
    assert ended.event == "execution_success", ended.data.get("exception_message", ended.data)
    return ended


def failed(server: Server, prompt: Prompt) -> str:
    """The message of an error in a node, which is one line."""
    ended = server.client.run(prompt)
    assert ended.event == "execution_error", ended.event
    message = ended.data["exception_message"].strip()
    assert "\n" not in message, message
    return message


def opened(path: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """A safetensors file's tensors, as bytes, and metadata."""
    with safe_open(path, framework="np") as file:
        return {key: file.get_tensor(key).tobytes() for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def cancelled(server: Server, prompt: Prompt, at: int) -> Ended:
    """A run that is interrupted at this step."""

    def on_progress(name: str, value: float) -> None:
        if name == "train" and value >= at:
            server.client.call("/interrupt", {})

    return server.client.run(prompt, on_progress)


def steps_shown(ended: Ended) -> list[int]:
    """The steps that the training node has shown."""
    shown = [int(value) for value, most in ended.progress["train"] if most > 1 and value]
    return list(dict.fromkeys(shown))


def test_the_nodes_are_there(server: Server) -> None:
    assert "IMPORT FAILED" not in server.log()
    for name in NODES:
        info = server.client.call(f"/object_info/Lorasmith{name}")[f"Lorasmith{name}"]
        assert info["category"].startswith("lorasmith") and info["description"]
    info = server.client.call("/object_info/LorasmithTrainLora")["LorasmithTrainLora"]
    assert list(info["input"]["required"]) == ["model", "latents", "positive", *CONTRACT]
    assert info["output_name"] == ["model_with_lora", "lora", "loss", "steps"]


def test_a_whole_run(server: Server) -> None:
    ended = succeeded(server, from_a_folder("whole"))
    assert steps_shown(ended) == [1, 2, 3, 4]
    assert {most for _, most in ended.progress["train"][1:-1]} == {4}
    pictures = [content for content in ended.pictures if content[:4] == b"\0\0\0\x04"]  # with their node's name
    assert pictures and any(mark in pictures[0] for mark in (b"\xff\xd8\xff", b"\x89PNG"))
    tensors, metadata = opened(server.output / "loras" / "whole_4_steps_00001_.safetensors")
    assert tensors and metadata["lorasmith.steps"] == metadata["ss_steps"] == "4"
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert (server.output / "plots" / "whole_00001_.png").stat().st_size > 1000
    assert ended.outputs["plot"]["images"] and not server.checkpoints()


def test_cancelling_and_resuming(server: Server) -> None:
    steps = 60
    ended = cancelled(server, from_a_folder("resumed", steps=steps, seed=1), at=3)
    assert ended.event == "execution_interrupted"
    (checkpoint,) = server.checkpoints()
    stop = int(checkpoint.stem.removeprefix("step-"))
    assert 3 <= stop < steps and stop - 3 <= 10, "it must end after the step in hand"
    assert not list((server.output / "loras").glob("resumed*"))
    resumed = succeeded(server, from_a_folder("resumed", steps=steps, seed=1))
    assert steps_shown(resumed) == list(range(stop + 1, steps + 1))
    # Another input that decides nothing, so that ComfyUI does not take the training's outputs from its cache.
    succeeded(server, from_a_folder("at_once", steps=steps, seed=1, checkpoints_keep=3))
    one, other = (
        server.output / "loras" / f"{name}_{steps}_steps_00001_.safetensors" for name in ("resumed", "at_once")
    )
    assert opened(one) == opened(other) and one.read_bytes() == other.read_bytes()
    assert not list((server.output / "lorasmith" / "checkpoints").iterdir())


def test_starting_anew_on_demand(server: Server) -> None:
    assert cancelled(server, from_a_folder("anew", steps=60, seed=2), at=3).event == "execution_interrupted"
    ended = succeeded(server, from_a_folder("anew", steps=60, seed=2, resume=False))
    assert steps_shown(ended)[0] == 1 and not server.checkpoints()


def test_an_error_is_one_line_and_the_server_goes_on(server: Server) -> None:
    prompt = from_a_folder("damaged", seed=3)
    prompt["damage"] = node("TinyDamage", latents=["data", 0])
    prompt["train"]["inputs"]["latents"] = ["damage", 0]
    message = failed(server, prompt)
    assert "sample 0" in message and "latent must be finite" in message
    succeeded(server, from_a_folder("after", seed=3, steps=1))


def test_other_errors_are_one_line(server: Server) -> None:
    for inputs, words in (
        ({"targets_include": "("}, ("targets", "regular expression")),
        ({"targets_preset": "none"}, ("targets", "match")),
        ({"non_finite_returns": 1}, ("non_finite", "save_every")),
        ({"factor": 2}, ("LoRA", "factor")),
    ):
        message = failed(server, from_a_folder("odd", seed=4, **inputs))
        assert all(word in message for word in words), message


def test_values_out_of_range_are_refused(server: Server) -> None:
    for name, value in (("steps", 0), ("rank", 129), ("learning_rate", 0.0), ("seed", -1), ("optimizer", "Lion")):
        with pytest.raises(ValueError, match=name):
            server.client.run(from_a_folder("refused", **{name: value}))


def test_every_default_is_accepted(server: Server) -> None:
    """As the front end posts them, which leaves no widget out."""
    info = server.client.call("/object_info/LorasmithTrainLora")["LorasmithTrainLora"]["input"]
    options = {name: rest for name, (_, *rest) in {**info["required"], **info["optional"]}.items() if rest}
    defaults = {name: rest[0]["default"] for name, rest in options.items() if "default" in rest[0]}
    assert len(defaults) > 40
    succeeded(server, from_a_folder("defaults", **{**defaults, "steps": 1}))


def test_the_highest_seed(server: Server) -> None:
    succeeded(server, from_a_folder("seed", seed=2**64 - 1, steps=1))


def test_going_on_with_a_lora(server: Server) -> None:
    succeeded(server, from_a_folder("first", seed=5))
    copy(
        server.output / "loras" / "first_4_steps_00001_.safetensors",
        server.base / "models" / "loras" / "mine.safetensors",
    )
    succeeded(server, from_a_folder("second", seed=5, existing_lora="mine.safetensors"))
    _, metadata = opened(server.output / "loras" / "second_8_steps_00001_.safetensors")
    assert metadata["lorasmith.steps"] == "8"


@pytest.mark.parametrize("source", ["data", "buckets"])
@pytest.mark.parametrize("bucket_mode", [False, True])
def test_among_the_built_in_companions(server: Server, source: str, bucket_mode: bool) -> None:
    prefix = f"among_{source}_{bucket_mode}"
    ended = succeeded(server, ours_among_theirs(prefix, source, bucket_mode=bucket_mode, steps=2))
    assert opened(server.output / "loras" / f"{prefix}_2_steps_00001_.safetensors")[0]
    assert ended.outputs["plot"]["images"] and ended.outputs["sink"]["patches"][0] > 10


def test_the_built_in_training_among_ours(server: Server) -> None:
    ended = succeeded(server, theirs_among_ours("theirs"))
    assert opened(server.output / "loras" / "theirs_2_steps_00001_.safetensors")[0]
    assert ended.outputs["sink"]["patches"][0] > 10


def test_the_model_that_comes_out_has_the_lora(server: Server) -> None:
    prompt = from_a_folder("applied", steps=1)
    prompt["sink"] = node("TinySink", model=["train", 0])
    assert succeeded(server, prompt).outputs["sink"]["patches"][0] > 10


def test_a_data_set_on_disk(server: Server) -> None:
    prompt = from_a_folder("direct", seed=6)
    prompt["keep"] = node("LorasmithSaveDataset", latents=["data", 0], positive=["data", 1], name="kept/mine")
    succeeded(server, prompt)
    again = from_a_folder("loaded", seed=6)
    again["data"] = node("LorasmithLoadDataset", name="kept/mine")
    succeeded(server, again)
    one, other = (server.output / "loras" / f"{name}_4_steps_00001_.safetensors" for name in ("direct", "loaded"))
    assert one.read_bytes() == other.read_bytes()


def test_a_changed_caption_trains_anew(server: Server) -> None:
    """ComfyUI takes what has not changed from its cache: captions in files and in tables count as changes."""
    folder = server.base / "input" / "changing"
    folder.mkdir()
    copy(server.base / "input" / "pictures" / "1.png", folder)

    def is_trained() -> bool:
        prompt = from_a_folder("changing", seed=8, steps=1)
        prompt["data"]["inputs"]["folder"] = "changing"
        return "train" in succeeded(server, prompt).progress

    for name, captions in (
        ("1.txt", ("one", "two")),
        ("metadata.jsonl", ('{"file_name": "1.png", "text": "one"}', '{"file_name": "1.png", "text": "two"}')),
    ):
        for caption in captions:
            (folder / name).write_text(caption, encoding="utf-8")
            assert [is_trained(), is_trained()] == [True, False], (name, caption)
        (folder / name).unlink()


def test_nothing_went_wrong_unseen(server: Server) -> None:
    """What the pack should never say, after all of the above."""
    log = server.log()
    assert "lora key not loaded" not in log and "Inference tensors cannot be saved" not in log
